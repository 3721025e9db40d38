"""The vocabulary products of the loss, in the model's dtype where the machine can, else in float32 by tiles.

A CPU without bfloat16 arithmetic takes a hundred times as long for such a product; there tiles of the head are widened
one after the other, so that no whole float32 copy of it exists. What is summed over chunks is float32 everywhere.
"""

import torch
from torch import Tensor

_TILE = 1 << 14
"""Ids of a tile: 32 MiB of a head of width 512 in float32."""


def widened(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of tensors of this dtype are taken in float32 on this device."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return False
    able = torch.cpu.get_capabilities()
    return not (able.get("amx_bf16") or able.get("avx512_bf16") if dtype == torch.bfloat16 else able.get("amx_fp16"))


def keep_freed_memory(device: torch.device) -> None:
    """Let the heap of a CPU process keep up to 60 MiB that it freed, so that the next tensors need no new pages.

    glibc hands back to the system what is freed beyond twice the largest block it ever mapped and unmapped (32 MiB at
    most count). Temporaries of a few hundred kilobytes would be faulted in anew by nearly every operation: measured,
    the work on logits took 2.5 times as long. One larger block that nobody writes to settles it; elsewhere than on
    glibc it does nothing.
    """
    if device.type == "cpu":
        torch.empty(30 << 20, dtype=torch.uint8)


def logits_buffer(rows: int, hidden: Tensor, weight: Tensor) -> Tensor:
    """Room for logits [rows, V]: the dtype a product comes out in, float32 on a GPU and where tiles are widened."""
    keep = hidden.device.type == "cpu" and not widened(hidden.dtype, hidden.device)
    dtype = hidden.dtype if keep else torch.promote_types(hidden.dtype, torch.float32)
    return torch.empty(rows, weight.shape[0], dtype=dtype, device=hidden.device)


def logits_into(out: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """``hidden @ weight.T`` written into ``out`` [R, V]; hidden [R, H], weight [V, H]."""
    if out.dtype == hidden.dtype:
        return torch.mm(hidden, weight.t(), out=out)
    if not widened(hidden.dtype, hidden.device):
        return torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    wide = hidden.to(out.dtype)
    for at in range(0, len(weight), _TILE):
        out[:, at:at + _TILE] = wide @ weight[at:at + _TILE].to(out.dtype).t()
    return out


def hidden_gradient_into(out: Tensor, dz: Tensor, weight: Tensor) -> None:
    """``dz @ weight`` written into ``out`` [R, H]; dz [R, V] in the dtype of the logits."""
    if not widened(weight.dtype, weight.device):
        torch.mm(dz.to(weight.dtype), weight, out=out)
        return
    wide = torch.zeros_like(out, dtype=dz.dtype)
    for at in range(0, len(weight), _TILE):
        wide.addmm_(dz[:, at:at + _TILE], weight[at:at + _TILE].to(dz.dtype))
    out.copy_(wide)


def add_head_gradient(total: Tensor, dz: Tensor, hidden: Tensor) -> None:
    """``total += dz.T @ hidden``; total [V, H] in float32 at least, dz [R, V] in the dtype of the logits."""
    if widened(hidden.dtype, hidden.device):
        hidden = hidden.to(total.dtype)
    dz = dz.to(hidden.dtype)
    if hidden.dtype == total.dtype:
        total.addmm_(dz.t(), hidden)
        return
    for at in range(0, len(total), _TILE):  # what comes out in the model's dtype must not be as large as the head
        total[at:at + _TILE] += dz[:, at:at + _TILE].t() @ hidden
