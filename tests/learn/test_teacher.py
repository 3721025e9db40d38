"""Frozen stays, EMA follows exactly, live is the student; a gradient reaches none of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from agentsdpo.errors import LearnError
from agentsdpo.learn.learner import Learner
from agentsdpo.learn.presets import resolve
from agentsdpo.learn.rows import TrainRow
from agentsdpo.learn.teacher import EmaTeacher, FrozenTeacher, LiveTeacher


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


@pytest.mark.parametrize("kind", ["live", "frozen", "ema"])
def test_scores_carry_no_gradient(kind: str, tiny_model: Any, make_row: Callable[..., TrainRow]) -> None:
    from agentsdpo.learn.batch import microbatches
    learner = learner_with(tiny_model, kind)
    head = learner.teacher.scores(microbatches(learner.admit([make_row()], 0).rows, learner.config)[0])
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
