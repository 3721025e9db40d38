"""Attempts of other tools as runs: nothing that was said is lost, grades come along, nothing of it is trained on."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from atif import Trajectory

from agentsdpo.benchmarks.apex.checks import check
from agentsdpo.benchmarks.apex.compare import AGREE, NotComparable, compare_runs
from agentsdpo.benchmarks.apex.config import BenchConfig
from agentsdpo.benchmarks.apex.exports import export_run
from agentsdpo.benchmarks.apex.grading import regrade
from agentsdpo.benchmarks.apex.imports import import_run
from agentsdpo.benchmarks.apex.report import make_report, markdown
from agentsdpo.benchmarks.apex.runfolder import BenchFolder
from agentsdpo.benchmarks.apex.show import one_attempt, print_attempt
from agentsdpo.benchmarks.apex.start import reopen, start
from agentsdpo.envs.archives import UnsafeArchive, UnsafePath
from agentsdpo.errors import AgentSdpoError, ConfigError, FormatError, RunError, TrainForbidden
from agentsdpo.types import Json, Outcome, Task
from tests.replay.test_formats_dump import counts, opening, run

SAID = [{"role": "system", "content": "Work."}, {"role": "user", "content": "Revenue?"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "mail", "arguments": '{"to": "x"'}},
            {"id": "b", "type": "function", "function": {"name": "final_answer", "arguments": '{"answer": "512"}'}}]},
        {"role": "tool", "tool_call_id": "a", "name": "mail", "content": "bad \ud800 arguments"},
        {"role": "tool", "tool_call_id": "b", "name": "final_answer", "content": "thanks"}]


@check
def says_512(task: Task, outcome: Outcome) -> bool:
    """A criterion; the calls are those of the trajectory."""
    return outcome.answer == "512" and [call.name for call, _ in outcome.calls] == ["mail", "final_answer"]


def written(folder: Path, **files: Any) -> Path:
    """A trajectory's folder with what stands beside it."""
    folder.mkdir(parents=True)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def messages(folder: BenchFolder, place: tuple[str, int]) -> list[Json]:
    files = [json.loads((folder.episode(*place) / f"{name}.json").read_text())
             for name in ("initial_messages", "trajectory")]
    return [*files[0], *files[1]["messages"]]


def within(theirs: Any, kept: Any) -> bool:
    """Whether all that was there is there still; keys may have been added."""
    if isinstance(theirs, dict):
        return all(name in kept and within(value, kept[name]) for name, value in theirs.items())
    if isinstance(theirs, list):
        return len(theirs) == len(kept) and all(map(within, theirs, kept))
    return theirs == kept


# ---------------------------------------------------------------------------------------------- archipelago


@pytest.mark.parametrize("size", [8, pytest.param(146, marks=pytest.mark.slow)])
def test_a_dump_comes_in_whole(tmp_path: Path, size: int) -> None:
    """Runs of APEX's shape, up to 1,804 calls: every message and every key of every run."""
    runs = [run(number, calls) for number, calls in enumerate(sorted(counts(), reverse=True)[:size])]
    for number, said in enumerate(runs):
        written(tmp_path / "dump" / str(number), trajectory=said, initial_messages=opening(number))
    made = import_run(tmp_path / "dump", "apex", tmp_path / "run")
    assert (made["attempts"], made["lost"]) == (size, {})
    assert made["messages"] == sum(len(said["messages"]) + 2 for said in runs)
    folder = BenchFolder(tmp_path / "run")
    wanted = {said["trajectory_id"]: (opening(number) + said["messages"], said) for number, said in enumerate(runs)}
    for record in folder.records():
        place = folder.episode(*record.place)
        kept = json.loads((place / "trajectory.json").read_text())
        whole, said = wanted.pop(kept["trajectory_id"])
        assert messages(folder, record.place) == whole
        assert within({name: value for name, value in said.items() if name != "messages"}, kept)
        assert record.tool_calls == sum(len(m.get("tool_calls") or ()) for m in said["messages"])
        assert (record.scored, record.outcome, record.ended) == (
            False, "judge_error", "completed" if said["status"] == "completed" else "budget_turns")
    assert not wanted
    assert folder.about()["train_allowed"] is False
    make_report(folder)
    assert max(record.tool_calls for record in folder.records()) == 1804


def test_grades_and_snapshots_come_along(tmp_path: Path) -> None:
    verifiers = [{"verifier_id": "v1", "task_id": "t1", "world_id": "w1", "verifier_values": {
        "criteria": "States 512", "is_primary_objective": True}, "extra": 1}, {"verifier_id": "v2"}]
    grades = {"grading_run_id": "gr_1", "new": 2, "scoring_results": {"final_score": 0.5}, "verifier_results": [
        {"verifier_id": "v1", "score": 1.0, "verifier_result_values": {"grade_rationale": "it does"}},
        {"verifier_id": "v2", "score": 0.0, "status": "ok", "verifier_result_values": {"grade_rationale": "no"}}]}
    place = written(tmp_path / "dump" / "x", trajectory={"messages": SAID, "status": "completed"}, verifiers=verifiers,
                    grades=grades, grading_settings={"llm_judge_model": "some/judge"})
    for name in ("initial_snapshot", "final_snapshot"):
        with zipfile.ZipFile(place / f"{name}.zip", "w") as archive:
            archive.writestr("filesystem/memo.md", name)
    import_run(tmp_path / "dump", "apex", tmp_path / "run")
    folder = BenchFolder(tmp_path / "run")
    (record,) = folder.records()
    assert (record.place, record.world_id, record.scored, record.passed, record.score) == (
        ("t1", 0), "w1", True, False, 0.5)
    assert record.criteria == {"v1": 1.0, "v2": 0.0}
    assert folder.about()["judge"]["model"] == "some/judge"
    there = folder.episode("t1", 0)
    for name, value in (("grades", grades), ("verifiers", verifiers)):
        assert within(value, json.loads((there / f"{name}.json").read_text()))
    assert (there / "final_snapshot.zip").read_bytes() == (place / "final_snapshot.zip").read_bytes()
    run = make_report(folder)
    assert run["overall"]["conditional"]["mean_score"]["value"] == 0.5
    assert "it does" in (there / "episode.html").read_text()


def test_a_criterion_nobody_could_judge_leaves_the_attempt_unscored(tmp_path: Path) -> None:
    written(tmp_path / "dump", trajectory={"messages": SAID, "task_id": "t"}, grades={"verifier_results": [
        {"verifier_id": "v1", "score": 1.0}, {"verifier_id": "v2", "score": None, "status": "error", "message": "no"}]})
    import_run(tmp_path / "dump", "apex", tmp_path / "run")
    (record,) = BenchFolder(tmp_path / "run").records()
    assert (record.scored, record.outcome, record.message) == (False, "judge_error", "v2: error: no")


def test_an_import_claims_no_settings_that_nobody_stated(tmp_path: Path, played: BenchFolder) -> None:
    import_run(export_run(played, "archipelago"), "apex", tmp_path / "back", BenchConfig())
    with pytest.raises(NotComparable) as caught:
        compare_runs(BenchFolder(tmp_path / "back"), played)
    assert [name for name in AGREE if f"{name} is" in str(caught.value)] == [
        "profile.name", "budgets.sha256", "judge.model"]
    said = markdown(make_report(BenchFolder(tmp_path / "back")))
    assert "profile unknown, budgets unknown, judge unknown, seed unknown" in said


def test_what_never_came_to_its_end_has_no_score(tmp_path: Path) -> None:
    written(tmp_path / "dump", trajectory={"messages": SAID, "status": "running"},
            grades={"verifier_results": [{"verifier_id": "v1", "score": 1.0}]})
    import_run(tmp_path / "dump", "apex", tmp_path / "run")
    (record,) = BenchFolder(tmp_path / "run").records()
    assert (record.scored, record.outcome, record.message) == (False, "cancelled", "status running")


def test_imported_answers_are_graded_by_their_benchmark(tmp_path: Path) -> None:
    tasks = tmp_path / "mine.toml"
    tasks.write_text('[[task]]\nid = "q3"\nprompt = "Revenue?"\nrubric = [\n'
                     f'  {{id = "sum", text = "512", check = "{__name__}:says_512"}}]\n')
    lines = tmp_path / "dump.jsonl"
    lines.write_text("\n".join(json.dumps({"messages": said, "task_id": "q3"}) for said in (
        SAID, [*SAID[:2], {"role": "assistant", "content": "498"}])))
    out = tmp_path / "run"
    made = import_run(lines, "apex", out, BenchConfig(suite=str(tasks)))
    assert (made["attempts"], made["scored"]) == (2, 0)
    assert [record.passed for record in regrade(out)] == [True, False]
    with pytest.raises(RunError, match="nothing of it can be played; grade it"):
        reopen(out)
    import_run(lines, "apex", tmp_path / "bare")
    with pytest.raises(RunError, match="imported without its benchmark"):
        regrade(tmp_path / "bare")


# ------------------------------------------------------------------------------------------- other formats


@pytest.fixture
def played(tmp_path: Path) -> BenchFolder:
    """A run of our own."""
    bench = start(BenchConfig(model="guesser", tasks=3, attempts=2), tmp_path / "own")
    bench.play()
    return bench.folder


def scores(folder: BenchFolder) -> list[tuple[Any, ...]]:
    return [(*r.place, r.outcome, r.scored, r.passed, r.score, r.criteria, r.turns, r.tool_calls)
            for r in folder.records()]


def test_archipelago_files_of_ours_come_back(played: BenchFolder, tmp_path: Path) -> None:
    made = import_run(export_run(played, "archipelago"), "apex", tmp_path / "back")
    assert made["scored"] == 6
    back = BenchFolder(tmp_path / "back")
    assert scores(back) == scores(played)
    with pytest.raises(TrainForbidden):
        export_run(back, "verifiers")


def test_inspect_logs_of_ours_come_back(played: BenchFolder, tmp_path: Path) -> None:
    import_run(export_run(played, "inspect"), "inspect", tmp_path / "back")
    back = BenchFolder(tmp_path / "back")
    assert [row[:7] for row in scores(back)] == [row[:7] for row in scores(played)]
    for record in played.records():
        assert [m["role"] for m in messages(back, record.place)] == [m["role"] for m in messages(played, record.place)]
        calls = [[call["function"]["arguments"] for m in messages(folder, record.place)
                  for call in m.get("tool_calls", ())] for folder in (played, back)]
        assert [json.loads(text) for text in calls[0]] == [json.loads(text) for text in calls[1]]


def test_inspect_scores_limits_and_errors(tmp_path: Path) -> None:
    said = {"version": 2, "eval": {"model": "m"}, "samples": [
        {"id": 1, "epoch": 1, "messages": SAID[:2], "scores": {"match": {"value": "C"}, "f1": {"value": 0.5}}},
        {"id": 1, "epoch": 2, "messages": SAID[:2], "limit": {"type": "token", "limit": 5},
         "scores": {"all": {"value": {"a": True, "b": 0}}, "match": {"value": "I"}}},
        {"id": 2, "epoch": 1, "messages": [], "error": {"message": "gone"}, "scores": {"match": {"value": "C"}}},
        {"id": 3, "epoch": 1, "messages": [], "scores": {"odd": {"value": [1]}}}]}
    (tmp_path / "log.json").write_text(json.dumps(said))
    import_run(tmp_path / "log.json", "inspect", tmp_path / "run")
    found = {r.place: (r.outcome, r.scored, r.criteria, r.message) for r in BenchFolder(tmp_path / "run").records()}
    assert found[("1", 0)] == ("completed", True, {"match": 1.0, "f1": 0.5}, "")
    assert found[("1", 1)] == ("budget_tokens", True, {"a": 1.0, "b": 0.0}, "")
    assert found[("2", 0)] == ("env_error", False, None, "gone")
    assert found[("3", 0)] == ("judge_error", False, None, "odd: error: [1] is no score from 0 to 1")


def test_atif_comes_in(played: BenchFolder, tmp_path: Path) -> None:
    path = export_run(played, "atif")
    made = import_run(path, "atif", tmp_path / "back")
    assert made["attempts"] == 6
    back = BenchFolder(tmp_path / "back")
    assert [row[3:7] for row in scores(back)] == [row[3:7] for row in scores(played)]


def trial(folder: Path, **more: Any) -> None:
    """A trial as Harbor leaves it."""
    steps = [{"step_id": 1, "source": "user", "message": "Revenue?"},
             {"step_id": 2, "source": "agent", "message": "512", "llm_call_count": 1}]
    written(folder / "agent", trajectory={"schema_version": "ATIF-v1.5", "session_id": "s", "steps": steps, "agent": {
        "name": "terminus", "version": "2", "model_name": "m"}})
    Trajectory.model_validate(json.loads((folder / "agent" / "trajectory.json").read_text()))
    said = {"task_name": "q3", "trial_name": folder.name, "agent_result": {"n_input_tokens": 9, "cost_usd": 0.5},
            "started_at": "2026-01-01T00:00:00Z", "finished_at": "2026-01-01T00:01:00Z", **more}
    (folder / "result.json").write_text(json.dumps(said))


def test_harbor_trials(tmp_path: Path) -> None:
    job = tmp_path / "job"
    trial(job / "q3__a", verifier_result={"rewards": {"reward": 1.0}})
    trial(job / "q3__b", verifier_result={"rewards": {"reward": 0.0}},
          exception_info={"exception_type": "AgentTimeoutError", "exception_message": "late"})
    trial(job / "q3__c", exception_info={"exception_type": "DockerError", "exception_message": "gone"})
    trial(job / "q3__d", verifier_result={"rewards": {"reward": 3.5}})
    (job / "result.json").write_text('{"stats": {}}')
    made = import_run(job, "harbor", tmp_path / "run")
    assert (made["attempts"], made["scored"]) == (4, 2)
    found = [(r.outcome, r.scored, r.passed, r.message, r.wall_s, r.cost_usd)
             for r in BenchFolder(tmp_path / "run").records()]
    assert found == [("completed", True, True, "", 60.0, 0.5), ("budget_time", True, False, "", 60.0, 0.5),
                     ("env_error", False, None, "DockerError: gone", 60.0, 0.5),
                     ("judge_error", False, None, "reward: error: 3.5 is no score from 0 to 1", 60.0, 0.5)]
    assert messages(BenchFolder(tmp_path / "run"), ("q3", 0)) == [
        {"role": "user", "content": "Revenue?"}, {"role": "assistant", "content": "512"}]


# ----------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(("fmt", "name", "text", "words"), [
    ("apex", "trajectory.json", "{", "is no JSON"),
    ("apex", "trajectory.json", '{"messages": [{"role": "?"}]}', "role"),
    ("apex", "trajectory.json", '{"messages": [], "time_elapsed": "long"}', "time_elapsed"),
    ("apex", "trajectory.json", '{"messages": [], "usage": {"prompt_tokens": "many"}}', "usage.prompt_tokens"),
    ("apex", "other.txt", "", "holds nothing to import from apex"),
    ("inspect", "log.eval", "PK", "holds nothing to import"),
    ("inspect", "log.json", '{"version": 1}', "version 1, not"),
    ("inspect", "log.json", '{"version": 2, "samples": [{"id": 1, "messages": [{"role": "x"}]}]}', "role"),
    ("inspect", "log.json", '{"version": 2, "samples": [{"id": 1, "epoch": 0}]}', "epoch"),
    ("inspect", "log.json", '{"version": 2, "samples": [{"id": 1, "model_usage": {"m": {"input_tokens": "many"}}}]}',
     "model_usage.m.input_tokens"),
    ("inspect", "log.json", '{"version": 2, "samples": [{"id": 1, "messages": [{"role": "user", "tool_calls": 5}]}]}',
     "tool_calls"),
    ("inspect", "log.json", '{"version": 2, "samples": [{"id": 1, "messages": [{"role": "user", "tool_calls": [1]}]}]}',
     r"tool_calls\[0\]"),
    ("atif", "a.json", '{"schema_version": "ATIF-v9"}', "a.json"),
    ("harbor", "result.json", '{"trial_name": "a"}', "task_name"),
    ("harbor", "result.json", '{"trial_name": "a", "task_name": "t"}', "no agent/trajectory.json"),
])
def test_what_cannot_be_read(tmp_path: Path, fmt: str, name: str, text: str, words: str) -> None:
    (tmp_path / "dump").mkdir()
    (tmp_path / "dump" / name).write_text(text)
    with pytest.raises(FormatError, match=words):
        import_run(tmp_path / "dump", fmt, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "said", "words"), [
    ("agent_config", [], "agent_config"), ("verifiers", {}, "verifiers"),
    ("verifiers", [{"criteria": "no id"}], r"verifiers\[0\].verifier_id"), ("grades", [], "grades"),
    ("grades", {"verifier_results": [{"verifier_id": "v", "score": 7}]}, "score"), ("eval_configs", {}, "eval_configs"),
    ("initial_messages", [{"role": "?"}], "initial_messages")])
def test_files_beside_a_trajectory_that_are_none(tmp_path: Path, name: str, said: Any, words: str) -> None:
    written(tmp_path / "dump", trajectory={"messages": SAID}, **{name: said})
    with pytest.raises(FormatError, match=words):
        import_run(tmp_path / "dump", "apex", tmp_path / "run")


def test_calls_that_lack_what_they_may_lack(tmp_path: Path) -> None:
    said = [SAID[1], {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]},
            {"role": "tool", "content": "nothing"}]
    written(tmp_path / "dump", trajectory={"messages": said, "task_id": "t"}, grades={"verifier_results": [
        {"verifier_id": "v1", "score": 1.0}]})
    made = import_run(tmp_path / "dump", "apex", tmp_path / "run")
    assert json.dumps(made["scored"]) == "1"
    folder = BenchFolder(tmp_path / "run")
    assert within(said, messages(folder, ("t", 0)))
    make_report(folder)
    for to in ("inspect", "atif", "archipelago"):
        export_run(folder, to)


def test_what_agents_wrote_stays_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "</pre><script>alert(1)</script>\x1b[2J\u202e"
    call = {"id": evil, "type": "function", "function": {"name": evil, "arguments": evil}}
    said = [{"role": "user", "content": [{"type": "text", "text": evil}]}, {"role": "tool", "content": evil,
            "tool_call_id": evil, "name": evil}, {"role": "assistant", "content": evil, "tool_calls": [call]}]
    row = {"verifier_id": evil, "score": 0.0, "verifier_result_values": {"grade_rationale": evil}}
    written(tmp_path / "dump", grades={"verifier_results": [row]}, verifiers=[
        {"verifier_id": evil, "verifier_values": {"criteria": evil}}], trajectory={
            "messages": said, "task_id": evil, "model": evil, "final_answer": {"a": evil}})
    import_run(tmp_path / "dump", "apex", tmp_path / "run")
    folder = BenchFolder(tmp_path / "run")
    make_report(folder)
    print_attempt(one_attempt(folder, evil, 0))
    pages = [*tmp_path.glob("run/report.*"), *tmp_path.glob("run/episodes/*/*/episode.html")]
    assert len(pages) == 4
    for text in [capsys.readouterr().out, *(path.read_text() for path in pages if path.suffix != ".json")]:
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert "‹U+202E›" in text
    assert not any("<script>" in path.read_text() for path in pages if path.suffix != ".json")
    for to in ("inspect", "atif", "archipelago"):
        export_run(folder, to)


@pytest.mark.parametrize(("members", "error"), [
    ({"../../etc/passwd": b"x"}, UnsafePath), ({"filesystem/zeros": bytes(4 << 20)}, UnsafeArchive)])
def test_hostile_snapshots(tmp_path: Path, members: dict[str, bytes], error: type[AgentSdpoError]) -> None:
    place = written(tmp_path / "dump", trajectory={"messages": SAID})
    with zipfile.ZipFile(place / "final_snapshot.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(error):
        import_run(tmp_path / "dump", "apex", tmp_path / "run")


def test_wrong_requests(tmp_path: Path, played: BenchFolder) -> None:
    (tmp_path / "log.json").write_text(json.dumps({"version": 2, "samples": 2 * [{"id": 1, "messages": []}]}))
    (tmp_path / "half.json").write_text(json.dumps({"version": 2, "samples": [{"id": "\ud800", "messages": []}]}))
    for call, error, words in (
        (("half.json", "inspect", "run"), FormatError, "holds a lone surrogate; rename the task"),
        (("log.json", "word", "run"), ConfigError, "choose one of apex, harbor, inspect, atif"),
        (("log.json", "inspect", "own"), RunError, "is not empty"),
        (("nowhere", "apex", "run"), FormatError, "is not there"),
        (("log.json", "inspect", "twice"), FormatError, "attempt 0 at task '1' is there twice"),
    ):
        with pytest.raises(error, match=words):
            import_run(tmp_path / call[0], call[1], tmp_path / call[2])
    assert not (tmp_path / "twice").exists(), "the first attempt was written before the second was read"
    with pytest.raises(FormatError, match="desk-mini has no task '1'"):
        import_run(tmp_path / "log.json", "inspect", tmp_path / "suite", BenchConfig(tasks=1))
