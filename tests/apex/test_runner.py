"""Playing a benchmark: faults are unscored and retried, never zeros; what is finished is never done twice."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentsdpo.benchmarks.apex import branchfile, episode
from agentsdpo.benchmarks.apex.agents import NULLS, Agent
from agentsdpo.benchmarks.apex.config import BenchConfig, load
from agentsdpo.benchmarks.apex.grading import regrade
from agentsdpo.benchmarks.apex.records import Attempt
from agentsdpo.benchmarks.apex.report import make_report
from agentsdpo.benchmarks.apex.runfolder import BenchFolder, RunNotFound
from agentsdpo.benchmarks.apex.start import reopen, start
from agentsdpo.benchmarks.apex.summary import summarise
from agentsdpo.benchmarks.apex.taskset import check_tasks
from agentsdpo.collect.episode_log import read_events
from agentsdpo.errors import ConfigError, FormatError, RunError
from tests.apex.conftest import Adder, Provider, SumTasks, make

DESK = {"suite": "desk-mini", "tasks": 3, "attempts": 2}


def deterministic(records: list[Attempt]) -> list[dict[str, object]]:
    """Records without what a clock wrote."""
    return [record.model_dump(exclude={"wall_s", "working_s"}) for record in records]


# ---------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("preset", ["desk-mini", "desk"])
def test_the_oracle_passes_everything(tmp_path: Path, preset: str) -> None:
    records = start(load(None, {"suite": preset, "model": "oracle", "tasks": 5, "attempts": 1}), tmp_path / "r").play()
    assert [record.passed for record in records] == [True] * 5
    assert {record.outcome for record in records} == {"completed"}


@pytest.mark.parametrize("agent", [*NULLS, "scattergun"])
def test_agents_that_do_no_work_pass_nothing(tmp_path: Path, agent: str) -> None:
    records = start(load(None, {**DESK, "model": agent, "attempts": 1}), tmp_path / "r").play()
    assert [record.scored for record in records] == [True] * 3
    assert not any(record.passed for record in records)


def test_run_folder_has_every_file_of_the_specification(tmp_path: Path) -> None:
    bench = start(load(None, {**DESK, "model": "seed", "tasks": 1, "attempts": 1}), tmp_path / "r")
    record = bench.play()[0]
    names = {path.name for path in bench.folder.episode(record.task_id, 0).iterdir()}
    assert names == {"initial_messages.json", "agent_config.json", "trajectory.json", "final_snapshot.zip",
                     "verifiers.json", "eval_configs.json", "scoring_config.json", "grading_settings.json",
                     "grades.json", "events.jsonl", "branches.npz", "checkpoints"}
    about = bench.folder.about()
    assert about["benchmark"] == "desk-mini@1"
    assert about["judge"] == {"model": None, "prompt_sha256": None}
    assert about["train_allowed"] is False
    assert {"sha256", "given"} <= about["budgets"].keys()
    assert about["agent"]["chat_template_sha256"]
    line = json.loads((tmp_path / "r" / "attempts.jsonl").read_text())
    for key in ("task_id", "world_id", "domain", "attempt", "seed", "outcome", "scored", "passed", "score", "criteria",
                "turns", "tool_calls", "calls_refused", "tool_errors", "longest_repeat", "compactions", "branches",
                "prompt_tokens", "completion_tokens", "wall_s", "working_s", "policy_version", "task_sha256",
                "episode_sha256"):
        assert key in line, key
    assert {event["type"] for event in read_events(bench.folder.episode(record.task_id, 0))} >= {"start", "final"}


def test_the_rubric_is_nowhere_in_what_the_agent_and_the_environment_saw(tmp_path: Path) -> None:
    bench = start(load(None, {**DESK, "model": "random"}), tmp_path / "r")
    bench.play()
    for task in bench.taskset.tasks:
        for number in range(2):
            place = bench.folder.episode(task.task_id, number)
            seen = (place / "events.jsonl").read_text() + (place / "initial_messages.json").read_text()
            assert not [c.text for c in task.rubric if c.text in seen]


def test_an_existing_run_is_not_overwritten(tmp_path: Path, sums: SumTasks) -> None:
    make(tmp_path / "r")
    with pytest.raises(RunError, match="bench resume"):
        make(tmp_path / "r")


def test_scores_are_weighted_and_passes_are_not(tmp_path: Path, sums: SumTasks) -> None:
    records = make(tmp_path / "r", "halfway", attempts=8).play()
    wrong = [record for record in records if record.criteria == {"answer": 0.0, "state": 1.0}]
    assert wrong
    assert {record.score for record in wrong} == {0.75}
    assert not any(record.passed for record in wrong)


# ----------------------------------------------------------------------------------------------------- faults


def test_a_broken_environment_is_retried_and_never_a_zero(tmp_path: Path, sums: SumTasks) -> None:
    sums.break_at = {2, 5}
    bench = make(tmp_path / "r", retries=2, concurrency=1)
    records = bench.play()
    assert [record.passed for record in records] == [True] * 8
    failures = bench.folder.failures()
    assert {failure.outcome for failure in failures} == {"env_error"}
    assert "the machine is gone" in failures[0].message
    assert failures[0].score is None
    assert sums.closed == 8 + len(failures)


def test_what_stays_broken_is_unscored_and_resume_tries_it_again(tmp_path: Path, sums: SumTasks) -> None:
    sums.break_at = set(range(1, 4))
    bench = make(tmp_path / "r", concurrency=1)
    first = bench.play()
    lost = [record for record in first if not record.scored]
    assert 1 <= len(lost) <= 3
    assert summarise(bench.folder)["overall"]["conditional"]["pass@1"]["partial"] == 1.0
    assert summarise(bench.folder)["warnings"]
    strict = summarise(bench.folder)["overall"]["strict"]["pass@1"]["partial"]
    assert strict == pytest.approx(1 - len(lost) / 8)
    again = reopen(tmp_path / "r").play()
    assert [record.passed for record in again] == [True] * 8
    assert summarise(bench.folder)["warnings"] == []


def test_an_environment_that_breaks_on_resume_is_played_from_the_start(tmp_path: Path, sums: SumTasks) -> None:
    sums.break_at = {1, 2}
    bench = make(tmp_path / "r", retries=3, concurrency=1, tasks=None)
    records = bench.play()
    assert all(record.passed for record in records)


def test_a_provider_that_fails_goes_on_inside_the_episode(tmp_path: Path, sums: SumTasks) -> None:
    bench = make(tmp_path / "r", concurrency=1, attempts=1)
    policy = Provider({3, 9})
    bench.player.agent = replace(bench.agent, policy=lambda task, seed: policy)
    first = bench.play()
    assert sorted({record.outcome for record in first}) == ["completed", "provider_error"]
    calls = sums.calls
    bench.play()
    assert all(record.passed for record in bench.folder.records())
    assert sums.calls - calls <= 2 * 3, "finished turns were not asked for again"


def test_a_judge_that_breaks_leaves_the_attempt_unscored_and_only_its_grade_is_made_again(
        tmp_path: Path, sums: SumTasks) -> None:
    sums.judge_breaks = {1, 2}
    bench = make(tmp_path / "r", concurrency=1)
    first = bench.play()
    lost = [record for record in first if not record.scored]
    assert [(record.outcome, record.ended, record.score) for record in lost] == [("judge_error", "completed", None)] * 2
    assert "no verdict" in lost[0].message
    conditional = summarise(bench.folder)["overall"]["conditional"]["pass@1"]
    assert conditional["partial"] == 1.0
    calls = sums.calls
    again = reopen(tmp_path / "r").play()
    assert sums.calls == calls, "an episode was played again"
    assert [(record.outcome, record.passed) for record in again] == [("completed", True)] * 8


def test_an_environment_that_cannot_be_made_is_unscored(tmp_path: Path, sums: SumTasks,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(task: object) -> None:
        raise OSError("no container runtime")

    monkeypatch.setattr(sums, "env", refuse)
    records = make(tmp_path / "r").play()
    assert {(record.outcome, record.error_class, record.scored) for record in records} == {
        ("env_error", "OSError", False)}


def test_a_wrong_set_up_stops_the_run(tmp_path: Path, sums: SumTasks, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(task: object) -> None:
        raise ConfigError("no such world", fix="name another")

    monkeypatch.setattr(sums, "env", refuse)
    with pytest.raises(ConfigError, match="no such world"):
        make(tmp_path / "r").play()


# ----------------------------------------------------------------------------------------------------- resume


def test_finished_attempts_are_not_played_again(tmp_path: Path, sums: SumTasks) -> None:
    make(tmp_path / "r").play()
    calls = sums.calls
    assert len(reopen(tmp_path / "r").play()) == 8
    assert sums.calls == calls


def test_a_torn_last_line_is_ignored_and_its_attempt_played_again(tmp_path: Path, sums: SumTasks) -> None:
    before = deterministic(make(tmp_path / "r").play())
    path = tmp_path / "r" / "attempts.jsonl"
    whole = path.read_bytes()
    for cut in (1, 7, 150, 400):
        path.write_bytes(whole[:-cut])
        assert deterministic(reopen(tmp_path / "r").play()) == before
        assert len(path.read_bytes().splitlines()) == 8


def test_a_damaged_line_inside_is_an_error_that_names_it(tmp_path: Path, sums: SumTasks) -> None:
    make(tmp_path / "r").play()
    path = tmp_path / "r" / "attempts.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], b'{"task_id": 3', *lines[1:]]) + b"\n")
    with pytest.raises(RunError, match="line 2 of"):
        BenchFolder(tmp_path / "r").records()


def test_tasks_that_changed_refuse_a_resume(tmp_path: Path, sums: SumTasks) -> None:
    make(tmp_path / "r").play()
    sums.sha256 = "0" * 64
    with pytest.raises(RunError, match="put the old files back"):
        reopen(tmp_path / "r")
    with pytest.raises(RunNotFound):
        reopen(tmp_path / "nowhere")


CHILD = """
import os, sys
from agentsdpo.benchmarks.apex.config import load
from agentsdpo.benchmarks.apex.start import start, reopen
import agentsdpo.collect.episode_log as log
out, at = sys.argv[1], int(sys.argv[2])
written, plain = [0], log.EpisodeLog.write
def dies(self, *args):
    plain(self, *args)
    written[0] += 1
    if written[0] == at:
        os.kill(os.getpid(), 9)
log.EpisodeLog.write = dies
bench = reopen(out) if os.path.exists(out + "/run.json") else start(load(None, dict(
    suite="desk", model="oracle", tasks=2, attempts=1, concurrency=2)), out)
bench.play()
"""


@pytest.mark.slow
def test_killed_again_and_again_a_run_comes_to_the_same_end(tmp_path: Path) -> None:
    settings = {"suite": "desk", "model": "oracle", "tasks": 2, "attempts": 1, "concurrency": 2}
    wanted = deterministic(start(load(None, settings), tmp_path / "whole").play())
    out = tmp_path / "run"  # another name is another run, with other ids of episodes, which no hash may depend on
    for _ in range(12):
        done = subprocess.run([sys.executable, "-c", CHILD, str(out), "6"], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.returncode == 0, "it never came to its end"
    assert deterministic(BenchFolder(out).records()) == wanted


# ----------------------------------------------------------------------------------------------------- grades


def test_grading_again_plays_nothing_and_keeps_the_old_grades(tmp_path: Path, sums: SumTasks) -> None:
    bench = make(tmp_path / "r", "halfway")
    before = deterministic(bench.play())
    calls, sums.judge = sums.calls, "openai/other-judge"
    told: list[int] = []
    after = regrade(tmp_path / "r", told=lambda attempt, done, total: told.append(done))
    assert sums.calls == calls
    assert deterministic(after) == [record | {"grading": 1} for record in before]
    assert len(told) == 8
    assert bench.folder.grading()["judge"]["model"] == "openai/other-judge"
    assert deterministic(bench.folder.records(0)) == before
    place = bench.folder.episode("sum-0", 0)
    assert json.loads((place / "grades-0.json").read_text())["x_agentsdpo"]["grading"] == 0
    assert json.loads((place / "grades.json").read_text())["x_agentsdpo"]["grading"] == 1


def test_a_grading_that_was_stopped_does_not_count_yet_and_goes_on(tmp_path: Path, sums: SumTasks,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make(tmp_path / "r", concurrency=1)
    bench.play()
    written = [0]

    def full(*args: Any) -> None:
        written[0] += 1
        if written[0] > 3:
            raise OSError(28, "no space left")
        plain(*args)

    plain = episode.write_grade
    monkeypatch.setattr(episode, "write_grade", full)
    with pytest.raises(OSError, match="no space"):
        regrade(tmp_path / "r")
    assert bench.folder.grading()["id"] == 0
    monkeypatch.setattr(episode, "write_grade", plain)
    graded = sums.graded
    assert len(regrade(tmp_path / "r")) == 8
    assert sums.graded - graded == 5
    assert bench.folder.grading()["id"] == 1


def test_a_new_judge_that_breaks_leaves_attempts_unscored_under_it_alone(tmp_path: Path, sums: SumTasks) -> None:
    bench = make(tmp_path / "r", concurrency=1)
    bench.play()
    sums.judge_breaks = {sums.graded + 1}
    after = regrade(tmp_path / "r")
    assert sum(record.scored for record in after) == 7
    assert sum(record.scored for record in bench.folder.records(0)) == 8
    assert all(record.scored for record in reopen(tmp_path / "r").play())


def test_outcomes_come_back_from_their_files_as_they_were(tmp_path: Path) -> None:
    bench = start(load(None, {**DESK, "suite": "desk", "model": "oracle", "attempts": 1}), tmp_path / "r")
    for record in bench.play():
        task = next(task for task in bench.taskset.tasks if task.task_id == record.task_id)
        outcome = episode.read_outcome(bench.folder, record)
        grade = bench.taskset.suite.grader().judge(task, outcome)  # type: ignore[attr-defined]
        assert grade.passed
        assert outcome.calls
    with pytest.raises(RunNotFound):
        episode.read_outcome(bench.folder, record.model_copy(update={"attempt": 99}))


# ------------------------------------------------------------------------------------------------------ files


def test_branches_come_back_to_the_bit(tmp_path: Path) -> None:
    settings = load(None, {**DESK, "model": "seed", "tasks": 1, "attempts": 1}, ["sampling.top_k=5"])
    bench = start(settings, tmp_path / "r")
    record = bench.play()[0]
    path = bench.folder.episode(record.task_id, 0) / "branches.npz"
    branches = branchfile.read(path)
    assert len(branches) == record.branches == 1
    assert branches[0].kept_ids is not None
    assert branchfile.pack(branches, train_allowed=False) == path.read_bytes()
    with np.load(path, allow_pickle=False) as data:
        assert not data["train_allowed"]
    again = branchfile.read(path)[0]
    for name in ("token_ids", "token_kind", "logprobs", "kept_ids", "kept_counts"):
        assert getattr(again, name).tobytes() == getattr(branches[0], name).tobytes()
    assert again.calls == branches[0].calls
    assert branchfile.read(tmp_path / "none.npz") == ()


def test_no_task_id_leaves_the_run_folder(tmp_path: Path) -> None:
    folder = BenchFolder(tmp_path)
    for name in ("../../up", "/etc/passwd", "a/b", "..", "con\x00", "x" * 999, "ünï", "-rf", "\ud800"):
        place = folder.episode(name, 0)
        assert place.resolve().parent.parent == (tmp_path / "episodes").resolve(), name
        place.mkdir(parents=True)
    assert len(list((tmp_path / "episodes").iterdir())) == 9


def test_the_same_run_twice_is_the_same(tmp_path: Path) -> None:
    settings = {**DESK, "model": "random"}
    first, second = (deterministic(start(load(None, settings), tmp_path / name).play()) for name in ("a", "b"))
    assert first == second


def test_settings_that_make_no_sense_say_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean attempts"):
        load(None, {}, ["attemps=3"])
    with pytest.raises(ConfigError, match="there is no suite"):
        start(BenchConfig(suite="nothing-here"), tmp_path / "r")
    with pytest.raises(ConfigError, match="oracle"):
        start(BenchConfig(model="no-such-agent", engine="script"), tmp_path / "r")
    with pytest.raises(ConfigError, match="url is empty"):
        start(BenchConfig(engine="vllm"), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_budgets_of_a_configuration_hold(tmp_path: Path) -> None:
    bench = start(load(None, {**DESK, "model": "oracle", "attempts": 1}, ["budget.tool_calls=2"]), tmp_path / "r")
    records = bench.play()
    assert {(record.outcome, record.passed, record.scored) for record in records} == {("budget_calls", False, True)}


def test_an_agent_can_be_anybody(tmp_path: Path, sums: SumTasks) -> None:
    bench = make(tmp_path / "r")
    bench.player.agent = Agent("mine", "script", lambda task, seed: Adder(right=False))
    assert not any(record.passed for record in bench.play())
    assert make_report(bench.folder)["overall"]["conditional"]["pass@1"]["value"] == 0.0
    assert os.listdir(tmp_path / "r" / "initial") == [f"{episode.sha256(b'0').hexdigest()}.zip"]


@pytest.mark.parametrize(("change", "says"), [
    ({"rubric": ()}, "has no rubric"), ({"prompt": "a\ud800"}, "is no text"), ({"task_id": "sum-1"}, "more than once")])
def test_tasks_that_cannot_be_scored_honestly_are_refused(change: dict[str, Any], says: str) -> None:
    tasks = list(SumTasks().tasks)
    with pytest.raises(FormatError, match=says):
        check_tasks([tasks[0].model_copy(update=change), *tasks[1:]], "mine.jsonl")
