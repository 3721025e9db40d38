"""Whose weights read the hint: frozen, exponential mean, or live. One small interface.

A live teacher follows the student (its target moves with what it teaches); a frozen one cannot exceed what the base
model can do with a hint; an EMA lies between and is contaminated slowly. Dropout is off in all of them.
"""

import copy
from typing import Any, Protocol

import torch
from torch import Tensor

from agentsdpo.errors import LearnError
from agentsdpo.learn.batch import MicroBatch
from agentsdpo.learn.config import LearnConfig
from agentsdpo.learn.model import scores
from agentsdpo.learn.records import Head


class Teacher(Protocol):
    """Scores the hinted rows; no gradient ever reaches it."""

    def scores(self, batch: MicroBatch) -> Head:
        """Hidden states [N, H] at the teacher's loss positions and its output projection, both without gradient."""
        ...

    def after_step(self, student: Any) -> None:
        """Called once after every optimiser step."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Weights to put into a checkpoint; empty when the student's suffice."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from :meth:`state_dict`."""
        ...


def make_teacher(model: Any, config: LearnConfig) -> Teacher:
    """The teacher the configuration names, starting from the model's present weights."""
    if config.teacher == "live":
        return LiveTeacher(model)
    return EmaTeacher(model, config.ema_rate) if config.teacher == "ema" else FrozenTeacher(model)


class LiveTeacher:
    """The student's own present weights, reading the hint (Scaling SDPO; prime-rl's opsd)."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def scores(self, batch: MicroBatch) -> Head:
        """See :class:`Teacher`."""
        with torch.no_grad():
            head = scores(self.model, batch.teacher_ids, batch.teacher_pos)
            return Head(head.hidden, head.weight.detach())

    def after_step(self, student: Any) -> None:
        """Nothing: it is the student."""

    def state_dict(self) -> dict[str, Tensor]:
        """Empty."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Refuse the weights of another kind of teacher."""
        if state:
            raise LearnError(f"the checkpoint holds {len(state)} teacher tensors but learn.teacher is 'live'",
                             fix="resume with the teacher the run was started with")


class FrozenTeacher(LiveTeacher):
    """A copy of the initial weights, for ever."""

    def __init__(self, model: Any) -> None:
        super().__init__(copy.deepcopy(model).eval().requires_grad_(False))

    def state_dict(self) -> dict[str, Tensor]:
        """Its weights by parameter name."""
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy the weights in; every parameter must be there."""
        own = dict(self.model.named_parameters())
        if own.keys() != state.keys():
            odd = sorted(own.keys() ^ state.keys())
            raise LearnError(f"the checkpoint's teacher differs in {len(odd)} tensors, first {odd[0]!r}",
                             fix="resume with the model and the teacher the run was started with")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])


class EmaTeacher(FrozenTeacher):
    """Exponential mean of the student: after every step ``teacher += rate * (student - teacher)``.

    Args:
        model: student at the start.
        rate: share of the student taken over per step, in (0, 1].
    """

    def __init__(self, model: Any, rate: float) -> None:
        super().__init__(model)
        self.rate = rate

    def after_step(self, student: Any) -> None:
        """Move towards the student."""
        with torch.no_grad():
            for mine, theirs in zip(self.model.parameters(), student.parameters(), strict=True):
                mine.lerp_(theirs, self.rate)
