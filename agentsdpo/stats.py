"""Intervals and comparisons for pass rates and seeds, with numpy alone.

Which one when:

- one pass rate over independent attempts: :func:`wilson`;
- a few seeds (runs), each scored on the same strata: :func:`over_seeds`;
- tasks that share a world: :func:`cluster_bootstrap`;
- two policies on the same tasks: :func:`paired_difference`.

Everything is seeded and repeatable. Rates are fractions in [0, 1], never percent.
"""

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from agentsdpo.errors import RunError

DRAWS = 10_000
"""Bootstrap resamples; the Monte Carlo error of a 95 % end point is then about 2 % of the interval's width."""
POWER_FACTOR = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)
"""2.80: standard errors a true difference must have to be found at two-sided 5 % with power 80 %."""

Statistic = Callable[..., NDArray[np.float64]]
"""Takes an array and ``axis=-1`` and reduces that axis."""


class Interval(NamedTuple):
    """An estimate with the ends of its confidence interval, in the unit of the estimate."""

    estimate: float
    low: float
    high: float


class Paired(NamedTuple):
    """A mean difference A - B over tasks scored in both.

    ``p_value`` is two-sided, from sign flips; ``detectable`` is the smallest true difference that this many
    clusters would find at 5 % with power 80 %, None where it is not known; ``n`` counts tasks.
    """

    estimate: float
    low: float
    high: float
    p_value: float
    detectable: float | None
    n: int


def wilson(passes: float, n: int, level: float = 0.95) -> Interval:
    """Score interval of a pass rate (Wilson 1927); honest at 0 and at n passes, unlike rate +- 1.96 SE.

    Args:
        passes: attempts that passed, in [0, n].
        n: attempts; 0 gives (nan, 0, 1), that is, nothing is known.
        level: confidence in (0, 1).

    Raises:
        RunError: ``passes`` is outside [0, n].

    >>> [round(x, 4) for x in wilson(1, 128)]
    [0.0078, 0.0014, 0.0429]
    >>> wilson(0, 128).low, round(wilson(0, 128).high, 4)
    (0.0, 0.0291)
    """
    if not 0 <= passes <= n:
        raise RunError(f"{passes} passes of {n} attempts", fix="count each attempt once, and passes among attempts")
    if n == 0:
        return Interval(float("nan"), 0.0, 1.0)
    z, rate = NormalDist().inv_cdf(0.5 + level / 2), passes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    low, high = max(0.0, float(centre - half)), min(1.0, float(centre + half))
    return Interval(rate, 0.0 if passes == 0 else low, 1.0 if passes == n else high)


def difference(a: Interval, b: Interval) -> Interval:
    """Difference a - b of two independent rates from the ends of their score intervals.

    Newcombe 1998, method 10. Runs that are evaluated on the same tasks are closer than independent ones, so the
    interval is rather too wide than too narrow.

    >>> [round(x, 4) for x in difference(wilson(56, 70), wilson(48, 80))]
    [0.2, 0.0524, 0.3339]
    """
    down = np.hypot(a.estimate - a.low, b.high - b.estimate)
    up = np.hypot(a.high - a.estimate, b.estimate - b.low)
    gap = a.estimate - b.estimate
    return Interval(gap, float(gap - down), float(gap + up))


def iqm(values: ArrayLike, axis: int = -1) -> NDArray[np.float64]:
    """Interquartile mean: the mean after a quarter, rounded down, is cut from each end.

    Agarwal et al. 2021 (arXiv 2108.13264), section 4.3. With three values or fewer it is the plain mean.

    >>> float(iqm([0.0, 0.5, 0.6, 0.7, 9.0])), float(iqm([1.0, 2.0, 6.0]))
    (0.6, 3.0)
    """
    ordered = np.sort(np.moveaxis(np.asarray(values, np.float64), axis, -1), axis=-1)
    n = ordered.shape[-1]
    return ordered[..., n // 4:n - n // 4].mean(axis=-1)


def stratified_bootstrap(
    scores: ArrayLike, statistic: Statistic = iqm, *, level: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Percentile interval over seeds: within each stratum the runs are redrawn, the strata are kept.

    Agarwal et al. 2021 (arXiv 2108.13264), section 4.1. The statistic sees all runs x strata values at once.

    Args:
        scores: ``[R, S]`` runs by strata (tasks, splits), or ``[R]`` for one stratum; any unit.
        statistic: reduces ``axis=-1`` of ``[draws, R * S]``.

    Raises:
        RunError: there is no run, or a score is not finite.

    >>> scores = np.array([[0.90, 0.40], [0.92, 0.60], [0.94, 0.50]])
    >>> [round(x, 3) for x in stratified_bootstrap(scores)]
    [0.73, 0.66, 0.765]
    """
    table = np.asarray(scores, np.float64)
    table = table[:, None] if table.ndim == 1 else table
    if table.ndim != 2 or table.size == 0 or not np.isfinite(table).all():
        raise RunError(f"scores of shape {np.shape(scores)} with {int((~np.isfinite(table)).sum())} values not finite",
                       fix="give finite scores as [runs, strata] with at least one run")
    runs, strata = table.shape
    picks = np.random.default_rng(seed).integers(runs, size=(draws, runs, strata))
    redrawn = table[picks, np.arange(strata)].reshape(draws, runs * strata)
    return _percentile(float(statistic(table.reshape(-1), axis=-1)), statistic(redrawn, axis=-1), level)


def over_seeds(scores: ArrayLike, n: int = 0) -> Interval:
    """Interquartile mean over runs, with its interval by :func:`stratified_bootstrap`; of one run what it alone tells.

    Args:
        scores: ``[R]`` or ``[R, S]``, as there.
        n: episodes behind the pass rate of a single run: its interval is :func:`wilson`'s over these. 0: no ends (NaN)
            are given, since none are known.

    >>> over_seeds([0.5]), round(over_seeds([0.5], n=64).low, 3), over_seeds([0.25, 0.75])
    (Interval(estimate=0.5, low=nan, high=nan), 0.381, Interval(estimate=0.5, low=0.25, high=0.75))
    """
    table = np.asarray(scores, np.float64)
    if len(table) > 1:
        return stratified_bootstrap(table)
    mean = float(table.mean())
    return wilson(mean * n, n) if n else Interval(mean, np.nan, np.nan)


def bootstrap(
    values: Sequence[float] | NDArray[np.float64], statistic: Statistic = np.mean,
    *, level: float = 0.95, draws: int = DRAWS, seed: int = 0,
) -> Interval:
    """Percentile interval of a statistic of independent values ``[n]``; see :func:`stratified_bootstrap`.

    >>> [round(x, 2) for x in bootstrap([1.0, 2.0, 3.0, 4.0])]
    [2.5, 1.5, 3.5]
    """
    return stratified_bootstrap(np.asarray(values, np.float64).reshape(-1), statistic,
                                level=level, draws=draws, seed=seed)


def cluster_bootstrap(
    values: ArrayLike, clusters: Sequence[object], *, level: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Interval of a mean when values share clusters (tasks share worlds): whole clusters are redrawn.

    Each redrawn mean is a ratio of sums, so that large worlds keep their weight.

    >>> [round(x, 2) for x in cluster_bootstrap([1, 1, 0, 0], ["w0", "w0", "w1", "w1"])]
    [0.5, 0.0, 1.0]
    """
    sums, counts = _cluster_sums(values, clusters)
    return _percentile(float(sums.sum() / counts.sum()), _redrawn_means(sums, counts, draws, seed), level)


def cluster_draws(
    values: ArrayLike, clusters: Sequence[object], *, draws: int = DRAWS, seed: int = 0
) -> NDArray[np.float64]:
    """The redrawn means ``[draws]`` behind :func:`cluster_bootstrap`; their spread is the mean's standard error.

    >>> round(float(cluster_draws([0.0, 1.0] * 50, range(100)).std()), 3)
    0.05
    """
    return _redrawn_means(*_cluster_sums(values, clusters), draws, seed)


def paired_difference(
    a: ArrayLike, b: ArrayLike, clusters: Sequence[object] | None = None,
    *, level: float = 0.95, draws: int = DRAWS, seed: int = 0,
) -> Paired:
    """Mean of a - b over tasks scored in both, resampled and sign-flipped by whole clusters.

    Args:
        a, b: ``[n]`` score per task, same order.
        clusters: ``[n]`` world of each task; None makes each task its own cluster.

    Raises:
        RunError: lengths differ.

    >>> result = paired_difference([1, 1, 1, 1, 0, 1, 1, 1], [0, 0, 1, 0, 0, 0, 1, 0])
    >>> result.estimate, round(result.p_value, 2), result.n
    (0.625, 0.06, 8)
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape:
        raise RunError(f"{first.size} scores against {second.size}", fix="pair the scores of tasks scored in both")
    gaps = first - second
    sums, counts = _cluster_sums(gaps, range(len(gaps)) if clusters is None else clusters)
    means = _redrawn_means(sums, counts, draws, seed)
    middle = _percentile(float(sums.sum() / counts.sum()), means, level)
    signs = np.random.default_rng(seed + 1).choice((-1.0, 1.0), size=(draws, len(sums)))
    hits = int((np.abs(signs @ sums) >= abs(sums.sum()) - 1e-12).sum())
    return Paired(*middle, (1 + hits) / (1 + draws), POWER_FACTOR * float(means.std()), len(gaps))


def _cluster_sums(values: ArrayLike, clusters: Sequence[object]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and count of the values of each cluster, in order of first appearance."""
    flat = np.asarray(values, np.float64)
    if flat.ndim != 1 or len(flat) != len(clusters) or len(flat) == 0:
        raise RunError(f"values of shape {flat.shape} in {len(clusters)} clusters", fix="name one cluster per value")
    index: dict[object, int] = {}
    where = np.array([index.setdefault(cluster, len(index)) for cluster in clusters])
    return np.bincount(where, flat).astype(np.float64), np.bincount(where).astype(np.float64)


def _redrawn_means(
    sums: NDArray[np.float64], counts: NDArray[np.float64], draws: int, seed: int
) -> NDArray[np.float64]:
    picks = np.random.default_rng(seed).integers(len(sums), size=(draws, len(sums)))
    return sums[picks].sum(axis=1) / counts[picks].sum(axis=1)


def _percentile(estimate: float, draws: NDArray[np.float64], level: float) -> Interval:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high))
