"""Key/value cache in slots: every episode owns one row of preallocated buffers, at its own length.

Shapes: ``S`` slots, ``R`` rows of one forward, ``Q`` new tokens per row (left-padded), ``L`` cached positions seen,
``W`` window. Buffers are ``[S, heads, W + 1, head_dim]``; position ``W`` is scratch, where padding writes.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from agentsdpo.errors import ModelError

GROUPED_SDPA = "grouped_sdpa"
"""Name under which :func:`grouped_sdpa` is registered with transformers."""


@dataclass
class Plan:
    """Which slots a forward reads and writes.

    Attributes:
        slots: int64[R].
        span: ``slots`` as a slice when they are consecutive (K/V are then views, not copies), else None.
        positions: int64[R, Q] where each new token is written; ``W`` for padding.
        length: L, positions that attention may look at.
    """

    slots: Tensor
    span: slice | None
    positions: Tensor
    length: int
    _flat: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def flat(self, heads: int, width: int) -> Tensor:
        """Rows of the ``[S * heads * width, head_dim]`` view that the new tokens fill, int64[R * heads * Q]."""
        if (heads, width) not in self._flat:
            head = torch.arange(heads, device=self.slots.device)
            base = (self.slots[:, None] * heads + head) * width
            self._flat[heads, width] = (base[:, :, None] + self.positions[:, None, :]).reshape(-1)
        return self._flat[heads, width]

    def read(self, buffer: Tensor) -> Tensor:
        """The first L positions of the planned slots, ``[R, heads, L, head_dim]``."""
        seen = buffer[:, :, :self.length]
        return seen[self.span] if self.span is not None else seen.index_select(0, self.slots)


class SlotLayer(CacheLayerMixin):
    """One layer's buffers. ``update`` scatters the new K/V to the planned positions and returns what is visible."""

    is_sliding = False
    is_croppable = False
    plan: Plan

    def __init__(self, slots: int, window: int) -> None:
        super().__init__()
        self.slots, self.window = slots, window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate both buffers in the shape of the first states seen."""
        for name, states in (("keys", key_states), ("values", value_states)):
            shape = (self.slots, states.shape[1], self.window + 1, states.shape[3])
            setattr(self, name, torch.zeros(shape, dtype=states.dtype, device=states.device))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write ``[R, heads, Q, head_dim]`` states; return keys and values ``[R, heads, L, head_dim]``."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def _write(self, buffer: Tensor | None, states: Tensor) -> Tensor:
        assert buffer is not None
        _, heads, width, dim = buffer.shape
        buffer.view(-1, dim).index_copy_(0, self.plan.flat(heads, width), states.reshape(-1, dim))
        return self.plan.read(buffer)

    def copy_prefix(self, source: int, targets: Tensor, length: int) -> None:
        """Give slots ``targets`` int64[N] the first ``length`` positions of slot ``source``."""
        for buffer in (self.keys, self.values):
            if buffer is not None:
                buffer[targets, :, :length] = buffer[source, :, :length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Visible length and offset; unused, because the engine always passes a finished 4D mask."""
        return self.plan.length, 0

    def get_seq_length(self) -> int:
        """Zero: rows differ in length, so positions are always given explicitly."""
        return 0

    def get_max_length(self) -> int:
        """The window, in tokens."""
        return self.window


class SlotCache(Cache):
    """All layers' slots, in the shape transformers models expect of ``past_key_values``.

    Args:
        layers: number of attention layers.
        slots: S, rows held at once.
        window: W, tokens a slot can hold.
    """

    def __init__(self, layers: int, slots: int, window: int) -> None:
        self.slot_layers = [SlotLayer(slots, window) for _ in range(layers)]
        super().__init__(layers=list(self.slot_layers))

    def follow(self, plan: Plan) -> None:
        """Use this plan for the next forward."""
        for layer in self.slot_layers:
            layer.plan = plan

    def copy_prefix(self, source: int, targets: Tensor, length: int) -> None:
        """Give slots ``targets`` the first ``length`` positions of slot ``source``, in every layer."""
        for layer in self.slot_layers:
            layer.copy_prefix(source, targets, length)


def grouped_sdpa(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                 dropout: float = 0.0, scaling: float | None = None, **kwargs: Any) -> tuple[Tensor, None]:
    """``sdpa``, except that grouped K/V heads are not repeated: the query heads of a group become extra queries.

    Repeating K/V costs three times the attention itself when 25 new tokens meet 200 cached ones on a CPU.
    Query ``[R, H, Q, D]``, key and value ``[R, G, L, D]``, mask ``[R, 1, Q, L]``; returns ``[R, Q, H, D]``.
    """
    rows, heads, length, dim = query.shape
    repeats = heads // key.shape[1]
    plain = attention_mask is None or attention_mask.shape[1] != 1 or kwargs.get("position_bias") is not None
    if plain or repeats == 1 or attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                                      **kwargs)
    mask = attention_mask if length == 1 else attention_mask.repeat(1, 1, repeats, 1)
    packed = query.reshape(rows, heads // repeats, repeats * length, dim)
    out = torch.nn.functional.scaled_dot_product_attention(packed, key, value, attn_mask=mask, dropout_p=dropout,
                                                           scale=scaling)
    return out.reshape(rows, heads, length, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED_SDPA, grouped_sdpa)
AttentionMaskInterface.register(GROUPED_SDPA, sdpa_mask)


def check_layers(config: Any) -> int:
    """Number of layers of a model whose every layer attends to the whole past.

    Raises:
        ModelError: some layer slides, chunks or is recurrent, which slots cannot hold.
    """
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"]
        kinds *= text.num_hidden_layers
    other = sorted(set(kinds) - {"full_attention"})
    if other:
        raise ModelError(f"the in-process engine caches full attention only, this model also has {', '.join(other)}",
                         fix="serve it with vLLM")
    return len(kinds)
