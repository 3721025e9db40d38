"""Packing: which branches share a forward, so that nothing is padded and no forward costs much more than the others.

A forward of tokens ``T`` costs ``c(T) = 2 P T + 2 n d L T^2`` (``P`` parameters outside embedding and head, ``n``
query heads of width ``d``, ``L`` layers) per branch: linear layers see the sum of a bin's tokens, attention each
branch alone. First-fit decreasing finds how few bins will do; the branches are then spread over as many by cost.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agentsdpo.errors import LearnError
from agentsdpo.learn.attention import Segments


@dataclass(frozen=True)
class RowCost:
    """Forward FLOP of one branch by its length: ``linear`` per token, ``quadratic`` per token squared.

    >>> RowCost(linear=2.0, quadratic=1.0)(3)
    15.0
    """

    linear: float
    quadratic: float

    def __call__(self, tokens: int) -> float:
        """Of a branch of that many tokens."""
        return self.linear * tokens + self.quadratic * tokens**2


def row_cost(model: Any) -> RowCost:
    """The cost of a model's rows, from its parameters and shape."""
    shape = model.config.get_text_config()
    outside = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    body = sum(p.numel() for p in model.parameters() if id(p) not in outside)
    width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    return RowCost(2.0 * body, 2.0 * shape.num_attention_heads * width * shape.num_hidden_layers)


def pack(lengths: Sequence[int], capacity: int, cost: RowCost, *, multiple: int = 1) -> list[list[int]]:
    """Bins of row numbers, each at most ``capacity`` tokens, as few as first-fit decreasing finds, balanced by cost.

    Args:
        lengths: tokens of each row, at least 1.
        capacity: tokens of one forward.
        cost: of a row by its length.
        multiple: the number of bins is one of this, if there are rows enough: all processes have as many.

    Raises:
        LearnError: a row is longer than the capacity. It is never cut: that would lose scored tokens.

    >>> pack([6, 5, 4, 3, 2], capacity=10, cost=RowCost(1.0, 0.0))
    [[0, 2], [1, 3, 4]]
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    longest = max(lengths, default=0)
    if longest > capacity:
        raise LearnError(f"a branch has {longest} tokens with its hint but learn.forward_tokens is {capacity}",
                         fix=f"set learn.forward_tokens to {longest} or more, or lower collect.window")
    tight = _first_fit(order, lengths, capacity)
    wanted = min(-(-len(tight) // multiple) * multiple, len(lengths))
    return sorted(sorted(rows) for rows in _spread(order, lengths, capacity, cost, wanted) or tight)


def _first_fit(order: list[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Each row into the first bin with room for it."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in order:
        at = next((b for b, left in enumerate(room) if left >= lengths[i]), len(bins))
        if at == len(bins):
            bins.append([])
            room.append(capacity)
        bins[at].append(i)
        room[at] -= lengths[i]
    return bins


def _spread(order: list[int], lengths: Sequence[int], capacity: int, cost: RowCost, n: int) -> list[list[int]] | None:
    """Each row into the cheapest of ``n`` bins with room for it; None when one finds no room."""
    bins: list[list[int]] = [[] for _ in range(n)]
    room, spent = [capacity] * n, [0.0] * n
    for i in order:
        open_bins = [b for b in range(n) if room[b] >= lengths[i]]
        if not open_bins:
            return None
        at = min(open_bins, key=lambda b: (spent[b], b))
        bins[at].append(i)
        room[at] -= lengths[i]
        spent[at] += cost(lengths[i])
    return bins


@dataclass(frozen=True)
class PackedRow:
    """Branches side by side. ``ids`` and ``position_ids`` int64[1, T]; positions start at 0 in every segment."""

    ids: Tensor
    position_ids: Tensor
    segments: Segments

    @property
    def starts(self) -> np.ndarray:
        """Index of each segment's first token, int64[B]."""
        return np.cumsum([0, *self.segments.lengths[:-1]])


def packed_row(rows: Sequence[np.ndarray], device: torch.device | str = "cpu") -> PackedRow:
    """One packed row of token ids.

    >>> row = packed_row([np.array([7, 8, 9]), np.array([5, 6])])
    >>> row.ids.tolist(), row.position_ids.tolist(), row.starts.tolist()
    ([[7, 8, 9, 5, 6]], [[0, 1, 2, 0, 1]], [0, 3])
    """
    lengths = tuple(len(ids) for ids in rows)
    ids = torch.from_numpy(np.concatenate(rows).astype(np.int64))[None].to(device)
    positions = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None].to(device)
    return PackedRow(ids, positions, Segments.of(lengths, device))
