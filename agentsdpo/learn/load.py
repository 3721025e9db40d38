"""Loading a model folder with sentences for what can be wrong with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from agentsdpo.chat import ChatFormat
from agentsdpo.errors import ConfigError, ModelError, TokenizerMismatch


def pick_device(name: str = "auto") -> torch.device:
    """Where to compute: ``auto`` is this process's GPU where there is one, else the CPU; others are torch's names.

    Raises:
        ConfigError: there is no such GPU.

    >>> pick_device("cpu")
    device(type='cpu')
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(f"the device is {name!r} but torch {torch.__version__} finds {count} GPUs",
                          fix="name one that is there, or 'auto' or 'cpu'; a torch built for CPUs finds none")
    return device


def load_chat(path: Path | str) -> ChatFormat:
    """The chat format of a model folder (or hub name).

    Raises:
        ModelError: no such folder, no tokenizer in it, or no chat template.
    """
    folder = Path(path)
    looks_local = folder.is_absolute() or str(path).startswith(".") or str(path).count("/") != 1
    if looks_local and not folder.is_dir():
        raise ModelError(f"there is no model folder {str(path)!r}",
                         fix="give a folder with config.json and safetensors, a hub name, or 'seed'")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"no tokenizer can be loaded from {str(path)!r}: {_first_line(error)}",
                         fix="put tokenizer.json and tokenizer_config.json beside the weights") from error
    return ChatFormat(tokenizer)


def load_model(path: Path | str, chat: ChatFormat, *, dtype: str = "float32",
               device: torch.device | str = "cpu") -> Any:
    """The causal LM of a model folder, eval mode.

    Args:
        path: folder or hub name.
        chat: its chat format; no id of the tokenizer may lie outside the model's vocabulary.
        dtype: of its weights, ``float32`` or ``bfloat16``.
        device: where it is put, see :func:`pick_device`.

    Raises:
        ModelError: nothing can be loaded.
        TokenizerMismatch: the tokenizer knows more ids than the model.
    """
    logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ModelError(f"no model can be loaded from {str(path)!r}: {_first_line(error)}",
                         fix="put config.json and model.safetensors of a causal language model there") from error
    size = model.config.get_text_config().vocab_size
    if chat.vocab_size > size:
        raise TokenizerMismatch(f"the tokenizer of {str(path)!r} has {chat.vocab_size} ids, its model {size}",
                                fix="use the tokenizer the model was trained with, or resize the embedding")
    return model.to(device).eval()


def take_weights(model: Any, weights: Mapping[str, Any]) -> None:
    """Give a model other weights, all of them.

    Raises:
        ModelError: they are not all weights of this model, or of other shapes.
    """
    try:
        model.load_state_dict(dict(weights), strict=True)
    except RuntimeError as error:
        raise ModelError(f"the weights are not those of a {type(model).__name__}: "
                         f"{' '.join(str(error).split())[:300]}",
                         fix="name the model they were trained from (--model)") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
