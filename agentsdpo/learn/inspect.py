"""What student and teacher think of every loss token of a branch: for people to look at, nothing is trained."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agentsdpo.learn.batch import collate
from agentsdpo.learn.config import LearnConfig
from agentsdpo.learn.model import scores
from agentsdpo.learn.records import Head, sampled_logp
from agentsdpo.learn.rows import LossRow
from agentsdpo.learn.sdpo import objective
from agentsdpo.learn.weights import Bounds

TOP = 5
"""Likeliest next tokens that are shown of either side."""


@dataclass(frozen=True)
class Inspection:
    """Of one row, n loss tokens.

    ``position`` int64[n] in the branch; ``student``, ``teacher`` float32[n] log-probs of the sampled token, nats;
    ``push`` float32[n] what the token adds to the step, as the objective weighs it; ``student_top``, ``teacher_top``
    the likeliest ids int64[n, 5] with their log-probs float32[n, 5].
    """

    position: np.ndarray
    student: np.ndarray
    teacher: np.ndarray
    push: np.ndarray
    student_top: tuple[np.ndarray, np.ndarray]
    teacher_top: tuple[np.ndarray, np.ndarray]


def inspect_row(model: Any, row: LossRow, config: LearnConfig, *, teacher: Any = None) -> Inspection:
    """Score one admitted row.

    Args:
        model: the student, prepared for packed rows.
        row: with its hint.
        config: form, weights and gates of the objective.
        teacher: another model; the student itself, hinted, when not given.
    """
    device = next(model.parameters()).device
    batch = collate([row], [np.ones(len(row.position), np.float32)], device)
    with torch.no_grad():
        ours = scores(model, batch.student, batch.student_pos)
        theirs = scores(teacher or model, batch.teacher, batch.teacher_pos)
        tops = [_top(head) for head in (ours, theirs)]
    student = Head(ours.hidden.detach().requires_grad_(), ours.weight.detach())
    teacher_head = Head(theirs.hidden.detach(), theirs.weight.detach())
    _, stats = objective(student, teacher_head, batch.tokens, config, Bounds())
    return Inspection(position=row.position, student=_plain(stats.student_logp), teacher=_plain(stats.teacher_logp),
                      push=_plain(stats.push), student_top=tops[0], teacher_top=tops[1])


def both_logps(model: Any, row: LossRow) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs of the sampled tokens of one row, without and with its hint, float32[n] each."""
    batch = collate([row], [np.ones(len(row.position), np.float32)], next(model.parameters()).device)
    with torch.no_grad():
        student, teacher = (_plain(sampled_logp(scores(model, packed, at), batch.tokens)) for packed, at in (
            (batch.student, batch.student_pos), (batch.teacher, batch.teacher_pos)))
    return student, teacher


def _top(head: Head, rows: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest ids and their log-probs, ``rows`` of logits at a time."""
    found = [Head(hidden, head.weight).log_probs().topk(min(TOP, head.weight.shape[0])) for hidden in
             head.hidden.split(rows)]
    values = torch.cat([each.values for each in found]).float().cpu().numpy()
    return torch.cat([each.indices for each in found]).cpu().numpy(), values


def _plain(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy()
