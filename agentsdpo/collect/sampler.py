"""Drawing tokens: temperature, top-k, top-p, and the exact log-prob of what was drawn from.

The behaviour log-prob must be that of the distribution after every filter, renormalised: with top-p 0.8 and the
unfiltered number the mean importance ratio of an unchanged policy is 0.9 instead of 1 (trl#7269).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class SamplingRows:
    """Sampling parameters of R rows: ``temperature`` float32[R] (0 is greedy), ``top_k`` int64[R], ``top_p`` f64[R]."""

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray

    def take(self, rows: np.ndarray) -> "SamplingRows":
        """The parameters of some rows, in order."""
        return SamplingRows(self.temperature[rows], self.top_k[rows], self.top_p[rows])


@dataclass
class Draw:
    """One token per row: ``ids`` int64[R], ``logps`` float32[R], ``kept`` ascending ids per row, None where all."""

    ids: np.ndarray
    logps: np.ndarray
    kept: list[np.ndarray | None]


def keep_mask(logp: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Ids that survive top-k and then top-p, bool[R, V]; ties go to the lower id, at least one id survives.

    Args:
        logp: float[R, V] log-probs after temperature.
        top_k: int64[R], 0 is off.
        top_p: float[R] in (0, 1], 1 is off: the smallest set whose mass, renormalised after top-k, reaches it.

    >>> logp = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    >>> keep_mask(logp, torch.tensor([3]), torch.tensor([0.8])).tolist()
    [[True, True, False, False]]
    """
    ordered, order = torch.sort(logp, dim=-1, descending=True, stable=True)
    rank = torch.arange(logp.shape[-1], device=logp.device)
    keep = rank < torch.where(top_k > 0, top_k, logp.shape[-1])[:, None]
    mass = torch.softmax(ordered.masked_fill(~keep, -torch.inf).double(), dim=-1)
    before = mass.cumsum(-1) - mass
    keep &= (before < top_p[:, None]) | (top_p >= 1.0)[:, None]
    keep[:, 0] = True
    return torch.zeros_like(keep).scatter_(-1, order, keep)


def _invert(logp: Tensor, uniform: Tensor) -> Tensor:
    """First id whose cumulated probability exceeds ``uniform``; never an id of probability zero. int64[R]."""
    cdf = logp.double().exp().cumsum(-1)
    target = (uniform * cdf[:, -1]).minimum(cdf[:, -1] * (1 - 1e-12))
    return torch.searchsorted(cdf, target[:, None], right=True).squeeze(-1)


def draw(logits: Tensor, rows: SamplingRows, uniform: np.ndarray) -> Draw:
    """Draw one token per row by inverting the cumulated distribution.

    Args:
        logits: float[R, V] of the model.
        rows: sampling parameters of the R rows.
        uniform: float64[R] in [0, 1), one number per row; not used where greedy.

    Returns:
        ids and log-probs; a greedy row takes the likeliest id and reports its log-prob at temperature 1.
    """
    device = logits.device
    greedy = rows.temperature == 0.0
    temperature = torch.from_numpy(np.where(greedy, np.float32(1.0), rows.temperature)).to(device)
    logp = torch.log_softmax(logits.float() / temperature[:, None], dim=-1)
    kept: list[np.ndarray | None] = [None] * len(greedy)
    cut = np.flatnonzero(((rows.top_k > 0) | (rows.top_p < 1.0)) & ~greedy)
    if cut.size:
        at = torch.from_numpy(cut).to(device)
        mask = keep_mask(logp[at], *(torch.from_numpy(x[cut]).to(device) for x in (rows.top_k, rows.top_p)))
        logp[at] = torch.log_softmax(logp[at].masked_fill(~mask, -torch.inf), dim=-1)
        for row, ids in zip(cut, mask.cpu().numpy(), strict=True):
            kept[row] = np.flatnonzero(ids)
    ids = _invert(logp, torch.from_numpy(uniform).to(device))
    if greedy.any():
        ids = torch.where(torch.from_numpy(greedy).to(device), logp.argmax(-1), ids)
    logps = logp.gather(-1, ids[:, None]).squeeze(-1)
    return Draw(ids.cpu().numpy(), logps.cpu().numpy(), kept)
