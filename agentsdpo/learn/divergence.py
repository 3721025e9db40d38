"""Divergences between student and teacher at each loss token: pure functions. Shapes: N tokens, V ids, B buckets.

With ``p`` the student's and ``q`` the teacher's distribution (only the student's logits ``z`` get a gradient)::

    beta = 0      D = KL(q||p)                                              dD/dz = p - q           forward
    beta = 1      D = KL(p||q),            l = log p - log q                dD/dz = p (l - <p,l>)   reverse
    0 < beta < 1  M = (1-beta) p + beta q
                  D = beta KL(q||M) + (1-beta) KL(p||M)                     generalised JSD
                  c = (1-beta)(log p - log M)                               dD/dz = p (c - <p,c>)

The JSD vanishes as beta goes to 0 or 1 while the ends are whole KLs; ``jsd_scale="unit"`` divides it by beta(1-beta),
which makes the family continuous. Conventions of TRL's generalised JSD (GKD, 2306.13649, section 3).
"""

from dataclasses import dataclass
from math import log
from typing import Literal

import torch
from torch import Tensor

Support = Literal["full", "student", "teacher", "union"]
Scale = Literal["raw", "unit"]

ABSENT = -100.0
"""Log-probability written on both sides of a bucket that does not exist: equal there, so it adds exactly zero."""


@dataclass(frozen=True)
class Divergence:
    """Per loss token: ``value`` float[N] in nats (with gradient), mass off the support float[N] in [0, 1] per side."""

    value: Tensor
    tail_student: Tensor
    tail_teacher: Tensor


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities in float32 at least, whatever the logits' type. Shape [N, V] to [N, V]."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide, dim=-1)


def between(log_p: Tensor, log_q: Tensor, *, beta: float, jsd_scale: Scale = "unit") -> Tensor:
    """Divergence of two log-distributions over the same buckets, summed over the last dimension.

    Args:
        log_p: student, [N, B], normalised.
        log_q: teacher, [N, B], normalised.
        beta: 0 forward KL, 1 reverse KL, between: JSD.
        jsd_scale: ``unit`` divides the JSD by beta(1-beta).

    Returns:
        [N], in nats, at least 0 up to rounding.

    >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    >>> [round(between(p, q, beta=b).item(), 4) for b in (0.0, 0.5, 1.0)]
    [0.1308, 0.1353, 0.1438]
    """
    if beta == 0.0:
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    if beta == 1.0:
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    log_m = torch.logaddexp(log_p + log(1.0 - beta), log_q + log(beta))
    teacher = (log_q.exp() * (log_q - log_m)).sum(-1)
    student = (log_p.exp() * (log_p - log_m)).sum(-1)
    value = beta * teacher + (1.0 - beta) * student
    return value / (beta * (1.0 - beta)) if jsd_scale == "unit" else value


def divergence(student: Tensor, teacher: Tensor, *, beta: float, jsd_scale: Scale = "unit", support: Support = "full",
               top_k: int = 64) -> Divergence:
    """Divergence at each loss token over the full vocabulary, or over top-k buckets and the exact tail.

    Args:
        student: log-probabilities [N, V] of :func:`log_softmax`, with gradient.
        teacher: log-probabilities [N, V], no gradient.
        beta: see the module's equations; in [0, 1].
        jsd_scale: scale of the JSD.
        support: whose largest ids become buckets; ``full`` uses all V and ignores ``top_k``.
        top_k: ids per side, at most V is used.

    Returns:
        Values and both tail masses. Bucketing never increases a divergence (data processing), and top-k tends to full.
    """
    if support == "full":
        zero = student.new_zeros(student.shape[0])
        return Divergence(between(student, teacher, beta=beta, jsd_scale=jsd_scale), zero, zero)
    ids, absent = support_ids(student.detach(), teacher, support, top_k)
    log_p, log_q = buckets(student, ids, absent), buckets(teacher, ids, absent)
    value = between(log_p, log_q, beta=beta, jsd_scale=jsd_scale)
    return Divergence(value, log_p[:, -1].detach().exp(), log_q[:, -1].exp())


def support_ids(student: Tensor, teacher: Tensor, support: Support, top_k: int) -> tuple[Tensor, Tensor]:
    """Ids int64[N, B] of the live top-k, and which of them are repeats bool[N, B] (the teacher's half of a union)."""
    k = min(top_k, student.shape[-1])
    if support != "union":
        ids = (student if support == "student" else teacher).topk(k, dim=-1).indices
        return ids, torch.zeros_like(ids, dtype=torch.bool)
    first, second = student.topk(k, dim=-1).indices, teacher.topk(k, dim=-1).indices
    known = torch.zeros_like(student, dtype=torch.bool).scatter_(1, first, True)
    repeat = torch.cat([torch.zeros_like(first, dtype=torch.bool), known.gather(1, second)], dim=1)
    return torch.cat([first, second], dim=1), repeat


def buckets(log_probs: Tensor, ids: Tensor, absent: Tensor) -> Tensor:
    """Log-mass [N, B+1] of the chosen ids and, last, of everything else.

    The tail is the logsumexp over the exact complement. ``log(1 - sum)`` with a clamp would lose its gradient
    exactly when the support holds nearly all the mass.
    """
    member = torch.zeros_like(log_probs, dtype=torch.bool).scatter_(1, ids, True)
    tail = log_probs.masked_fill(member, float("-inf")).logsumexp(-1, keepdim=True)
    empty = member.all(-1, keepdim=True)
    gathered = log_probs.gather(1, ids).masked_fill(absent, ABSENT)
    return torch.cat([gathered, tail.masked_fill(empty, ABSENT)], dim=1)


def entropy(log_probs: Tensor, probs: Tensor | None = None) -> Tensor:
    """Shannon entropy [N] in nats of log-probabilities [N, V]; ``probs`` is exp of them, where it is at hand.

    >>> round(entropy(torch.zeros(1, 4).log_softmax(-1)).item(), 4)
    1.3863
    """
    return -torch.linalg.vecdot(log_probs.exp() if probs is None else probs, log_probs)


def top1_agree(student: Tensor, teacher: Tensor) -> Tensor:
    """Whether the id that the student puts first is one that no other exceeds for the teacher, bool[N].

    >>> top1_agree(torch.tensor([[0.1, 0.9]]).log(), torch.tensor([[0.4, 0.6]]).log()).tolist()
    [True]
    """
    first = student.argmax(-1, keepdim=True)  # ten times as slow as the largest value alone: once is enough
    return teacher.gather(1, first)[:, 0] == teacher.amax(-1)


def token_logp(log_probs: Tensor, tokens: Tensor, kept: Tensor | None = None) -> Tensor:
    """Log-probability [N] of the sampled tokens, renormalised over the ids each was drawn from.

    Args:
        log_probs: [N, V].
        tokens: int64[N].
        kept: int64[N, K], ids that truncated sampling kept, padded with -1; a row of -1 was not truncated.

    >>> p = torch.tensor([[0.5, 0.3, 0.2]]).log()
    >>> token_logp(p, torch.tensor([0]), torch.tensor([[0, 1, -1]])).exp()
    tensor([0.6250])
    """
    chosen = log_probs.gather(1, tokens[:, None]).squeeze(1)
    if kept is None:
        return chosen
    mass = log_probs.gather(1, kept.clamp_min(0)).masked_fill(kept < 0, float("-inf"))
    free = (kept < 0).all(-1)
    mass = torch.where(free[:, None], torch.zeros_like(mass), mass)
    return torch.where(free, chosen, chosen - mass.logsumexp(-1))
