"""Hidden states where the loss needs them, and the output projection; logits are never formed for other tokens."""

from typing import Any

from torch import Tensor, nn

from agentsdpo.errors import ModelError
from agentsdpo.learn.records import Head


def check_model(model: Any) -> None:
    """Raise ModelError for a model whose logits are more than ``hidden @ weight.T``."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ModelError(f"the output layer is {type(head).__name__}, not a linear layer without bias",
                         fix="use a causal language model with a plain LM head")
    if getattr(model.config, "final_logit_softcapping", None):
        raise ModelError("the model caps its logits (final_logit_softcapping)", fix="use a model without soft-capping")


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
