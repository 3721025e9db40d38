"""The verbs of the benchmark as a user types them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from agentsdpo.benchmarks.apex.checks import check
from agentsdpo.cli import app
from tests.apex.conftest import SumTasks

FLAGS = ["--suite", "desk-mini", "--tasks", "3", "--attempts", "2"]


def call(*words: str) -> Result:
    return CliRunner().invoke(app, ["bench", *words])


def data(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_run_report_show_and_compare_work_out_of_the_box(tmp_path: Path) -> None:
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    first = data(call("run", *FLAGS, "--model", "oracle", "--out", a, "--json"))
    assert first["overall"]["conditional"]["pass@1"]["value"] == 1.0
    assert set(first["references"]) == {"null", "random", "oracle"}
    table = call("run", *FLAGS, "--model", "guesser", "--out", b)
    assert table.exit_code == 0
    assert "pass@1" in table.stdout
    assert "cost: no cost, 0 prompt and 0 completion tokens" in table.stdout
    assert data(call("report", a, b, "--json"))["comparison"]["pass@1"]["n"] == 3
    assert data(call("compare", a, b, "--json"))["pass@1"]["estimate"] == 1.0
    assert "100.0" in call("compare", a, b).stdout
    shown = data(call("show", a, "desk-mini-test_names-0", "1", "--json"))
    assert shown["record"]["passed"]
    assert "cell_set" in call("show", a, "desk-mini-test_names-0").stdout
    assert data(call("resume", a, "--json"))["n_missing"] == 0
    for to in ("inspect", "atif", "archipelago"):
        assert Path(data(call("export", a, "--to", to, "--json"))["path"]).exists()
    made = data(call("import", str(tmp_path / "a" / "export" / "archipelago"), "--from", "apex", "--suite", "desk-mini",
                     "--tasks", "3", "--out", str(tmp_path / "c"), "--json"))
    assert (made["attempts"], made["scored"]) == (6, 6)
    assert "6 attempts at 3 tasks" in call("import", str(tmp_path / "a" / "export" / "atif.jsonl"), "--from", "atif",
                                           "--out", str(tmp_path / "d")).stdout
    assert data(call("compare", a, str(tmp_path / "c"), "--force", "--json"))["pass@1"]["estimate"] == 0.0
    shutil.rmtree(next((tmp_path / "a" / "export" / "archipelago").rglob("trajectory.json")).parent)
    call("import", str(tmp_path / "a" / "export" / "archipelago"), "--from", "apex", "--suite", "desk-mini", "--out",
         str(tmp_path / "e"))
    again = data(call("grade", str(tmp_path / "e"), "--json"))
    assert (again["overall"]["n_scored"], again["overall"]["n_unscored"]) == (5, {})
    assert data(call("grade", a, "--json"))["grading"]["id"] == 1
    assert len(list((tmp_path / "a").glob("episodes/*/*/grades-0.json"))) == 6


def test_a_file_of_settings_with_flags_over_it(tmp_path: Path) -> None:
    path = tmp_path / "bench.toml"
    path.write_text('suite = "desk-mini"\nmodel = "oracle"\ntasks = 2\nattempts = 1\n[budget]\nturns = 50\n')
    found = data(call("run", str(path), "--attempts", "2", "--set", "budget.turns=40", "--out", str(tmp_path / "r"),
                      "--json"))
    assert found["overall"]["n_attempts"] == 4
    assert found["budgets"]["given"] == {"turns": 40}


def test_unscored_attempts_end_with_code_3(tmp_path: Path, sums: SumTasks) -> None:
    sums.break_at = {2}
    out = str(tmp_path / "r")
    result = call("run", "--model", "oracle", "--attempts", "1", "--set", "retries=0", "--out", out)
    assert result.exit_code == 3
    assert "warning: 1 of 4 attempts could not be scored (env_error 1)" in result.stdout
    assert f"agentsdpo bench resume {out}" in result.stderr
    assert call("resume", out).exit_code == 0


def test_a_judge_that_is_missing_for_a_later_task_alone_is_found_before_anything_is_played(tmp_path: Path) -> None:
    path, out = tmp_path / "tasks.toml", tmp_path / "r"
    path.write_text(f'''
        [[task]]
        id = "checked"
        prompt = "Say 5."
        rubric = [{{text = "5", check = "{__name__}:anything"}}]
        [[task]]
        id = "judged"
        prompt = "Say 6."
        rubric = ["6"]
        ''')
    result = call("run", "--suite", str(path), "--model", "echo", "--out", str(out))
    assert "task 'judged' has criteria without a check and there is no judge" in str(result.exception)
    assert not out.exists()


@check
def anything(task: Any, outcome: Any) -> bool:
    """Any outcome will do."""
    return True


def test_doctor_finds_a_benchmark_that_pays_for_nothing(sums: SumTasks) -> None:
    rows = {row["name"]: row for row in data(call("doctor", "--json"))}
    assert all(row["ok"] for row in rows.values())
    assert {"oracle", "determinism", "licence stamp", "rubric hidden", "null agent inject"} <= rows.keys()
    sums.tasks = tuple(task.model_copy(update={"metadata": {"sum": ":"}}) for task in sums.tasks)
    sums.grader = lambda task: Generous()  # type: ignore[method-assign]
    result = call("doctor")
    assert result.exit_code == 1
    assert "FAIL  null agent colon" in result.stdout


class Generous:
    """Takes every answer."""

    async def grade(self, task: Any, outcome: Any) -> Any:
        from agentsdpo.types import CriterionResult, Grade

        return Grade.of([CriterionResult(id="answer", score=1.0)])


def test_doctor_finds_a_licence_that_is_not_kept_and_a_rubric_that_leaks(sums: SumTasks) -> None:
    sums.name = "apex-agents"  # type: ignore[misc]
    sums.tasks = tuple(task.model_copy(update={"train_allowed": True, "prompt": "The sum is 3."})
                       for task in sums.tasks)
    result = call("doctor", "--json")
    assert result.exit_code == 1
    rows = {row["name"]: row["ok"] for row in json.loads(result.stdout)}
    assert not rows["licence stamp"]
    assert not rows["rubric hidden"]


@pytest.mark.parametrize(("words", "code", "says"), [
    (["report", "nowhere"], 4, "holds no benchmark run"), (["show", "nowhere", "t"], 4, "holds no benchmark run"),
    (["export", "nowhere", "--to", "atif"], 4, "holds no benchmark run"),
    (["import", "nowhere", "--from", "apex", "--out", "r"], 1, "nowhere is not there"),
    (["import", ".", "--from", "atif", "--out", "a.file"], 1, "a.file cannot be written: File exists; name a folder"),
    (["import", ".", "--from", "word", "--out", "r"], 2, "there is no import from 'word'"),
    (["import", ".", "--from", "apex", "--out", "r", "--tasks", "3"], 2, "and none is named; give --suite"),
    (["grade", "r", "--set", "budget.turns=9"], 2, "--set budget.turns=9 changes no grade of what was played"),
    (["run", "--suite", "nothing"], 2, "there is no suite 'nothing'"),
    (["run", "--set", "atempts=3"], 2, "did you mean attempts?"),
    (["run", "--set", "learn.lr=1"], 2, "learn is not a setting; there are suite, tasks, model,"),
    (["run", "--attempts", "0"], 2, "0"),
    (["run", "--model", "oracle", "--set", "budget.wall_s=inf"], 2, "budget.wall_s is inf"),
    (["run", "--model", "oracle", "--out", "a.file/b1"], 1, "a.file/b1 cannot be written: Not a directory; name a"),
    (["run", "missing.toml"], 2, "cannot be read"), (["run", "--model", "./nowhere"], 2, "no model folder")])
def test_wrong_requests_say_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int,
                                          says: str) -> None:
    import sys

    from agentsdpo import cli

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.file").write_text("")
    monkeypatch.setattr(sys, "argv", ["agentsdpo", "bench", *words])
    said: list[str] = []
    monkeypatch.setattr(cli, "fail", lambda message, status: (said.append(message), sys.exit(status)))
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == code
    assert not said or says in said[0]
    assert not (tmp_path / "runs").exists()
