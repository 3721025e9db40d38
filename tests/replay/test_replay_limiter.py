"""The rate limiter: neither side waits for ever, and the ratio is kept."""

import json
import time
from collections import deque

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from replay_factories import TOKENIZER, make_episode

from agentsdpo.errors import ConfigError
from agentsdpo.replay import ReplayConfig, ReplayStore, Sampler, pin
from agentsdpo.replay.sampling.limiter import Limit, RateLimiter, may_collect, published

LIMITS = st.builds(dict, samples_per_insert=st.sampled_from([0.25, 0.5, 1.0, 1.5, 3.0, 8.0]),
                   min_size=st.integers(1, 6), min_diff=st.integers(-10, 10), room=st.integers(0, 40),
                   batch=st.integers(1, 6), inserted=st.integers(1, 6))


def limit_of(samples_per_insert: float, min_size: int, min_diff: int, room: int, batch: int, inserted: int) -> Limit:
    return Limit(samples_per_insert, min_size, float(min_diff), float(min_diff + room), batch, inserted)


def explore(limit: Limit, steps: int = 3000) -> set[tuple[int, int, int]]:
    """All (inserts, samples, size) reachable by inserts, samples and evictions, breadth first, up to a bound."""
    seen, left = {(0, 0, 0)}, deque([(0, 0, 0)])
    while left and len(seen) < steps:
        state = RateLimiter(limit, *left.popleft())
        inserts, samples, size = state.inserts, state.samples, state.size
        following = []
        if state.may_insert(limit.inserted):
            following.append((inserts + limit.inserted, samples, size + limit.inserted))
        if state.may_sample(limit.batch):
            following.append((inserts, samples + limit.batch, size))
        assert following, f"both sides wait at {state}, error {state.error}"
        following += [(inserts, samples, size - n) for n in (1, size) if size >= n > 0]
        for one in following:
            if one not in seen:
                seen.add(one)
                left.append(one)
    return seen


@settings(max_examples=60, deadline=None)
@given(LIMITS)
def test_no_reachable_state_lets_both_sides_wait(fields: dict) -> None:
    try:
        limit = limit_of(**fields)
    except ConfigError:
        assume(False)
        raise
    explore(limit)


@settings(max_examples=100, deadline=None)
@given(LIMITS, st.integers(0, 2**20))
def test_the_ratio_stays_within_its_bounds(fields: dict, seed: int) -> None:
    """Whoever may move moves, in any order: without evictions the error stays between the bounds."""
    try:
        limiter = RateLimiter(limit_of(**fields))
    except ConfigError:
        assume(False)
        raise
    limit = limiter.limit
    for step in range(300):
        moves = [move for move, may in (("insert", limiter.may_insert(limit.inserted)),
                                        ("sample", limiter.may_sample(limit.batch))) if may]
        if moves[(seed >> step % 20) % len(moves)] == "insert":
            limiter.insert(limit.inserted)
        else:
            limiter.sample(limit.batch)
            assert limiter.error >= limit.min_diff
        if limiter.inserts >= limit.min_size + limit.inserted:
            warm_up = limit.samples_per_insert * (limit.min_size + limit.inserted)
            assert limiter.error <= max(limit.max_diff, warm_up)


def test_bounds_too_tight_for_their_batches_would_block() -> None:
    with pytest.raises(ConfigError, match="raise error_buffer to 18"):
        Limit.around(4.0, min_size=8, error_buffer=10.0, batch=32)
    with pytest.raises(ConfigError, match="samples_per_insert 0"):
        Limit.around(0.0, min_size=8, error_buffer=10.0)
    tight = Limit.around(4.0, min_size=8, error_buffer=18.0, batch=32)
    explore(tight)
    object.__setattr__(tight, "max_diff", tight.max_diff - 5.0)
    with pytest.raises(AssertionError, match="both sides wait"):
        explore(tight)


def test_collectors_read_the_counters_of_the_learners() -> None:
    limit = Limit.around(2.0, min_size=2, error_buffer=4.0)
    full, hungry = RateLimiter(limit, inserts=4, samples=0, size=4), RateLimiter(limit, inserts=4, samples=6, size=4)
    states = [json.loads(json.dumps(one.state_dict())) for one in (full, hungry)]
    assert [RateLimiter.of(state) for state in states] == [full, hungry]
    assert may_collect([], 1), "no learner, or a lapsed pin, blocks nobody"
    assert not may_collect(states[:1], 1)
    assert may_collect(states[1:], 3)
    assert not may_collect(states[1:], 2, pending=2), "what was added since counts"
    assert not may_collect(states, 1), "the slowest learner decides"


def test_counters_travel_in_pins_and_lapse_with_them(store: ReplayStore) -> None:
    store.append([make_episode(0, size=20)])
    assert may_collect(published(store), 9), "no learner"
    limiter = RateLimiter(Limit.around(2.0, min_size=1, error_buffer=2.0), inserts=2, samples=0, size=2)
    pin(store, "learner", store.snapshot(), state={"limiter": limiter.state_dict()})
    pin(store, "viewer", store.snapshot())
    assert not may_collect(published(store), 1)
    pin(store, "learner", store.snapshot(), ttl_s=0.01, state={"limiter": limiter.state_dict()})
    time.sleep(0.05)
    assert may_collect(published(store), 1), "a lapsed pin blocks nobody"


def test_the_sampler_counts_and_holds_back(store: ReplayStore) -> None:
    def fill(first: int, n: int) -> None:
        store.append([make_episode(i, episode_id=f"e{i:03d}", size=20) for i in range(first, first + n)])

    def sampler() -> Sampler:
        limiter = RateLimiter(Limit.around(2.0, min_size=3, error_buffer=2.0))
        return Sampler(store, ReplayConfig(), seed=0, tokenizer_sha256=TOKENIZER, max_staleness=None, limiter=limiter)

    fill(0, 2)
    one = sampler()
    assert one.limiter is not None
    assert one.draw(1, 0) == [], "below min_size"
    fill(2, 1)
    assert one.refresh() == 1
    assert [len(one.draw(1, 0)) for _ in range(4)] == [1, 1, 0, 0]
    assert not one.limiter.may_insert(3)
    assert one.limiter.may_insert(2)
    fill(3, 2)
    one.refresh()
    one.refresh()
    assert (one.limiter.inserts, one.limiter.samples, one.limiter.size) == (5, 2, 5)
    state = json.loads(json.dumps(one.state_dict()))
    two = sampler()
    two.load_state_dict(state)
    assert two.limiter == one.limiter
    assert [two.draw(1, 0) for _ in range(6)] == [one.draw(1, 0) for _ in range(6)]
    other = Sampler(store, ReplayConfig(), seed=0, tokenizer_sha256=TOKENIZER, max_staleness=None)
    with pytest.raises(ConfigError, match="limiter"):
        other.load_state_dict(state)
