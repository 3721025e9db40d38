"""One program over several processes: the first one runs it, the others do with their learners what its learner does.

Only the first process has a run folder, a store and a registry; the rows of a step are sent to the others, so that
these need neither the store nor the same sampler. They wait in :func:`obey` for the next thing to do.
"""

import logging
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from torch import Tensor

from agentsdpo.errors import AgentSdpoError, LearnError, NotFinite, NothingToLearn
from agentsdpo.learn.checkpoint import Restored, load_checkpoint, save_checkpoint, weights_of
from agentsdpo.learn.learner import Learner, StepReport
from agentsdpo.learn.rows import TrainRow
from agentsdpo.learn.teacher import GatedTeacher

_log = logging.getLogger(__name__)
SAME = (NothingToLearn, NotFinite)
"""Errors that all processes meet at once and get over: they leave every learner as it was."""


class Together:
    """The learners of all processes, led by that of the first. One process alone is led the same way.

    Args:
        learner: of the first process.
    """

    def __init__(self, learner: Learner) -> None:
        self.learner = learner

    def step(self, rows: list[TrainRow], version: int) -> StepReport:
        """:meth:`Learner.step`."""
        return self._do("step", rows, version)

    def restrain(self, *, lr_factor: float, hold_teacher: bool) -> None:
        """:meth:`Learner.restrain`."""
        self._do("restrain", lr_factor=lr_factor, hold_teacher=hold_teacher)

    def policy(self) -> dict[str, Tensor]:
        """:meth:`Learner.policy`."""
        return self._do("policy")

    def adapter(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """:meth:`Learner.adapter`."""
        return self._do("adapter")

    def probed(self, score: float, at: Path | None = None) -> None:
        """Tell the teacher how well the student acts: with its present weights, or with those of a checkpoint."""
        self._do("probed", score, at)

    def count(self, steps: int) -> None:
        """Set the number of optimiser steps done."""
        self._do("count", steps)

    def save(self, root: Path, *, version: int, sampler: dict[str, Any], keep: int, keep_every: int,
             spare: Collection[int]) -> Path:
        """:func:`~agentsdpo.learn.checkpoint.save_checkpoint`."""
        return self._do("save", root, version=version, sampler=sampler, keep=keep, keep_every=keep_every,
                        spare=tuple(spare))

    def load(self, folder: Path) -> Restored:
        """:func:`~agentsdpo.learn.checkpoint.load_checkpoint`; every process reads the files."""
        return self._do("load", folder)

    @contextmanager
    def led(self) -> Iterator[None]:
        """Let the other processes end with the block; after a fault, whoever launched them all stops them.

        Then they may wait for something else than the next word.
        """
        try:
            yield
        except (AgentSdpoError, KeyboardInterrupt):
            _send(self.learner, None)
            raise
        _send(self.learner, None)

    def _do(self, name: str, *args: Any, **more: Any) -> Any:
        _send(self.learner, (name, args, more))
        return _act(self.learner, name, *args, **more)


def obey(learner: Learner) -> NoReturn:
    """Do what the first process says until that is done, then end this process.

    Ctrl-C is the first one's business: it stops between two steps and says so.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while (told := _receive(learner)) is not None:
        name, args, more = told
        with suppress(*SAME):  # the first process met the same, and says it
            _act(learner, name, *args, **more)
    sys.exit(0)


def _probed(learner: Learner, score: float, at: Path | None) -> None:
    """What a gated teacher copies must be what was probed, however far the student has come since."""
    try:
        with weights_of(at, learner) if at and isinstance(learner.teacher, GatedTeacher) else nullcontext():
            learner.teacher.probed(learner.model, score, length_safe=True)
    except LearnError as error:
        _log.warning("%s; the teacher stays as it is", error)


def _count(learner: Learner, steps: int) -> None:
    learner.step_count = steps


def _save(learner: Learner, root: Path, **about: Any) -> Path:
    return save_checkpoint(root, learner, **about)


def _load(learner: Learner, folder: Path) -> Restored:
    return load_checkpoint(folder, learner)


OWN = ("step", "restrain", "policy", "adapter")
OTHERS: Mapping[str, Callable[..., Any]] = {"probed": _probed, "count": _count, "save": _save, "load": _load}
"""With :data:`OWN`, the learner's own methods, all that the first process may ask for."""


def _act(learner: Learner, name: str, *args: Any, **more: Any) -> Any:
    return getattr(learner, name)(*args, **more) if name in OWN else OTHERS[name](learner, *args, **more)


def _send(learner: Learner, told: tuple[str, tuple[Any, ...], dict[str, Any]] | None) -> None:
    if learner.ranks.size > 1:
        dist.broadcast_object_list([told], src=0, group=learner.ranks.group)


def _receive(learner: Learner) -> tuple[str, tuple[Any, ...], dict[str, Any]] | None:
    box: list[Any] = [None]
    dist.broadcast_object_list(box, src=0, group=learner.ranks.group)
    return box[0]
