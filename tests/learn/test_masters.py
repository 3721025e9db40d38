"""A learner whose weights are bfloat16: what stays float32, that small steps are not lost, and resume to the bit."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from agentsdpo.chat import ChatFormat
from agentsdpo.envs.desk.seed import seed_path
from agentsdpo.errors import ConfigError
from agentsdpo.learn.checkpoint import load_checkpoint, save_checkpoint
from agentsdpo.learn.learner import Learner
from agentsdpo.learn.load import load_chat, load_model
from agentsdpo.learn.masters import MasterAdamW, make_optimizer
from agentsdpo.learn.model import plain_scores
from agentsdpo.learn.pack import packed_row
from agentsdpo.learn.presets import resolve
from agentsdpo.learn.rows import TrainRow

HALF: dict[str, Any] = {"dtype": "bfloat16", "gate": "off", "veto": None, "lr": 1e-3, "control_every": 0}
ADAPTER = {"adapter": {"rank": 4, "alpha": 8}}


@pytest.fixture
def rows(make_row: Callable[..., TrainRow]) -> list[TrainRow]:
    return [make_row(seed=i, episode=f"e{i}", prompt=8 + 5 * i, logp=-6.0) for i in range(4)]


def trained(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in learner.model.named_parameters() if p.requires_grad}


def test_weights_stay_bfloat16_and_all_that_is_summed_is_float32(tiny_model: Any, rows: list[TrainRow]) -> None:
    learner = Learner(tiny_model, resolve("robust", {**HALF, "forward_tokens": 64}))
    before = trained(learner)
    report = learner.step(rows, version=0)
    assert report.metrics["learn/microbatches"] > 1
    assert {p.dtype for p in learner.model.parameters()} == {torch.bfloat16}
    assert any(not torch.equal(before[name], now) for name, now in trained(learner).items())
    assert isinstance(learner.optimizer, MasterAdamW)
    for p, state in learner.optimizer.state.items():
        assert {t.dtype for t in state.values()} == {torch.float32}
        assert torch.equal(state["master"].bfloat16(), p)


def test_its_loss_and_gradient_are_those_of_float32_within_its_rounding(tiny_model: Any, rows: list[TrainRow]) -> None:
    wide = Learner(copy.deepcopy(tiny_model), resolve("robust", {**HALF, "dtype": "float32"})).step(rows, version=0)
    half = Learner(tiny_model, resolve("robust", HALF)).step(rows, version=0)
    assert half.metrics["learn/grad_norm"] == pytest.approx(wide.metrics["learn/grad_norm"], rel=0.1)
    assert half.metrics["learn/ratio/mean"] == pytest.approx(wide.metrics["learn/ratio/mean"], rel=0.05)


def test_positions_are_as_exact_as_in_a_model_that_is_loaded_in_bfloat16(
        tiny_model: Any, plain_logp: Callable[[Any, np.ndarray], np.ndarray], tmp_path: Path) -> None:
    """Rotary frequencies are no weights: rounded to bfloat16 they turned far tokens by other angles than the engine."""
    with torch.no_grad():
        for name, p in tiny_model.named_parameters():
            p.mul_(8.0 if "proj" in name else 1.0)  # so that attention looks somewhere
    tiny_model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    ids = np.random.default_rng(0).integers(0, 300, 1500)
    wanted, exact = plain_logp(loaded, ids)[1:], plain_logp(tiny_model, ids)[1:]
    learner = Learner(loaded, resolve("robust", {**HALF, "teacher": "live", "lr": 1e-6}))
    row, at = packed_row([ids]), torch.arange(len(ids) - 1)
    found = plain_scores(learner.model, row, at).log_probs().gather(1, row.ids[0, 1:, None])[:, 0].numpy()
    assert np.abs(found - exact)[1000:].mean() == pytest.approx(np.abs(wanted - exact)[1000:].mean(), rel=0.2)
    assert {b.dtype for b in learner.model.buffers()} == {torch.float32}


def test_gradients_of_micro_batches_are_summed_in_float32() -> None:
    """257 ones: in bfloat16 the sum stands still at 256."""
    p = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    MasterAdamW([p], lr=1.0, betas=(0.9, 0.999), weight_decay=0.0)
    for _ in range(257):
        (p * 1.0).sum().backward()
    assert p.grad is not None
    assert p.grad.item() == 257.0


def test_steps_are_those_of_torch_on_a_float32_copy() -> None:
    torch.manual_seed(0)
    half = torch.nn.Parameter(torch.randn(8, 3).bfloat16())
    wide = torch.nn.Parameter(half.detach().float())
    options: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.1}
    both = make_optimizer([half], **options), make_optimizer([wide], **options)
    assert type(both[1]) is torch.optim.AdamW
    for _ in range(50):
        half.grad = torch.randn(8, 3)
        wide.grad = half.grad.clone()
        for each in both:
            each.step()
    torch.testing.assert_close(both[0].state[half]["master"], wide.detach(), atol=0.0, rtol=0.0)
    assert torch.equal(half, wide.bfloat16())


@pytest.mark.parametrize("teacher", ["frozen", "snapshot", "ema"])
def test_an_adapter_is_float32_on_a_base_of_bfloat16(teacher: str, tiny_model: Any, rows: list[TrainRow]) -> None:
    learner = Learner(tiny_model, resolve("robust", {**HALF, **ADAPTER, "teacher": teacher, "refresh_every": 1}))
    for _ in range(2):
        learner.step(rows, version=0)
    kinds = {p.requires_grad: p.dtype for p in learner.model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert type(learner.optimizer) is torch.optim.AdamW
    assert {t.dtype for t in learner.policy().values()} == {torch.bfloat16}


@pytest.mark.parametrize("fields", [HALF, {**HALF, **ADAPTER}], ids=["full", "adapter"])
def test_resumes_to_the_bit(fields: dict[str, Any], tiny_model: Any, rows: list[TrainRow], tmp_path: Path) -> None:
    config, start = resolve("robust", fields), copy.deepcopy(tiny_model)
    whole = Learner(tiny_model, config)
    whole.step(rows, version=0)
    save_checkpoint(tmp_path, whole, version=0)
    whole.step(rows, version=0)
    again = Learner(start, config)
    load_checkpoint(tmp_path, again)
    again.step(rows, version=0)
    for name, tensor in trained(whole).items():
        assert torch.equal(tensor, trained(again)[name]), name
    for mine, theirs in zip(whole.parameters, again.parameters, strict=True):
        state, other = whole.optimizer.state[mine], again.optimizer.state[theirs]
        assert all(torch.equal(state[key], other[key]) for key in state)


def test_a_folder_is_loaded_in_the_dtype_asked_for() -> None:
    chat: ChatFormat = load_chat(seed_path())
    assert load_model(seed_path(), chat, dtype="bfloat16").dtype == torch.bfloat16
    assert load_model(seed_path(), chat).dtype == torch.float32


@pytest.mark.parametrize(("fields", "what"), [
    ({"dtype": "bfloat16", "teacher": "ema"}, "smaller than bfloat16 can tell"),
    ({"dtype": "bfloat16", "parallel": {"ranks": 2, "shard": True}}, "masters of spread weights"),
])
def test_what_bfloat16_cannot_carry_is_refused(fields: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        resolve("robust", fields)
