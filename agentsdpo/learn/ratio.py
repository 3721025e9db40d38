"""Importance ratios, masks, gates and the gap clipper: pure functions of per-token tensors float[N], all detached.

``ratio = exp(clip(student_logp - behaviour_logp, -20, 20))``; truncated from above, masked, gated, never floored: a
floor keeps pushing tokens the student has already abandoned.
"""

from typing import Literal

import torch
from torch import Tensor

Ratio = Literal["none", "is", "tis", "ppo"]


def log_ratio(student_logp: Tensor, behaviour_logp: Tensor) -> Tensor:
    """``log r`` clipped to [-20, 20]. Shape [N], no gradient."""
    return (student_logp.detach() - behaviour_logp).clamp(-20.0, 20.0)


def ppo_mask(ratio: Tensor, gap: Tensor, *, eps_lo: float, eps_hi: float) -> Tensor:
    """Sign-aware mask bool[N], False where the update has already gone far enough (1707.06347, equation 7).

    ``M = 0`` if (gap > 0 and r > 1+eps_hi) or (gap < 0 and r < 1-eps_lo), else 1: the gradient of
    ``-min(r A, clip(r, 1-eps_lo, 1+eps_hi) A)`` is ``-M r A grad log p``.

    >>> ppo_mask(torch.tensor([1.5, 1.5, 0.5, 0.5]), torch.tensor([1.0, -1.0, 1.0, -1.0]), eps_lo=0.2, eps_hi=0.2)
    tensor([False,  True,  True, False])
    """
    gone_up = (gap > 0) & (ratio > 1.0 + eps_hi)
    gone_down = (gap < 0) & (ratio < 1.0 - eps_lo)
    return ~(gone_up | gone_down)


def ratio_weight(mode: Ratio, ratio: Tensor, gap: Tensor, *, cap: float, eps_lo: float,
                 eps_hi: float) -> tuple[Tensor, Tensor]:
    """Weight float[N] that multiplies ``gap * grad log p``, and the mask bool[N] inside it.

    ``none`` 1; ``is`` r; ``tis`` min(r, cap); ``ppo`` min(r, cap) M, whose cap acts only on negative gaps
    as long as cap >= 1 + eps_hi (dual clip, 1912.09729). All are equal at r = 1.
    """
    everything = torch.ones_like(ratio, dtype=torch.bool)
    if mode == "none":
        return torch.ones_like(ratio), everything
    if mode == "is":
        return ratio, everything
    truncated = ratio.clamp_max(cap)
    if mode == "tis":
        return truncated, everything
    mask = ppo_mask(ratio, gap, eps_lo=eps_lo, eps_hi=eps_hi)
    return truncated * mask, mask


def k3(log_r: Tensor) -> Tensor:
    """Schulman's estimator ``r - 1 - log r`` float[N], never negative, zero at r = 1.

    >>> k3(torch.tensor([0.0, 1.0]))
    tensor([0.0000, 0.7183])
    """
    return torch.expm1(log_r) - log_r


def turn_mean(values: Tensor, turn: Tensor) -> Tensor:
    """Mean over the tokens of each token's own turn, given back per token. Shapes float[N], int64[N] to float[N]."""
    size = int(turn.max()) + 1 if turn.numel() else 0
    total = values.new_zeros(size).index_add_(0, turn, values)
    count = values.new_zeros(size).index_add_(0, turn, torch.ones_like(values))
    return (total / count.clamp_min(1.0))[turn]


def turn_gate(log_r: Tensor, turn: Tensor, *, c3: float | None, veto: float | None) -> Tensor:
    """0/1 gate bool[N], the same for all tokens of a turn.

    Args:
        log_r: clipped log ratios [N].
        turn: index of the turn each token belongs to, int64[N], unique within the call.
        c3: a turn passes while its mean K3 is at most this (nats); None is off.
        veto: a turn is dropped if any ratio in it is below this; None is off.
    """
    keep = torch.ones_like(log_r, dtype=torch.bool)
    if c3 is not None:
        keep &= turn_mean(k3(log_r), turn) <= c3
    if veto is not None:
        keep &= turn_mean((log_r.exp() < veto).to(log_r.dtype), turn) == 0
    return keep


def ess_frac(ratio: Tensor) -> float:
    """Effective sample share ``(sum r)^2 / (n sum r^2)`` in (0, 1].

    >>> ess_frac(torch.tensor([1.0, 1.0, 1.0, 1.0])), ess_frac(torch.tensor([4.0, 0.0, 0.0, 0.0]))
    (1.0, 0.25)
    """
    return float(ratio.sum().square() / (ratio.numel() * ratio.square().sum()))


class AdvantageClip:
    """Bound of ``kappa`` running means on |gap|, one bound per optimiser step ("Scaling SDPO", June 2026).

    The bound comes from the state before the step, so it never depends on the batch it clips; only the very first
    step has no past and uses its own mean. Feed it global sums: every micro-batch then sees the same bound.

    Args:
        kappa: bound in units of the running mean of |gap|.
        decay: of the exponential mean, per step.

    >>> clip = AdvantageClip(kappa=3.0, decay=0.99)
    >>> clip.bound(first_mean=0.5)
    1.5
    >>> clip.update(total=5.0, count=10)
    >>> round(clip.bound(), 6), clip.step
    (1.5, 1)
    """

    def __init__(self, kappa: float, decay: float) -> None:
        self.kappa, self.decay = kappa, decay
        self.step, self.ema = 0, 0.0

    @property
    def needs_first_mean(self) -> bool:
        """Whether :meth:`bound` needs the mean |gap| of the batch at hand (the first step only)."""
        return self.step == 0

    def bound(self, first_mean: float = 0.0) -> float:
        """Largest |gap| allowed in this step, in nats."""
        mean = first_mean if self.step == 0 else self.ema / (1.0 - self.decay**self.step)
        return self.kappa * mean

    def update(self, total: float, count: int) -> None:
        """Take in one optimiser step: ``total`` = sum of |gap|, ``count`` = loss tokens, over everything in it."""
        self.step += 1
        self.ema = self.decay * self.ema + (1.0 - self.decay) * total / max(count, 1)

    def state_dict(self) -> dict[str, float]:
        """State for a checkpoint; plain numbers."""
        return {"step": self.step, "ema": self.ema}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from :meth:`state_dict`."""
        self.step, self.ema = int(state["step"]), float(state["ema"])
