"""What the staleness study says: one line per arm, over its seeds."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from agentsdpo.plots.tables import final, full
from agentsdpo.results import HELD_OUT
from agentsdpo.stats import Interval, over_seeds
from agentsdpo.types import Json

CONTROL = "test_firm"
BASELINE = "robust-0"
WORDS = (f"{'arm':<14}{'seeds':>6}{'held-out pass, IQM [95 %]':>29}{'greedy':>8}{'score':>7}{'best':>6}"
         f"{'zero-shot':>11}{'control':>9}{'collapsed':>11}{'- ' + BASELINE:>22}")


@dataclass(frozen=True)
class Result:
    """One arm over its seeds; rates are fractions.

    Attributes:
        arm: its name. seeds: how many. n: held-out episodes of each seed.
        passed: interquartile mean of the sampled held-out pass rate after training, over seeds and splits, with its
            stratified bootstrap interval; of one seed the pass rate, with Wilson's over its episodes.
        greedy, score, zero_shot, control: means of the greedy pass rate, the criterion score, the pass rate before
            training, and that in a firm whose rules were never taught.
        best: highest pass rate of the curve, mean over seeds.
        collapsed: seeds whose last two points of the curve score below the untrained model, or that ended early; these
            count with the last pass rate they had, in every split.
        difference: of that statistic to the same with fresh data, seeds paired, without ends for one seed; None for
            the arm with fresh data.
    """

    arm: str
    seeds: int
    n: int
    passed: Interval
    greedy: float
    score: float
    zero_shot: float
    control: float
    best: float
    collapsed: int
    difference: Interval | None

    def line(self) -> str:
        """For people."""
        def percent(x: float) -> str:
            return f"{100 * x:.1f}"

        def interval(found: Interval | None, sign: str = "") -> str:
            if found is None:
                return ""
            ends = "" if np.isnan(found.low) else f" [{percent(found.low)}, {percent(found.high)}]"
            return f"{100 * found.estimate:{sign}.1f}{ends}"

        return (f"{self.arm:<14}{self.seeds:>6}{interval(self.passed):>29}{percent(self.greedy):>8}"
                f"{percent(self.score):>7}{percent(self.best):>6}{percent(self.zero_shot):>11}"
                f"{percent(self.control):>9}{f'{self.collapsed} of {self.seeds}':>11}"
                f"{interval(self.difference, '+'):>22}")


def lines(found: pa.Table) -> Iterator[str]:
    """Heading and one line per arm, in percent."""
    yield WORDS
    for result in results(found):
        yield result.line()


def results(found: pa.Table) -> list[Result]:
    """One result per arm that has a held-out evaluation after training, in alphabetical order."""
    rows = [{"kind": "eval", **row} for row in found.to_pylist()]
    arms = sorted({row["arm"] for row in rows})
    ends = {arm: full(final([row for row in rows if row["arm"] == arm], splits=HELD_OUT)) for arm in arms}
    steps = max((row["step"] for row in rows), default=0)
    return [_result(arm, [row for row in rows if row["arm"] == arm], ends[arm], ends.get(BASELINE, {}), steps)
            for arm in arms if ends[arm]]


def _last(rows: list[Json]) -> list[Json]:
    end = max(row["step"] for row in rows)
    return [row for row in rows if row["step"] == end]


def _result(arm: str, rows: list[Json], ends: dict[int, list[float]], fresh: dict[int, list[float]],
            steps: int) -> Result:
    seeds = [[row for row in rows if row["seed"] == seed] for seed in ends]
    last = [row for own in seeds for row in _last(own)]
    curves = [sorted((row for row in own if row["split"] == HELD_OUT[0] and row["decoding"] == "sampled"),
                     key=lambda row: row["step"]) for own in seeds]
    both = [np.subtract(ends[seed], fresh[seed]) for seed in ends if seed in fresh]
    n = sum(row["n"] for row in _last(seeds[0]) if row["decoding"] == "sampled" and row["split"] in HELD_OUT)

    def mean(of: list[Json], value: str, decoding: str, splits: tuple[str, ...]) -> float:
        values = [row[value] for row in of if row["decoding"] == decoding and row["split"] in splits]
        return float(np.mean(values)) if values else float("nan")

    return Result(
        arm=arm, seeds=len(seeds), n=n, passed=over_seeds(list(ends.values()), n),
        greedy=mean(last, "pass", "greedy", HELD_OUT),
        score=mean(last, "score", "sampled", HELD_OUT), control=mean(last, "pass", "sampled", (CONTROL,)),
        zero_shot=mean([row for row in rows if row["step"] == 0], "pass", "sampled", HELD_OUT),
        best=float(np.mean([max(row["pass"] for row in curve) for curve in curves])),
        collapsed=sum(curve[-1]["step"] < steps or all(row["score"] < curve[0]["score"] for row in curve[-2:])
                      for curve in curves),
        difference=over_seeds(both) if both and arm != BASELINE else None)
