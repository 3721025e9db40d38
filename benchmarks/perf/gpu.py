"""A step of the learner on a GPU: tokens per second, memory and share of the card's bfloat16 peak.

    python -m agentsdpo.benchmarks.perf.gpu [--models 0.6B 4B] [--tokens 8192 32768] [--json] [--out FILE]

Builds Qwen3 configurations with random weights (nothing is downloaded), one episode of the given length with a hint of
512 tokens and a quarter of it sampled, and times whole steps: teacher, student with recomputation, loss, backward,
optimiser. 0.6B trains all weights, 4B an adapter of rank 16. Tokens are those of the student's row. FLOP of a step::

    sampled tokens   6 V H  frozen head, 8 V H  trainable
    all tokens       4 (2 P + A) and 2 P more where all weights are trained, A more for the backward of attention
    P parameters outside embedding and head;  A = 2 n d T L  attention of one forward

where a frozen weight needs no gradient of its own, so an adapter's steps are not credited with more than they do.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agentsdpo.benchmarks.perf.figure import Figure, write_figures
from agentsdpo.types import Json

MODELS: dict[str, Json] = {
    "0.6B": {"vocabulary": 151_936, "width": 1024, "layers": 28, "mlp": 3072, "heads": 16, "groups": 8, "head": 128},
    "4B": {"vocabulary": 151_936, "width": 2560, "layers": 36, "mlp": 9728, "heads": 32, "groups": 8, "head": 128},
}
RANK = {"0.6B": 0, "4B": 16}
"""Of the adapter; 0 trains all weights."""
PEAKS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12,
         "A800": 312e12, "L40S": 362e12, "A10": 125e12, "RTX 4090": 165e12}
"""Dense bfloat16 FLOP/s of the data sheet, by a part of the card's name; the longest that fits counts."""
SHARE, HINT, TURN, STEPS = 0.25, 512, 1024, 5


def step_flop(shape: Json, tokens: int, sampled: int, *, parameters: int, trainable: bool) -> float:
    """FLOP of one step with recomputation, see the module.

    Args:
        shape: of :data:`MODELS`.
        tokens: of the row.
        sampled: loss tokens among them.
        parameters: outside embedding and head.
        trainable: all weights are trained.

    >>> flop = step_flop(MODELS["0.6B"], 32_768, 32_768, parameters=440_000_000, trainable=True)
    >>> round(flop / 32_768 / 1e9, 1)  # GFLOP per token
    24.4
    """
    attention = 2.0 * shape["heads"] * shape["head"] * tokens * shape["layers"]
    per_token = (5.0 if trainable else 4.0) * 2.0 * parameters + 5.0 * attention
    return tokens * per_token + sampled * (8.0 if trainable else 6.0) * shape["vocabulary"] * shape["width"]


def peak_of(card: str) -> float | None:
    """FLOP/s of a card by its name, None when it is not known.

    >>> peak_of("NVIDIA H100 80GB HBM3"), peak_of("a card of tomorrow")
    (989000000000000.0, None)
    """
    known = [name for name in PEAKS if name in card]
    return PEAKS[max(known, key=len)] if known else None


def measure(name: str, tokens: int, device: str, shape: Json, steps: int = STEPS) -> Figure:
    """Tokens per second of one model at one length, after a step that warms up; the rest is in the detail.

    Args:
        name: of the model.
        tokens: of the episode, a multiple of 1,024.
        device: ``cuda``; ``cpu`` runs the same, for tests.
        shape: of :func:`~agentsdpo.benchmarks.perf.episodes.qwen`.
        steps: timed.
    """
    import torch

    learner, rows = _prepared(name, tokens, device, shape)
    cuda = torch.cuda if device == "cuda" else None
    times, loss_tokens = [], 0
    for _ in range(steps + 1):
        began = time.perf_counter()
        loss_tokens = learner.step(rows, version=0).n_tokens
        if cuda:
            cuda.synchronize()
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times[1:])
    card = cuda.get_device_name() if cuda else "cpu"
    body = int(learner.cost.linear / 2.0)
    flop = step_flop(shape, tokens, loss_tokens, parameters=body, trainable=not learner.config.adapter.rank)
    peak = peak_of(card)
    return Figure(f"gpu_{name}_{tokens // 1024}k_tokens_per_s", round(tokens / seconds, 1), "tokens/s", None, {
        "card": card, "step_s": round(seconds, 3), "loss_tokens": loss_tokens,
        "peak_gib": round(cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        "tflop_per_s": round(flop / seconds / 1e12, 1),
        "share_of_peak": round(flop / seconds / peak, 3) if peak else None,
        "trained": f"adapter of rank {learner.config.adapter.rank}" if learner.config.adapter.rank else "all weights",
        "dtype": learner.config.dtype, "recompute": learner.config.recompute, "steps": steps})


def _prepared(name: str, tokens: int, device: str, shape: Json) -> tuple[Any, list[Any]]:
    """A learner as a user would configure it for long episodes, and its batch of one."""
    import numpy as np
    import torch

    from agentsdpo.benchmarks.perf.episodes import qwen, train_row
    from agentsdpo.learn.config import AdapterConfig, LearnConfig
    from agentsdpo.learn.learner import Learner

    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    sampled = round(TURN * SHARE)
    row = train_row(np.random.default_rng(0), prompt=TURN - sampled, hint=HINT, vocabulary=shape["vocabulary"],
                    turns=[(sampled, TURN - sampled)] * (tokens // TURN), episode="e")
    # without an adapter a frozen teacher is a second model in memory, as it is for whoever trains so
    config = LearnConfig(dtype="bfloat16", recompute="layers", mlp_tokens=4096, forward_tokens=tokens + HINT,
                         control_every=0, adapter=AdapterConfig(rank=RANK.get(name, 0)))
    return Learner(qwen(**shape, dtype="bfloat16", device=device), config, device=device), [row]


def table(figures: list[Figure]) -> str:
    """For people."""
    lines = ["model and length          tokens/s   step s  peak GiB  TFLOP/s  of peak  trained"]
    for one in figures:
        detail, share = one.detail, one.detail["share_of_peak"]
        words = f"{100 * share:.1f} %" if share is not None else "unknown"
        lines.append(f"{one.name.removeprefix('gpu_').removesuffix('_tokens_per_s'):<24}{one.value:>10,.0f}"
                     f"{detail['step_s']:>9.2f}{detail['peak_gib'] or 0.0:>10.2f}{detail['tflop_per_s']:>9.1f}"
                     f"{words:>9}  {detail['trained']}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command; 0, or 2 where no CUDA is at hand."""
    import torch

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 32_768], help="of one episode")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of the table")
    parser.add_argument("--out", type=Path, help="also write the figures to this file, with commit and load")
    args = parser.parse_args(arguments)
    if wrong := [n for n in args.tokens if n < TURN or n % TURN]:
        parser.error(f"--tokens {wrong[0]} is not a multiple of {TURN}, the length of a turn")
    if not torch.cuda.is_available():
        print("no CUDA device is at hand: these figures need one.", file=sys.stderr)  # noqa: T201
        return 2
    figures = []
    for name in args.models:
        for tokens in args.tokens:
            try:
                figures.append(measure(name, tokens, "cuda", MODELS[name]))
            except torch.cuda.OutOfMemoryError as error:
                print(f"{name} at {tokens} tokens does not fit: {str(error).splitlines()[0]}", file=sys.stderr)  # noqa: T201
    rows = [asdict(figure) for figure in figures]
    print(json.dumps(rows) if args.json else table(figures))  # noqa: T201
    if args.out:
        write_figures(args.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
