"""Hidden states where the loss needs them, and the output projection; logits are never formed for other tokens."""

from typing import Any

import torch
from torch import Tensor, nn

from agentsdpo.errors import ModelError
from agentsdpo.learn.records import Head

_CLOSE = 1e-3
"""Largest difference, relative to the logits, that rounding may make."""


def check_model(model: Any) -> None:
    """Raise ModelError for a model whose logits are more than ``hidden @ weight.T``; tried out on four ids."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ModelError(f"the output layer is {type(head).__name__}, not a linear layer without bias",
                         fix="use a causal language model with a plain LM head")
    if getattr(model.config, "final_logit_softcapping", None):
        raise ModelError("the model caps its logits (final_logit_softcapping)", fix="use a model without soft-capping")
    positions = torch.arange(4, device=head.weight.device)
    with torch.no_grad():
        ours = scores(model, positions[None], positions).logits()
        logits = model(input_ids=positions[None], use_cache=False).logits[0]
    off = float((ours - logits).abs().max())
    if not off <= _CLOSE * (1.0 + float(logits.abs().max())):
        raise ModelError(f"the model's logits differ from its last hidden states times the output layer by {off:.3g}",
                         fix="use a model that does not scale or shape its logits: the loss would be of another one")


def scores(model: Any, ids: Tensor, positions: Tensor) -> Head:
    """One forward without mask or cache, and the hidden states at flat positions.

    Args:
        model: a causal language model of transformers.
        ids: int64[B, T], padded on the right.
        positions: int64[N] into the flattened [B*T].

    Returns:
        ``hidden`` [N, H] and the output projection [V, H]; with gradient unless called under no_grad.
    """
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    return Head(hidden.flatten(0, 1).index_select(0, positions), model.get_output_embeddings().weight)
