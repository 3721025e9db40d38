"""Weights a teacher keeps to itself: a second model here, factors of an adapter in ``learn/adapters.py``."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor


class Held(Protocol):
    """Starts as the student's present weights. ``model`` computes with them inside :meth:`reading`."""

    model: Any

    def reading(self) -> AbstractContextManager[None]:
        """While it lasts, ``model`` is the teacher."""
        ...

    def take(self, student: Any) -> None:
        """Become the student as it is now."""
        ...

    def lean(self, student: Any, rate: float) -> None:
        """Become ``(1 - rate) self + rate student``; ``rate`` in (0, 1]."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold, by name, to be overwritten in place; empty when the student's suffice."""
        ...


class FullCopy:
    """A second model."""

    def __init__(self, model: Any) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Nothing to switch: it is a model of its own."""
        yield

    @torch.no_grad()
    def take(self, student: Any) -> None:
        """See :class:`Held`."""
        for mine, theirs in zip(self.model.parameters(), student.parameters(), strict=True):
            mine.copy_(theirs)

    @torch.no_grad()
    def lean(self, student: Any, rate: float) -> None:
        """See :class:`Held`."""
        for mine, theirs in zip(self.model.parameters(), student.parameters(), strict=True):
            mine.lerp_(theirs, rate)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters by name."""
        return {name: p.detach() for name, p in self.model.named_parameters()}
