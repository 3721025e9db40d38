"""Pace: what the learner says in its pin lets nobody run away and nobody wait for ever."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentsdpo.config import from_mapping
from agentsdpo.errors import ConfigError
from agentsdpo.programs.flow import LEARNER, Learnt, learners, limit, looked_at
from agentsdpo.replay.example import example
from agentsdpo.replay.sampling.limiter import RateLimiter
from agentsdpo.replay.upkeep.pinned import pin


def test_bounds_follow_from_the_settings_of_the_run() -> None:
    config = from_mapping({}, ["learn.batch=32", "episodes_per_step=16", "learn.max_staleness=8", "publish.every=2"])
    bounds = limit(config)
    assert (bounds.samples_per_insert, bounds.min_size, bounds.min_diff) == (2.0, 16, 0.0)
    assert bounds.max_diff == 8 * 2 * 32, "what begins now is drawn within max_staleness publishes"
    free = limit(from_mapping({}, ["flow.ahead=0", "flow.samples_per_insert=4"]))
    assert RateLimiter(free, inserts=10**9, size=10**9).may_insert(10**6)
    assert free.samples_per_insert == 4.0
    with pytest.raises(ConfigError, match=r"flow\.ahead is 1: .*set it to 2 or more"):
        from_mapping({}, ["flow.ahead=1"])


def test_a_collector_counts_what_the_learner_cannot_have_counted() -> None:
    limiter = RateLimiter(limit(from_mapping({}, ["learn.batch=4", "episodes_per_step=4", "flow.ahead=3"])))
    limiter.insert(8)
    said = Learnt(limiter, episodes=8, undecided=0, version=0)
    assert said.may_begin(8, in_flight=3)
    assert not said.may_begin(8, in_flight=4), "8 joined and 4 in flight are 12: three batches ahead"
    assert not said.may_begin(12, in_flight=0), "as many are in the store and not seen yet"
    assert not Learnt(limiter, 8, 4, 0).may_begin(8, in_flight=0), "or wait for their hints"
    assert Learnt(None, 8, 4, 0).may_begin(99, in_flight=99), "a learner that starves holds nobody back"
    limiter.sample(4)
    assert said.may_begin(12, in_flight=0)


def test_what_is_said_is_read_from_the_pins_while_they_stand() -> None:
    store = example()
    assert (learners(store), looked_at(store)) == ([], None)
    limiter = RateLimiter(limit(from_mapping({})), inserts=3, size=3)
    pin(store, LEARNER, store.snapshot(), ttl_s=60, state=Learnt(limiter, 3, 1, 7).as_json())
    pin(store, "somebody", store.snapshot(), ttl_s=60, state={"limiter": limiter.state_dict()})
    assert learners(store) == [Learnt(limiter, 3, 1, 7)]
    pin(store, LEARNER, store.snapshot(), ttl_s=60, state=Learnt(None, 3, 0, 7).as_json())
    assert learners(store) == [Learnt(None, 3, 0, 7)]
    pin(store, LEARNER, store.snapshot(), ttl_s=1e-6, state=Learnt(limiter, 3, 1, 7).as_json())
    assert learners(store) == [], "a learner that died long ago holds nobody back"


@given(st.integers(0, 10**9), st.integers(1, 12), st.integers(1, 12), st.sampled_from([None, 2, 5]),
       st.floats(0.0, 1.0), st.integers(1, 4))
def test_nobody_waits_for_ever_and_nobody_runs_away(seed: int, batch: int, per_step: int, ahead: int | None,
                                                    silent: float, of: int) -> None:
    """Collectors, hint writer and learner take turns at random; drawn units may be used up, hints may be lacking."""
    sets = [f"learn.batch={batch}", f"episodes_per_step={per_step}", f"flow.ahead={ahead or 'none'}",
            "learn.max_staleness=4"]
    bounds, rng = limit(from_mapping({}, sets)), random.Random(seed)
    limiter, said = RateLimiter(bounds), Learnt(RateLimiter(bounds), 0, 0, 0)
    flying, stored, looked, hinted, seen, steps = [0] * of, 0, 0, 0, 0, 0
    for _ in range(600):
        who = rng.randrange(of + 2)
        if who < of:
            if rng.random() < 0.5 and said.may_begin(stored, in_flight=flying[who] * of) and flying[who] < 8:
                flying[who] += 1
            elif flying[who]:
                flying[who], stored = flying[who] - 1, stored + 1
        elif who == of:
            fresh, looked = stored - looked, stored
            hinted += sum(rng.random() >= silent for _ in range(fresh))
        else:
            limiter.insert(hinted - seen)
            seen = hinted
            if limiter.may_sample(batch) and seen:
                limiter.sample(min(batch, seen))
                steps += 1
            undecided = stored - looked
            copy = RateLimiter.of(limiter.state_dict())
            said = Learnt(copy, stored, undecided, steps)
            assert limiter.samples <= bounds.samples_per_insert * max(limiter.inserts, bounds.min_size)
            slack = bounds.samples_per_insert * (bounds.min_size + of * 8)
            assert limiter.error <= bounds.max_diff + slack
    if silent < 0.5:
        assert steps > 0


def test_a_store_without_a_learner_is_collected_into_for_ever(tmp_path: Path) -> None:
    assert all(one.may_begin(10**6, in_flight=100) for one in learners(example()))
