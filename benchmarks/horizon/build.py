"""Teach the shipped seed model long episodes, for this study alone.

    python -m agentsdpo.benchmarks.horizon.build [--out DIR] [--threads 2] [--first-stage 1]

Starts from the shipped weights and reads the drills and episodes of :mod:`.corpus` in stages, each with a learning rate
that falls to zero. Writes weights, tokenizer, template and ``training.json``; ``python -m
agentsdpo.benchmarks.horizon.gates --model DIR`` judges the result.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from agentsdpo.benchmarks.horizon.corpus import cut_traces, drills
from agentsdpo.benchmarks.horizon.study import MODEL
from agentsdpo.chat import ChatFormat
from agentsdpo.envs.desk.build_seed import Batches, Stage, train_stage
from agentsdpo.envs.desk.corpus import Trace
from agentsdpo.envs.desk.seed import seed_path

SEED = 48
STAGES: tuple[tuple[Stage, Callable[[ChatFormat, int], Iterator[Trace]]], ...] = (
    (Stage(450, decay=False), partial(drills, lengths=(4, 8, 16), reading=0.0)),
    (Stage(1200, decay=True), partial(drills, lengths=(8, 16, 32, 48), reading=0.25)),
    (Stage(1200, decay=True), cut_traces),
    (Stage(1000, decay=True, peak=0.5), partial(cut_traces, short=0.5)))
"""Who is next among few, then among many, then whole episodes; in this order it is learned, at once it is not."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=MODEL, help=f"folder; {MODEL}")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--first-stage", type=int, default=0, help="go on in --out from this stage (1: the second)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(seed_path())
    tokenizer.save_pretrained(args.out)
    chat, log = ChatFormat(tokenizer), args.out / "training.json"
    figures = json.loads(log.read_text())[:args.first_stage] if args.first_stage else []
    model = Qwen3ForCausalLM.from_pretrained(args.out if args.first_stage else seed_path())
    for number, (stage, stream) in list(enumerate(STAGES))[args.first_stage:]:
        batches = Batches(tokenizer, stream(chat, SEED + number), args.batch_tokens, SEED + number)
        figures.append(train_stage(model, stage, batches, args.out))
        log.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
