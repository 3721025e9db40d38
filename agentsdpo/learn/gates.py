"""0/1 gates over turns and branches, and what they are made of: pure functions of float[N] tensors, all detached.

A gate says whether the data of a whole turn may still teach anything; it never weighs. Tokens are counted before it,
so a turn that is dropped makes the step smaller and not the others louder.
"""

from typing import Literal

import torch
from torch import Tensor

Gate = Literal["off", "k3", "geo"]


def k3(log_r: Tensor) -> Tensor:
    """Schulman's estimator ``r - 1 - log r`` float[N], never negative, zero at r = 1.

    >>> k3(torch.tensor([0.0, 1.0]))
    tensor([0.0000, 0.7183])
    """
    return torch.expm1(log_r) - log_r


def ess_frac(ratio: Tensor) -> float:
    """Effective sample share ``(sum r)^2 / (n sum r^2)`` in (0, 1].

    >>> ess_frac(torch.tensor([1.0, 1.0, 1.0, 1.0])), ess_frac(torch.tensor([4.0, 0.0, 0.0, 0.0]))
    (1.0, 0.25)
    """
    return float(ratio.sum().square() / (ratio.numel() * ratio.square().sum()))


def segment_sum(values: Tensor, segment: Tensor) -> Tensor:
    """Sum over the tokens of each token's own segment, given back per token. float[N], int64[N] to float[N].

    >>> segment_sum(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 1]))
    tensor([3., 3., 4.])
    """
    size = int(segment.max()) + 1 if segment.numel() else 0
    return values.new_zeros(size).index_add_(0, segment, values)[segment]


def segment_mean(values: Tensor, segment: Tensor) -> Tensor:
    """Mean over the tokens of each token's own segment (a turn, a branch), given back per token.

    >>> segment_mean(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 1]))
    tensor([1.5000, 1.5000, 4.0000])
    """
    return segment_sum(values, segment) / segment_sum(torch.ones_like(values), segment)


def k3_gate(log_r: Tensor, segment: Tensor, *, limit: float) -> Tensor:
    """bool[N]: segments whose mean K3 (nats) is at most ``limit``; verl's rejection by K3.

    >>> k3_gate(torch.tensor([0.1, 0.1, 2.0]), torch.tensor([0, 0, 1]), limit=0.1)
    tensor([ True,  True, False])
    """
    return segment_mean(k3(log_r), segment) <= limit


def geo_gate(log_r: Tensor, segment: Tensor, *, width: float) -> Tensor:
    """bool[N]: segments whose geometric mean ratio lies in ``[1 - width, 1 + width]`` (verl's rejection by geo mean).

    >>> geo_gate(torch.tensor([0.3, -0.3, 0.3]), torch.tensor([0, 0, 1]), width=0.2)
    tensor([ True,  True, False])
    """
    mean = segment_mean(log_r, segment).exp()
    return (mean >= 1.0 - width) & (mean <= 1.0 + width)


def veto_gate(log_r: Tensor, segment: Tensor, *, least: float) -> Tensor:
    """bool[N]: segments without any ratio below ``least`` (slime's veto).

    >>> veto_gate(torch.tensor([0.0, -12.0, 0.0]), torch.tensor([0, 0, 1]), least=1e-4)
    tensor([False, False,  True])
    """
    return segment_sum((log_r.exp() < least).to(log_r.dtype), segment) == 0


def segment_gate(log_r: Tensor, segment: Tensor, *, gate: Gate = "off", c3: float = 0.1, geo: float = 0.1,
                 veto: float | None = None) -> Tensor:
    """The gate of a configuration, bool[N], the same for all tokens of a segment.

    Args:
        log_r: clipped log ratios [N].
        segment: turn or branch of each token, int64[N], numbered within the call.
        gate: which of the gates above, beside the veto.
        c3: limit of ``k3``, nats.
        geo: width of ``geo``.
        veto: least ratio a segment may hold; None is off.
    """
    keep = torch.ones_like(log_r, dtype=torch.bool)
    if gate == "k3":
        keep &= k3_gate(log_r, segment, limit=c3)
    elif gate == "geo":
        keep &= geo_gate(log_r, segment, width=geo)
    if veto is not None:
        keep &= veto_gate(log_r, segment, least=veto)
    return keep
