"""One hard task at test time: how likely is a first success, and after how many attempts?

    python -m agentsdpo.benchmarks.methods.attempts               # 20 tasks, 64 attempts each; may be stopped
    python -m agentsdpo.benchmarks.methods.attempts --quick       # a look at whether it runs, not a result

Three arms on the same tasks, from the same weights, with the same budget (``agentsdpo solve``): ``sdpo`` learns from
the feedback on its failures between rounds of four attempts, ``best_of_k`` tries again, ``multi_turn`` reads the
feedback on all its earlier attempts. A fourth, ``sdpo_told_which``, is run when it is named: the control for how much
the feedback says, told which criteria failed and not what was expected. Untrained, the model passes one attempt in
some 300.

In the table each task is a ``seed``; ``episodes`` counts attempts, and ``pass`` is 1 once the task was solved.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from agentsdpo.benchmarks.study import COLUMNS, in_table, write_table
from agentsdpo.config import from_mapping
from agentsdpo.provenance import git_commit, hardware
from agentsdpo.solve import Attempt, Method, solve
from agentsdpo.stats import Interval, bootstrap
from agentsdpo.types import Json

SPLIT = "test_names"
ARMS: dict[str, tuple[str, ...]] = {
    "sdpo": (), "multi_turn": (), "best_of_k": ("group=32",), "sdpo_told_which": ("hint.level=1",)}
"""Overrides of each. Rounds do not matter to ``best_of_k``: large ones are faster."""
MAIN = ("sdpo", "multi_turn", "best_of_k")
COMMON: Json = {"preset": "test_time", "collect": {"window": 512, "concurrency": 32, "max_tokens": 64}}
TASKS, ATTEMPTS = 20, 64
SHOWN = (1, 2, 4, 8, 16, 32, 64)
TABLE = Path("docs/results/methods-test_time.parquet")


def method_of(arm: str) -> Method:
    """By which method an arm tries.

    >>> method_of("sdpo_told_which"), method_of("best_of_k")
    ('sdpo', 'best_of_k')
    """
    return cast("Method", "sdpo" if arm.startswith("sdpo") else arm)


def attempt(arm: str, task: int, budget: int) -> list[Json]:
    """Try one task; one row per attempt of the budget: solved by then or not, and the best score so far."""
    config = from_mapping(COMMON, ARMS[arm])
    began, walls = time.monotonic(), dict[int, float]()

    def told(fresh: Sequence[Attempt]) -> None:
        walls.update((one.number, time.monotonic() - began) for one in fresh)

    found = solve(config, (SPLIT, task), method=method_of(arm), attempts=budget, told=told)
    about = {"study": "methods-test_time", "arm": arm, "preset": config.preset, "staleness": 0, "seed": task,
             "env_steps": None, "split": SPLIT, "decoding": "sampled", "n": 1, "commit": git_commit(),
             "hardware": hardware()}
    best, rows = 0.0, list[Json]()
    for k in range(1, budget + 1):
        if k <= (found.solved_at or budget):
            best = max(best, found.attempts[k - 1].score or 0.0)
        solved = found.solved_at is not None and found.solved_at <= k
        rows.append({**about, "step": k, "episodes": k, "pass": float(solved), "score": best,
                     "wall_s": walls.get(k, max(walls.values()))})
    return rows


def run(arms: Sequence[str], tasks: int, budget: int, path: Path, say: Callable[[str], None]) -> None:
    """Try what the table lacks, all arms of a task before the next one."""
    have = in_table(path)
    for task in range(tasks):
        for arm in arms:
            if (arm, task) in have:
                continue
            rows = attempt(arm, task, budget)
            write_table(pa.Table.from_pylist(rows, COLUMNS), path)
            at = next((row["episodes"] for row in rows if row["pass"]), None)
            say(f"{SPLIT}/{task} {arm}: {f'attempt {at}' if at else 'not solved'}, {rows[-1]['wall_s']:.0f} s")


def discovery(rows: Sequence[Json], arm: str) -> dict[int, Interval]:
    """Share of tasks that were solved by each number of attempts, with its bootstrap interval over tasks."""
    own = [row for row in rows if row["arm"] == arm]
    return {k: bootstrap([row["pass"] for row in own if row["episodes"] == k])
            for k in sorted({row["episodes"] for row in own})}


def lines(found: pa.Table) -> Iterator[str]:
    """One line per arm, then how many attempts the others need for what best_of_k finds with all of its budget."""
    rows = found.to_pylist()
    shown = [k for k in SHOWN if k <= max(row["episodes"] for row in rows)]
    yield f"{'solved by attempt':<27}" + "".join(f"{k:>17}" for k in shown)
    curves = {arm: discovery(rows, arm) for arm in ARMS if any(row["arm"] == arm for row in rows)}
    for arm, curve in curves.items():
        yield f"{arm:<16}{sum(row['arm'] == arm and row['episodes'] == 1 for row in rows):>3} tasks  " + "".join(
            f"{_percent(curve[k]):>17}" for k in shown)
    if "best_of_k" in curves:
        budget = max(curves["best_of_k"])
        goal = curves["best_of_k"][budget].estimate
        yield f"one attempt of best_of_k passes in {base_success(rows):.1%}"
        for arm in [arm for arm in curves if arm != "best_of_k" and goal > 0]:
            yield f"{arm}: {100 * goal:.0f} % of the tasks, best_of_k's share after {budget}, {_by(curves[arm], goal)}"


def _percent(found: Interval) -> str:
    return f"{100 * found.estimate:.0f} % [{100 * found.low:.0f}, {100 * found.high:.0f}]"


def base_success(rows: Sequence[Json]) -> float:
    """Share of the attempts of best_of_k that passed, those up to the first success of each task counted."""
    own = [row for row in rows if row["arm"] == "best_of_k"]
    tasks = {row["seed"] for row in own}
    played = [min([row["episodes"] for row in own if row["seed"] == task and row["pass"]], default=0) for task in tasks]
    budget = max(row["episodes"] for row in own)
    return float(np.count_nonzero(played) / sum(n or budget for n in played))


def _by(curve: dict[int, Interval], goal: float) -> str:
    at = next((k for k, found in curve.items() if found.estimate >= goal), None)
    return f"by attempt {at}" if at else f"not within {max(curve)} attempts"


def main(arguments: Sequence[str] | None = None) -> None:
    """Try what is missing, then print what the table says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(MAIN),
                        help=f"{', '.join(MAIN)} if not given")
    parser.add_argument("--tasks", type=int, help=f"tasks 0 to this, exclusive, of {SPLIT}; {TASKS}, or 1 when quick")
    parser.add_argument("--attempts", type=int, help=f"the budget of each task; {ATTEMPTS}, or 8 when quick")
    parser.add_argument("--quick", action="store_true", help="one task and eight attempts: a look, not a result")
    parser.add_argument("--table", type=Path, help=f"results; {TABLE}, or runs/methods-test_time-quick.parquet")
    parser.add_argument("--no-run", action="store_true", help="only read what is there")
    args = parser.parse_args(arguments)
    path = args.table or (Path("runs/methods-test_time-quick.parquet") if args.quick else TABLE)
    if not args.no_run:
        run(args.arms, args.tasks or (1 if args.quick else TASKS), args.attempts or (8 if args.quick else ATTEMPTS),
            path, lambda text: print(text, file=sys.stderr, flush=True))  # noqa: T201
    for line in lines(pq.read_table(path)):
        print(line)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
