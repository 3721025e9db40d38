"""A whole run as programs side by side against a real server, and its versions played there once more."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentsdpo.config import load
from agentsdpo.envs.desk.seed import seed_path
from agentsdpo.programs.evaluating import Evaluator, evaluate_due
from agentsdpo.programs.owed import Owed, write_owed
from agentsdpo.publish.control import VllmControl
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.publish.served import read_served
from agentsdpo.replay.store import ReplayStore
from agentsdpo.runfolder import RunFolder
from agentsdpo.track import read_metrics

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

STEPS = 3
CONFIG = f"""
name = "served"
steps = {STEPS}
episodes_per_step = 4
[collect]
window = 512
concurrency = 8
max_tokens = 48
[learn]
batch = 4
max_staleness = 8
control_every = 0
[publish]
keep = 10
[tripwire]
on = false
[eval]
splits = []
final_episodes = 4
final_splits = ["val"]
"""


@pytest.fixture
def control(vllm_server: Any) -> Iterator[VllmControl]:
    """The server's controls; afterwards it serves the seed model as version 0."""
    with VllmControl(vllm_server.url) as found:
        yield found
        found.pause()
        found.reload(seed_path())
        found.reset_cache()
        found.set_label("0")
        found.resume()


def test_a_run_with_an_inference_server(vllm_server: Any, control: VllmControl, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(CONFIG)
    out = tmp_path / "run"
    done = subprocess.run([sys.executable, "-m", "agentsdpo.cli", "train", str(tmp_path / "run.toml"), "--async",
                           "--server", vllm_server.url, "--out", str(out), "--json"], capture_output=True, text=True,
                          cwd=tmp_path, timeout=280)
    assert done.returncode == 0, done.stderr + "".join(path.read_text() for path in (out / "logs").glob("*.log"))
    folder = RunFolder(out)
    registry = PolicyRegistry(folder.policies)
    assert registry.latest() == STEPS
    given = read_served(registry.root, vllm_server.url).version
    assert given is not None
    assert control.label() == str(given)
    view = ReplayStore.open(folder.replay, create=False).snapshot()
    rows = [view.read([key])[0] for key in view.rows]
    assert len({row.key.episode_id for row in rows}) >= STEPS * 4
    assert {call.untrainable_reason for row in rows for call in row.branch.calls} == {None}
    assert all(0 <= low <= high <= STEPS for low, high in (row.policy_versions for row in rows))

    write_owed(folder, [Owed(1, 1, 0.0, (("val", "greedy", 4),), {})])
    assert evaluate_due(out, server=vllm_server.url)["played"] == 1
    assert control.label() == "1"
    evaluator = Evaluator(load(folder.config), folder)
    here = evaluator.play(Owed(1, 1, 0.0, (("val", "greedy", 4),), {}), "val", "greedy", 4)
    there = next(row for row in read_metrics(folder.path / "evals.jsonl") if row["version"] == 1 and row["n"] == 4)
    assert (there["pass"], there["score"]) == (here["pass"], here["score"])
