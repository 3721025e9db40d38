"""Less memory per token of a long row, paid for in time; loss and gradients stay what they are.

``recompute``: a decoder layer keeps its input alone and runs again in the backward (+25 % time). What is left is one
hidden state per token and layer; ``offload`` keeps those in the memory of the host, which on a CPU is where they are.
``mlp_tokens``: the inside of an MLP, three times its width per token and the largest tensor of a layer, exists for so
many tokens at a time; tokens do not meet in an MLP.

Both stand inside ``forward``, so that hooks (of sharding, of adapters) stay around them, and neither goes by the
training flag, which would switch dropout on.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from agentsdpo.errors import ModelError
from agentsdpo.learn.config import LearnConfig


def save_memory(model: Any, config: LearnConfig) -> None:
    """Change the forward of a model's decoder layers and MLPs in place.

    Args:
        model: a causal language model of transformers.
        config: ``recompute``, ``mlp_tokens``; nothing happens at their defaults.

    Raises:
        ModelError: the model keeps its layers, or a layer its MLP, under names that are not known.
    """
    if config.recompute == "off" and config.mlp_tokens is None:
        return
    for layer in decoder_layers(model):
        if config.mlp_tokens is not None:
            mlp = getattr(layer, "mlp", None)
            if mlp is None:
                raise ModelError(f"{type(layer).__name__} has no part named 'mlp'", fix="remove learn.mlp_tokens")
            mlp.forward = partial(_tiled, mlp.forward, config.mlp_tokens)
        if config.recompute != "off":
            layer.forward = partial(_again, layer.forward, config.recompute == "offload")


def decoder_layers(model: Any) -> list[Any]:
    """The repeated layers of a model's body.

    Raises:
        ModelError: there are none under the usual name.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if not layers:
        raise ModelError(f"{type(model).__name__} keeps no decoder layers under the name 'layers'",
                         fix="set learn.recompute to 'off', remove learn.mlp_tokens, and train on one process")
    return list(layers)


def _again(forward: Callable[..., Any], offload: bool, *args: Any, **kwargs: Any) -> Any:
    """A forward of which the backward keeps the positional arguments alone."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    with save_on_cpu(pin_memory=args[0].is_cuda) if offload else nullcontext():
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _tiled(forward: Callable[[Tensor], Tensor], tokens: int, hidden: Tensor) -> Tensor:
    """A forward of [1, T, H] some tokens at a time."""
    if hidden.shape[1] <= tokens:
        return forward(hidden)
    # split and not slices: the backward of a slice is as large as the row
    parts = [_again(forward, False, part) for part in hidden.split(tokens, dim=1)]
    if not all(isinstance(part, Tensor) for part in parts):
        raise ModelError("an MLP of this model returns more than hidden states", fix="remove learn.mlp_tokens")
    return torch.cat(parts, dim=1)
