"""Collectors over a local Ray cluster: a worker that is killed in the middle costs nothing."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentsdpo.assemble import make_learner
from agentsdpo.config import from_mapping
from agentsdpo.learn.load import load_chat
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.replay.store import ReplayStore
from agentsdpo.suites import model_path

CONFIG = 'name = "far"\n[collect]\nwindow = 512\nconcurrency = 2\nmax_tokens = 48\n'


def run(folder: Path, *more: str) -> list[str]:
    (folder / "run.toml").write_text(CONFIG)
    return [sys.executable, "-m", "agentsdpo.cli", "collect", str(folder / "run.toml"), "--store",
            str(folder / "store"), "--policies", str(folder / "policies"), *more]


def test_one_number_and_a_cluster_make_no_sense(tmp_path: Path) -> None:
    done = subprocess.run(run(tmp_path, "--ray", "local", "--number", "1"), capture_output=True, text=True)
    assert (done.returncode, "--ray runs all of --of 1; leave --number out" in done.stderr) == (2, True)


def workers() -> list[int]:
    """Worker processes of Ray that run a collector, by the title Ray gives them."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            title = entry.read_bytes()
        except OSError:
            continue
        found += [int(entry.parent.name)] if title.startswith(b"ray::collector") else []
    return found


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_a_worker_killed_in_the_middle_costs_nothing(tmp_path: Path) -> None:
    config = from_mapping({"name": "far"})
    chat = load_chat(model_path(config))
    PolicyRegistry(tmp_path / "policies", tokenizer_sha256=chat.tokenizer_sha256,
                   chat_template_sha256=chat.template_sha256).publish(make_learner(config).policy(), learner_step=0)
    command = run(tmp_path, "--ray", "local", "--of", "2", "--episodes", "8", "--json")
    quiet = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=quiet)
    deadline = time.monotonic() + 300
    store = ReplayStore.open(tmp_path / "store")
    while not (len(store) >= 2 and workers()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    killed = workers()
    assert killed, process.communicate()[1]
    os.kill(killed[0], signal.SIGKILL)
    said, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert json.loads(said.splitlines()[-1])["collectors"] == 2
    rows = store.snapshot().rows
    assert len(rows) == 16, "eight of each, and each once"
    assert all(episode.grade is not None for episode in store.episodes())
