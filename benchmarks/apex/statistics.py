"""Numbers of a benchmark run: pass@k, pass^k, mean score, their intervals, and what difference could be seen at all.

Every number is a mean over tasks of something each task has by itself. An attempt that could not be scored is neither
pass nor fail: ``conditional`` leaves it out (the headline), ``strict`` counts it as failed. A task with fewer than k
attempts has no pass@k, and then the set has none either; the mean over the remaining tasks stands beside it.

Intervals come from :mod:`agentsdpo.stats`: percentile bootstrap, 10 000 draws, fixed seed; worlds are redrawn whole.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from agentsdpo.errors import RunError
from agentsdpo.stats import DRAWS, POWER_FACTOR, Paired, cluster_draws, difference, paired_difference, wilson
from agentsdpo.types import Frozen, Json

Column = Literal["conditional", "strict"]
COLUMNS: tuple[Column, ...] = ("conditional", "strict")


@dataclass(frozen=True)
class TaskScores:
    """The attempts at one task, as counts.

    Attributes:
        scored: attempts with a grade. passes: those in which every criterion was met. score: sum of their mean scores.
        unscored: attempts lost to a fault of host, provider, environment or judge.
    """

    task_id: str
    world_id: str | None
    domain: str
    scored: int
    passes: int
    score: float
    unscored: int = 0

    def n(self, column: Column) -> int:
        """Attempts that count in a column."""
        return self.scored + (self.unscored if column == "strict" else 0)

    @property
    def cluster(self) -> str:
        """The world, or the task itself when it has none."""
        return f"world:{self.world_id}" if self.world_id else f"task:{self.task_id}"


class Estimate(Frozen):
    """One number of the report with its interval, all fractions in [0, 1].

    ``value`` is None when some task has too few attempts; ``partial`` is then the mean over the ``n_tasks`` that have
    enough, of ``of_tasks``. The interval is that of ``partial``. ``error`` is its standard error.
    ``method``: ``cluster`` redraws worlds, ``task`` redraws tasks, ``wilson`` stands in where all of those have one and
    the same mean, for which redrawing finds no spread.
    """

    value: float | None
    partial: float | None
    low: float | None
    high: float | None
    error: float | None
    n_tasks: int
    of_tasks: int
    n_clusters: int
    method: Literal["cluster", "task", "wilson", "none"]

    @property
    def detectable(self) -> float | None:
        """Smallest true difference to another run of this size found at two-sided 5 % with power 80 %, unpaired."""
        return None if self.error is None else POWER_FACTOR * math.sqrt(2) * self.error


def pass_at_k(n: int, c: int, k: int) -> float | None:
    """Chance that at least one of k attempts, drawn without replacement from n with c passes, passed; None if n < k.

    Chen et al. 2021 (arXiv 2107.03374), equation 1.

    >>> pass_at_k(4, 1, 2), pass_at_k(4, 1, 8)
    (0.5, None)
    """
    _counts(n, c, k)
    return None if n < k else 1 - math.comb(n - c, k) / math.comb(n, k)


def pass_hat_k(n: int, c: int, k: int) -> float | None:
    """Chance that all of k attempts, drawn without replacement from n with c passes, passed; None if n < k.

    Yao et al. 2024 (arXiv 2406.12045), section 4.

    >>> pass_hat_k(4, 3, 2), pass_hat_k(1, 1, 2)
    (0.5, None)
    """
    _counts(n, c, k)
    return None if n < k else math.comb(c, k) / math.comb(n, k)


def _counts(n: int, c: int, k: int) -> None:
    if not 0 <= c <= n or k < 1:
        raise RunError(f"{c} passes of {n} attempts, k = {k}", fix="count passes among attempts, and k from 1")


def powers(attempts: int) -> list[int]:
    """The k for which numbers are given: 1, 2, 4, ... up to the attempts asked for.

    >>> powers(8), powers(3), powers(0)
    ([1, 2, 4, 8], [1, 2], [1])
    """
    return [1 << i for i in range(max(attempts, 1).bit_length())]


def estimate(tasks: Sequence[TaskScores], of: Callable[[TaskScores], float | None], *, draws: int = DRAWS,
             of_tasks: int = 0) -> Estimate:
    """Mean over tasks of one number each, with its interval.

    Args:
        tasks: of the set, all that were attempted.
        of: the task's number in [0, 1]; None when it has too few attempts.
        draws: bootstrap resamples.
        of_tasks: how many the set has, where some may never have been attempted; 0: these.

    >>> ab = [TaskScores(name, "w", "", 1, int(name == "a"), 0.5) for name in "ab"]
    >>> one = estimate(ab, lambda task: pass_at_k(task.scored, task.passes, 1))
    >>> one.value, one.method, estimate(ab, lambda task: pass_at_k(task.scored, task.passes, 2)).value
    (0.5, 'task', None)
    """
    values = [(task, number) for task in tasks if (number := of(task)) is not None]
    clusters = [task.cluster for task, _ in values]
    one_world = len(set(clusters)) < 2
    sizes = {"n_tasks": len(values), "of_tasks": max(of_tasks, len(tasks)), "n_clusters": len(set(clusters))}
    if not values:
        return Estimate(value=None, partial=None, low=None, high=None, error=None, method="none", **sizes)
    groups: Sequence[object] = range(len(values)) if one_world else clusters
    numbers = [number for _, number in values]
    mean, means = float(np.mean(numbers)), cluster_draws(numbers, groups, draws=draws)
    (low, high), error = map(float, np.quantile(means, [0.025, 0.975])), float(means.std())
    method = "task" if one_world else "cluster"
    if error < 1e-9:
        _, low, high = wilson(min(1.0, mean) * len(set(groups)), len(set(groups)))
        error, method = (high - low) / (2 * 1.96), "wilson"
    whole = mean if len(values) == sizes["of_tasks"] else None
    return Estimate(value=whole, partial=mean, low=low, high=high, error=error, method=method, **sizes)


def table(tasks: Sequence[TaskScores], attempts: int, column: Column, *, draws: int = DRAWS,
          of_tasks: int = 0) -> dict[str, Estimate]:
    """Every number of one column: ``pass@1``, ``pass@k`` and ``pass^k`` for k of :func:`powers`, ``mean_score``.

    Arguments are those of :func:`estimate`; ``attempts`` is how many each task was to have.

    >>> tasks = [TaskScores("a", "w0", "", 2, 1, 1.5), TaskScores("b", "w1", "", 2, 2, 2.0, unscored=1)]
    >>> {name: found.value for name, found in table(tasks, 2, "conditional").items()}
    {'pass@1': 0.75, 'mean_score': 0.875, 'pass@2': 1.0, 'pass^2': 0.5}
    """
    def of_k(formula: Callable[[int, int, int], float | None], k: int) -> Estimate:
        return estimate(tasks, lambda task: formula(task.n(column), task.passes, k), draws=draws, of_tasks=of_tasks)

    scores = estimate(tasks, lambda task: mean_score(task, column), draws=draws, of_tasks=of_tasks)
    found = {"pass@1": of_k(pass_at_k, 1), "mean_score": scores}
    for k in powers(attempts)[1:]:
        found |= {f"pass@{k}": of_k(pass_at_k, k), f"pass^{k}": of_k(pass_hat_k, k)}
    return found


def mean_score(task: TaskScores, column: Column) -> float | None:
    """Mean criterion score over a task's attempts; None without one."""
    return task.score / task.n(column) if task.n(column) else None


@dataclass(frozen=True)
class Comparison:
    """Two runs on the tasks scored in both, A - B.

    Attributes:
        difference: mean over tasks, with sign-flip p value and detectable difference.
        flipped: (task id, mean of A, mean of B) where the pass rates differ, largest difference first.
        left_out: tasks that one of the two has not scored.
        method: ``cluster`` or ``task``, which whole things were redrawn and flipped; ``newcombe`` stands in where all
            of them differ by the same, so that redrawing finds no spread.
    """

    metric: str
    difference: Paired
    flipped: tuple[tuple[str, float, float], ...]
    left_out: tuple[str, ...]
    method: Literal["cluster", "task", "newcombe"]

    def as_json(self) -> Json:
        """For ``report.json``."""
        return {"metric": self.metric, **self.difference._asdict(), "method": self.method,
                "flipped": [{"task_id": name, "a": a, "b": b} for name, a, b in self.flipped],
                "left_out": list(self.left_out)}


def compare(a: Sequence[TaskScores], b: Sequence[TaskScores], *, metric: Literal["pass@1", "mean_score"] = "pass@1",
            draws: int = DRAWS) -> Comparison:
    """Paired difference A - B; whole worlds are redrawn and flipped, single tasks when there is one world.

    Raises:
        RunError: no task was scored in both.

    >>> a = [TaskScores(f"t{i}", f"w{i}", "", 4, 4, 4.0) for i in range(8)]
    >>> b = [TaskScores(f"t{i}", f"w{i}", "", 4, 2 * (i % 2), 2.0) for i in range(8)]
    >>> found = compare(a, b)
    >>> found.difference.estimate, round(found.difference.p_value, 3), len(found.flipped), found.method
    (0.75, 0.008, 8, 'cluster')
    """
    theirs = {task.task_id: task for task in b if task.scored}
    both = [(task, theirs[task.task_id]) for task in a if task.scored and task.task_id in theirs]
    if not both:
        raise RunError(f"no task was scored in both runs: {len(a)} tasks against {len(b)}",
                       fix="compare two runs of the same benchmark, and resume what is unscored")
    rates = [(_rate(one, metric), _rate(other, metric)) for one, other in both]
    worlds = [task.cluster for task, _ in both]
    clustered = len(set(worlds)) > 1
    paired = paired_difference([x for x, _ in rates], [y for _, y in rates], worlds if clustered else None, draws=draws)
    method = "cluster" if clustered else "task"
    if paired.high - paired.low < 1e-9 and (paired.detectable or 0) < 1e-9:
        paired, method = _unspread(paired, rates, len(set(worlds)) if clustered else len(rates)), "newcombe"
    flipped = sorted(((task.task_id, x, y) for (task, _), (x, y) in zip(both, rates, strict=True) if x != y),
                     key=lambda row: (-abs(row[1] - row[2]), row[0]))
    together = {task.task_id for task, _ in both}
    left_out = sorted({task.task_id for task in (*a, *b)} - together)
    return Comparison(metric, paired, tuple(flipped), tuple(left_out), method)


def _unspread(paired: Paired, rates: Sequence[tuple[float, float]], n: int) -> Paired:
    """A difference that redrawing n worlds or tasks finds no spread in: as of two rates over n each."""
    a, b = (wilson(min(1.0, float(np.mean(side))) * n, n) for side in zip(*rates, strict=True))
    _, low, high = difference(a, b)
    return paired._replace(low=low, high=high, detectable=None)


def _rate(task: TaskScores, metric: str) -> float:
    return (task.passes if metric == "pass@1" else task.score) / task.scored
