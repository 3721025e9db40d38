"""Teach the shipped seed model long episodes, for this study alone.

    python -m agentsdpo.benchmarks.horizon.build [--out DIR] [--threads 2] [--first-stage 1]

Starts from the shipped weights and reads the drills and episodes of :mod:`.corpus` in stages, the first at one learning
rate, each other at one that falls to zero. Writes weights in float16, tokenizer, template and ``training.json``;
``python -m agentsdpo.benchmarks.horizon.gates --model DIR`` judges the result.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from agentsdpo.benchmarks.horizon.corpus import cut_traces, drills, recalled
from agentsdpo.chat import ChatFormat
from agentsdpo.envs.desk.build_seed import Batches, Stage, train_stage
from agentsdpo.envs.desk.corpus import Trace
from agentsdpo.envs.desk.seed import seed_path

SEED, BATCH_TOKENS, OUT = 48, 4096, Path("runs/horizon-model")
STAGES: tuple[tuple[Stage, Callable[[ChatFormat, int], Iterator[Trace]]], ...] = (
    (Stage(450, decay=False), partial(drills, lengths=(4, 8, 16), reading=0.0)),
    (Stage(1200, decay=True), partial(drills, lengths=(8, 16, 32, 48), reading=0.25)),
    (Stage(1200, decay=True), cut_traces),
    (Stage(1000, decay=True, peak=0.5), partial(cut_traces, short=0.5)),
    (Stage(450, decay=True, peak=0.5), partial(cut_traces, short=0.8)),
    (Stage(450, decay=True, peak=0.5), recalled),
    (Stage(1100, decay=True, peak=0.5), recalled))
"""Who is next among few, then among many, then whole episodes: in this order it is learned, at once it is not. The last
two bring back what the drills made it forget, whom a hint wants told, which 2,650 steps of the former three did not."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder; {OUT}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--first-stage", type=int, default=0, help="go on in --out from this stage (1: the second)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(seed_path())
    tokenizer.save_pretrained(args.out)
    chat, log = ChatFormat(tokenizer), args.out / "training.json"
    figures = json.loads(log.read_text())[:args.first_stage] if args.first_stage else []
    model = Qwen3ForCausalLM.from_pretrained(args.out if args.first_stage else seed_path(), dtype=torch.float32)
    for number, (stage, stream) in list(enumerate(STAGES))[args.first_stage:]:
        batches = Batches(tokenizer, stream(chat, SEED + number), BATCH_TOKENS, SEED + number)
        figures.append(train_stage(model, stage, batches, args.out))
        log.write_text(json.dumps(figures, indent=2) + "\n")
    model.half().save_pretrained(args.out)  # as it is shipped and measured: half the bytes


if __name__ == "__main__":
    main()
