"""Low-rank adapters through peft: the base stays as it is, a product ``s B A`` is learnt on top of its linear layers.

The adapter sits inside the student itself, so that every teacher needs one model alone: a frozen one reads with the
adapter off, snapshots and means read with factors of their own in its place.

A mean over steps is of the product. Means of A and of B are of neither: with ``B`` from zero, ``mean(B) mean(A)`` lags
twice and mixes terms no student ever had. A mean of products has a growing rank; it is kept as factors of a fixed one,
cut back after every step by the singular values of a small core.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from agentsdpo.errors import ModelError
from agentsdpo.learn.config import AdapterConfig

STUDENT = "student"
"""Name of the trained adapter in peft's layers."""

MEAN_RANKS = 4
"""Rank of a mean of products, in ranks of the adapter. Adam at 1e-3 from zero, 300 steps, rank 8: off by 4e-5."""


def add_adapter(model: Any, config: AdapterConfig) -> None:
    """Freeze a model of transformers and put a fresh adapter into it; its output is as before until the first step.

    Args:
        model: changed in place.
        config: ``rank`` 1 or more, ``alpha``, ``targets``. The random half is the same in every run.

    Raises:
        ModelError: no layer has one of the names, or the output layer or the embedding is meant.
    """
    from peft import LoraConfig  # one second to import

    targets = "all-linear" if config.targets == ("all-linear",) else list(config.targets)
    wanted = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets, lora_dropout=0.0)
    _check_targets(model, config.targets)
    model.requires_grad_(False)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.add_adapter(wanted, STUDENT)
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.float()  # beside a base in bfloat16: steps of a factor are too small for it
    except ValueError as error:
        raise ModelError(f"no adapter can be put on {list(config.targets)} of {type(model).__name__}: "
                         f"{str(error).splitlines()[0]}",
                         fix="name linear layers of the model in learn.adapter.targets, or 'all-linear' alone"
                         ) from error


def _check_targets(model: Any, targets: tuple[str, ...]) -> None:
    """Refuse what peft would take: the ends of the model, and a name that nothing has beside one that something has."""
    ends = {id(model.get_output_embeddings()), id(model.get_input_embeddings())}
    modules = {f".{name}": id(module) for name, module in model.named_modules()}
    for target in targets if targets != ("all-linear",) else ():
        meant = {module for name, module in modules.items() if name.endswith(f".{target}")}
        if meant & ends:
            raise ModelError(f"learn.adapter.targets {list(targets)} reaches the embedding or the output layer",
                             fix="adapt layers of the body: the loss needs the output layer as one matrix")
        if not meant:
            raise ModelError(f"learn.adapter.targets names {target!r}, and no layer of {type(model).__name__} ends so",
                             fix="name linear layers of the model, or 'all-linear' alone")


def has_adapter(model: Any) -> bool:
    """Whether :func:`add_adapter` was called on it."""
    return any(_is_adapted(module) for module in model.modules())


def merged_weights(model: Any) -> dict[str, Tensor]:
    """State dict under the names of the model without adapter, each product added to the weight it stands on.

    What an engine loads that knows nothing of adapters. Without an adapter, the state dict as it is.
    """
    layers = _layers(model)
    merged: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        owner, inside, rest = name.partition(".base_layer.")
        if not inside:
            if ".lora_" not in name:
                merged[name] = tensor
        elif rest == "weight":
            with torch.no_grad():
                merged[f"{owner}.weight"] = tensor + layers[owner].get_delta_weight(STUDENT).to(tensor.dtype)
        else:
            merged[f"{owner}.{rest}"] = tensor
    return merged


def adapter_weights(model: Any) -> dict[str, Tensor]:
    """The factors alone, by the names peft gives them in ``adapter_model.safetensors``."""
    return {f"base_model.model.{name}.lora_{side}.weight": getattr(layer, f"lora_{side}")[STUDENT].weight.detach()
            for name, layer in _layers(model).items() for side in "AB"}


def adapter_config(model: Any) -> dict[str, Any]:
    """What ``adapter_config.json`` says of the factors, for engines and peft; the same in every run of one setting."""
    told = model.peft_config[STUDENT].to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in told.items()}
    return plain | {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None,
                    "inference_mode": True}


class AdapterOff:
    """The weights below the adapter: those the student started with, without a second copy of them."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @contextmanager
    def reading(self) -> Iterator[None]:
        """The adapter does not count. Call it between a backward and the next forward, not in between."""
        self.model.disable_adapters()
        try:
            yield
        finally:
            self.model.enable_adapters()

    def take(self, student: Any) -> None:
        """Refused: what lies below an adapter never changes."""
        raise ModelError("the base of an adapter cannot become the student", fix="hold an AdapterCopy")

    def lean(self, student: Any, rate: float) -> None:
        """Refused, see :meth:`take`."""
        self.take(student)

    def tensors(self) -> dict[str, Tensor]:
        """Empty."""
        return {}


class AdapterCopy(AdapterOff):
    """Factors ``U V`` of every adapted layer, read in place of the student's ``s B A``.

    Args:
        model: the student with its adapter; ``U V`` starts as its product.
        ranks: rank of ``U V`` in ranks of the adapter; 1 is enough for copies, a mean wants :data:`MEAN_RANKS`.
    """

    def __init__(self, model: Any, ranks: int = 1) -> None:
        super().__init__(model)
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        for name, layer in _layers(model).items():
            b, a = _product(layer)
            wide = ranks * a.shape[0]
            self._factors[name] = b.new_zeros(b.shape[0], wide), a.new_zeros(wide, a.shape[1])
        self.take(model)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """The student's adapter is off and these factors are on."""
        layers = _layers(self.model)
        hooks = [layers[name].register_forward_hook(_adds(u, v)) for name, (u, v) in self._factors.items()]
        try:
            with super().reading():
                yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def take(self, student: Any) -> None:
        """Copy the student's factors."""
        for name, layer in _layers(student).items():
            (u, v), (b, a) = self._factors[name], _product(layer)
            u.zero_()[:, :a.shape[0]], v.zero_()[:a.shape[0]] = b, a

    @torch.no_grad()
    def lean(self, student: Any, rate: float) -> None:
        """``U V := (1 - rate) U V + rate s B A``, as near as the rank allows (best in the Frobenius norm)."""
        for name, layer in _layers(student).items():
            (u, v), (b, a) = self._factors[name], _product(layer)
            left, right = torch.cat([(1.0 - rate) * u, rate * b], 1), torch.cat([v, a])
            u[:], v[:] = _cut(left, right, u.shape[1])

    def tensors(self) -> dict[str, Tensor]:
        """Both factors of every layer."""
        return {f"{name}/{side}": factor for name, pair in self._factors.items()
                for side, factor in zip(("out", "in"), pair, strict=True)}


def _cut(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of at most ``rank`` of the product ``left @ right``, zeros behind the rank it has."""
    (q1, r1), (q2, r2) = torch.linalg.qr(left.double()), torch.linalg.qr(right.double().t())
    u, s, v = torch.linalg.svd(r1 @ r2.t(), full_matrices=False)
    root = s[:rank].sqrt()
    short = rank - len(root)
    out, into = (q1 @ u[:, :rank]) * root, (root[:, None] * v[:rank]) @ q2.t()
    return (nn.functional.pad(out, (0, short)).to(left.dtype), nn.functional.pad(into, (0, 0, 0, short)).to(left.dtype))


def _adds(u: Tensor, v: Tensor) -> Any:
    """A forward hook that adds ``x V' U'``."""
    def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + (inputs[0].to(v.dtype) @ v.t() @ u.t()).to(output.dtype)
    return hook


def _product(layer: Any) -> tuple[Tensor, Tensor]:
    """``s B`` [out, r] and ``A`` [r, in] of one adapted layer."""
    return layer.scaling[STUDENT] * layer.lora_B[STUDENT].weight, layer.lora_A[STUDENT].weight


def _layers(model: Any) -> dict[str, Any]:
    """Adapted layers by name."""
    return {name: module for name, module in model.named_modules() if _is_adapted(module)}


def _is_adapted(module: Any) -> bool:
    return hasattr(module, "lora_A") and STUDENT in module.lora_A
