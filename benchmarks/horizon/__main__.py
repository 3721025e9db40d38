"""Does learning from stale single episodes hold at long horizons? 4, 16 and 48 clients, cut by compaction.

    python -m agentsdpo.benchmarks.horizon                  # three lengths, 5 seeds: hours; may be stopped, continued
    python -m agentsdpo.benchmarks.horizon --arms robust-n4 --seeds 1
    python -m agentsdpo.benchmarks.horizon --quick          # a look at whether it runs, not a result

``robust``, sixteen versions stale, as in the staleness study. The scale: before training (the same weights), and what
these weights do when they read the hint (``python -m agentsdpo.benchmarks.horizon.gates``); the oracle passes all.
The model lies beside this file; ``python -m agentsdpo.benchmarks.horizon.build`` makes another in an hour.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import nan

import numpy as np
import pyarrow as pa

from agentsdpo.benchmarks.horizon.study import ARMS, COMMON, MODEL, QUICK, existing
from agentsdpo.benchmarks.study import Study, carry_out, options
from agentsdpo.formats import interval, percent
from agentsdpo.plots.tables import final, held_out
from agentsdpo.results import HELD_OUT
from agentsdpo.stats import Interval
from agentsdpo.types import Json

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
    ends = final(rows)
    last = [row for row in rows if row["step"] == ends[row["seed"]][0]["step"]]

    def mean(decoding: str, splits: tuple[str, ...]) -> float:
        rates = [row["pass"] for own in final(rows, "pass", splits, decoding).values() for row in own]
        return float(np.mean(rates)) if rates else float("nan")

    return Result(arm=arm, seeds=len(ends), episodes=max(row["episodes"] for row in last),
                  calls=float(np.mean([row["env_steps"] / row["episodes"] for row in last])),
                  before=_held_out(rows, "pass", 0), passed=_held_out(rows, "pass"),
                  score_before=_held_out(rows, "score", 0), score=_held_out(rows, "score"),
                  greedy=mean("greedy", HELD_OUT), control=mean("sampled", CONTROL))


def _held_out(rows: list[Json], value: str, step: int | None = None) -> Interval:
    return held_out(rows, value, step, HELD_OUT) or Interval(nan, nan, nan)


def lines(found: pa.Table) -> Iterator[str]:
    """One line per length, in percent."""
    for one in results(found):
        yield (f"{one.arm:<11} {one.seeds} seed{'s' * (one.seeds > 1)}  {one.episodes} episodes of {one.calls:.0f} "
               f"calls  pass {_of(one.before)} -> {_of(one.passed)}, greedy {percent(one.greedy)}, "
               f"score {_of(one.score_before)} -> {_of(one.score)}, untaught firm {percent(one.control)}")


def _of(found: Interval) -> str:
    return f"{percent(found.estimate)} {interval(found)}".strip()


STUDY = Study("horizon", ARMS, tuple(ARMS), COMMON, QUICK, lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, then write the table and print what it says."""
    parser = options(STUDY, __doc__)
    parser.add_argument("--model", type=existing, default=str(MODEL), help=f"folder of the model to train; {MODEL}")
    args = parser.parse_args(arguments)
    carry_out(STUDY, args, (f"model={args.model}",))


if __name__ == "__main__":
    sys.exit(main())
