"""A whole run as processes: any of them may be killed, the one that started them included, and it comes to its end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from agentsdpo.config import from_mapping
from agentsdpo.errors import ConfigError
from agentsdpo.programs.side_by_side import Watcher, programs, train_async
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.replay.store import ReplayStore
from agentsdpo.replay.upkeep.verification import verify
from agentsdpo.runfolder import RunFolder
from agentsdpo.show.console import SilentView
from agentsdpo.track import MetricsWriter, read_metrics

CONFIG = """
name = "beside"
steps = 8
episodes_per_step = 4
checkpoint_every = 2
[collect]
window = 512
concurrency = 8
max_tokens = 48
[learn]
batch = 4
max_staleness = 8
[eval]
every = 4
episodes = 4
final_episodes = 4
splits = ["val"]
final_splits = ["val"]
"""


def test_every_program_is_started_with_the_command_one_would_type(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    local = {one.name: one.command[3:] for one in programs(folder, 2, ())}
    assert list(local) == ["learner", "hints", "evaluator", "collector-0", "collector-1"]
    assert local["collector-1"][-6:] == ["--engine", "inprocess", "--number", "1", "--of", "2"]
    served = {one.name: one.command[3:] for one in programs(folder, 1, ("http://a:8000", "http://b:8000"))}
    assert [served[f"collector-{i}"][7] for i in range(2)] == ["http://a:8000", "http://b:8000"]
    assert served["publisher"][0] == "publish"
    assert served["publisher"].count("--server") == 2


def test_groups_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    config = from_mapping({"group": 4, "episodes_per_step": 8})
    with pytest.raises(ConfigError, match="group is 4"):
        train_async(config, out=tmp_path / "run", mode="none")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:8000", "http://[::1"])
def test_an_address_that_is_none_is_refused_before_anything_is_made(tmp_path: Path, address: str) -> None:
    with pytest.raises(ConfigError, match=f"'{re.escape(address)}' is no address of a server; give one such as http:"):
        train_async(from_mapping({}), out=tmp_path / "run", servers=["http://a:8000", address])
    assert not (tmp_path / "run").exists()


def test_the_watcher_shows_every_line_once_though_the_learner_begins_the_file_anew(tmp_path: Path) -> None:
    shown: list[int] = []

    class View(SilentView):
        def step(self, metrics: Mapping[str, Any]) -> None:
            shown.append(metrics["step"])

    folder = RunFolder(tmp_path)
    with MetricsWriter(folder.metrics) as metrics:
        metrics.write("step", 1, {})
        watcher = Watcher(folder, View())
        watcher.look()
        metrics.write("step", 2, {})
        watcher.look()
    with MetricsWriter(folder.metrics, resume_step=1) as metrics:
        watcher.look()
        metrics.write("step", 2, {})
        metrics.write("step", 3, {})
        with folder.metrics.open("a") as torn:
            torn.write('{"kind": "step", "st')
        watcher.look()
    assert shown == [2, 3]


def test_a_request_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(CONFIG)
    done = subprocess.run([sys.executable, "-m", "agentsdpo.cli", "train", str(tmp_path / "run.toml"), "--collectors",
                           "2"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "--collectors and --server are of --async; add --async, or leave them out" in done.stderr


def pid_of(name: str, out: Path) -> int | None:
    """The process of one program of a run, found by what it was started with."""
    verb = {"learner": "learn", "hints": "hint", "evaluator": "evaluate", "collector-0": "collect"}[name]
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode().split("\0")
        except OSError:
            continue
        if verb in words and any(word.startswith(str(out)) for word in words) and "--async" not in words:
            return int(entry.parent.name)
    return None


@pytest.mark.slow
def test_killed_one_after_the_other_the_run_comes_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(CONFIG)
    out = tmp_path / "run"
    command = [sys.executable, "-m", "agentsdpo.cli", "train", str(tmp_path / "run.toml"), "--async", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    victims = ["collector-0", "hints", "learner", "evaluator"]
    deadline, steps = time.monotonic() + 400, 0
    while victims and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
        done = len([row for row in read_metrics(out / "metrics.jsonl") if row["kind"] == "step"])
        if done > steps or (steps == 0 and done):
            pid = pid_of(victims[0], out)
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
                victims.pop(0)
                steps = done
    assert not victims
    os.kill(process.pid, signal.SIGKILL)  # and at last the one that watches over them
    process.communicate(timeout=60)
    while any(pid_of(name, out) for name in ("learner", "hints", "evaluator", "collector-0")):
        assert time.monotonic() < deadline, "they outlive their starter"
        time.sleep(0.2)
    done = subprocess.run([*command, "--resume", "--json"], capture_output=True, text=True, cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["steps"] == 8
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(1, 9))
    evals = Counter((row["step"], row["split"], row["decoding"]) for row in rows if row["kind"] == "eval")
    assert {(0, "val", "sampled"), (0, "val", "greedy"), (8, "val", "sampled"), (8, "val", "greedy")} <= set(evals)
    assert set(evals.values()) == {1}
    assert (out / "FINISHED").exists()
    assert (out / "report.html").exists()
    store = ReplayStore.open(out / "replay", create=False)
    assert not verify(store, "full").problems
    whole = [key.episode_id for key, row in store.snapshot().rows.items() if row.status != "salvaged"]
    assert len(whole) == len(set(whole)) >= 8 * 4
    versions = PolicyRegistry(out / "policies").versions()
    assert max(row.version_max for row in store.snapshot().rows.values()) <= max(versions)
    notes = re.findall(r"ended with signal SIGKILL", (out / "logs" / "collector-0.log").read_text())
    assert not notes, "deaths are told by the one that watches, not in the logs"


def test_settings_of_the_flow_belong_to_the_run() -> None:
    assert from_mapping({}, ["flow.ahead=4"]).flow.ahead == 4
