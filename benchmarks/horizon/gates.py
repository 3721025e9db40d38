"""What can the model of the horizon study do before it is trained: told the rules, and not?

    python -m agentsdpo.benchmarks.horizon.gates [--model DIR] [--tasks 32] [--json]

Every task has rules of its own, so nothing can be known beforehand: without the hint the model has to guess, with it it
shows what a teacher can do at that length. One row for each number of clients.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from agentsdpo.benchmarks.horizon.study import COLLECT, LENGTHS, MODEL
from agentsdpo.benchmarks.seed_gates import passed, play
from agentsdpo.collect.config import CollectConfig
from agentsdpo.collect.inprocess import InProcessEngine
from agentsdpo.learn.load import load_chat, load_model
from agentsdpo.provenance import git_commit, hardware
from agentsdpo.types import Episode


def measure(path: Path, tasks: int, lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, Any]]:
    """Pass rate and mean criterion score, hinted and not, calls and branches an episode, for each n."""
    chat, config = load_chat(path), CollectConfig.model_validate(COLLECT)
    engine = InProcessEngine(load_model(path, chat), chat.eos_id, max_slots=config.concurrency, window=config.window)
    rows = []
    for n in lengths:
        told, blind = (play(engine, chat, n=n, split="test_names", hinted=hinted, greedy=False, tasks=tasks,
                            config=config) for hinted in (True, False))
        rows.append({"n": n, "episodes": tasks, "hinted_pass": passed(told), "hinted_score": score(told),
                     "unhinted_pass": passed(blind), "unhinted_score": score(blind),
                     "calls": float(np.mean([e.metadata["calls"] for e in told])),
                     "branches": float(np.mean([len(e.branches) for e in told]))})
    return rows


def score(episodes: list[Episode]) -> float:
    """Mean criterion score, 0 where an episode has no grade."""
    return float(np.mean([(e.grade.mean or 0.0) if e.grade else 0.0 for e in episodes]))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="folder; that of the study when not given")
    parser.add_argument("--tasks", type=int, default=32, help="for each length, with and without the hint")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="clients of a task")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not args.model.is_dir():
        parser.error(f"there is no model at {args.model}: python -m agentsdpo.benchmarks.horizon.build makes it")
    rows = measure(args.model, args.tasks, tuple(args.lengths))
    if args.json:
        weights = (args.model / "model.safetensors").read_bytes()
        about = {"model_sha256": hashlib.sha256(weights).hexdigest(), "commit": git_commit(), "hardware": hardware()}
        sys.stdout.write(json.dumps({**about, "rows": rows}, indent=2) + "\n")
        return
    for row in rows:
        sys.stdout.write("  ".join(f"{key} {value:.3g}" for key, value in row.items()) + "\n")


if __name__ == "__main__":
    main()
