"""What computes on the CPU computes the same on another device; see :mod:`tests.card`."""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentsdpo import assemble, audit
from agentsdpo.config import from_mapping
from agentsdpo.errors import ConfigError
from agentsdpo.learn import load, parallel
from agentsdpo.learn.config import LearnConfig
from agentsdpo.learn.learner import Learner
from agentsdpo.learn.presets import resolve
from agentsdpo.learn.rows import TrainRow
from agentsdpo.loop import train
from agentsdpo.replay.cli.view import load as load_episode
from agentsdpo.replay.store import ReplayStore
from agentsdpo.show import viewing
from agentsdpo.solve import solve
from agentsdpo.track import read_metrics
from tests.card import Carded, card, held
from tests.learn.conftest import build_row, sampled_by

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def graded(tiny_model: Any) -> list[TrainRow]:
    """Rows of one group, half of them good."""
    rows = [build_row(seed=i, episode=f"e{i}", prompt=5 + 3 * i, hint=tuple(range(30 + i, 40 + i))) for i in range(4)]
    return [replace(sampled_by(tiny_model, row), group="g", score=float(i % 2)) for i, row in enumerate(rows)]


def test_the_card_refuses_what_a_gpu_refuses() -> None:
    with card() as device:
        there, here = torch.ones(3, device=device), torch.ones(3)
        assert isinstance(there, Carded)
        assert (there + 1.0).sum().item() == 6.0
        assert there[torch.tensor([0, 2])].cpu().numpy().tolist() == [1.0, 1.0]
        with pytest.raises(RuntimeError, match="same device"):
            _ = there + here
        with pytest.raises((RuntimeError, TypeError)):
            there.numpy()
        here.copy_(there.mul_(2.0))
        assert here.tolist() == [2.0, 2.0, 2.0]


LEARNERS: dict[str, dict[str, Any]] = {
    "robust": {}, "sdpopp": {}, "sdpo": {}, "sdft": {}, "grpo": {}, "safe_agent": {"c3": 10.0},
    "conversations": {"adapter": {"rank": 4}}, "test_time": {"teacher": "trust_region"},
    "naive": {"recompute": "layers", "mlp_tokens": 16, "control_every": 1}, "opd_grpo": {"teacher": "snapshot"}}
HALF: dict[str, dict[str, Any]] = {"robust": {"adapter": {"rank": 4}, "recompute": "offload"}, "sdpopp": {}}


def both(model: Any, rows: list[TrainRow], config: LearnConfig) -> Iterator[tuple[Learner, list[dict[str, float]]]]:
    """Two steps on the CPU, and two on the card."""
    for where in (nullcontext("cpu"), card()):
        with where as device:
            learner = Learner(copy.deepcopy(model), config, device=device)
            yield learner, [learner.step(rows, 0).metrics for _ in range(2)]


@pytest.mark.parametrize("preset", LEARNERS)
def test_a_learner_takes_the_same_steps(preset: str, tiny_model: Any, graded: list[TrainRow]) -> None:
    config = resolve(preset, {"lr": 3e-4, "allow_live_lr": True, **LEARNERS[preset]})
    (here, wanted), (there, found) = both(tiny_model, graded, config)
    for one, other in zip(wanted, found, strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-4)
    assert all(isinstance(p.detach(), Carded) for p in there.model.parameters())
    for one, other in zip(held(here.model), held(there.model), strict=True):
        assert torch.allclose(one, other, atol=3e-5)


@pytest.mark.parametrize("preset", HALF)
def test_in_bfloat16_it_takes_them_but_for_rounding(preset: str, tiny_model: Any, graded: list[TrainRow]) -> None:
    config = resolve(preset, {"lr": 3e-4, "allow_live_lr": True, "dtype": "bfloat16", **HALF[preset]})
    (_, wanted), (there, found) = both(tiny_model, graded, config)
    assert found[0]["learn/gap/abs"] == pytest.approx(wanted[0]["learn/gap/abs"], rel=0.05)
    assert found[1]["learn/grad_norm"] == pytest.approx(wanted[1]["learn/grad_norm"], rel=0.2)
    assert {p.dtype for p in held(there.model)} <= {torch.bfloat16, torch.float32}


SETS = ["name='t'", "model='seed'", "staleness=1", "collect.window=512", "collect.concurrency=4",
        "collect.max_tokens=16", "collect.max_turns=2", "episodes_per_step=2", "learn.batch=2",
        "learn.max_staleness=6", "checkpoint_every=1",
        "eval.episodes=1", "eval.final_episodes=1", "eval.splits=[]", "eval.final_splits=['val']", "group=2"]


@pytest.fixture
def on_card() -> Iterator[None]:
    """The card is this process's GPU."""
    with card() as device, pytest.MonkeyPatch.context() as patch:
        for module in (assemble, audit, parallel, viewing):
            patch.setattr(module, "pick_device", lambda name="auto": device)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on the CPU."""
    out = tmp_path_factory.mktemp("here") / "run"
    train(from_mapping({"steps": 2}, SETS), out=out, mode="none")
    return out


def measured(folder: Path) -> list[dict[str, float]]:
    """Numbers of a run that are not times, of its steps and its first and last evaluation."""
    kept = ("step", "pass", "score", "learn/gap/abs", "learn/grad_norm", "learn/mismatch/mean", "learn/entropy/student")
    return [{key: row[key] for key in kept if row.get(key) is not None}
            for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == "step" or row["step"] != 1]


def test_a_run_is_played_learnt_published_and_taken_up_there(run: Path, tmp_path: Path, on_card: None) -> None:
    config = from_mapping({"steps": 2}, SETS)
    train(config.model_copy(update={"steps": 1}), out=tmp_path / "run", mode="none")
    train(config, out=tmp_path / "run", mode="none", resume=True)
    wanted, found = measured(run), measured(tmp_path / "run")
    assert len(wanted) == len(found)
    assert all(one == pytest.approx(other, rel=1e-3, abs=1e-5) for one, other in zip(wanted, found, strict=True))


def test_a_store_is_audited_and_looked_at_there(run: Path, on_card: None) -> None:
    (verdict,) = audit.audit_store(from_mapping({}, SETS), run / "replay", rows=2, tasks=1)
    assert verdict.empty_gap < 1e-4 < verdict.gap.estimate
    assert verdict.lift is not None
    store = ReplayStore.open(run / "replay", create=False)
    view = store.snapshot()
    episode, scores = viewing.Scorer(viewing.Wanted("seed")).score(
        load_episode(store, view, next(iter(view.rows)).episode_id))
    assert scores[0] is not None
    behaviour = episode.rows[0].branch.logprobs
    seen = np.isfinite(behaviour) & np.isfinite(scores[0].student)
    np.testing.assert_allclose(scores[0].student[seen], behaviour[seen], atol=0.01)


def test_one_task_is_solved_there(on_card: None) -> None:
    found = solve(from_mapping({"preset": "test_time"}, SETS), ("train", 0), attempts=4, updates=1)
    assert found.steps == 1


def test_a_device_that_is_not_there_is_said() -> None:
    assert load.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"the device is 'cuda:64' but torch .* finds \d+ GPUs"):
        load.pick_device("cuda:64")
    with pytest.raises(ConfigError, match=r"collect\.device"):
        from_mapping({}, ["collect.device='gpu'"])
