"""Statistics of the benchmark against closed forms and against enumerations that share no code with them."""

import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentsdpo.benchmarks.apex import statistics
from agentsdpo.benchmarks.apex.statistics import Estimate, TaskScores, compare, estimate, pass_at_k, pass_hat_k, table
from agentsdpo.errors import RunError
from agentsdpo.stats import wilson


def enumerated(n: int, c: int, k: int) -> tuple[Fraction, Fraction]:
    """pass@k and pass^k by looking at every choice of k attempts."""
    attempts = [True] * c + [False] * (n - c)
    chosen = list(itertools.combinations(attempts, k))
    return Fraction(sum(map(any, chosen)), len(chosen)), Fraction(sum(map(all, chosen)), len(chosen))


def test_pass_at_k_and_hat_k_equal_an_enumeration_of_all_choices() -> None:
    for n in range(1, 9):
        for c in range(n + 1):
            for k in range(1, n + 1):
                at, hat = enumerated(n, c, k)
                assert pass_at_k(n, c, k) == pytest.approx(float(at), abs=1e-15)
                assert pass_hat_k(n, c, k) == pytest.approx(float(hat), abs=1e-15)


@given(st.integers(1, 200), st.data())
def test_closed_forms_hold_for_any_counts(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    at, hat = pass_at_k(n, c, k), pass_hat_k(n, c, k)
    assert at is not None
    assert hat is not None
    # the product form of Chen et al., and that of drawing passes one after the other
    product = 1 - math.prod(1 - k / i for i in range(n - c + 1, n + 1)) if n - c >= k else 1.0
    assert at == pytest.approx(product, abs=1e-12)
    assert hat == pytest.approx(math.prod(max(c - i, 0) / (n - i) for i in range(k)), abs=1e-12)
    assert hat <= c / n + 1e-12 <= at + 2e-12


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 0)])
def test_counts_that_cannot_be_are_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(RunError, match="passes"):
        pass_at_k(n, c, k)
    with pytest.raises(RunError, match="passes"):
        pass_hat_k(n, c, k)


def test_a_task_with_too_few_attempts_makes_the_set_null_and_never_lowers_k() -> None:
    tasks = [TaskScores("a", "w0", "", 4, 2, 3.0), TaskScores("b", "w1", "", 3, 3, 3.0, unscored=1)]
    found = table(tasks, 4, "conditional", draws=200)
    for name in ("pass@4", "pass^4"):
        assert found[name].value is None
        assert (found[name].n_tasks, found[name].of_tasks) == (1, 2)
        assert found[name].partial == (1.0 if name == "pass@4" else 0.0)
    assert found["pass@2"].value == pytest.approx(((1 - 1 / 6) + 1) / 2)
    strict = table(tasks, 4, "strict", draws=200)
    assert strict["pass^4"].value == 0.0
    assert strict["pass@1"].value == pytest.approx((2 / 4 + 3 / 4) / 2)
    assert strict["mean_score"].value == pytest.approx((3 / 4 + 3 / 4) / 2)


def test_unscored_attempts_change_the_strict_column_alone() -> None:
    scored = [TaskScores(f"t{i}", f"w{i % 3}", "", 4, i % 5, float(i % 5)) for i in range(9)]
    lossy = [TaskScores(t.task_id, t.world_id, "", t.scored, t.passes, t.score, unscored=2) for t in scored]
    conditional = {name: e.value for name, e in table(scored, 4, "conditional", draws=100).items()}
    assert conditional == {name: e.value for name, e in table(lossy, 4, "conditional", draws=100).items()}
    before, after = table(scored, 4, "strict", draws=100), table(lossy, 4, "strict", draws=100)
    assert (after["pass@1"].value or 0) < (before["pass@1"].value or 0)


def one_by_one(values: list[float], clusters: list[str], draws: int, seed: int) -> list[float]:
    """A cluster bootstrap written as a loop over drawn worlds, with another generator."""
    rng, worlds = random.Random(seed), sorted(set(clusters))
    means = []
    for _ in range(draws):
        drawn = [rng.choice(worlds) for _ in worlds]
        kept = [value for world in drawn for value, where in zip(values, clusters, strict=True) if where == world]
        means.append(sum(kept) / len(kept))
    return sorted(means)


def test_the_cluster_interval_equals_an_independent_loop() -> None:
    rng = random.Random(3)
    worlds = [f"w{rng.randrange(12)}" for _ in range(60)]
    tasks = [TaskScores(f"t{i}", world, "", 8, rng.randrange(9), 0.0) for i, world in enumerate(worlds)]
    found = estimate(tasks, lambda task: pass_at_k(task.scored, task.passes, 1))
    means = one_by_one([task.passes / 8 for task in tasks], worlds, 8000, seed=11)
    assert found.method == "cluster"
    assert found.value == pytest.approx(sum(task.passes / 8 for task in tasks) / 60)
    assert found.low == pytest.approx(means[200], abs=0.008)
    assert found.high == pytest.approx(means[7800], abs=0.008)
    assert found.error == pytest.approx(float(np.std(means)), rel=0.05)


def test_every_resample_of_two_worlds_enumerated() -> None:
    """Two worlds: the mean is a, b or the mixture with chances 1/4, 1/4, 1/2, so the ends are a and b."""
    tasks = [TaskScores("a", "w0", "", 1, 0, 0.0), TaskScores("b", "w0", "", 1, 1, 1.0),
             TaskScores("c", "w1", "", 1, 1, 1.0)]
    found = estimate(tasks, lambda task: float(task.passes))
    assert (found.value, found.low, found.high) == (pytest.approx(2 / 3), 0.5, 1.0)
    mixture = np.array([0.5, 1.0, 2 / 3, 2 / 3])
    assert found.error == pytest.approx(float(mixture.std()), rel=0.03)


def test_published_scale_of_one_run_of_240_tasks() -> None:
    """68.6 % of 240 independent tasks: interval of about 5.9 points to each side, detectable 11.9."""
    tasks = [TaskScores(f"t{i}", None, "", 1, int(i < 165), 0.0) for i in range(240)]
    found = estimate(tasks, lambda task: float(task.passes))
    assert found.low is not None
    assert found.high is not None
    assert found.detectable is not None
    assert (found.high - found.low) / 2 == pytest.approx(0.0587, abs=0.002)
    assert found.detectable == pytest.approx(0.119, abs=0.002)


def test_one_world_falls_back_to_tasks_and_says_so() -> None:
    tasks = [TaskScores(f"t{i}", "w", "", 1, i % 2, 0.0) for i in range(20)]
    assert estimate(tasks, lambda task: float(task.passes)).method == "task"
    assert compare(tasks, [TaskScores(t.task_id, "w", "", 1, 0, 0.0) for t in tasks]).method == "task"


@pytest.mark.parametrize("passes", [0, 1])
def test_a_set_without_spread_gets_an_honest_interval(passes: int) -> None:
    found = estimate([TaskScores(f"t{i}", f"w{i}", "", 1, passes, 0.0) for i in range(20)], lambda t: float(t.passes))
    assert found.method == "wilson"
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low == pytest.approx(0.1611, abs=1e-3)  # 1 - 1/(1 + z^2/20)


@pytest.mark.parametrize(("places", "passes"), [
    (["w0"], [2]), (["w0", "w1", "w2"], [2, 2, 2]), (["w0", "w0", "w1", "w1"], [4, 0, 0, 4])],
    ids=["one task", "one rate", "worlds of one mean"])
def test_no_spread_between_the_ends_is_no_certainty(places: list[str], passes: list[int]) -> None:
    """Half of the attempts passed: an interval of no width would say that a second run must come out the same."""
    tasks = [TaskScores(f"t{i}", world, "", 4, c, float(c)) for i, (world, c) in enumerate(zip(places, passes,
                                                                                              strict=True))]
    for name in ("pass@1", "mean_score"):
        found = table(tasks, 4, "conditional")[name]
        low, high = wilson(found.n_clusters / 2, found.n_clusters)[1:]
        assert (found.value, found.low, found.high, found.method) == (0.5, low, high, "wilson")
        assert found.detectable is not None
        assert found.detectable > 0.5


@pytest.mark.parametrize(("worlds", "passes"), [(3, 0), (1, 0), (3, 2)])
def test_a_comparison_without_spread_gets_an_honest_interval(worlds: int, passes: int) -> None:
    a = [TaskScores(f"t{i}", f"w{i % worlds}", "", 2, 2, 2.0) for i in range(3)]
    found = compare(a, [TaskScores(t.task_id, t.world_id, "", 2, passes, 0.0) for t in a])
    assert found.method == "newcombe"
    assert found.difference.detectable is None
    ends = (found.difference.low, found.difference.high)
    half = 1 - 3 / (3 + 1.96 ** 2)  # of Wilson's interval at 0 and at 3 of 3
    assert ends == pytest.approx((-half, half) if passes else (1 - half * 2 ** 0.5, 1), abs=1e-3)


def flips(gaps: list[float]) -> float:
    """Exact two-sided p value: all signs of all clusters."""
    observed = abs(sum(gaps))
    sums = [abs(sum(sign * gap for sign, gap in zip(signs, gaps, strict=True)))
            for signs in itertools.product((-1, 1), repeat=len(gaps))]
    return sum(total >= observed - 1e-12 for total in sums) / len(sums)


def test_the_paired_p_value_equals_the_enumeration_of_all_sign_flips() -> None:
    rng = random.Random(5)
    worlds = [f"w{i // 3}" for i in range(30)]
    a = [TaskScores(f"t{i}", world, "", 4, rng.randrange(5), 0.0) for i, world in enumerate(worlds)]
    b = [TaskScores(t.task_id, t.world_id, "", 4, max(0, t.passes - rng.randrange(3)), 0.0) for t in a]
    found = compare(a, b)
    gaps = [(x.passes - y.passes) / 4 for x, y in zip(a, b, strict=True)]
    by_world = [sum(gaps[i:i + 3]) for i in range(0, 30, 3)]
    assert found.difference.estimate == pytest.approx(sum(gaps) / 30)
    assert found.difference.p_value == pytest.approx(flips(by_world), abs=0.01)
    assert {name for name, *_ in found.flipped} == {t.task_id for t, gap in zip(a, gaps, strict=True) if gap}


def test_comparison_uses_tasks_scored_in_both_and_names_the_rest() -> None:
    a = [TaskScores("x", "w0", "", 1, 1, 1.0), TaskScores("y", "w1", "", 1, 1, 1.0),
         TaskScores("z", "w2", "", 0, 0, 0.0, 1)]
    b = [TaskScores("x", "w0", "", 1, 0, 0.5), TaskScores("z", "w2", "", 1, 0, 0.0)]
    found = compare(a, b, metric="mean_score")
    assert found.difference.estimate == 0.5
    assert found.left_out == ("y", "z")
    with pytest.raises(RunError, match="no task was scored in both"):
        compare(a[2:], b)


def test_estimates_are_the_same_every_time() -> None:
    tasks = [TaskScores(f"t{i}", f"w{i % 7}", "", 4, i % 5, i % 5 / 2) for i in range(40)]
    assert table(tasks, 4, "conditional") == table(tasks, 4, "conditional")
    assert isinstance(table(tasks, 4, "strict")["pass@1"], Estimate)
    assert statistics.powers(9) == [1, 2, 4, 8]
