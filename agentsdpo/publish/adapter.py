"""Low-rank adapters as files: what an engine can serve of them, and the full weights they stand for.

Names and files are peft's: ``base_model.model.<layer>.lora_A.weight`` [r, in] and ``...lora_B.weight`` [out, r] in
``adapter_model.safetensors``, rank and scale in ``adapter_config.json``. The weight of a layer is ``W + s B A``.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from agentsdpo.errors import RegistryError
from agentsdpo.types import Json

PREFIX = "base_model.model."
_NAME = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")
_ENDS = ("lm_head", "embed_tokens", "wte", "embed_out")
_MERGED = "publish the merged weights instead: publish.kind = \"full\""
_REFUSED = ("modules_to_save", "use_dora", "lora_bias", "target_parameters", "trainable_token_indices",
            "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora", "fan_in_fan_out")


def refuse_unservable(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Refuse an adapter that vLLM would not load, or would serve as something else than what was trained.

    Args:
        config: content of ``adapter_config.json``.
        tensors: its factors by name.

    Raises:
        RegistryError: trained copies of whole layers (``modules_to_save``), DoRA, trained biases, adapted parameters,
            adapted embedding or output layer, or tensors that are not pairs of low-rank factors of the rank it says.

    >>> refuse_unservable({"use_dora": True}, {})
    Traceback (most recent call last):
    agentsdpo.errors.RegistryError: the adapter has use_dora = True, which vLLM does not serve; publish the merged \
weights instead: publish.kind = "full"
    """
    for key in _REFUSED:
        if config.get(key):
            raise RegistryError(f"the adapter has {key} = {config[key]!r}, which vLLM does not serve", fix=_MERGED)
    if config.get("bias", "none") != "none":
        raise RegistryError(f"the adapter trains biases (bias = {config['bias']!r}), which vLLM does not serve",
                            fix=_MERGED)
    for name in tensors:
        found = _NAME.fullmatch(name)
        if found is None:
            raise RegistryError(f"tensor {name!r} of the adapter is no low-rank factor of peft's naming", fix=_MERGED)
        if found["layer"].rpartition(".")[2] in _ENDS:
            raise RegistryError(f"the adapter changes {found['layer']}: vLLM leaves that out of prompt log-probs",
                                fix=_MERGED)
        rank, side = config.get("r"), found["side"]
        if side == "A" and not config.get("rank_pattern") and tensors[name].shape[0] != rank:
            raise RegistryError(f"{name} has rank {tensors[name].shape[0]} but adapter_config.json says r = {rank}",
                                fix="pass the configuration the adapter was trained with")
    pairs = {side: {m["layer"] for m in map(_NAME.fullmatch, tensors) if m and m["side"] == side} for side in "AB"}
    if not tensors or pairs["A"] != pairs["B"]:
        odd = sorted(pairs["A"] ^ pairs["B"])
        raise RegistryError(f"the adapter has {len(tensors)} tensors, and only one factor for {odd[:3]}",
                            fix="pass lora_A and lora_B of every adapted layer")


def refuse_misfit(path: Path, tensors: Mapping[str, Any]) -> None:
    """Refuse an adapter whose products do not fit the base in a safetensors file; reads the file's header alone.

    Raises:
        RegistryError: a layer is not in the base, or has another shape there.
    """
    with safe_open(path, framework="np") as file:
        known = set(file.keys())
        for layer, (out, into) in layers(tensors).items():
            shape = [out.shape[0], into.shape[1]]
            have = file.get_slice(f"{layer}.weight").get_shape() if f"{layer}.weight" in known else None
            if have != shape:
                raise RegistryError(f"the adapter of {layer} makes a product of shape {shape}, the base has {have}",
                                    fix="name the version of full weights that the adapter was trained on")


def layers(tensors: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """``B`` [out, r] and ``A`` [r, in] by name of the layer.

    >>> list(layers({"base_model.model.q.lora_A.weight": 1, "base_model.model.q.lora_B.weight": 2}).items())
    [('q', (2, 1))]
    """
    names = [found["layer"] for found in map(_NAME.fullmatch, tensors) if found and found["side"] == "A"]
    return {layer: (tensors[f"{PREFIX}{layer}.lora_B.weight"], tensors[f"{PREFIX}{layer}.lora_A.weight"])
            for layer in names}


def merge(base: Mapping[str, Any], tensors: Mapping[str, Any], config: Json) -> Iterator[tuple[str, Any]]:
    """The adapted weights, name and ``W + s B A`` in the data type of ``W``; numpy or torch, as given.

    Args:
        base: full weights by name.
        tensors: factors by peft's names, in the kind of array ``base`` has.
        config: content of ``adapter_config.json``.

    >>> factors = {f"base_model.model.q.lora_{side}.weight": np.ones((1, 1)) for side in "AB"}
    >>> dict(merge({"q.weight": np.zeros((1, 1))}, factors, {"r": 4, "lora_alpha": 8}))
    {'q.weight': array([[8.]])}
    """
    for layer, (out, into) in layers(tensors).items():
        weight = base[f"{layer}.weight"]
        product = (out @ into) * _scale(config, layer, into.shape[0])
        yield f"{layer}.weight", weight + (product.astype(weight.dtype) if isinstance(product, np.ndarray)
                                           else product.to(weight.dtype))


def _scale(config: Json, layer: str, rank: int) -> float:
    """peft's rule: alpha over the rank, or over its root; patterns name layers that differ."""
    patterns = (config.get("alpha_pattern") or {}).items()
    alpha = next((value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", layer)),
                 config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
