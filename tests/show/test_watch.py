"""Looking on at a run from outside: whole, killed, resumed, of several arms, side by side; nothing is ever written."""

import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agentsdpo.cli import app
from agentsdpo.errors import ConfigError, RunError
from agentsdpo.runfolder import RunFolder
from agentsdpo.show import watch
from agentsdpo.track import MetricsWriter

Later = Callable[..., None]


def begin(path: Path, name: str = "mine", steps: int = 9) -> RunFolder:
    """A run folder as it stands before its first line."""
    path.mkdir(parents=True)
    (path / "config.toml").write_text(f'name = "{name}"\nsteps = {steps}\n')
    return RunFolder(path)


def step(metrics: MetricsWriter, number: int, **more: Any) -> None:
    metrics.write("step", number, {"learn/loss": 0.5, "collect/score/mean": number / 10, "learn/ess_frac": 0.9,
                                   "episodes": 4 * number, "tokens": 100 * number, **more}, wall_s=2.0 * number)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Later:
    """Has things happen while the watcher sleeps, one after the other; it may not sleep once more than that."""
    def plan(*happenings: Callable[[], None]) -> None:
        left: Iterator[Callable[[], None]] = iter(happenings)
        monkeypatch.setattr(watch.time, "sleep", lambda seconds: next(left)())
    return plan


def shown(path: Path, mode: str = "plain") -> list[str]:
    out = io.StringIO()
    watch.follow(path, mode=mode, out=out)
    return out.getvalue().splitlines()


def test_a_run_is_followed_to_its_end(tmp_path: Path, later: Later) -> None:
    run = begin(tmp_path / "run", steps=3)
    with MetricsWriter(run.metrics) as metrics:
        step(metrics, 1)

        def torn() -> None:
            with run.metrics.open("a") as file:
                file.write('{"kind": "step", "step": 2, "wall_s": 4.0')

        def whole() -> None:
            with run.metrics.open("a") as file:
                file.write(', "learn/loss": 0.25}\n')

        def end() -> None:
            step(metrics, 3)
            run.finish()

        later(torn, whole, end)
        lines = shown(run.path)
    assert lines[0] == "mine: 3 steps"
    assert [line.split()[1] for line in lines if line.startswith("step")] == ["1/3", "2/3", "3/3"]
    assert "no process of this machine runs it" in lines[2]
    assert "loss 0.25" in lines[3]
    assert lines[-1] == "finished"


def test_a_run_that_was_killed_and_goes_on_from_a_checkpoint_is_shown_anew(tmp_path: Path, later: Later) -> None:
    run = begin(tmp_path / "run")
    with MetricsWriter(run.metrics) as metrics:
        for number in (1, 2, 3, 4):
            step(metrics, number)
    with run.metrics.open("a") as file:
        file.write('{"kind": "st')

    def resumed() -> None:
        run.config.write_text('name = "mine"\nsteps = 12\n')
        with MetricsWriter(run.metrics, resume_step=2) as metrics:
            step(metrics, 3)
            run.finish()

    later(resumed)
    lines = shown(run.path)
    at = lines.index("mine: 12 steps")
    assert "note: goes on from a checkpoint" in lines[at + 1]
    assert [line.split()[1] for line in lines[:at] if line.startswith("step")] == ["1/9", "2/9", "3/9", "4/9"]
    assert [line.split()[1] for line in lines[at:] if line.startswith("step")] == ["1/12", "2/12", "3/12"]


def test_a_resume_that_lost_nothing_goes_on_without_a_break(tmp_path: Path, later: Later) -> None:
    run = begin(tmp_path / "run")
    with MetricsWriter(run.metrics) as metrics:
        step(metrics, 1)

    def resumed() -> None:
        with MetricsWriter(run.metrics, resume_step=1) as metrics:
            step(metrics, 2)
            run.finish()

    later(resumed)
    assert [line.split()[1] for line in shown(run.path) if line.startswith("step")] == ["1/9", "2/9"]


def test_a_plain_view_begins_with_the_newest_lines_and_a_live_one_with_the_whole_course(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begin(tmp_path / "run", steps=30)
    with MetricsWriter(run.metrics) as metrics:
        for number in range(1, 31):
            step(metrics, number)
    run.finish()
    lines = shown(run.path)
    assert [line.split()[1] for line in lines if line.startswith("step")] == [f"{n}/30" for n in range(26, 31)]
    monkeypatch.setenv("TERM", "xterm-256color")
    text = "\n".join(shown(run.path, "rich"))
    for expected in ("30/30", "0:01:00", "reward", "ESS", "2 s/step", "50 tokens/s", "finished"):
        assert expected in text, expected
    assert shown(run.path, "none") == []


def test_a_demo_is_followed_from_arm_to_arm(tmp_path: Path, later: Later) -> None:
    first = begin(tmp_path / "demo" / "arms" / "naive", "naive", 1)
    with MetricsWriter(first.metrics) as metrics:
        step(metrics, 1)
    first.finish()

    def second() -> None:
        arm = begin(tmp_path / "demo" / "arms" / "robust", "robust", 1)
        with MetricsWriter(arm.metrics) as metrics:
            step(metrics, 1)
        os.utime(arm.metrics, (2e9, 2e9))
        arm.finish()

    def summary() -> None:
        (tmp_path / "demo" / "summary.json").write_text("{}")

    later(second, summary)
    lines = shown(tmp_path / "demo")
    assert [line for line in lines if line.endswith("1 steps")] == ["naive: 1 steps", "robust: 1 steps"]
    assert not [line for line in lines if line.startswith("note")]
    assert watch.snapshot(tmp_path / "demo")["name"] == "robust"


def test_of_arms_that_run_side_by_side_one_is_shown_until_it_ends(tmp_path: Path, later: Later) -> None:
    arms = [begin(tmp_path / "study" / "arms" / name, name, 2) for name in ("one", "two")]
    for arm in arms:
        (arm.path / "LOCK").write_text(f"{os.getpid()}\n")
        with MetricsWriter(arm.metrics) as metrics:
            step(metrics, 1)
    os.utime(arms[0].metrics, (1e9, 1e9))
    os.utime(arms[1].metrics, (2e9, 2e9))

    def other_writes() -> None:
        os.utime(arms[0].metrics, (3e9, 3e9))

    def shown_ends() -> None:
        arms[1].finish()

    def other_ends() -> None:
        arms[0].finish()
        (tmp_path / "study" / "summary.json").write_text("{}")

    later(other_writes, shown_ends, other_ends)
    assert [line for line in shown(tmp_path / "study") if line.endswith("2 steps")] == ["two: 2 steps", "one: 2 steps"]


def test_an_evaluation_that_comes_late_turns_nothing_back(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    with MetricsWriter(run.metrics) as metrics:
        step(metrics, 8)
        metrics.write("eval", 5, {"split": "val", "decoding": "sampled", "n": 8, "pass": 0.5, "episodes": 20})
    about = watch.snapshot(run.path)
    assert (about["step"], about["episodes"], about["evals"][0]["step"]) == (8, 32, 5)


def test_how_it_stands_as_data(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    (run.path / "LOCK").write_text(f"{os.getpid()}\n")
    (run.replay / "data" / "20260101").mkdir(parents=True)
    (run.replay / "data" / "20260101" / "a.parquet").write_bytes(b"x" * 1000)
    run.logs.mkdir()
    (run.logs / "hints.log").write_text("3 hints\n")
    with MetricsWriter(run.metrics) as metrics:
        for number, rate in ((0, 0.0), (3, 0.25), (6, 0.5)):
            metrics.write("eval", number, {"split": "val", "decoding": "sampled", "n": 64, "pass": rate, "score": rate})
            step(metrics, number + 1)
        metrics.write("tripwire", 7, {"level": "soft", "alarms": {}, "action": "hold the teacher"})
        step(metrics, 8, **{"tripwire/restrained": 1.0})
    before = sorted((path, path.stat().st_mtime_ns) for path in run.path.rglob("*"))
    about = watch.snapshot(run.path)
    assert sorted((path, path.stat().st_mtime_ns) for path in run.path.rglob("*")) == before
    assert (about["state"], about["pid"], about["step"], about["steps"]) == ("running", os.getpid(), 8, 9)
    assert about["store"] == {"files": 1, "bytes": 1000}
    assert about["programs"][0]["said"] == "3 hints"
    assert about["evals"] == [{"split": "val", "decoding": "sampled", "step": 6, "n": 64, "pass": 0.5, "score": 0.5,
                               "first_pass": 0.0}]
    assert about["restrained"]
    assert [one["level"] for one in about["alarms"]] == ["soft"]
    assert about["rates"]["episodes_per_s"] == pytest.approx(2.0)
    said = "\n".join(watch.words(about))
    for expected in ("step 8/9, running", "2 s/step  2 episodes/s  50 tokens/s  left 2.0 s",
                     "val sampled: pass 0.0 % at first, 50.0 % [38.1, 61.9] at step 6",
                     "hints, ", "alarms: 1, the newest soft at step 7: hold the teacher"):
        assert expected in said, expected


def test_a_number_in_the_lock_of_a_process_that_is_gone_counts_for_nothing(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    for text in ("", "4194399\n", "words"):  # above the kernel's largest number of a process
        (run.path / "LOCK").write_text(text)
        assert watch.Sight(run.path).state == "silent"


def test_what_is_no_run_or_is_broken_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run; give the folder that a run writes to"):
        watch.snapshot(tmp_path)
    run = begin(tmp_path / "run")
    run.metrics.write_text('{"kind": "step"}\nnonsense\n')
    with pytest.raises(RunError, match="is not a JSON object: b'nonsense'"):
        watch.snapshot(run.path)
    with pytest.raises(ConfigError, match="use auto, rich, plain or none"):
        watch.follow(run.path, mode="loud")


def test_words_of_a_run_cannot_drive_the_terminal(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", "a\\u001b[2Jb")
    run.finish()
    assert shown(run.path) == ["a [2Jb: 9 steps", "finished"]
    assert watch.words(watch.snapshot(run.path))[0].startswith("a [2Jb: step 0/9")


def test_the_verb(run_dir: Path) -> None:
    (run_dir / "arms" / "off-policy" / "FINISHED").write_text("")
    (run_dir / "arms" / "no-correction" / "FINISHED").write_text("")
    for arm in run_dir.glob("arms/*"):
        (arm / "config.toml").write_text(f'name = "{arm.name}"\nsteps = 60\n')

    def call(*words: str) -> Any:
        return CliRunner().invoke(app, ["watch", str(run_dir), *words])

    assert "step 60/60, finished" in call("--once").stdout
    assert json.loads(call("--once", "--json").stdout)["metrics"]["replay/staleness/mean"] > 0
    assert [json.loads(line)["step"] for line in call("--json").stdout.splitlines()] == [60]
    assert "step 60/60" in call("--mode", "plain").stdout
    assert call("--mode", "none").stdout == ""
    for other in ("--json", "--once"):
        assert isinstance(call(other, "--mode", "rich").exception, ConfigError)


def test_the_data_tells_the_end_as_well(tmp_path: Path, later: Later) -> None:
    run = begin(tmp_path / "run", steps=1)
    with MetricsWriter(run.metrics) as metrics:
        later(lambda: None, lambda: step(metrics, 1), run.finish)
        said = CliRunner().invoke(app, ["watch", str(run.path), "--json"]).stdout
    assert [(one["step"], one["state"]) for one in map(json.loads, said.splitlines())] == [
        (0, "silent"), (1, "silent"), (1, "finished")]
