"""Hidden states where the loss needs them, and the output projection; logits are never formed for other tokens."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from agentsdpo.errors import ModelError
from agentsdpo.learn.attention import use_segments
from agentsdpo.learn.batch import MicroBatch
from agentsdpo.learn.pack import PackedRow, packed_row
from agentsdpo.learn.records import Head
from agentsdpo.learn.ulysses import gather_rows

_CLOSE = {torch.float32: 1e-3}
"""Largest difference, relative to the logits, that rounding may make; 0.05 in half precision."""


def moved(model: Any, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A model on a device in eval mode, its weights in another dtype, changed in place.

    Buffers keep theirs, as in a model that is loaded in that dtype. Frequencies of rotary positions, rounded to
    bfloat16, are off by up to 0.2 %: after 1,000 tokens by an angle of a radian, and log-probs are not the engine's.
    """
    model.to(device=device)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model.eval()


def prepare_model(model: Any) -> None:
    """Make a model attend inside the branches of packed rows, after trying out that it can be learnt with.

    Raises:
        ModelError: logits that are more than ``hidden @ weight.T``, or branches that reach each other when they are
            packed (attention that cannot be replaced, or layers that carry a state along the row).
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ModelError(f"the output layer is {type(head).__name__}, not a linear layer without bias",
                         fix="use a causal language model with a plain LM head")
    if getattr(model.config, "final_logit_softcapping", None):
        raise ModelError("the model caps its logits (final_logit_softcapping)", fix="use a model without soft-capping")
    device, branches = head.weight.device, [np.arange(4), np.arange(3, 0, -1)]
    with torch.no_grad():
        logits = [model(input_ids=torch.from_numpy(ids)[None].to(device), use_cache=False).logits[0]
                  for ids in branches]
        use_segments(model)
        ours = [scores(model, packed_row(rows, device), torch.arange(sum(map(len, rows)), device=device)).logits()
                for rows in (branches[:1], branches)]
    largest = 1.0 + max(float(each.abs().max()) for each in logits)
    close = _CLOSE.get(head.weight.dtype, 0.05) * largest
    off = float((ours[0] - logits[0]).abs().max())
    if not off <= close:
        raise ModelError(f"the model's logits differ from its last hidden states times the output layer by {off:.3g}",
                         fix="use a model that does not scale or shape its logits: the loss would be of another one")
    off = float((ours[1] - torch.cat(logits)).abs().max())
    if not off <= close:
        raise ModelError(f"the logits of two branches in one row differ by {off:.3g} from those of each alone",
                         fix="use a model of attention layers alone that goes by position_ids")


def longest_row(model: Any) -> int:
    """Tokens of the longest branch, hint included, that a model can be learnt with: no more than it has positions, and
    where layers slide no more than their window, in which attention is full."""
    shape = model.config.get_text_config()
    kinds = getattr(shape, "layer_types", None) or ["sliding_attention"]
    window = getattr(shape, "sliding_window", None) if "sliding_attention" in kinds else None
    return min(getattr(shape, "max_position_embeddings", None) or 2**31, window or 2**31)


def scores(model: Any, row: PackedRow, positions: Tensor) -> Head:
    """One forward without mask or cache, and the hidden states at some positions.

    Args:
        model: a causal language model of transformers, see :func:`prepare_model`.
        row: T packed tokens, or this process's slice of them.
        positions: int64[N], each below T, in the whole row.

    Returns:
        ``hidden`` [N, H] and the output projection [V, H]; with gradient unless called under no_grad.
    """
    hidden = model.get_decoder()(input_ids=row.ids, position_ids=row.position_ids, segments=row.segments,
                                 use_cache=False).last_hidden_state
    group = row.segments.group
    picked = hidden[0].index_select(0, positions) if group is None else gather_rows(hidden[0], positions, group)
    return Head(picked, model.get_output_embeddings().weight)


def plain_scores(model: Any, row: PackedRow, positions: Tensor) -> Head:
    """:func:`scores` without gradient."""
    with torch.no_grad():
        head = scores(model, row, positions)
    return Head(head.hidden, head.weight.detach())


def both_sides(model: Any, batch: MicroBatch, teacher: Any = None) -> tuple[Head, Head]:
    """Scores of a micro-batch without gradient, without its hints and with them.

    Args:
        model: the student.
        batch: see :mod:`agentsdpo.learn.batch`.
        teacher: another model that reads the hints; the student itself when not given.
    """
    return (plain_scores(model, batch.student, batch.student_pos),
            plain_scores(teacher or model, batch.teacher, batch.teacher_pos))
