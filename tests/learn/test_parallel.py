"""Two processes over the loopback are one learner: same loss, gradients, clipper, report and weights as one process."""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from agentsdpo.errors import ConfigError, LearnError
from agentsdpo.learn.checkpoint import load_checkpoint
from agentsdpo.learn.config import ParallelConfig
from agentsdpo.learn.learner import Learner
from agentsdpo.learn.pack import RowCost, pack
from agentsdpo.learn.parallel import Ranks, check_launch
from agentsdpo.learn.presets import resolve

WORKER = Path(__file__).resolve().parent / "ranks_worker.py"
BASE = {"lr": 1e-3, "teacher": "frozen", "control_every": 0}
FREE = {**BASE, "gate": "off", "veto": None}
CONTROLLED = {**FREE, "control_every": 1}


def case(preset: str, fields: dict[str, Any], *, tied: bool = True, rows: tuple[int, ...] = (5, 3),
         **parallel: bool) -> dict[str, Any]:
    return {"preset": preset, "tied": tied, "rows": rows,
            "fields": {**fields, "parallel": {"ranks": 2, **parallel}}}


CASES = {
    "dealt": case("robust", CONTROLLED),
    "dealt, one row": case("robust", FREE, rows=(1, 1)),
    "dealt, three forwards": case("robust", {**FREE, "forward_tokens": 90}),
    "dealt, clipper and gates": case("sdpopp", {**BASE, "gate": "k3", "c3": 0.5, "forward_tokens": 90}),
    "dealt, m2po": case("sdpopp", {**BASE, "ratio": "m2po"}),
    "dealt, adapter, mean": case("robust", {**FREE, "teacher": "ema", "adapter": {"rank": 4}}),
    "shard": case("robust", {**FREE, "forward_tokens": 90}),
    "shard, untied": case("robust", CONTROLLED, tied=False, shard=True),
    "shard, clipper, recompute": case("sdpopp", {**BASE, "recompute": "layers", "mlp_tokens": 16}, shard=True),
    "shard, mean": case("robust", {**FREE, "teacher": "ema"}, shard=True),
    "shard, adapter": case("robust", {**FREE, "adapter": {"rank": 4}}, shard=True),
    "sequence": case("robust", CONTROLLED, sequence=True),
    "sequence, gates": case("robust", BASE, sequence=True, rows=(5, 1)),
    "sequence, clipper, tiles": case("sdpopp", {**BASE, "recompute": "layers", "mlp_tokens": 16}, sequence=True),
    "sequence, shard": case("robust", FREE, sequence=True, shard=True, tied=False),
    "sequence, adapter": case("robust", {**FREE, "adapter": {"rank": 4}}, sequence=True),
}
CASES["shard"]["fields"]["parallel"]["shard"] = True


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    """One test, since starting the processes takes most of the time."""
    (tmp_path / "cases.json").write_text(json.dumps(CASES))
    launch(tmp_path, tmp_path / "cases.json")
    for name in CASES:
        same_step(name, tmp_path)
    for rank in range(2):
        alone = json.loads((tmp_path / f"alone-{rank}.json").read_text())
        same_attention(alone)
        refusals(alone["said"])
        for name in ("resumed", "resumed, shard"):
            assert alone[name] == {"metrics": True, "weights": True, "one left": True}, (rank, name)
    first, second = (json.loads((tmp_path / f"alone-{rank}.json").read_text())["said"] for rank in range(2))
    assert "could not be written" in first["no room"]
    assert "Not a directory" in first["any fault"]
    assert all("process 0 of this learner failed" in second[name] for name in ("no room", "any fault"))
    goes_on_alone(tmp_path / "shard")


def launch(out: Path, cases: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    started = subprocess.Popen([sys.executable, str(WORKER), str(out), str(cases)], env=env, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, said = started.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        raise
    assert started.returncode == 0, said[-6000:]


def same_step(name: str, two: Path) -> None:
    """Loss, gradient, clipper, report and weights are those of one process."""
    one = {**CASES[name], "fields": {**CASES[name]["fields"], "parallel": {}}}
    expected, weights = runpy.run_path(str(WORKER))["run_case"](one, None)
    first, second = (json.loads((two / f"{name}-{rank}.json").read_text()) for rank in range(2))
    assert first == second, f"{name}: every process knows the same"
    for mine, theirs in zip(first["metrics"], expected["metrics"], strict=True):
        ignored = {"learn/microbatches"}
        assert mine.keys() == theirs.keys(), name
        for key in theirs.keys() - ignored:
            assert mine[key] == pytest.approx(theirs[key], rel=2e-4, abs=2e-6), (name, key)
    assert first["clip"] == pytest.approx(expected["clip"], rel=1e-5)
    tensors = [load_file(two / f"{name}-{rank}.safetensors") for rank in range(2)]
    assert tensors[0].keys() == weights.keys()
    for key, tensor in weights.items():
        assert torch.equal(tensors[0][key], tensors[1][key]), (name, key)
        if key.startswith("teacher/") and key.endswith(("/out", "/in")):
            continue  # factors are free up to a sign
        # a first gradient is clipped to a norm of 1; Adam divides by the size of a gradient, however small
        near = 1e-6 if key.startswith("gradient/") else 1e-4
        torch.testing.assert_close(tensors[0][key], tensor, rtol=1e-4, atol=near, msg=f"{name}: {key}")


def goes_on_alone(folder: Path) -> None:
    """What two processes with sharded weights wrote, one process reads."""
    worker = runpy.run_path(str(WORKER))
    learner = Learner(worker["make_tiny_model"](300), resolve("sdpopp", {"lr": 1e-3, "teacher": "ema"}))
    assert load_checkpoint(folder, learner).step == 2
    assert learner.step(worker["rows_of"](5), 2).step == 3


def same_attention(found: dict[str, Any]) -> None:
    """Attention on slices is that of the whole row to the bit."""
    for heads in ("4 4", "4 2"):
        assert found[f"attention {heads}"] == {"out": 0.0, "q": 0.0, "k": 0.0, "v": 0.0}
    for heads in ("4 1", "2 1"):  # keys are repeated before the exchange: their gradients add up in another order
        assert max(found[f"attention {heads}"].values()) < 1e-6
        assert found[f"attention {heads}"]["out"] == 0.0


def refusals(said: dict[str, str]) -> None:
    """What is wrong stops every process, and none waits for another."""
    assert "processes [1] of 2 were given other rows" in said["other rows"]
    assert "is nan, nothing was updated" in said["not finite"]
    assert "learn.parallel.ranks is 1 but there are 2 processes" in said["one process wanted"]
    assert "3 attention heads cannot be shared among 2" in said["odd heads"]


def test_a_launch_that_was_not_asked_for_is_refused(tiny_model: Any) -> None:
    with pytest.raises(LearnError, match="connected as NO, not MULTI_CPU"):  # accelerate without cpu=True
        check_launch(ParallelConfig(ranks=2), processes=2, kind="NO", wanted="MULTI_CPU")
    with pytest.raises(LearnError, match=r"ranks is 2 but the learner was given 1"):
        Learner(tiny_model, resolve("robust", {"parallel": {"ranks": 2}}))


def test_settings_that_make_no_sense_are_refused() -> None:
    for name in ("shard", "sequence"):
        with pytest.raises(ConfigError, match=f"learn.parallel.{name} is true with learn.parallel.ranks 1"):
            resolve("robust", {"parallel": {name: True}})
    with pytest.raises(ConfigError, match="factors are not spread"):
        resolve("robust", {"parallel": {"ranks": 2, "shard": True}, "adapter": {"rank": 4}, "teacher": "ema"})


def test_one_process_alone_sums_and_gathers_nothing(tiny_model: Any) -> None:
    alone = Ranks()
    value = torch.ones(2)
    assert (alone.size, alone.rank) == (1, 0)
    assert alone.sum(value) is value


def test_forwards_come_in_multiples_where_there_are_rows_enough() -> None:
    cost = RowCost(1.0, 0.0)
    assert [len(pack([5] * n, 10, cost, multiple=2)) for n in (1, 2, 3, 5, 8)] == [1, 2, 2, 4, 4]
