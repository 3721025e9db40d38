"""Intervals against their defining equations and against slow, independent versions."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentsdpo import stats
from agentsdpo.errors import RunError


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_ends_solve_the_score_equation(case: tuple[int, int]) -> None:
    passes, n = case
    interval = stats.wilson(passes, n)
    for end in (interval.low, interval.high):
        if 0 < end < 1:
            assert (passes / n - end) ** 2 == pytest.approx(1.959963984540054**2 * end * (1 - end) / n, rel=1e-9)
    assert 0 <= interval.low <= interval.estimate <= interval.high <= 1


def test_wilson_against_published_values() -> None:
    # Newcombe 1998 (Statistics in Medicine 17), table I, method 3: 81/263, 15/148, 0/20, 1/29.
    published = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611),
                 (1, 29): (0.0061, 0.1718)}
    for (passes, n), ends in published.items():
        assert stats.wilson(passes, n)[1:] == pytest.approx(ends, abs=5e-5)


def test_wilson_knows_nothing_without_attempts_and_refuses_nonsense() -> None:
    assert math.isnan(stats.wilson(0, 0).estimate)
    assert stats.wilson(0, 0)[1:] == (0.0, 1.0)
    with pytest.raises(RunError, match="5 passes of 4 attempts"):
        stats.wilson(5, 4)


def trimmed_mean(values: list[float]) -> float:
    """A quarter off each end, by popping."""
    left = sorted(values)
    for _ in range(int(0.25 * len(values))):
        left.pop()
        left.pop(0)
    return math.fsum(left) / len(left)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40))
def test_iqm_is_the_trimmed_mean(values: list[float]) -> None:
    assert float(stats.iqm(values)) == pytest.approx(trimmed_mean(values), abs=1e-9)


def test_iqm_reduces_the_axis_asked_for() -> None:
    table = np.arange(24.0).reshape(4, 6)
    assert stats.iqm(table, axis=0) == pytest.approx([trimmed_mean(list(column)) for column in table.T])
    assert stats.iqm(table).shape == (4,)


def test_bootstrap_matches_full_enumeration() -> None:
    values = [0.1, 0.4, 0.5, 0.9, 2.0]
    means = [np.mean(draw) for draw in itertools.product(values, repeat=5)]
    low, high = np.quantile(means, [0.025, 0.975])
    found = stats.bootstrap(values)
    assert found.estimate == pytest.approx(np.mean(values))
    assert found[1:] == pytest.approx((low, high), abs=0.02)


def test_stratified_bootstrap_redraws_runs_within_each_stratum() -> None:
    rng = np.random.default_rng(3)
    scores = rng.normal([[0.2, 0.5, 0.9]], 0.1, size=(5, 3))
    draws = [trimmed_mean([scores[rng.integers(5), stratum] for stratum in range(3) for _ in range(5)])
             for _ in range(4000)]
    found = stats.stratified_bootstrap(scores)
    assert found[1:] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.01)
    assert found.estimate == pytest.approx(trimmed_mean(list(scores.reshape(-1))))


def test_strata_that_do_not_vary_give_no_width() -> None:
    """Redrawing across strata would give this table a wide interval; within strata it has none."""
    assert stats.stratified_bootstrap(np.tile([0.0, 0.5, 1.0], (4, 1))) == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.parametrize("scores", [[], [[0.1, float("nan")]], np.zeros((2, 2, 2))])
def test_bootstrap_refuses_what_it_cannot_draw_from(scores: object) -> None:
    with pytest.raises(RunError, match="finite"):
        stats.stratified_bootstrap(scores)  # pyright: ignore[reportArgumentType]


def test_clusters_widen_the_interval_of_correlated_values() -> None:
    worlds = np.repeat(np.arange(10), 10)
    values = np.repeat(np.tile([0.0, 1.0], 5), 10)
    alone, together = stats.bootstrap(values), stats.cluster_bootstrap(values, list(worlds))
    assert together.high - together.low > 2.5 * (alone.high - alone.low)
    assert alone.estimate == together.estimate == 0.5


def test_paired_p_value_matches_all_sign_flips() -> None:
    a, b = [1.0, 0.8, 0.9, 0.4, 1.0, 0.7], [0.2, 0.5, 0.9, 0.5, 0.1, 0.6]
    gaps = np.subtract(a, b)
    flips = [abs(np.dot(signs, gaps)) >= abs(gaps.sum()) - 1e-12 for signs in itertools.product((-1, 1), repeat=6)]
    found = stats.paired_difference(a, b)
    assert found.p_value == pytest.approx(np.mean(flips), abs=0.015)
    assert found.estimate == pytest.approx(gaps.mean())
    assert found.detectable == pytest.approx(2.8016 * gaps.std() / math.sqrt(6), rel=0.05)
    assert found.low < found.estimate < found.high


@settings(max_examples=20)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_equal_policies_do_not_differ(values: list[float]) -> None:
    found = stats.paired_difference(values, values, draws=200)
    assert found[:3] == (0.0, 0.0, 0.0)
    assert found.p_value == 1.0


def test_paired_difference_needs_pairs() -> None:
    with pytest.raises(RunError, match="2 scores against 1"):
        stats.paired_difference([1, 0], [1])
    with pytest.raises(RunError, match="3 clusters"):
        stats.paired_difference([1, 0], [1, 1], clusters=["w0", "w1", "w2"])
