"""A pretend graphics card: tensors that are elsewhere, on a machine that has no elsewhere.

Inside :func:`card` the device ``meta`` computes. A tensor put there holds its numbers on the CPU, but whoever mixes it
with one of the CPU, or reads it as an array without fetching it first, is refused as torch refuses it for a GPU. So the
mistakes that only a GPU shows are shown everywhere. Kernels, streams, memory and speed are not a GPU's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer  # type: ignore[attr-defined]
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CARD = torch.device("meta")
_aten = torch.ops.aten
_MOVES = (_aten._to_copy.default, _aten.copy_.default, _aten._foreach_copy_.default)
_INDEXED = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default)
"""Indices may lie on the CPU, as torch lets them."""
_LACKING: dict[Any, Any] = {
    _aten.mm.dtype_out: lambda a, b, dtype, *, out: torch.mm(a.to(dtype), b.to(dtype), out=out)}
"""What a GPU has kernels for and a CPU has not."""


class Carded(Tensor):
    """A tensor of the card; ``held`` are its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls: type["Carded"], held: Tensor) -> "Carded":
        out = Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), dtype=held.dtype, device=CARD,
                                            storage_offset=held.storage_offset())
        out.held = held
        return out

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """The same numbers, without gradient."""
        return self.detach()

    @data.setter
    def data(self, value: "Carded") -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.held = value.held

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        """No: its numbers are somewhere."""
        return False

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _Operations(TorchDispatchMode):
    """What makes tensors goes by the device it is told, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:  # in inference mode operations come whole, with the device anywhere among their arguments
            parts = func.decompose(*args, **kwargs or {})
        return _compute(func, args, kwargs or {}) if parts is NotImplemented else parts


class _Literals(TorchFunctionMode):
    """``torch.tensor`` never reaches the dispatcher with its numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return func(*args, **{k: v for k, v in kwargs.items() if k != "device"}).to(kwargs["device"])
        return func(*args, **kwargs)


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run one operation on the CPU; its results lie where they would."""
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [x for x in given if isinstance(x, Carded)]
    if there and func not in _MOVES:
        _refuse_mixed(func, tree_leaves((args[0], args[2:]) if func in _INDEXED else (args, kwargs)))
    to = kwargs.get("device")
    told = torch.device(to) if to is not None else None
    if told is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    out = _LACKING.get(func, func)(*tree_map(_plain, args), **tree_map(_plain, kwargs))
    ours = isinstance(args[0], Carded) if func is _aten.copy_.default else bool(there) if told is None else told == CARD
    known = {id(x.held): x for x in there}  # what an operation changed in place stays the tensor it was
    return tree_map(lambda x: known[id(x)] if id(x) in known else _there(x) if ours else x, out)


def _refuse_mixed(func: Any, leaves: list[Any]) -> None:
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    here = [tuple(x.shape) for x in tensors if not isinstance(x, Carded) and x.dim()]
    if here and len(here) < len(tensors):
        raise RuntimeError(f"Expected all tensors to be on the same device: of {func} those of {here} are on the CPU")


def _there(x: Any) -> Any:
    return Carded(x) if isinstance(x, Tensor) else x


def _plain(x: Any) -> Any:
    return x.held if isinstance(x, Carded) else x


def put(model: nn.Module) -> nn.Module:
    """Move a model to the card in place; weights that are one stay one."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, own in module._parameters.items():
            if own is not None and not isinstance(own, Carded):
                module._parameters[name] = moved.setdefault(
                    id(own), nn.Parameter(Carded(own.detach()), own.requires_grad))
        for name, buffer in module._buffers.items():
            if buffer is not None and not isinstance(buffer, Carded):
                module._buffers[name] = Carded(buffer)
    return model


@contextmanager
def card() -> Iterator[torch.device]:
    """The device of the card, which computes while this lasts."""
    fused, to = optimizer._get_fused_kernels_supported_devices, nn.Module.to

    def moved(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        where = kwargs.get("device", args[0] if args else None)
        return put(self) if where is not None and str(where) == str(CARD) else to(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, _Operations(), _Literals():
        patch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: [*fused(), CARD.type])
        patch.setattr(nn.Module, "to", moved)
        yield CARD


def held(model: nn.Module) -> list[Tensor]:
    """The numbers of a model's weights, wherever they are."""
    return [_plain(p.detach()) for p in model.parameters()]

