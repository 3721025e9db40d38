"""The bound on the size of the gap: one per optimiser step, from the steps before it."""


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
        """Take in one optimiser step: ``total`` = sum of |gap|, ``count`` = loss tokens with a hint, over all of it."""
        self.step += 1
        self.ema = self.decay * self.ema + (1.0 - self.decay) * total / max(count, 1)

    def state_dict(self) -> dict[str, float]:
        """State for a checkpoint; plain numbers."""
        return {"step": self.step, "ema": self.ema}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from :meth:`state_dict`."""
        self.step, self.ema = int(state["step"]), float(state["ema"])
