"""AdamW for weights that are kept in bfloat16: the optimiser steps float32 copies, and the model holds their rounding.

At a learning rate of 1e-6 nearly every step of a bfloat16 weight is smaller than half the distance to its neighbour
and would be lost. Gradients are accumulated in float32, moments are float32, and so is the copy (the *master*) that
they move. It is part of the optimiser's state, so a checkpoint holds it, and is made from the weight at the first step.
Per weight: 2 bytes, and 16 for gradient, moments and master.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw


def make_optimizer(params: list[nn.Parameter], *, lr: float, betas: tuple[float, float],
                   weight_decay: float) -> torch.optim.Optimizer:
    """AdamW for parameters of any dtype: torch's own where all of them are float32, else on masters."""
    if all(p.dtype == torch.float32 for p in params):
        return torch.optim.AdamW(params, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
    return MasterAdamW(params, lr=lr, betas=betas, weight_decay=weight_decay)


class MasterAdamW(torch.optim.Optimizer):
    """AdamW on float32 masters.

    Args:
        params: parameters of any floating dtype; from now on their gradients accumulate in float32.
        lr, betas, weight_decay: as in :class:`torch.optim.AdamW`.

    >>> p = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    >>> small = MasterAdamW([p], lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    >>> for _ in range(3):
    ...     p.grad = torch.ones(1)
    ...     small.step()
    >>> p.item(), round(small.state[p]["master"].item(), 4)  # one step alone would round back to 1.0
    (0.99609375, 0.997)
    """

    def __init__(self, params: Iterable[nn.Parameter], *, lr: float, betas: tuple[float, float],
                 weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": 1e-8})
        for group in self.param_groups:
            for p in group["params"]:
                p.grad_dtype = torch.float32

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; ``closure`` is not used."""
        for group in self.param_groups:
            own = [p for p in group["params"] if p.grad is not None]
            states = [self._state(p) for p in own]
            masters, first, second, steps = ([state[key] for state in states]
                                             for key in ("master", "exp_avg", "exp_avg_sq", "step"))
            adamw(masters, [p.grad for p in own], first, second, [], steps, fused=True, amsgrad=False,
                  beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
                  weight_decay=group["weight_decay"], eps=group["eps"], maximize=False)
            for p, master in zip(own, masters, strict=True):
                p.copy_(master)

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        """State of one parameter, made before its first step."""
        state = self.state[p]
        if not state:
            zero = torch.zeros_like(p, dtype=torch.float32)
            state |= {"step": torch.zeros((), device=p.device), "exp_avg": zero, "exp_avg_sq": zero.clone(),
                      "master": p.detach().float().clone()}
        return state
