"""Does learning from stale single episodes hold at long horizons? 4, 16 and 48 clients, cut by compaction.

    python -m agentsdpo.benchmarks.horizon.build            # first the model, half an hour
    python -m agentsdpo.benchmarks.horizon                  # three lengths, 5 seeds: hours; may be stopped, continued
    python -m agentsdpo.benchmarks.horizon --arms robust-n4 --seeds 1
    python -m agentsdpo.benchmarks.horizon --quick          # a look at whether it runs, not a result

``robust``, sixteen versions stale, as in the staleness study. The scale: before training (the same weights), and what
these weights do when they read the hint (``python -m agentsdpo.benchmarks.horizon.gates``); the oracle passes all.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from agentsdpo.benchmarks.horizon.study import ARMS, COMMON, MODEL, QUICK
from agentsdpo.benchmarks.study import in_table, run_study, table, write_table
from agentsdpo.formats import interval, percent
from agentsdpo.results import HELD_OUT
from agentsdpo.stats import Interval, over_seeds
from agentsdpo.types import Json

TABLE = Path("docs/results/horizon.parquet")
CONTROL = ("test_firm",)


@dataclass(frozen=True)
class Result:
    """One length over its seeds; rates are fractions.

    Attributes:
        arm: its name. seeds: how many. episodes: played by each. calls: of tools, an episode of training.
        before, passed: held-out pass rate before and after training, sampled, over seeds and splits; of one seed with
            Wilson's interval over its episodes. score_before, score: the same of the mean criterion score.
        greedy, control: pass rate after training, greedy; and that in a firm whose rules were never taught.
    """

    arm: str
    seeds: int
    episodes: int
    calls: float
    before: Interval
    passed: Interval
    score_before: Interval
    score: Interval
    greedy: float
    control: float


def results(found: pa.Table) -> list[Result]:
    """One result per length that was trained to its end, shortest first."""
    rows = [{"kind": "eval", **row} for row in found.to_pylist()]
    arms = sorted({row["arm"] for row in rows}, key=lambda arm: int(arm.rpartition("n")[2]))
    return [_result(arm, [row for row in rows if row["arm"] == arm]) for arm in arms]


def _result(arm: str, rows: list[Json]) -> Result:
    ends = {seed: max(row["step"] for row in rows if row["seed"] == seed) for seed in {row["seed"] for row in rows}}
    last = [row for row in rows if row["step"] == ends[row["seed"]]]
    first = [row for row in rows if row["step"] == 0]

    def mean(decoding: str, splits: tuple[str, ...]) -> float:
        rates = [row["pass"] for row in last if row["decoding"] == decoding and row["split"] in splits]
        return float(np.mean(rates)) if rates else float("nan")

    def of(chosen: list[Json], value: str) -> Interval:
        sampled = [row for row in chosen if row["decoding"] == "sampled" and row["split"] in HELD_OUT]
        by_seed = [[row[value] for row in sampled if row["seed"] == seed] for seed in sorted(ends)]
        n = sum(row["n"] for row in sampled if row["seed"] == min(ends))
        return over_seeds(by_seed, n if value == "pass" else 0)

    return Result(arm=arm, seeds=len(ends), episodes=max(row["episodes"] for row in last),
                  calls=float(np.mean([row["env_steps"] / row["episodes"] for row in last])),
                  before=of(first, "pass"), passed=of(last, "pass"), score_before=of(first, "score"),
                  score=of(last, "score"), greedy=mean("greedy", HELD_OUT), control=mean("sampled", CONTROL))


def lines(found: pa.Table) -> Iterator[str]:
    """One line per length, in percent."""
    for one in results(found):
        yield (f"{one.arm:<11} {one.seeds} seed{'s' * (one.seeds > 1)}  {one.episodes} episodes of {one.calls:.0f} "
               f"calls  pass {_of(one.before)} -> {_of(one.passed)}, greedy {percent(one.greedy)}, "
               f"score {_of(one.score_before)} -> {_of(one.score)}, untaught firm {percent(one.control)}")


def _of(found: Interval) -> str:
    return f"{percent(found.estimate)} {interval(found)}".strip()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, then write the table and print what it says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="these; all if not given")
    parser.add_argument("--model", type=Path, default=MODEL, help=f"folder of the model to train; {MODEL}")
    parser.add_argument("--seeds", type=int, help="0 to this, exclusive; 5, or 1 when quick")
    parser.add_argument("--quick", action="store_true", help="two steps and four episodes: a look, not a result")
    parser.add_argument("--out", type=Path, help="run folders; runs/horizon, or that with -quick")
    parser.add_argument("--table", type=Path, help=f"results; {TABLE}, or OUT/results.parquet when quick")
    parser.add_argument("--no-run", action="store_true", help="only read what is there")
    args = parser.parse_args(arguments)
    out = args.out or Path("runs/horizon-quick" if args.quick else "runs/horizon")
    path = args.table or (out / "results.parquet" if args.quick else TABLE)
    if not args.no_run:
        if not args.model.is_dir():
            parser.error(f"there is no model at {args.model}: python -m agentsdpo.benchmarks.horizon.build makes it")
        more = (f"model={args.model}", *(QUICK if args.quick else ()))
        arms = [replace(ARMS[name], sets=(*ARMS[name].sets, *more)) for name in args.arms]
        for seed in range(args.seeds or (1 if args.quick else 5)):
            run_study(arms, COMMON, [seed], out, in_table(path))
            write_table(table("horizon", out), path)
    for line in lines(pq.read_table(path)):
        print(line)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
