"""What can the model of the horizon study do before it is trained: told the rules, and not?

    python -m agentsdpo.benchmarks.horizon.gates [--model DIR] [--tasks 32] [--json]

Every task has rules of its own, so nothing can be known beforehand: without the hint the model has to guess, with it it
shows what a teacher can do at that length. One row for each number of clients.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from agentsdpo.assemble import inprocess_engine
from agentsdpo.benchmarks.horizon.study import CONFIG, LENGTHS, MODEL, existing
from agentsdpo.benchmarks.seed_gates import play
from agentsdpo.evaluate import scores
from agentsdpo.learn.load import load_chat
from agentsdpo.provenance import git_commit, hardware
from agentsdpo.types import Episode, Json


def measure(path: Path, tasks: int, lengths: tuple[int, ...] = LENGTHS) -> list[Json]:
    """Pass rate and mean criterion score, hinted and not, calls and branches an episode, for each n."""
    chat = load_chat(path)
    engine = inprocess_engine(CONFIG, path, chat)
    rows = []
    for n in lengths:
        told, blind = (play(engine, chat, n=n, split="test_names", hinted=hinted, greedy=False, tasks=tasks,
                            config=CONFIG) for hinted in (True, False))
        rows.append({"n": n, "episodes": tasks, **_rates("hinted", told), **_rates("unhinted", blind),
                     "calls": float(np.mean([e.metadata["calls"] for e in told])),
                     "branches": float(np.mean([len(e.branches) for e in told]))})
    return rows


def _rates(name: str, episodes: list[Episode]) -> Json:
    found = scores(episodes)
    return {f"{name}_{key}": found[key] for key in ("pass", "score")}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=existing, default=str(MODEL), help=f"folder; {MODEL}")
    parser.add_argument("--tasks", type=int, default=32, help="for each length, with and without the hint")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="clients of a task")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
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
