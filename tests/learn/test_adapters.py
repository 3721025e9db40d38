"""Adapters: a frozen base that teaches without a copy, a mean of products, and weights any engine can load."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from agentsdpo.config import from_mapping
from agentsdpo.errors import ModelError
from agentsdpo.learn import loss as losses
from agentsdpo.learn.adapters import STUDENT, AdapterCopy, AdapterOff, _layers, add_adapter, merged_weights
from agentsdpo.learn.batch import microbatches
from agentsdpo.learn.checkpoint import load_checkpoint, save_checkpoint
from agentsdpo.learn.config import AdapterConfig, LearnConfig
from agentsdpo.learn.learner import Learner
from agentsdpo.learn.presets import resolve
from agentsdpo.learn.rows import TrainRow
from agentsdpo.learn.weights import Bounds

ADAPTER = {"rank": 4, "alpha": 8}


def config(preset: str = "robust", **fields: Any) -> LearnConfig:
    return resolve(preset, {"lr": 1e-3, "adapter": ADAPTER, "gate": "off", "veto": None, **fields})


def batch_of(make_row: Callable[..., TrainRow], n: int = 4) -> list[TrainRow]:
    return [make_row(seed=i, episode=f"e{i}", prompt=5 + i, logp=-6.0) for i in range(n)]


def product(model: Any, name: str) -> torch.Tensor:
    return _layers(model)[name].get_delta_weight(STUDENT).detach().double()


def held(copy_: AdapterCopy, name: str) -> torch.Tensor:
    tensors = copy_.tensors()
    return tensors[f"{name}/out"].double() @ tensors[f"{name}/in"].double()


def test_a_step_moves_the_adapter_alone_and_never_forms_a_gradient_of_the_head(
        tiny_model: Any, make_row: Callable[..., TrainRow], monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: p.detach().clone() for name, p in tiny_model.named_parameters()}
    monkeypatch.setattr(losses, "dense_loss", None)  # a frozen head is chunked however few the tokens are
    learner = Learner(tiny_model, config())
    assert all(f".{STUDENT}." in name for name, p in tiny_model.named_parameters() if p.requires_grad)
    learner.step(batch_of(make_row), 0)
    learner.step(batch_of(make_row), 0)
    for name, p in tiny_model.named_parameters():
        if ".lora_" in name:
            assert p.requires_grad
            assert p.grad is None
        else:
            assert torch.equal(p, before[name.replace(".base_layer", "")]), name
    assert all(product(tiny_model, name).abs().max() > 0 for name in _layers(tiny_model))


def test_loss_and_gradient_are_those_of_the_merged_model(tiny_model: Any, make_row: Callable[..., TrainRow]) -> None:
    """``dL/dB = s dL/dW A'`` and ``dL/dA = s B' dL/dW``, with ``dL/dW`` from full fine-tuning of the merged weights."""
    plain = copy.deepcopy(tiny_model)
    learner = Learner(tiny_model, config())
    learner.step(batch_of(make_row), 0)
    plain.load_state_dict(learner.policy())
    full = Learner(plain, config(adapter={}))
    (batch,) = microbatches(learner.admit(batch_of(make_row), 0).rows, learner.config, learner.cost)
    bounds = Bounds()  # robust clips no gap
    full.teacher = learner.teacher
    (a, _), (b, _) = learner.objective(batch, bounds), full.objective(batch, bounds)
    a.backward()
    b.backward()
    assert a.item() == pytest.approx(b.item(), rel=1e-4)
    for name, layer in _layers(tiny_model).items():
        grad, scale = plain.get_submodule(name).weight.grad, layer.scaling[STUDENT]
        left, right = layer.lora_B[STUDENT].weight, layer.lora_A[STUDENT].weight
        torch.testing.assert_close(left.grad, scale * grad @ right.t(), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(right.grad, scale * left.t() @ grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["frozen", "trust_region", "snapshot", "gated", "ema", "live"])
def test_teachers_of_an_adapter_are_those_of_full_weights_at_the_start(
        name: str, tiny_model: Any, make_row: Callable[..., TrainRow]) -> None:
    plain, fields = copy.deepcopy(tiny_model), {"teacher": name, "allow_live_lr": True}
    one, two = Learner(tiny_model, config(**fields)), Learner(plain, config(adapter={}, **fields))
    assert name == "live" or not any(isinstance(part, torch.nn.Module) and part is not tiny_model
                                     for part in vars(one.teacher).values()), "no second model"
    (batch,) = microbatches(one.admit(batch_of(make_row), 0).rows, one.config, one.cost)
    torch.testing.assert_close(one.teacher.scores(batch).log_probs(), two.teacher.scores(batch).log_probs(),
                               rtol=1e-5, atol=1e-5)


def test_a_frozen_teacher_is_the_base_whatever_the_adapter_learns(
        tiny_model: Any, make_row: Callable[..., TrainRow]) -> None:
    learner = Learner(tiny_model, config(teacher="frozen", beta_kl=0.01))
    (batch,) = microbatches(learner.admit(batch_of(make_row), 0).rows, learner.config, learner.cost)
    before = learner.teacher.scores(batch).hidden, learner.teacher.reference(batch).hidden
    for _ in range(2):
        learner.step(batch_of(make_row), 0)
    after = learner.teacher.scores(batch).hidden, learner.teacher.reference(batch).hidden
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert isinstance(learner.teacher.held, AdapterOff)  # type: ignore[attr-defined]
    assert learner.teacher.state_dict() == {}
    assert all(p.requires_grad for name, p in tiny_model.named_parameters() if ".lora_" in name), "switched on again"


def test_the_mean_is_of_the_product_and_not_of_the_factors(tiny_model: Any, make_row: Callable[..., TrainRow]) -> None:
    learner = Learner(tiny_model, config(teacher="ema", ema_rate=0.05))
    layers = list(_layers(tiny_model))
    exact = {name: product(tiny_model, name) for name in layers}
    factors = {name: [p.weight.detach().double() for p in (_layers(tiny_model)[name].lora_B[STUDENT],
                                                           _layers(tiny_model)[name].lora_A[STUDENT])]
               for name in layers}
    for step in range(25):
        learner.step(batch_of(make_row, 2 + step % 3), 0)
        for name, layer in _layers(tiny_model).items():
            exact[name] = 0.95 * exact[name] + 0.05 * product(tiny_model, name)
            now = layer.lora_B[STUDENT].weight.detach().double(), layer.lora_A[STUDENT].weight.detach().double()
            factors[name] = [0.95 * old + 0.05 * new for old, new in zip(factors[name], now, strict=True)]
    teacher = learner.teacher.held  # type: ignore[attr-defined]
    assert isinstance(teacher, AdapterCopy)
    for name in layers:
        size = exact[name].norm()
        assert (held(teacher, name) - exact[name]).norm() / size < 1e-3, name
        apart = 2.0 * factors[name][0] @ factors[name][1]  # alpha / rank
        assert (apart - exact[name]).norm() / size > 0.02, "the mistake would be seen"


def test_the_mean_is_exact_while_its_rank_holds_it(tiny_model: Any) -> None:
    add_adapter(tiny_model, AdapterConfig(rank=4))
    teacher = AdapterCopy(tiny_model, ranks=4)
    name = next(iter(_layers(tiny_model)))
    exact = torch.zeros_like(product(tiny_model, name))
    for seed in range(4):  # three jumps to unrelated products fill the rank beside what was left of the start, zero
        if seed:
            for layer in _layers(tiny_model).values():
                torch.nn.init.normal_(layer.lora_B[STUDENT].weight)
                torch.nn.init.normal_(layer.lora_A[STUDENT].weight)
        teacher.lean(tiny_model, 0.3)
        exact = 0.7 * exact + 0.3 * product(tiny_model, name)
    torch.testing.assert_close(held(teacher, name), exact, rtol=1e-4, atol=1e-4)


def test_a_snapshot_is_the_student_at_its_last_copy(tiny_model: Any, make_row: Callable[..., TrainRow]) -> None:
    learner = Learner(tiny_model, config(teacher="snapshot", refresh_every=2))
    (batch,) = microbatches(learner.admit(batch_of(make_row), 0).rows, learner.config, learner.cost)
    learner.step(batch_of(make_row), 0)
    start = learner.teacher.scores(batch).hidden
    learner.step(batch_of(make_row), 0)
    name = next(iter(_layers(tiny_model)))
    torch.testing.assert_close(held(learner.teacher.held, name), product(tiny_model, name))  # type: ignore[attr-defined]
    assert not torch.allclose(learner.teacher.scores(batch).hidden, start)


def test_published_weights_load_into_a_model_without_adapter(
        tiny_model: Any, make_row: Callable[..., TrainRow]) -> None:
    plain = copy.deepcopy(tiny_model)
    learner = Learner(tiny_model, config())
    learner.step(batch_of(make_row), 0)
    published = learner.policy()
    assert published.keys() == plain.state_dict().keys()
    plain.load_state_dict(published)
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, tiny_model(input_ids=ids, use_cache=False).logits,
                                   rtol=1e-4, atol=1e-5)
    assert published["lm_head.weight"].data_ptr() == published["model.embed_tokens.weight"].data_ptr(), "still tied"


@pytest.mark.parametrize("teacher", ["frozen", "ema", "snapshot"])
def test_resume_is_bit_for_bit_and_small(teacher: str, tiny_model: Any, tmp_path: Path,
                                         make_row: Callable[..., TrainRow]) -> None:
    stranger, size = copy.deepcopy(tiny_model), sum(p.numel() for p in tiny_model.parameters())
    learner = Learner(tiny_model, config(teacher=teacher, refresh_every=2))
    for _ in range(3):
        learner.step(batch_of(make_row), 0)
    folder = save_checkpoint(tmp_path, learner, version=3)
    assert (folder / "weights.safetensors").stat().st_size < size, "a quarter of the float32 base, at most"
    again = Learner(stranger, config(teacher=teacher, refresh_every=2))
    load_checkpoint(tmp_path, again)
    for _ in range(2):
        assert again.step(batch_of(make_row), 3).metrics == learner.step(batch_of(make_row), 3).metrics
    for (name, p), q in zip(tiny_model.named_parameters(), stranger.parameters(), strict=True):
        assert torch.equal(p, q), name
    for name, tensor in learner.teacher.state_dict().items():
        assert torch.equal(tensor, again.teacher.state_dict()[name]), name


def test_two_learners_start_with_the_same_adapter(tiny_model: Any) -> None:
    other = copy.deepcopy(tiny_model)
    for seed, model in enumerate((tiny_model, other)):
        torch.manual_seed(seed)
        add_adapter(model, AdapterConfig(rank=4))
    for p, q in zip(tiny_model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(("targets", "match"), [
    (("self_attn",), "no adapter can be put on"), (("lm_head",), "output layer"), (("embed_tokens",), "embedding"),
    (("nowhere",), "names 'nowhere', and no layer"), (("q_proj", "v_prj"), "names 'v_prj'"),
    (("q_proj", "all-linear"), "names 'all-linear'")])
def test_targets_that_make_no_sense_are_refused(targets: tuple[str, ...], match: str, tiny_model: Any) -> None:
    with pytest.raises(ModelError, match=match):
        add_adapter(tiny_model, AdapterConfig(rank=4, targets=targets))


def test_some_layers_alone(tiny_model: Any) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    add_adapter(tiny_model, AdapterConfig(rank=2, targets=("q_proj", "v_proj")))
    assert sorted({name.rsplit(".", 1)[-1] for name in _layers(tiny_model)}) == ["q_proj", "v_proj"]
    merged = merged_weights(tiny_model)
    assert all(torch.equal(merged[name], tensor) for name, tensor in before.items()), "B is zero"


@pytest.mark.slow
def test_the_shipped_model_learns_with_an_adapter(tmp_path: Path) -> None:
    """A whole run: collect with published weights, learn, collect again. Seeded: it comes out the same every time."""
    from agentsdpo.loop import train
    from agentsdpo.track import read_metrics
    run = from_mapping({"name": "t", "steps": 6}, [
        "learn.adapter.rank=16", "learn.lr=3e-3", "learn.control_every=0", "collect.window=512", "learn.batch=16",
        "collect.concurrency=16", "collect.max_tokens=64", "episodes_per_step=16", "eval.episodes=2", "eval.every=6",
        "eval.splits=['val']", "eval.final_splits=['val']", "eval.final_episodes=2", "checkpoint_every=6"])
    train(run, out=tmp_path / "run", mode="none")
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "step"]

    def mean(key: str, part: slice) -> float:
        return sum(row[key] for row in rows[part]) / len(rows[part])

    assert mean("learn/loss", slice(-3, None)) < 0.92 * mean("learn/loss", slice(3))
    assert mean("collect/score/mean", slice(-3, None)) > mean("collect/score/mean", slice(3)) + 0.05
    assert max(row["learn/mismatch/max"] for row in rows) < 1e-3, "the engine samples from what the learner learnt"
