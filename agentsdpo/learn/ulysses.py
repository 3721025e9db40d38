"""One packed row on several processes (Ulysses, 2309.14509): each holds a slice of the tokens, and, in attention, some
heads of all tokens.

Everything in a decoder layer but attention goes token by token. Around attention, two exchanges turn ``T/W`` tokens of
all heads into all ``T`` tokens of ``n/W`` heads and back; no sum is taken in another order, so forward and backward are
those of one process to the bit. Hidden states at the loss positions are gathered; gradients of weights come out as
shares, whose sum over the processes is the gradient.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as collectives

from agentsdpo.errors import ModelError
from agentsdpo.learn.attention import Segments, segment_attention
from agentsdpo.learn.pack import PackedRow


def local_row(row: PackedRow, group: ProcessGroup) -> PackedRow:
    """This process's slice of a row: T/W tokens with their positions, and the segments of the whole row.

    Where W does not divide T, a segment of padding stands behind the others; nothing attends to it.
    """
    size, rank, tokens = group.size(), group.rank(), row.ids.shape[1]
    pad = -tokens % size
    ids, positions, segments = row.ids, row.position_ids, row.segments
    if pad:
        filler = torch.zeros(1, pad, dtype=ids.dtype, device=ids.device)
        ids, positions = torch.cat([ids, filler], 1), torch.cat([positions, filler], 1)
        segments = Segments.of((*segments.lengths, pad), segments.bounds.device)
    own = slice(rank * (tokens + pad) // size, (rank + 1) * (tokens + pad) // size)
    return PackedRow(ids[:, own], positions[:, own], replace(segments, group=group))


def exchanged_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                        dropout: float, scaling: float | None, segments: Segments, **options: Any,
                        ) -> tuple[Tensor, None]:
    """:func:`~agentsdpo.learn.attention.segment_attention` on slices of the tokens.

    Args:
        module: the model's attention layer.
        query: [1, n_q, T/W, d]; key, value: [1, n_kv, T/W, d].
        key: see query.
        value: see query.
        attention_mask: must be None.
        dropout, scaling, options: as there.
        segments: of the whole row, with its group.

    Returns:
        [1, T/W, n_q, d] and no attention weights.

    Raises:
        ModelError: W does not divide the query heads; what segment attention raises.
    """
    group = segments.group
    assert group is not None
    if query.shape[1] % group.size():
        raise ModelError(f"{query.shape[1]} attention heads cannot be shared among {group.size()} processes",
                         fix="use a number of processes that divides the heads, or learn.parallel.sequence = false")
    if key.shape[1] % group.size():
        key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for each in (key, value))
    heads = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1])
    query, key, value = (_to_heads(each, group) for each in (query, key, value))
    out, _ = segment_attention(heads, query, key, value, attention_mask, dropout, scaling,
                               replace(segments, group=None), **options)
    return _to_tokens(out, group), None


def gather_rows(hidden: Tensor, positions: Tensor, group: ProcessGroup) -> Tensor:
    """Rows of the whole [T, H] from slices [T/W, H], at positions int64[N] of the row: [N, H] on every process.

    Backward, each slice gets the sum of what all processes ask of it.
    """
    owner, at = positions // len(hidden), positions % len(hidden)
    counts = torch.bincount(owner, minlength=group.size())
    wide = int(counts.max())
    order = torch.argsort(owner, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[owner[order]]
    own = hidden.new_zeros(wide, dtype=torch.int64)
    mine = owner == group.rank()
    own[place[mine]] = at[mine]
    everyone = collectives.all_gather_tensor_autograd(hidden.index_select(0, own), gather_dim=0, group=group)
    return everyone.index_select(0, owner * wide + place)


def _to_heads(x: Tensor, group: ProcessGroup) -> Tensor:
    """[1, n, T/W, d] to [1, n/W, T, d]."""
    _, n, tokens, width = x.shape
    parts = _exchange(x.reshape(group.size(), n // group.size(), tokens, width), group)
    return parts.transpose(0, 1).reshape(1, n // group.size(), group.size() * tokens, width)


def _to_tokens(x: Tensor, group: ProcessGroup) -> Tensor:
    """[1, T, n/W, d] to [1, T/W, n, d]."""
    _, tokens, n, width = x.shape
    parts = _exchange(x.reshape(group.size(), tokens // group.size(), n, width), group)
    return parts.transpose(0, 1).reshape(1, tokens // group.size(), group.size() * n, width)


def _exchange(x: Tensor, group: ProcessGroup) -> Tensor:
    """Part ``i`` of the first dimension goes to process ``i``; what comes back is in the order of the senders."""
    ones = [1] * group.size()
    return collectives.wait_tensor(collectives.all_to_all_single_autograd(x.contiguous(), ones, ones, group))
