"""Values and gradients of the loss by hand, for a block of rows: what the chunked loss forms inside its forward.

For buckets ``b`` of one row (the whole vocabulary, or a support and its tail), ``p`` student, ``q`` teacher and
``g_b = p_b dD/dp_b``, of which any multiple of ``p_b`` may be left out, ``G = sum_b g_b`` and

::

    dD/dz_i = g_i - p_i G                      i a bucket of its own
    dD/dz_i = p_i / p_tail (g_tail - p_tail G)  i in the tail
    forward KL  g = -q                reverse KL  g = p (log p - log q)        JSD  g = (1-beta) p (log p - log m)

The sampled token: ``d(-log p(y))/dz_i = p_i - 1[i = y]`` over the ids it was drawn from. Compared with autograd over
``learn/divergence.py`` in the tests. All shapes are [R, V] rows of one block, float32 or float64.
"""

import torch
from torch import Tensor

from agentsdpo.learn.divergence import ABSENT, Scale, Support, buckets, support_ids

_FAR = 80.0
"""Log-ratio of teacher and student above which exp would overflow; there ``log(m/q)`` is ``log beta`` to all digits."""
_TINY = {torch.float32: 1e-30, torch.float64: 1e-300}
"""Mass of a tail that is summed from probabilities; a smaller one is the logsumexp of their logarithms."""


def slope(log_p: Tensor, log_q: Tensor, *, beta: float, jsd_scale: Scale, p: Tensor | None = None,
          q: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence [R] in nats, ``g`` [R, B] and its sum ``G`` [R, 1] of two log-distributions over the same buckets.

    All three vanish exactly where the two are bit for bit the same, but for ``g = -q`` and ``G = -1`` of forward KL,
    which cancel against each other. ``p`` and ``q``: exp of the two, where they are at hand.

    >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    >>> value, g, total = slope(p, q, beta=0.0, jsd_scale="unit")
    >>> (g - p.exp() * total).round(decimals=4)
    tensor([[ 0.2500, -0.2500]])
    """
    p, q = log_p.exp() if p is None else p, log_q.exp() if q is None else q
    if beta == 0.0:
        value = torch.linalg.vecdot(q, log_q - log_p) + _excess(p, q)
        return value, -q, q.new_full((len(q), 1), -1.0)
    if beta == 1.0:
        g = (log_p - log_q).mul_(p)
        total = g.sum(-1)
        return total + _excess(q, p), g, total[:, None]
    apart = (log_q - log_p).clamp_max_(_FAR)
    mixed = torch.expm1(apart).mul_(beta).log1p_()  # log m - log p, to all digits where the two are close
    g = p * mixed
    value = beta * torch.linalg.vecdot(q, apart.sub_(mixed)) - (1.0 - beta) * g.sum(-1)
    g.mul_(beta - 1.0)
    if jsd_scale == "unit":
        value, g = value / (beta * (1.0 - beta)), g.div_(beta * (1.0 - beta))
    return value, g, g.sum(-1, keepdim=True)


def _excess(mass: Tensor, other: Tensor) -> Tensor:
    """What two sums that should be 1 differ by, [R]: rounding of log-probs, and added to a KL it takes that out of it.

    ``sum q (log q - log p) - q + p`` is of second order in ``log q - log p`` term by term.
    """
    return mass.sum(-1) - other.sum(-1)


def divergence_slope(log_p: Tensor, log_q: Tensor, *, beta: float, jsd_scale: Scale, support: Support,
                     top_k: int, p: Tensor | None = None, q: Tensor | None = None,
                     ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Divergence of each row and its gradient with respect to the student's logits.

    Args:
        log_p: student, [R, V].
        log_q: teacher, [R, V].
        beta, jsd_scale, support, top_k: see :func:`~agentsdpo.learn.divergence.divergence`.
        p, q: exp of the two, where they are at hand; left as they are.

    Returns:
        ``D`` [R], ``dD/dz`` [R, V], and the mass off the support on both sides, [R] each (zero when it is full).
    """
    p, q = log_p.exp() if p is None else p, log_q.exp() if q is None else q
    if support == "full":
        value, g, total = slope(log_p, log_q, beta=beta, jsd_scale=jsd_scale, p=p, q=q)
        nothing = torch.zeros_like(value)
        return value, g.addcmul_(p, total, value=-1.0), nothing, nothing
    ids, absent = support_ids(log_p, log_q, support, top_k)
    own, other = _buckets(log_p, p, ids, absent), _buckets(log_q, q, ids, absent)
    mass, tail = own.exp(), own[:, -1:]
    value, g, total = slope(own, other, beta=beta, jsd_scale=jsd_scale, p=mass)
    each = g.addcmul_(mass, total, value=-1.0)
    if bool((mass[:, -1] >= _TINY[p.dtype]).all()):
        dz = p * (each[:, -1:] / mass[:, -1:])  # rows of the support are written over below
    else:
        dz = (log_p - tail).clamp_max_(0.0).exp_().mul_(each[:, -1:])
    dz.scatter_(1, ids, 0.0)
    dz.scatter_add_(1, ids, each[:, :-1].masked_fill(absent, 0.0))
    return value, dz, mass[:, -1], other[:, -1].exp()


def _buckets(log_probs: Tensor, probs: Tensor, ids: Tensor, absent: Tensor) -> Tensor:
    """:func:`~agentsdpo.learn.divergence.buckets` from probabilities at hand: one pass over them instead of three."""
    tail = probs.scatter(1, ids, 0.0).sum(-1, keepdim=True)
    if bool((tail < _TINY[probs.dtype]).any()):
        return buckets(log_probs, ids, absent)
    return torch.cat([log_probs.gather(1, ids).masked_fill(absent, ABSENT), tail.log_()], dim=1)


def token_slope(log_p: Tensor, tok: Tensor, kept: Tensor | None, *, p: Tensor | None = None) -> Tensor:
    """Gradient [R, V] of ``-log p(tok)`` with respect to the logits, p taken over ``kept`` where it is given.

    Args:
        log_p: [R, V], normalised over the vocabulary.
        tok: int64[R].
        kept: int64[R, K] padded with -1; a row of -1 was not truncated.
        p: exp of ``log_p`` where it is at hand; the gradient may take its place.
    """
    p = log_p.exp() if p is None else p
    if kept is not None:
        drawn_from = torch.zeros_like(p, dtype=torch.bool).scatter_(1, kept.clamp_min(0), kept >= 0)
        # a padded entry must not unset id 0, which the line above may have written in either order
        drawn_from[:, 0] = (kept == 0).any(-1)
        free = (kept < 0).all(-1, keepdim=True)
        inside = log_p.masked_fill(~(drawn_from | free), float("-inf")).softmax(-1)
        p = torch.where(free, p, inside)
    return p.scatter_add_(1, tok[:, None], torch.full_like(p[:, :1], -1.0))
