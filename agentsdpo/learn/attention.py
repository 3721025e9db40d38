"""Causal attention inside each segment of a packed row, under a name that transformers' models look up.

A packed row holds several branches side by side, each with positions that start at 0. Told nothing else, transformers
builds a dense [1, 1, T, T] mask from those positions; told an attention mask of ones, or to fill a cache, it silently
lets the branches see each other. Here the lengths of the segments travel with the forward as a keyword argument, no
mask exists, and whoever brings one is refused. On a GPU in half precision one variable-length kernel does all
segments; elsewhere they are taken one after the other by the fused causal kernel.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from agentsdpo.errors import ModelError

SEGMENTS = "agentsdpo_segments"
"""Name of this attention in ``config._attn_implementation``."""


@dataclass(frozen=True)
class Segments:
    """Where the branches of a packed row begin and end: ``lengths`` in tokens, ``bounds`` int32[B+1] their sums.

    ``group``: processes that hold a slice of the row each (``learn/ulysses.py``), None where it is in one piece.
    """

    lengths: tuple[int, ...]
    bounds: Tensor
    group: Any = None

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device | str = "cpu") -> "Segments":
        """From the lengths alone.

        >>> Segments.of((3, 2)).bounds.tolist()
        [0, 3, 5]
        """
        return cls(lengths, torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device))


def use_segments(model: Any) -> None:
    """Make a model of transformers attend inside segments from now on; calls without segments stay plainly causal.

    Raises:
        ModelError: the model's attention cannot be chosen.
    """
    model.set_attn_implementation(SEGMENTS)
    used = model.config.get_text_config()._attn_implementation
    if used != SEGMENTS:
        raise ModelError(f"the attention of {type(model).__name__} stays {used!r} and cannot be replaced",
                         fix="use a model whose attention goes through transformers' AttentionInterface")


def segment_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                      dropout: float = 0.0, scaling: float | None = None, segments: Segments | None = None,
                      **options: Any) -> tuple[Tensor, None]:
    """Attention function in the form transformers calls it.

    Args:
        module: the model's attention layer.
        query: [1, n_q, T, d]; key, value: [1, n_kv, T, d]; any batch size without ``segments``.
        key: see query.
        value: see query.
        attention_mask: must be None.
        dropout: 0 everywhere in the learner.
        scaling: of the scores; None is ``d ** -0.5``.
        segments: of the row; None is one segment per row.
        options: of other attention functions; a sliding window must hold the longest segment.

    Returns:
        [1, T, n_q, d] and no attention weights.

    Raises:
        ModelError: a mask, a cache, a window, capped scores or sinks, none of which this attention knows.
    """
    if segments is not None and segments.group is not None:
        from agentsdpo.learn.ulysses import exchanged_attention  # which comes back here with whole rows
        return exchanged_attention(module, query, key, value, attention_mask, dropout, scaling, segments, **options)
    lengths = segments.lengths if segments else (query.shape[2],)
    _refuse(query, key, attention_mask, lengths, options)
    if segments is None or len(lengths) == 1:
        return sdpa_attention_forward(module, query, key, value, None, dropout, scaling, is_causal=True)
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and not dropout:
        return _varlen(query, key, value, segments, scaling), None
    # split and not slices: the backward of a slice is as large as the row
    sides = zip(*(each.split(lengths, dim=2) for each in (query, key, value)), strict=True)
    parts = [sdpa_attention_forward(module, q, k, v, None, dropout, scaling, is_causal=True)[0] for q, k, v in sides]
    return torch.cat(parts, dim=1), None


def _varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None) -> Tensor:
    """All segments in one kernel of torch; CUDA alone has it."""
    from torch.nn.attention.varlen import varlen_attn  # not in every build of torch that can train on a CPU

    longest = max(segments.lengths)
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
    out = varlen_attn(q, k, v, segments.bounds, segments.bounds, longest, longest, scale=scaling, window_size=(-1, 0),
                      enable_gqa=q.shape[1] != k.shape[1])
    return out[None]  # type: ignore[index]


def _refuse(query: Tensor, key: Tensor, mask: Tensor | None, lengths: tuple[int, ...],
            options: dict[str, Any]) -> None:
    """Raise ModelError for what would silently be left out."""
    window, longest = options.get("sliding_window"), max(lengths)
    wrong = {"an attention mask": mask is not None, "a cache": query.shape[2] != key.shape[2],
             f"a sliding window of {window} tokens under a segment of {longest}": bool(window) and longest > window,
             "capped attention scores": options.get("softcap") is not None,
             "attention sinks": options.get("s_aux") is not None,
             f"segments of {sum(lengths)} tokens in a row of {query.shape[2]}": sum(lengths) != query.shape[2]}
    found = [what for what, is_so in wrong.items() if is_so]
    if found:
        raise ModelError(f"attention inside segments was called with {found[0]}",
                         fix="train on packed rows alone, with a model of full causal attention; generate with a copy")


def _no_mask(attention_mask: Tensor | None = None, **_: Any) -> None:
    """What transformers builds masks with: nothing. A padding mask it was given goes no further."""
    if attention_mask is not None:
        raise ModelError("attention inside segments was called with an attention mask",
                         fix="pack rows without padding, or use a copy of the model with its own attention")


AttentionInterface.register(SEGMENTS, segment_attention)
AttentionMaskInterface.register(SEGMENTS, _no_mask)
