"""The learner's benchmark measures what it says: peers compute the same, memory is of the work alone."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from agentsdpo.benchmarks.perf import gpu, learner
from agentsdpo.benchmarks.perf.fresh import Cost, fresh, in_turn
from agentsdpo.errors import AgentSdpoError

CASES = "agentsdpo.benchmarks.perf."
SHAPE: dict[str, Any] = {"vocabulary": 1000, "width": 32, "layers": 2, "mlp": 64, "head": 8}
EPISODES: dict[str, Any] = {"seed": 0, "turns": [2, 4], "sampled": 5, "tool": 8, "prompt": 9, "hint": 6}


@pytest.fixture(autouse=True)
def cases_of_this_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes find this file, too."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def test_memory_is_that_of_the_work_alone_and_time_that_of_the_process() -> None:
    cost = fresh("test_perf_learner:filled", mib=64)
    assert 60 < cost.peak_mib < 90
    assert cost.whole_mib > cost.peak_mib
    assert cost.value == 64.0


def filled(mib: int) -> Any:
    """A case: writes to so much memory, after preparations that took as much and gave it back."""
    held = torch.ones(mib << 18)
    del held
    return lambda: torch.ones(mib << 18).sum().item() / (1 << 18)


def test_a_case_that_fails_says_so() -> None:
    with pytest.raises(subprocess.CalledProcessError):
        fresh("test_perf_learner:absent")


@pytest.mark.slow
def test_all_sides_of_the_loss_agree() -> None:
    about = {"n": 24, "width": 16, "vocabulary": 500, "trainable": True, "dtype": "float32"}
    names = ("ours", "own_dense", "trl_dense", "trl_chunked")
    learner._agree(in_turn({name: (f"{CASES}loss_cases:{name}", about) for name in names}, 1, runs=1))


@pytest.mark.slow
def test_an_episode_scores_as_its_turns_do() -> None:
    about = {"shape": SHAPE, "turns": 3, "sampled": 4, "tool": 6}
    learner._agree({name: fresh(f"{CASES}score_cases:{name}", runs=1, **about) for name in ("episode", "per_turn")})


@pytest.mark.slow
@pytest.mark.parametrize("support", ["full", "student"])
def test_a_step_of_the_peer_is_the_same_step(support: str) -> None:
    about = {"shape": SHAPE, "episodes": EPISODES, "support": support, "top_k": 20}
    learner._agree({"mine": fresh(f"{CASES}step_cases:ours", runs=1, forward_tokens=64, **about),
                    "peer": fresh(f"{CASES}step_cases:trl", runs=1, batch=4, **about)})


@pytest.mark.slow
def test_a_long_row_gives_the_dense_loss() -> None:
    about = {"shape": SHAPE, "context": 512, "share": 0.25}
    learner._agree({"mine": fresh(f"{CASES}step_cases:long_ours", runs=1, forward_tokens=4096, **about),
                    "peer": fresh(f"{CASES}step_cases:long_dense", runs=1, **about)})


def test_sides_that_computed_different_things_are_not_compared() -> None:
    cost = Cost(1.0, 1.0, 1.0, 1.0, 1.0)
    learner._agree({"a": cost, "b": Cost(2.0, 2.0, 2.0, 2.0, 1.001)})
    with pytest.raises(AgentSdpoError, match="computed different things"):
        learner._agree({"a": cost, "b": Cost(1.0, 1.0, 1.0, 1.0, 1.1)})


def test_without_cuda_the_gpu_benchmark_says_so_in_one_sentence(capsys: pytest.CaptureFixture[str],
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "no CUDA device is at hand: these figures need one.\n"
    with pytest.raises(SystemExit):
        gpu.main(["--tokens", "1000"])


@pytest.mark.parametrize("name", ["0.6B", "4B"])
def test_what_the_gpu_benchmark_measures_runs_in_bfloat16_anywhere(name: str) -> None:
    figure = gpu.measure(name, 1024, "cpu", {**SHAPE, "heads": 4, "groups": 2}, steps=1)
    assert figure.value > 0.0
    assert figure.detail["loss_tokens"] == 256
    assert figure.detail["dtype"] == "bfloat16"
    assert "unknown" in gpu.table([figure])
