"""Run folders: opened by one process at a time, never overwritten, the first start never forgotten."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from agentsdpo import config as settings
from agentsdpo import provenance, runfolder
from agentsdpo.errors import RunError
from agentsdpo.runfolder import open_run, read_run
from agentsdpo.show.comparison import compare
from agentsdpo.types import Json


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two starts are told apart by their commit."""
    commits = iter(f"{i}" * 40 for i in range(1, 10))
    monkeypatch.setattr(provenance, "git_commit", lambda: next(commits))


def test_a_run_holds_its_settings_commit_and_versions(tmp_path: Path) -> None:
    config = settings.load(sets=["steps=3", "learn.max_staleness=none"])
    folder = open_run(tmp_path / "runs" / "a", config)
    assert settings.load(folder.config) == config
    (start,) = json.loads(folder.environment.read_text())
    assert start["packages"]["numpy"] == np.__version__
    assert folder.config.read_text().startswith(f"# agentsdpo {start['agentsdpo']}, commit {start['commit']}\n")
    assert not folder.finished


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    config = settings.load()
    folder = open_run(tmp_path / "a", config)
    with pytest.raises(RunError, match=r"a holds a stopped run; choose another --out, or go on with it by --resume"):
        open_run(tmp_path / "a", config)
    folder.finish()
    with pytest.raises(RunError, match="holds a finished run"):
        open_run(tmp_path / "a", config)


def test_resume_wants_the_same_settings_except_the_length(tmp_path: Path) -> None:
    config = settings.load(sets=["steps=3"])
    with pytest.raises(RunError, match="holds no run to resume"):
        open_run(tmp_path / "a", config, resume=True)
    assert not (tmp_path / "a").exists()
    open_run(tmp_path / "a", config).finish()
    longer = open_run(tmp_path / "a", settings.load(sets=["steps=5"]), resume=True)
    assert not longer.finished
    assert settings.load(longer.config).steps == 5
    with pytest.raises(RunError, match=r"was started with learn.lr = 0.0006, resuming asks for 0.001 \(and 1 more\);"):
        open_run(tmp_path / "a", settings.load(sets=["learn.lr=1e-3", "eval.every=2"]), resume=True)
    with pytest.raises(RunError, match="was started with name = 'run', resuming asks for 'other'"):
        open_run(tmp_path / "a", settings.load(sets=["name=other", "steps=5"]), resume=True)


def test_a_setting_that_is_newer_than_the_run_had_its_default(tmp_path: Path) -> None:
    written = open_run(tmp_path / "a", settings.load()).config
    written.write_text(written.read_text().replace("\ngroup = 1\n", "\n"))
    open_run(tmp_path / "a", settings.load(), resume=True)
    written.write_text(written.read_text().replace("\ngroup = 1\n", "\n"))
    with pytest.raises(RunError, match="was started with group = 1, resuming asks for 4"):
        open_run(tmp_path / "a", settings.load(sets=["group=4"]), resume=True)


def test_every_start_is_written_down_and_the_first_stays_in_the_settings(tmp_path: Path) -> None:
    folder = open_run(tmp_path / "a", settings.load(sets=["steps=3"]))
    head, stamp = folder.config.read_text().partition("\n")[0], folder.config.stat()
    assert head.endswith("1" * 40)
    open_run(tmp_path / "a", settings.load(sets=["steps=3"]), resume=True)
    assert (folder.config.stat().st_ino, folder.config.stat().st_mtime_ns) == (stamp.st_ino, stamp.st_mtime_ns)
    open_run(tmp_path / "a", settings.load(sets=["steps=4"]), resume=True)
    assert folder.config.read_text().startswith(f"{head}\n")
    assert [start["commit"][0] for start in json.loads(folder.environment.read_text())] == ["1", "2", "3"]


def test_steps_are_not_lowered_below_what_was_done(tmp_path: Path) -> None:
    folder = open_run(tmp_path / "a", settings.load(sets=["steps=9"]))
    rows = [{"kind": "step", "step": 4, "wall_s": 1.0}, {"kind": "eval", "step": 8, "wall_s": 2.0}]
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RunError, match="has done 4 steps, resuming asks for steps = 3; set steps to 4 or more"):
        open_run(tmp_path / "a", settings.load(sets=["steps=3"]), resume=True)
    assert settings.load(open_run(tmp_path / "a", settings.load(sets=["steps=4"]), resume=True).config).steps == 4


def test_a_crash_while_settings_are_written_leaves_the_old_ones(tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    folder = open_run(tmp_path / "a", settings.load(sets=["steps=3"]))
    before = {path.name: path.read_text() for path in folder.path.iterdir()}

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        open_run(tmp_path / "a", settings.load(sets=["steps=5"]), resume=True)
    assert {path.name: path.read_text() for path in folder.path.iterdir()} == before


HOLDER = """
import sys, time
from agentsdpo import config as settings
from agentsdpo.runfolder import open_run
folder = open_run(sys.argv[1], settings.load())
print("ready", flush=True)
time.sleep(60)
"""


def test_two_processes_never_run_one_folder(tmp_path: Path) -> None:
    out, config = tmp_path / "a", settings.load()
    child = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True)
    assert child.stdout
    assert child.stdout.readline() == "ready\n"
    for resume in (False, True):
        with pytest.raises(RunError, match=rf"another process \(pid {child.pid}\) is running in .*a; wait for it"):
            open_run(out, config, resume=resume)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    folder = open_run(out, config, resume=True)
    again = open_run(out, config, resume=True)
    assert again == folder, "this process may open what it holds"
    passer = HOLDER.replace("time.sleep(60)", "").replace("settings.load()", "settings.load(), resume=True")
    second = [sys.executable, "-c", passer, str(out)]
    assert "another process" in subprocess.run(second, capture_output=True, text=True).stderr
    folder.release()
    assert subprocess.run(second, capture_output=True, text=True, check=True).stdout == "ready\n"


def test_a_folder_that_was_deleted_and_made_again_is_locked_anew(tmp_path: Path) -> None:
    folder = open_run(tmp_path / "a", settings.load())
    for path in folder.path.iterdir():
        path.unlink()
    folder.path.rmdir()
    open_run(tmp_path / "a", settings.load())
    done = subprocess.run([sys.executable, "-c", HOLDER, str(folder.path)], capture_output=True, text=True)
    assert "another process" in done.stderr


def test_a_path_that_cannot_be_a_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RunError, match=rf"{path} cannot be used as the folder of a run: (File exists|Not a dir)"):
            open_run(path, settings.load())

    def refuses(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(runfolder, "write_text", refuses)
    with pytest.raises(RunError, match="b cannot be used as the folder of a run: Permission denied; give --out"):
        open_run(tmp_path / "b", settings.load())


# ----------------------------------------------------------------------------------------------------------- reading


def test_a_finished_demo_is_read_whole(run_dir: Path) -> None:
    run = read_run(run_dir)
    assert [arm.name for arm in run.arms] == ["off-policy", "no-correction"]
    assert run.main.name == "off-policy"
    assert "max_staleness" in run.config
    assert "lr" in run.main.config
    assert len(run.main.rows) == 60 + 4 * 4


def test_the_main_arm_is_named_and_never_guessed_by_its_numbers(run_dir: Path) -> None:
    path = run_dir / "summary.json"
    summary = json.loads(path.read_text())
    summary["final_pass"] = summary["arms"]["no-correction"]["final_pass"]
    path.write_text(json.dumps(summary))
    assert read_run(run_dir).main.name == "off-policy"
    path.write_text(json.dumps({**summary, "arm": "no-correction"}))
    assert read_run(run_dir).main.name == "no-correction"


def test_one_training_run_is_a_run_of_one_arm(tmp_path: Path) -> None:
    folder = open_run(tmp_path / "a", settings.load(sets=["name=first"]))
    folder.metrics.write_text('{"kind": "step", "step": 1, "wall_s": 1.0}\n{"kind')
    run = read_run(folder.path)
    assert [(arm.name, len(arm.rows)) for arm in run.arms] == [("first", 1)]
    assert run.main.config == run.config == folder.config.read_text()
    (folder.path / "summary.json").write_text(json.dumps({"seed": 3, "arms": {"first": {"final_pass": 0.5}}}))
    (arm,) = read_run(folder.path).arms
    assert (arm.summary["final_pass"], arm.summary["seed"], len(arm.rows)) == (0.5, 3, 1)
    folder.config.unlink()
    assert {arm.name for arm in read_run(folder.path).arms} == {"first", "run"}


def test_an_arm_of_a_demo_is_a_run_like_any_other(tmp_path: Path, arm_rows: Callable[..., list[Json]]) -> None:
    folder = open_run(tmp_path / "demo" / "arms" / "robust", settings.load(sets=["name=robust", "steps=20"]))
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in arm_rows(0, steps=20)))
    assert read_run(folder.path).summary == {}, "it has not finished"
    folder.finish()
    (start,) = json.loads(folder.environment.read_text())
    run = read_run(folder.path)
    assert [(arm.name, len(arm.rows)) for arm in run.arms] == [("robust", 28)]
    assert {key: run.summary[key] for key in ("arm", "steps", "seed", "commit", "hardware", "episodes")} == {
        "arm": "robust", "steps": 20, "seed": 0, "commit": start["commit"], "hardware": start["hardware"],
        "episodes": 640}
    assert set(run.main.summary["splits"]) == {"val", "test_names"}
    assert run.summary["final_pass"] == run.main.summary["final_pass"] is not None
    compared = compare(folder.path, folder.path)
    assert compared["warnings"] == []
    assert "cannot be told apart" in compared["verdict"]
    folder.environment.unlink()
    assert "command" not in read_run(folder.path).summary


def test_a_killed_run_is_read_without_its_torn_line(bare_run: Path) -> None:
    run = read_run(bare_run)
    assert (run.summary, run.config, len(run.main.rows)) == ({}, "", 1)


def test_a_broken_middle_line_is_named(bare_run: Path) -> None:
    path = bare_run / "arms" / "only" / "metrics.jsonl"
    path.write_text('{"kind": "step"}\nnonsense\n{"kind": "step"}\n')
    with pytest.raises(RunError, match="line 2 of 3"):
        read_run(bare_run)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="neither summary.json nor"):
        read_run(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_broken_summary_is_named(run_dir: Path, text: str) -> None:
    (run_dir / "summary.json").write_text(text)
    with pytest.raises(RunError, match="summary.json"):
        read_run(run_dir)


@pytest.mark.parametrize(("name", "text", "told"), [("config.toml", "name = ", "config.toml of .* is not TOML"),
                                                    ("environment.json", '[{"commit"', "environment.json is not JSON")])
def test_broken_settings_and_starts_are_named(tmp_path: Path, name: str, text: str, told: str) -> None:
    open_run(tmp_path / "r", settings.RunConfig()).finish()
    (tmp_path / "r" / "metrics.jsonl").write_text("")
    (tmp_path / "r" / name).write_text(text)
    with pytest.raises(RunError, match=told):
        read_run(tmp_path / "r")
    with pytest.raises(RunError, match=told):
        open_run(tmp_path / "r", settings.RunConfig(), resume=True)


def test_settings_that_are_not_toml_cannot_be_compared(bare_run: Path) -> None:
    (bare_run / "arms" / "only" / "config.toml").write_text("name = ")
    with pytest.raises(RunError, match="bare is not TOML"):
        compare(bare_run, bare_run)


def test_an_arm_name_in_the_summary_is_never_a_path(run_dir: Path) -> None:
    (run_dir.parent / "metrics.jsonl").write_text('{"kind": "step", "step": 1}\n')
    (run_dir / "summary.json").write_text(json.dumps({"arms": {"../..": {"final_pass": 0.5}}}))
    outside = [arm for arm in read_run(run_dir).arms if arm.name == "../.."]
    assert outside[0].rows == ()
