"""Verdicts that come out wrong although judge and agent are honest: what is shown, what is asked, what is kept."""

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest

from agentsdpo.benchmarks.apex.evidence import gather
from agentsdpo.benchmarks.apex.judge import RubricGrader
from agentsdpo.benchmarks.apex.report import make_report
from agentsdpo.collect.hosted import HostedConfig, HostedModel
from agentsdpo.types import Criterion, CriterionResult, Grade, Json, Outcome
from tests.apex.conftest import SumTasks, make
from tests.apex.test_judge import GOOD, RUBRIC, TASK, captured, grade, honest, read, verdict, zipped


def test_what_apps_keep_takes_no_room_from_the_files() -> None:
    apps = {f".apps_data/db/{i:02}.json": b"y" * 50_000 for i in range(12)}
    changes = gather(Outcome(answer="done", initial=zipped({}), final=zipped(
        {**apps, "filesystem/report.txt": b"Revenue was 512 million"}))).changes
    assert [change.path for change in changes] == [*apps, "report.txt"]
    assert changes[-1].text == "Revenue was 512 million"
    assert changes[-2].text == "[50000 bytes left out]", "a judge must not take it for an empty file"


def test_to_have_changed_nothing_may_be_what_is_asked_for() -> None:
    task = TASK.model_copy(update={"rubric": (
        RUBRIC[0], Criterion(id="n", text="No file was changed", target="files", negative=True))})

    def strict(criterion: Json, work: Json, last: str) -> str:
        if "No file" in criterion["criterion"]:
            return verdict(criterion, not work["files"])
        return honest(criterion, work, last)
    assert grade(strict, GOOD, task=task).passed
    assert [r.score for r in grade(strict, GOOD, task=task, files={"filesystem/a": b"x"}).results] == [1.0, 0.0]
    assert [r.score for r in grade(captured, ":", task=task).results] == [0.0, 0.0], "nobody is asked about silence"


def test_kept_rubbish_is_asked_about_again(chat_server: Any, tmp_path: Path) -> None:
    """Else an attempt whose judge once babbled could be resumed for ever and never be scored."""
    rubbish = True

    def say(body: Json) -> Any:
        return chat_server.say("Well..." if rubbish else honest(*read(body["messages"][1]["content"]), ""))
    chat_server.answer = say
    outcome = Outcome(answer=GOOD, initial=zipped({}), final=zipped({}))

    async def once() -> Grade:
        model = HostedModel(HostedConfig(model="openai/j", api_base=chat_server.url, cache=tmp_path, retries=0))
        try:
            return await RubricGrader(model).grade(TASK, outcome)
        finally:
            await model.aclose()
    first = asyncio.run(once())
    assert (first.passed, len(chat_server.seen)) == (None, 9)
    assert first.results[0].rationale.startswith("the judge gave no readable verdict in 3 replies")
    rubbish = False
    assert asyncio.run(once()).passed
    assert len(chat_server.seen) == 12
    assert asyncio.run(once()).passed
    assert len(chat_server.seen) == 12, "what could be read is kept"


@pytest.mark.parametrize(("given", "said"), [
    (math.nan, "ValueError: Gives gave the mean score nan"), (5.0, "ValueError: sum has score 5.0, not 0 to 1"),
    (-1.0, "ValueError: sum has score -1.0, not 0 to 1"), ({"mean": 1.0}, "TypeError: Gives gave dict, not a Grade"),
    (None, "TypeError: Gives gave NoneType, not a Grade"),
    (Grade(results=(), mean=1.0, passed=True), "the grade is empty")])
def test_what_is_no_grade_leaves_an_attempt_unscored(tmp_path: Path, sums: SumTasks, monkeypatch: pytest.MonkeyPatch,
                                                     given: Any, said: str) -> None:
    class Gives:
        async def grade(self, task: Any, outcome: Any) -> Any:
            score = isinstance(given, float)
            return Grade.of([CriterionResult(id="sum", score=given)]) if score else given

    monkeypatch.setattr(sums, "grader", lambda task: Gives())
    bench = make(tmp_path / "r", attempts=1)
    assert {(one.outcome, one.message) for one in bench.play()} == {("judge_error", said)}
    assert make_report(bench.folder)["overall"]["conditional"]["mean_score"]["partial"] is None
