"""Tensors to a safetensors file and back, for torch and numpy alike and without importing torch here."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from agentsdpo.errors import CorruptionError, RegistryError
from agentsdpo.files import FULL


def untie(weights: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Split off tensors that are the very memory of another one: a safetensors file holds each byte once.

    Returns:
        Tensors to store, and name left out -> name stored. The name that comes first in ``weights`` is stored.
    """
    stored: dict[str, Any] = {}
    tied: dict[str, str] = {}
    owner: dict[tuple[Any, ...], str] = {}
    for name, tensor in weights.items():
        first = owner.setdefault(_memory(tensor, name), name)
        if first == name:
            stored[name] = tensor
        else:
            tied[name] = first
    return stored, tied


def _memory(tensor: Any, name: str) -> tuple[Any, ...]:
    """What two tensors share exactly when one is the other; an empty tensor has no memory and shares nothing."""
    if isinstance(tensor, np.ndarray):
        key = tensor.__array_interface__["data"][0], tensor.shape, tensor.strides, str(tensor.dtype)
    else:
        key = tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), str(tensor.dtype)
    return key if key[0] and 0 not in key[1] else (name,)


def dtype_of(tensors: Mapping[str, Any]) -> str:
    """The one data type of all tensors, ``mixed`` when there are several.

    >>> dtype_of({"a": np.zeros(1, np.float32)}), dtype_of({"a": np.zeros(1), "b": np.zeros(1, np.float32)})
    ('float32', 'mixed')
    """
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    return kinds.pop() if len(kinds) == 1 else "mixed"


def write_tensors(tensors: Mapping[str, Any], path: Path) -> None:
    """One safetensors file, readable by everyone; the bytes depend on names and values alone.

    Raises:
        RegistryError: there is no room for it, or it cannot be written.
    """
    try:
        _save(tensors, path)
        path.chmod(0o644)  # the library leaves it to its owner alone
    except (SafetensorError, OSError) as error:
        raise unwritten(error, path) from error


def _save(tensors: Mapping[str, Any], path: Path) -> None:
    if all(isinstance(tensor, np.ndarray) for tensor in tensors.values()):
        from safetensors.numpy import save_file

        save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path)
    else:
        from safetensors.torch import save_file  # the tensors are torch's, so torch is loaded already

        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def unwritten(error: Exception, path: Path) -> RegistryError:
    """The sentence for a failed write. The library gives the system's error number in its text alone."""
    told = re.search(r"os error (\d+)", str(error))
    number = int(told[1]) if told else getattr(error, "errno", None)
    reason = os.strerror(number) if number else str(error)
    if number in FULL:
        return RegistryError(f"there is no room for {path} ({reason})", fix=(
            "free some space, or raise the quota or file size limit, then go on: versions published before are safe"))
    return RegistryError(f"{path} cannot be written: {reason}", fix="give this user write permission there")


def read_tensors(path: Path, framework: Literal["pt", "np"]) -> dict[str, Any]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        CorruptionError: the file is not there, is cut short or is no safetensors file.
    """
    try:
        with safe_open(path, framework=framework) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, FileNotFoundError) as error:
        raise CorruptionError(f"{path} is not a whole safetensors file: {error}",
                              fix="restore it from a copy; do not train or sample from it") from error
