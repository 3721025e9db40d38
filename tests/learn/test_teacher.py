"""Frozen stays, EMA follows exactly, live is the student; a gradient reaches none of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from agentsdpo.errors import LearnError
from agentsdpo.learn.batch import microbatches
from agentsdpo.learn.learner import Learner
from agentsdpo.learn.model import scores
from agentsdpo.learn.presets import resolve
from agentsdpo.learn.records import sampled_logp
from agentsdpo.learn.rows import TrainRow
from agentsdpo.learn.teacher import (
    EmaTeacher,
    FrozenTeacher,
    GatedTeacher,
    LiveTeacher,
    SnapshotTeacher,
    TrustRegionTeacher,
)


def named(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def learner_with(model: Any, teacher: str, **fields: Any) -> Learner:
    return Learner(model, resolve("sdft", {"teacher": teacher, "lr": 1e-3, "allow_live_lr": True, **fields}))


def test_a_frozen_teacher_never_moves(tiny_model: Any, make_row: Callable[..., TrainRow]) -> None:
    start, learner = named(tiny_model), learner_with(tiny_model, "frozen")
    for _ in range(2):
        learner.step([make_row()], 0)
    kept = learner.teacher.state_dict()
    assert all(torch.equal(kept[name], start[name]) for name in start)
    assert not torch.equal(named(tiny_model)["model.embed_tokens.weight"], start["model.embed_tokens.weight"])


def test_an_ema_teacher_is_the_mean_it_says(tiny_model: Any, make_row: Callable[..., TrainRow]) -> None:
    expected, learner = named(tiny_model), learner_with(tiny_model, "ema", ema_rate=0.25)
    for _ in range(2):
        learner.step([make_row()], 0)
        expected = {name: 0.75 * old + 0.25 * named(tiny_model)[name] for name, old in expected.items()}
    for name, tensor in learner.teacher.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-7, rtol=1e-5)


def test_a_live_teacher_is_the_student_and_stores_nothing(tiny_model: Any, make_row: Callable[..., TrainRow]) -> None:
    learner = learner_with(tiny_model, "live")
    learner.step([make_row()], 0)
    assert isinstance(learner.teacher, LiveTeacher)
    assert learner.teacher.model is tiny_model
    assert learner.teacher.state_dict() == {}


@pytest.mark.parametrize("kind", ["live", "frozen", "ema", "snapshot", "gated", "trust_region"])
def test_scores_carry_no_gradient(kind: str, tiny_model: Any, make_row: Callable[..., TrainRow]) -> None:
    learner = learner_with(tiny_model, kind)
    head = learner.teacher.scores(microbatches(learner.admit([make_row()], 0).rows, learner.config, learner.cost)[0])
    assert not head.hidden.requires_grad
    assert not head.weight.requires_grad


def test_teachers_load_their_own_state_and_refuse_another(tiny_model: Any) -> None:
    teacher, other = FrozenTeacher(tiny_model), EmaTeacher(tiny_model, 0.5)
    with torch.no_grad():
        tiny_model.lm_head.weight.add_(1.0)
    other.load_state_dict(FrozenTeacher(tiny_model).state_dict())
    assert torch.equal(other.state_dict()["model.embed_tokens.weight"], tiny_model.lm_head.weight)
    with pytest.raises(LearnError, match="teacher is 'live'"):
        LiveTeacher(tiny_model).load_state_dict(teacher.state_dict())
    with pytest.raises(LearnError, match="differs in"):
        teacher.load_state_dict({})


def same(model: Any, tensors: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensors[name], p) for name, p in model.named_parameters())


def test_a_snapshot_is_copied_by_the_clock_and_counts_on_after_a_resume(
        tiny_model: Any, make_row: Callable[..., TrainRow]) -> None:
    start, learner = named(tiny_model), learner_with(tiny_model, "snapshot", refresh_every=3)
    teacher = learner.teacher
    assert isinstance(teacher, SnapshotTeacher)
    for _ in range(2):
        learner.step([make_row()], 0)
    assert same(teacher.model, start)
    again = SnapshotTeacher(tiny_model, 3)
    again.load_state_dict({name: tensor.clone() for name, tensor in teacher.state_dict().items()})
    assert (again.since, again.copies) == (2, 0)
    learner.step([make_row()], 0)
    assert (teacher.since, teacher.copies) == (0, 1)
    assert same(teacher.model, named(tiny_model))
    assert not teacher.model.lm_head.weight.requires_grad


def test_a_gated_teacher_refuses_inside_its_isolation_period_and_without_proof(tiny_model: Any) -> None:
    start, teacher = named(tiny_model), GatedTeacher(tiny_model, 5)
    with torch.no_grad():
        tiny_model.lm_head.weight.add_(1.0)
    assert teacher.probed(tiny_model, 0.2, length_safe=True) == "first"
    for _ in range(4):
        teacher.after_step(tiny_model)
    assert teacher.probed(tiny_model, 0.9, length_safe=True) == "isolated"
    teacher.after_step(tiny_model)
    assert teacher.probed(tiny_model, 0.2, length_safe=True) == "score"
    assert teacher.probed(tiny_model, 0.9, length_safe=False) == "length"
    assert same(teacher.model, start), "no refusal may touch the weights"
    saved = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    assert teacher.probed(tiny_model, 0.9, length_safe=True) == "copied"
    assert same(teacher.model, named(tiny_model))
    assert (teacher.since, teacher.copies) == (0, 1)
    teacher.load_state_dict(saved)
    assert same(teacher.model, start), "a roll back restores the teacher too"
    for _ in range(5):
        teacher.after_step(tiny_model)
    assert teacher.probed(tiny_model, 0.3, length_safe=True) == "copied", "and the score it has to beat"
    for _ in range(5):
        teacher.after_step(tiny_model)
    assert teacher.probed(tiny_model, 0.3, length_safe=True) == "score"


@pytest.mark.parametrize("trust", [0.0, 0.05, 1.0])
def test_a_trust_region_mixes_logits(trust: float, tiny_model: Any, make_row: Callable[..., TrainRow]) -> None:
    learner = learner_with(tiny_model, "trust_region", trust=trust)
    learner.step([make_row()], 0)
    teacher = learner.teacher
    assert isinstance(teacher, TrustRegionTeacher)
    (batch,) = microbatches(learner.admit([make_row()], 0).rows, learner.config, learner.cost)
    with torch.no_grad():
        frozen, live = (scores(model, batch.teacher, batch.teacher_pos).logits()
                        for model in (teacher.model, tiny_model))
    assert not torch.allclose(frozen, live, atol=1e-4)
    torch.testing.assert_close(teacher.scores(batch).logits(), torch.lerp(frozen, live, trust), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["live", "frozen", "ema", "snapshot", "trust_region"])
def test_only_a_gated_teacher_listens_to_probes(kind: str, tiny_model: Any) -> None:
    learner = learner_with(tiny_model, kind)
    before = {name: tensor.clone() for name, tensor in learner.teacher.state_dict().items()}
    assert learner.teacher.probed(tiny_model, 1.0, length_safe=True) == "never"
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.teacher.state_dict().items())


def test_the_reference_is_the_initial_weights_without_hint_or_refused(
        tiny_model: Any, make_row: Callable[..., TrainRow]) -> None:
    learner = learner_with(tiny_model, "frozen", beta_kl=0.01)
    (batch,) = microbatches(learner.admit([make_row()], 0).rows, learner.config, learner.cost)
    before = sampled_logp(learner.teacher.reference(batch), batch.tokens, rows=2)
    first = learner.step([make_row()], 0).metrics["learn/loss"]
    assert torch.equal(sampled_logp(learner.teacher.reference(batch), batch.tokens, rows=2), before)
    assert isinstance(learner.teacher, FrozenTeacher)
    again = sampled_logp(scores(learner.teacher.model, batch.student, batch.student_pos), batch.tokens)
    torch.testing.assert_close(before, again, atol=1e-6, rtol=1e-6)
    assert first != learner.step([make_row()], 0).metrics["learn/loss"]
    with pytest.raises(LearnError, match="does not hold the initial weights"):
        learner_with(tiny_model, "live").teacher.reference(batch)
