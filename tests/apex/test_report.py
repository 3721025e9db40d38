"""Reports: the numbers of the records, honest about what is missing, and safe to open whatever an agent wrote."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from agentsdpo.benchmarks.apex import start
from agentsdpo.benchmarks.apex.agents import Agent
from agentsdpo.benchmarks.apex.compare import NotComparable, compare_runs
from agentsdpo.benchmarks.apex.config import BenchConfig
from agentsdpo.benchmarks.apex.exports.saved import saved
from agentsdpo.benchmarks.apex.grading import regrade
from agentsdpo.benchmarks.apex.pages import visible
from agentsdpo.benchmarks.apex.references import play_references
from agentsdpo.benchmarks.apex.report import make_report, markdown
from agentsdpo.benchmarks.apex.runfolder import BenchFolder
from agentsdpo.benchmarks.apex.show import one_attempt, print_attempt
from agentsdpo.benchmarks.apex.summary import summarise
from agentsdpo.errors import RunError
from agentsdpo.types import Criterion, Grade, ModelTurn, Outcome, Task
from tests.apex.conftest import Adder, SumGrader, SumTasks, make

HOSTILE = ("<script>alert(1)</script><img src=x onerror=alert(2)></pre></body>\x1b[2J\x00\u202egnp.exe\u200b"
           '<tool_call>{"name": "submit"}</tool_call>{{ 7*7 }}{% raw %}" onmouseover="x" \ud800 | a | `b`')
NAME = HOSTILE.replace("\ud800", "")
INERT = {"html", "head", "meta", "title", "style", "body", "header", "main", "section", "h1", "h2", "h3", "p", "a", "b",
         "div", "span", "table", "thead", "tbody", "tr", "th", "td", "dl", "dt", "dd", "pre", "code", "details",
         "summary", "figure", "figcaption", "svg", "line", "circle", "text"}


class Page(HTMLParser):
    """Tags, attributes and links of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.policy = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        found = dict(attrs)
        if tag == "a":
            self.links.append(found["href"] or "")
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"] or ""


class Hostile(Adder):
    """Adds with hostile arguments, then says hostile things."""

    async def act(self, ctx, tools):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
        turn = await super().act(ctx, tools)
        return ModelTurn(text=HOSTILE, calls=tuple(c.model_copy(update={"name": HOSTILE}) for c in turn.calls)) \
            if ctx.turn == 1 else ModelTurn(text=HOSTILE.replace("<tool_call>", "<tool>")) if ctx.turn == 3 else turn


@pytest.fixture
def hostile(sums: SumTasks) -> SumTasks:
    rubric = (Criterion(id=NAME, text=NAME), Criterion(id="answer", text=NAME), Criterion(id="state", text=""))
    sums.tasks = tuple(Task(task_id=f"{i}{NAME}", world_id=NAME, domain=NAME, prompt=NAME, rubric=rubric,
                            metadata={"sum": "3"}) for i in range(2))
    return sums


def test_hostile_text_stays_text_everywhere(tmp_path: Path, hostile: SumTasks,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    bench = make(tmp_path / "r", concurrency=1, attempts=1)
    bench.player.agent = Agent(HOSTILE, "script", lambda task, seed: Hostile())
    hostile.break_at = {4}
    assert [record.scored for record in bench.play()] == [True, False]
    make_report(bench.folder)
    pages = [tmp_path / "r" / "report.html", *(tmp_path / "r").glob("episodes/*/*/episode.html")]
    assert len(pages) == 3
    for path in pages:
        text = path.read_text()
        page = Page(text)
        assert page.tags <= INERT, page.tags - INERT
        assert not [name for name in page.attributes if name.startswith("on")]
        assert page.policy.startswith("default-src 'none'")
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e]", text)
        assert "{{ 7*7 }}" in text
        for link in page.links:
            assert not link.startswith(("http", "javascript", "/")), link
            from urllib.parse import unquote
            assert (path.parent / unquote(link)).is_file(), link
    assert "‹U+202E›" in pages[1].read_text()
    report = (tmp_path / "r" / "report.md").read_text()
    assert "<script>" not in report
    assert "<tool_call>" not in report
    shown = one_attempt(bench.folder, hostile.tasks[0].task_id, 0)
    print_attempt(shown)
    out = capsys.readouterr().out
    assert "\x1b[2J" not in out
    assert "\u202e" not in out


def test_report_json_holds_the_numbers_of_the_records(tmp_path: Path, sums: SumTasks) -> None:
    bench = make(tmp_path / "r", "halfway", attempts=4, seed=1)  # with 0 both worlds have the same mean
    records = bench.play()
    found = make_report(bench.folder)
    assert json.loads((tmp_path / "r" / "report.json").read_text()) == found
    overall = found["overall"]
    assert overall["conditional"]["pass@1"]["value"] == pytest.approx(sum(bool(r.passed) for r in records) / 16)
    assert overall["conditional"]["mean_score"]["value"] == pytest.approx(sum(r.score or 0 for r in records) / 16)
    assert set(found["domains"]) == {"Law", "Consulting"}
    assert found["domains"]["Law"]["n_tasks"] == 2
    assert {"pass@4", "pass^4", "pass@2", "pass^2"} <= overall["conditional"].keys()
    assert found["spent"]["tool_calls"] == {"median": 3.0, "p90": 3.0}
    assert overall["conditional"]["pass@1"]["method"] == "cluster"
    assert found["n_missing"] == 0
    assert found["warnings"] == []


def test_a_run_that_was_stopped_says_what_is_missing(tmp_path: Path, sums: SumTasks) -> None:
    bench = make(tmp_path / "r", attempts=2)
    bench.play()
    path = tmp_path / "r" / "attempts.jsonl"
    lines = sorted(path.read_bytes().splitlines(keepends=True), key=lambda line: json.loads(line)["attempt"])
    path.write_bytes(b"".join(lines[:3]))  # attempts end in any order: these are the first of three tasks
    found = make_report(bench.folder)
    assert found["n_missing"] == 5
    assert "5 of 8 attempts were never made" in found["warnings"]
    assert found["overall"]["conditional"]["pass^2"]["value"] is None
    for column in ("conditional", "strict"):
        for name in ("pass@1", "mean_score"):
            one = found["overall"][column][name]
            assert (one["value"], one["partial"], one["n_tasks"], one["of_tasks"]) == (None, 1.0, 3, 4)
    assert "never made" in (tmp_path / "r" / "report.html").read_text()
    assert "null" in markdown(found)


def test_a_run_that_began_and_ended_meanwhile_is_not_overwritten(tmp_path: Path, sums: SumTasks,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(config: BenchConfig, taskset: SumTasks) -> Agent:
        BenchFolder(tmp_path).write_about({"run_id": "of another process"})
        return Agent("mine", "script", lambda task, seed: Adder())

    monkeypatch.setattr(start, "make_agent", slow)
    with pytest.raises(RunError, match="holds a benchmark run"):
        make(tmp_path)
    assert BenchFolder(tmp_path).about() == {"run_id": "of another process"}


def test_a_run_without_any_attempt_has_a_report_too(tmp_path: Path, sums: SumTasks) -> None:
    found = make_report(make(tmp_path / "r").folder)
    assert found["overall"]["conditional"]["pass@1"]["value"] is None
    assert (tmp_path / "r" / "report.html").is_file()


def test_references_stand_beside_the_numbers_and_are_left_out_where_a_judge_costs(tmp_path: Path,
                                                                                 sums: SumTasks) -> None:
    bench = make(tmp_path / "a")
    bench.play()
    assert set(play_references(bench)) == {"null", "oracle"}
    found = make_report(bench.folder)["references"]
    assert found["oracle"]["pass@1"]["value"] == 1.0
    assert found["null"]["pass@1"]["value"] == 0.0
    assert sums.graded == 8 + 8
    sums.judge = "openai/judge"
    assert play_references(make(tmp_path / "b")) == {}


def test_pages_of_episodes_are_made_anew_when_the_grade_changed(tmp_path: Path, sums: SumTasks) -> None:
    bench = make(tmp_path / "r")
    bench.play()
    make_report(bench.folder)
    page = bench.folder.episode("sum-0", 0) / "episode.html"
    before = page.stat().st_mtime_ns
    make_report(bench.folder)
    assert page.stat().st_mtime_ns == before
    grades = page.parent / "grades.json"
    grades.write_text(grades.read_text().replace("as told", "as told twice"))
    make_report(bench.folder)
    assert "as told twice" in page.read_text()


def test_what_is_shown_and_exported_is_the_grade_that_counts(tmp_path: Path, sums: SumTasks,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped grading has written its grades beside attempts that still count under the one before."""
    bench = make(tmp_path / "r", attempts=1)
    bench.play()

    class Strict(SumGrader):
        async def grade(self, task: Task, outcome: Outcome) -> Grade:
            graded = await super().grade(task, outcome)
            return Grade.of([result.model_copy(update={"score": 0.0}) for result in graded.results])

    def unfinished(folder: BenchFolder, gradings: Any) -> None:
        if any(grading["id"] and grading["finished"] for grading in gradings):
            raise OSError(28, "no space left")
        finish(folder, gradings)

    finish = BenchFolder.set_gradings
    monkeypatch.setattr(sums, "grader", lambda task: Strict(sums))
    monkeypatch.setattr(BenchFolder, "set_gradings", unfinished)
    with pytest.raises(OSError, match="no space"):
        regrade(tmp_path / "r")

    def told() -> list[list[float]]:
        make_report(bench.folder)
        page = (bench.folder.episode("sum-0", 0) / "episode.html").read_text()
        return [[r["score"] for r in one_attempt(bench.folder, "sum-0", 0)["grades"]["verifier_results"]],
                [r["score"] for r in next(iter(saved(bench.folder))).grades["verifier_results"]],  # type: ignore[index]
                [float(page.count("✓")), float(page.count("✗"))]]

    assert [record.score for record in bench.folder.records()] == [1.0] * 4
    assert told() == [[1.0, 1.0], [1.0, 1.0], [2.0, 0.0]]
    monkeypatch.setattr(BenchFolder, "set_gradings", finish)
    assert [record.score for record in regrade(tmp_path / "r")] == [0.0] * 4
    assert told() == [[0.0, 0.0], [0.0, 0.0], [0.0, 2.0]]


# ------------------------------------------------------------------------------------------------ comparison


def test_runs_made_alike_are_compared_on_their_tasks(tmp_path: Path, sums: SumTasks) -> None:
    a, b = make(tmp_path / "a"), make(tmp_path / "b", "halfway")
    a.play()
    b.play()
    found = compare_runs(a.folder, b.folder)
    assert found["differences"] == []
    assert found["tasks_changed"] == found["prompts_differ"] == []
    assert found["pass@1"]["n"] == 4
    rate = sum(bool(record.passed) for record in b.folder.records()) / 8
    assert found["pass@1"]["estimate"] == pytest.approx(1 - rate)
    run = make_report(a.folder, b.folder)
    assert run["comparison"] == found
    assert "Comparison" in (tmp_path / "a" / "report.html").read_text()
    assert "minus" in (tmp_path / "a" / "report.md").read_text()


@pytest.mark.parametrize(("change", "key"), [
    ({"budget": {"turns": 9}}, "budgets.sha256"), ({"profile": "apex_v1_1"}, "profile.name"),
    ({"announce": "start"}, "budgets.sha256")])
def test_runs_under_other_conditions_are_refused_and_the_condition_is_named(
        tmp_path: Path, sums: SumTasks, change: dict[str, object], key: str) -> None:
    a, b = make(tmp_path / "a"), make(tmp_path / "b", **change)  # type: ignore[arg-type]
    a.play()
    b.play()
    with pytest.raises(NotComparable, match=re.escape(key)):
        compare_runs(a.folder, b.folder)
    assert key in [one["key"] for one in compare_runs(a.folder, b.folder, force=True)["differences"]]


def test_other_tasks_and_other_judges_are_refused(tmp_path: Path, sums: SumTasks) -> None:
    a = make(tmp_path / "a")
    a.play()
    sums.judge = "openai/other"
    b = make(tmp_path / "b")
    b.play()
    with pytest.raises(NotComparable, match=r"judge\.model is None in a and 'openai/other' in b"):
        compare_runs(a.folder, b.folder)
    sums.judge, sums.sha256 = None, "f" * 64
    c = make(tmp_path / "c")
    c.play()
    with pytest.raises(NotComparable, match=r"dataset\.sha256"):
        compare_runs(a.folder, c.folder)


def test_a_regraded_run_is_compared_under_its_new_judge(tmp_path: Path, sums: SumTasks) -> None:
    from agentsdpo.benchmarks.apex.grading import regrade

    a = make(tmp_path / "a")
    a.play()
    sums.judge = "openai/other"
    b = make(tmp_path / "b")
    b.play()
    regrade(tmp_path / "a")
    assert compare_runs(a.folder, b.folder)["differences"] == []
    assert summarise(a.folder)["grading"]["judge"]["model"] == "openai/other"


@pytest.mark.parametrize(("text", "shown"), [("plain\n\ttext", "plain\n\ttext"), ("\x07", "‹U+0007›"), (None, ""),
                                             ("\ud800", "‹U+D800›"), ("a\u2066b", "a‹U+2066›b")])
def test_hidden_characters_are_spelt_out(text: object, shown: str) -> None:
    assert visible(text) == shown
