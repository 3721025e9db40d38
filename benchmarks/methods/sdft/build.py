"""Teach the shipped seed model to do as a demonstration does, for the curve of the preset ``sdft`` alone.

    python -m agentsdpo.benchmarks.methods.sdft.build [--out DIR] [--threads 2] [--first-stage 1]

Starts from the shipped weights. Part of the text are episodes with an expert's calls in front, under rules that are
redrawn for each, as in :mod:`agentsdpo.envs.desk.corpus`, so that no rule can be learned here; the rest is what the
model has read before. Writes weights in float16, tokenizer, template and ``training.json``.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from agentsdpo.calls import call_line
from agentsdpo.chat import ChatFormat
from agentsdpo.envs.desk.agents import ScriptedAgent, steps
from agentsdpo.envs.desk.build_seed import Batches, Stage, train_stage
from agentsdpo.envs.desk.corpus import MIXES, Frame, Mix, Trace, any_year, trace, traces
from agentsdpo.envs.desk.seed import seed_path
from agentsdpo.envs.desk.suite import DeskSuite
from agentsdpo.hint.sources import DEMO
from agentsdpo.types import Task

SEED, BATCH_TOKENS, OUT = 49, 4096, Path("runs/sdft-model")
MINI: Mix = ((1.0, "desk-mini", "lookup", (1,), 0),)
"""The tasks on which the preset is measured."""
STAGES: tuple[tuple[Stage, float, Mix], ...] = (
    (Stage(900, decay=True, peak=0.5), 0.5, MIXES[1]), (Stage(900, decay=True), 0.7, MINI))
"""Each with the share of its episodes that have a demonstration, and what these are of. After the first the model
copies sheet, unit and folder, and guesses who is told."""


def shown(task: Task, rules: dict[str, str]) -> str:
    """The hint that the source ``demo`` would write, had the firm these rules."""
    done = steps(task, ScriptedAgent(task, rules))
    return "\n".join([DEMO, *(call_line(name, arguments) for name, arguments in done)])


def demonstrated(chat: ChatFormat, seed: int, share: float, mix: Mix) -> Iterator[Trace]:
    """An endless, seeded stream of episodes, a share of them with a demonstration of the same task in front."""
    frame, rng, index = Frame(chat), random.Random(seed), 0
    known = traces(frame, seed, MIXES[1])
    suites = [DeskSuite(preset, families=(family,), n=n, rows=rows) for _, preset, family, n, rows in mix]
    while True:
        if rng.random() > share:
            yield next(known)
            continue
        suite = rng.choices(suites, [share for share, *_ in mix])[0]
        task = any_year(suite.task("train", seed * 10_000_000 + index), rng)
        yield trace(frame, task, rng, epsilon=rng.choice((0.0, 0.05, 0.2)), words=shown)
        index += 1


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
    for number, (stage, share, mix) in list(enumerate(STAGES))[args.first_stage:]:
        stream = demonstrated(chat, SEED + number, share, mix)
        figures.append(train_stage(model, stage, Batches(tokenizer, stream, BATCH_TOKENS, SEED + number), args.out))
        log.write_text(json.dumps(figures, indent=2) + "\n")
    model.half().save_pretrained(args.out)  # as it is shipped and measured: half the bytes


if __name__ == "__main__":
    main()
