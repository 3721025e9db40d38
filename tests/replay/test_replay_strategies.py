"""Strategies against what they promise: once per pass, frequencies by theory, the same draws after any interruption."""

import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_factories import TOKENIZER, make_branch, make_episode

from agentsdpo.errors import ConfigError
from agentsdpo.replay import Key, ReplayConfig, ReplayStore, Sampler, compact, evict, gc, pin
from agentsdpo.replay.log import Located
from agentsdpo.replay.sampling.eligible import Filters, Units
from agentsdpo.replay.sampling.placement import placement
from agentsdpo.replay.sampling.strategies import uniform
from agentsdpo.replay.segment import open_segment
from agentsdpo.replay.snapshot import Snapshot

STRATEGIES = ("uniform", "fifo", "newest", "uniform_iid", "prioritised")


def located(episode: int, *, branch: int = 0, version: int = 0, group: str = "", size: int = 1,
            status: str = "sealed", trainable: bool = True) -> Located:
    return Located(
        key=Key(f"e{episode:03d}", branch, 0), path="p", row_group=0, index=0, size=1, footer_len=1, footer_sha256="",
        tokens_sha256="", content_sha256="", n_tokens=10 + episode, n_trainable=5, version_min=version,
        version_max=version, group_id=group, group_size=size, status=status, trainable=trainable, train_allowed=True,
        tokenizer_sha256=TOKENIZER, chat_template_sha256="", logprob_kind="processed", kept_set="not_needed", ts_us=0)


class FakeStore:
    """Rows that a test moves about at will; draws never read them."""

    def __init__(self, rows: list[Located]) -> None:
        self.rows, self.closures = {row.key: row for row in rows}, dict[str, list[str]]()

    def snapshot(self, at: Any = None) -> Snapshot:
        nothing: Any = None
        return Snapshot(nothing, dict(self.rows), {}, frozenset(), nothing, nothing, nothing, self.closures)

    def add(self, *rows: Located) -> None:
        self.rows |= {row.key: row for row in rows}

    def move(self) -> None:
        """As a compaction does: the same rows elsewhere."""
        self.rows = {key: replace(row, path=row.path + "x") for key, row in reversed(self.rows.items())}


def sampler(store: Any, *, seed: int = 0, max_staleness: int | None = None, **config: Any) -> Sampler:
    return Sampler(store, ReplayConfig(**config), seed=seed, tokenizer_sha256=TOKENIZER, max_staleness=max_staleness)


def ids(drawn: list[Key]) -> list[str]:
    return [key.episode_id for key in drawn]


# ----------------------------------------------------------------------------------------------------- passes


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(STRATEGIES[:3]), st.integers(1, 12), st.lists(st.integers(1, 7), max_size=8), st.integers(0, 5))
def test_each_unit_comes_once_per_pass(strategy: str, n: int, batches: list[int], seed: int) -> None:
    one = sampler(FakeStore([located(i) for i in range(n)]), strategy=strategy, seed=seed)
    drawn = [ids(one.draw(size, 0)) for size in batches]
    assert all(len(batch) == min(size, n) for batch, size in zip(drawn, batches, strict=True))
    assert all(len(set(batch)) == len(batch) for batch in drawn)
    flat = sum(drawn, [])
    passes = [flat[i:i + n] for i in range(0, len(flat), n)]
    assert all(len(set(each)) == len(each) for each in passes)


@pytest.mark.parametrize("unit", ["branch", "episode", "group"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_units_are_drawn_whole(strategy: str, unit: str) -> None:
    rows = [located(i, branch=b, group=f"g{i // 2}", size=2) for i in range(6) for b in range(2)]
    one = sampler(FakeStore(rows), strategy=strategy, unit=unit)
    size = {"branch": 1, "episode": 2, "group": 4}[unit]
    for _ in range(5):
        drawn = one.draw(2, 0)
        assert len(drawn) == len(one.weights) == 2 * size
        for start in (0, size):
            part = drawn[start:start + size]
            assert part == sorted(part)
            assert len({int(key.episode_id[1:]) // 2 for key in part}) == 1
            assert len(set(part)) == size


# ------------------------------------------------------------------------------------------------ independent


def test_iid_draws_are_the_formula() -> None:
    one = sampler(FakeStore([located(i) for i in reversed(range(7))]), strategy="uniform_iid", seed=3)
    drawn = ids(one.draw(4, 0)) + ids(one.draw(3, 0))
    assert drawn == [f"e{int(uniform(3, t) * 7):03d}" for t in range(7)]


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("config", [
    dict(strategy="uniform_iid"), dict(strategy="prioritised", alpha=0.6), dict(strategy="prioritised", alpha=1.0),
    dict(strategy="prioritised", alpha=0.0), dict(strategy="uniform_iid", staleness_weight=0.7),
    dict(strategy="prioritised", alpha=0.5, staleness_weight=0.9)])
def test_frequencies_follow_the_theory(config: dict[str, Any]) -> None:
    """20 degrees of freedom: chi-square above 45.3 has probability 0.001, and draws are fixed by the seed."""
    n, draws = 21, 8400
    versions = np.arange(n) % 4
    one = sampler(FakeStore([located(i, version=int(v)) for i, v in enumerate(versions)]), seed=5, **config)
    priorities = np.linspace(0.2, 3.0, n)
    one.update_priorities({Key(f"e{i:03d}", 0, 0): p for i, p in enumerate(priorities)})
    share = priorities ** config.get("alpha", 0.0) * config.get("staleness_weight", 1.0) ** (3.0 - versions)
    counts = np.zeros(n)
    for _ in range(draws // 21):
        np.add.at(counts, [int(name[1:]) for name in ids(one.draw(21, 3))], 1)
    assert counts.sum() == draws
    assert chi_square(counts, draws * share / share.sum()) < 45.3
    if config["strategy"] == "uniform_iid":
        assert chi_square(counts, np.full(n, draws / n)) > 10, "not stratified: draws do vary"


def test_strata_are_drawn_once_each() -> None:
    one = sampler(FakeStore([located(i) for i in range(8)]), strategy="prioritised")
    assert ids(one.draw(8, 0)) == [f"e{i:03d}" for i in range(8)], "equal mass: one stratum is one unit"
    one.update_priorities({Key("e000", 0, 0): 7.0})
    assert Counter(ids(one.draw(8, 0)))["e000"] >= 2


def test_importance_weights_are_the_formula() -> None:
    one = sampler(FakeStore([located(i) for i in range(4)]), strategy="prioritised", alpha=0.6, beta=0.4, beta_draws=20)
    priorities = np.array([1.0, 2.0, 4.0, 8.0])
    one.update_priorities({Key(f"e{i:03d}", 0, 0): p for i, p in enumerate(priorities)})
    share = priorities**0.6 / (priorities**0.6).sum()
    for beta in (0.4, 0.7, 1.0, 1.0):
        weights = (4 * share) ** -beta
        drawn = one.draw(10, 0)
        np.testing.assert_allclose(one.weights, [(weights / weights.max())[int(k.episode_id[1:])] for k in drawn])


def test_new_units_take_the_greatest_priority_and_old_ones_decay() -> None:
    store = FakeStore([located(0), located(1)])
    one = sampler(store, strategy="prioritised", alpha=1.0, decay=0.5)
    one.update_priorities({Key("e000", 0, 0): 0.5, Key("e001", 0, 0): 4.0, Key("gone", 0, 0): 99.0})
    store.add(located(2))
    one.refresh()
    assert one.state_dict()["units"]["e002/0"] == [0, -1, -1, 4.0]
    counts = Counter(ids(one.draw(2, 0)))
    units = one.state_dict()["units"]
    assert {name: unit[0] for name, unit in units.items()} == {f"{k}/0": counts[k] for k in ("e000", "e001", "e002")}
    for _ in range(200):
        one.draw(1, 0)
    uses = [one.state_dict()["units"][f"e00{i}/0"][0] for i in range(3)]
    assert uses[1] - uses[0] in range(1, 7), "three halvings make up for a priority eight times as great"


def test_a_priority_of_nothing_is_not_out_of_reach() -> None:
    one = sampler(FakeStore([located(0), located(1)]), strategy="prioritised")
    one.update_priorities({Key("e000", 0, 0): 0.0, Key("e001", 0, 0): 0.0})
    assert ids(one.draw(2, 0)) == ["e000", "e001"]


def test_a_unit_rests_for_the_cooldown() -> None:
    for strategy in ("uniform_iid", "prioritised"):
        one = sampler(FakeStore([located(i) for i in range(6)]), strategy=strategy, cooldown=4)
        flat = sum((ids(one.draw(1, 0)) for _ in range(60)), [])
        assert all(flat[i] not in flat[i + 1:i + 5] for i in range(60))
        assert one.explain(0)["resting"] == 4
        assert len(one.draw(6, 0)) == 2, "those that rest are not drawn"


def test_caps_hold_within_one_draw() -> None:
    for strategy in STRATEGIES:
        one = sampler(FakeStore([located(i) for i in range(3)]), strategy=strategy, max_uses=2)
        drawn = sum((ids(one.draw(4, 0)) for _ in range(4)), [])
        assert Counter(drawn) == {"e000": 2, "e001": 2, "e002": 2}


def test_settings_that_nobody_hears_are_refused() -> None:
    with pytest.raises(ValueError, match="alpha is 0.9.*choose prioritised"):
        ReplayConfig(alpha=0.9)
    with pytest.raises(ValueError, match="cooldown is 3.*uniform_iid or prioritised"):
        ReplayConfig(strategy="fifo", cooldown=3)
    with pytest.raises(ValueError, match="priority of"):
        sampler(FakeStore([located(0)])).update_priorities({Key("e000", 0, 0): float("nan")})


# ----------------------------------------------------------------------------------------------------- groups


def test_closed_groups_wait_for_their_members() -> None:
    store = FakeStore([located(0, group="a", size=2, version=5), located(1, group="b", size=2, version=1),
                       located(2), located(3, group="b", size=2, version=9, trainable=False)])
    one = sampler(store, unit="episode", group_mode="closed", max_staleness=3)
    assert ids(one.draw(9, 3)) in (["e001", "e002"], ["e002", "e001"]), "an untrainable member counts as there"
    assert (one.explain(3)["open_group"], one.explain(3)["eligible"], one.explain(3)["untrainable"]) == (1, 2, 1)
    store.add(located(4, group="a", size=2, version=2))
    one.refresh()
    assert sorted(ids(one.draw(9, 3))) == ["e000", "e001", "e002", "e004"]
    assert one.explain(5)["stale"] == 2, "e001 and e002"
    assert one.explain(6)["stale"] == 4, "e000 goes with e004: the oldest version of a group is that of all its members"


@pytest.mark.parametrize("status", ["sealed", "truncated", "aborted", "salvaged"])
def test_a_group_that_lost_a_member_stays_open(status: str) -> None:
    store = FakeStore([located(0, group="a", size=2), located(1, group="a", size=2, status=status)])
    one = sampler(store, unit="group", group_mode="closed")
    assert len(one.draw(1, 0)) == (0 if status == "salvaged" else 2)
    store.closures = {"a": ["e000"]}
    one.refresh()
    assert len(one.draw(1, 0)) == 2, "closed by name"
    lost = FakeStore([located(0, group="a", size=9)])
    lost.closures = {"a": ["e000", "e007"]}
    assert sampler(lost, group_mode="closed").draw(1, 0) == [], "a named member is not there"


def test_groups_are_told_apart_by_what_they_are() -> None:
    units = Units(Filters(None, None, None), "group", closed_only=False)
    units.join([located(0), located(1), located(2, group="g"), located(3, group="g")], {}, {})
    assert units.names == ["e000", "e001", "g"]
    assert [len(units.keys(unit)) for unit in range(3)] == [1, 1, 2]


# ----------------------------------------------------------------------------------------------------- resume


@st.composite
def stories(draw: st.DrawFn) -> list[tuple[str, int]]:
    moves = st.tuples(st.sampled_from(["draw", "draw", "add", "move", "evict", "priority"]), st.integers(1, 5))
    return draw(st.lists(moves, min_size=1, max_size=12))


def play(one: Sampler, store: FakeStore, move: tuple[str, int], version: int) -> list[Key]:
    kind, n = move
    if kind == "draw":
        return one.draw(n, version)
    if kind == "add":
        first = 100 + 10 * version
        store.add(*(located(first + i, version=max(version - i, 0), group="late") for i in range(n)))
    elif kind == "move":
        store.move()
    elif kind == "evict" and len(store.rows) > 2:
        del store.rows[sorted(store.rows)[n % len(store.rows)]]
    elif kind == "priority":
        one.update_priorities({key: 0.1 + (i * n) % 7 for i, key in enumerate(sorted(store.rows))})
    one.refresh()
    return []


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(STRATEGIES), st.sampled_from(["branch", "episode", "group"]), stories(), st.integers(0, 3))
def test_resuming_at_any_point_changes_nothing(strategy: str, unit: str, story: list[tuple[str, int]],
                                               cap: int) -> None:
    """One sampler lives through; its twin is thrown away and restored from JSON before every move."""
    extra: dict[str, Any] = {"cooldown": 2, "staleness_weight": 0.9} if strategy in STRATEGIES[3:] else {}
    config: dict[str, Any] = dict(strategy=strategy, unit=unit, max_uses=cap, max_staleness=6, seed=2, **extra)
    rows = [located(i, branch=b, version=i % 3, group=f"g{i // 2}") for i in range(5) for b in range(1 + i % 2)]
    ours, theirs = FakeStore(rows), FakeStore(rows)
    one, two = sampler(ours, **config), sampler(theirs, **config)
    for version, move in enumerate(story):
        state = json.loads(json.dumps(two.state_dict()))
        two = sampler(theirs, **config)
        two.load_state_dict(state)
        assert play(one, ours, move, version) == play(two, theirs, move, version)
        if move[0] == "draw":
            np.testing.assert_array_equal(one.weights, two.weights)
        assert one.state_dict() == two.state_dict()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_order_of_appends_and_place_of_rows_do_not_matter(strategy: str) -> None:
    rows = [located(i, version=i % 3) for i in range(9)]
    one, two = sampler(FakeStore(rows), strategy=strategy), sampler(FakeStore(rows[::-1]), strategy=strategy)
    assert [one.draw(4, 0) for _ in range(6)] == [two.draw(4, 0) for _ in range(6)]


def test_the_draws_of_the_first_release_stay(store: ReplayStore) -> None:
    """Runs repeat themselves across releases: default settings draw what they always drew."""
    store.append([make_episode(i, episode_id=f"e{i:03d}", size=20) for i in range(8)])
    one = Sampler(store, ReplayConfig(), seed=7, tokenizer_sha256=TOKENIZER, max_staleness=8)
    drawn = [ids(one.draw(3, 0)) for _ in range(6)]
    assert drawn == FIRST_RELEASE


FIRST_RELEASE = [line.split() for line in (
    "e006 e003 e000", "e001 e004 e002", "e005 e007 e002", "e006 e001 e004", "e003 e000 e007", "e005 e000 e002")]


# -------------------------------------------------------------------------------------------------- placement


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 1000), max_size=40))
def test_ranks_share_the_same_batch_at_any_world_size(lengths: list[int]) -> None:
    drawn = [Key(f"e{i}", 0, 0) for i in range(len(lengths))]
    tokens = dict(zip(drawn, lengths, strict=True))
    for world in (1, 2, 8):
        parts = [placement(drawn, lengths, world_size=world, rank=rank) for rank in range(world)]
        assert sorted(sum(parts, [])) == sorted(drawn)
        loads = [sum(tokens[key] for key in part) for part in parts]
        assert max(loads) - min(loads) <= max(lengths, default=0)


def test_a_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 2 of 2"):
        placement([1], [1], world_size=2, rank=2)
    with pytest.raises(ValueError, match="2 lengths"):
        placement([1], [1, 1], world_size=2, rank=0)


# ------------------------------------------------------------------------------------------------ a real store


@pytest.mark.parametrize("strategy", ["uniform", "prioritised"])
def test_resuming_after_compaction_and_gc(tmp_path: Path, strategy: str) -> None:
    """A checkpoint pins its snapshot; meanwhile rows are moved, their files deleted, others hidden."""
    stores = [ReplayStore.open(tmp_path / name) for name in ("calm", "busy")]
    samplers = []
    for store in stores:
        for i in range(8):
            store.append([make_episode(i, episode_id=f"e{i}", group_id=f"g{i}", group_size=1, size=20)])
        samplers.append(store.sampler(ReplayConfig.model_validate({"strategy": strategy}), seed=3))
    calm, busy = samplers
    assert calm.draw(3, 0) == busy.draw(3, 0)
    state, store = json.loads(json.dumps(busy.state_dict())), stores[1]
    pin(store, "learner", busy.snapshot)
    store.close()
    compact(store)
    for _ in range(2):
        gc(store, grace_s=0)
        time.sleep(0.02)
    assert not list(store.root.glob("data/2*/*")), "all of it was moved"
    gone = Key("e5", 0, 0)
    again = ReplayStore.open(store.root)
    two = again.sampler(busy.config, seed=3)
    two.load_state_dict(state)
    drawn = calm.draw(6, 0)
    assert [row.key for row in two.sample(6, 0)] == drawn
    for one in stores:
        evict(one, [gone], reason="test")
    calm.refresh()
    two.refresh()
    for _ in range(4):
        drawn = calm.draw(5, 0)
        assert [row.key for row in two.sample(5, 0)] == drawn
        assert gone not in drawn


def test_a_filter_of_its_own_and_late_rewards(store: ReplayStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.append([make_episode(i, episode_id=f"e{i}", size=20) for i in range(4)])
    store.add_rewards({"e0": 0.0, "e1": 1.0, "e2": 1.0})
    one = store.sampler(where="reward == 1", tokenizer_sha256=TOKENIZER)
    assert sorted(ids(one.draw(9, 0))) == ["e1", "e2"]
    assert one.explain(0)["where"] == 2
    with pytest.raises(ConfigError, match="filter"):
        store.sampler(tokenizer_sha256=TOKENIZER).load_state_dict(one.state_dict())
    with pytest.raises(ConfigError, match="did you mean reward"):
        store.sampler(where="reword == 1")
    rng = np.random.default_rng(0)
    store.append([make_episode(9, episode_id="e9", branches=(make_branch(rng, size=20),))])
    store.add_rewards({"e9": 1.0})
    opened = list[Key]()
    monkeypatch.setattr("agentsdpo.replay.snapshot.open_segment",
                        lambda storage, row: opened.append(row.key) or open_segment(storage, row))
    assert one.refresh() == 1
    assert ids(opened) == ["e9"], "what was filtered before is not read again"
    assert sorted(set(ids(one.draw(9, 0)))) == ["e1", "e2", "e9"]


def test_what_is_said_later_changes_no_filtered_draws(store: ReplayStore) -> None:
    """Not even after a compaction or a resume, where the rows are looked at anew."""
    store.append([make_episode(i, episode_id=f"e{i}", size=20, group_size=1) for i in range(8)])
    store.append([make_episode(8, episode_id="e8", size=20)], salvaged=True)
    store.add_labels({f"e{i}": "bad" for i in (0, 1, 8)})
    one, two, calm = (store.sampler(ReplayConfig(), seed=3, where="label is None") for _ in range(3))
    store.add_labels({"e5": "bad"})
    for other in (one, two, calm):
        other.refresh()
    two = store.sampler(ReplayConfig(), seed=3, where="label is None")
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    compact(store)
    one.refresh()
    for _ in range(3):
        drawn = calm.draw(4, 0)
        assert one.draw(4, 0) == two.draw(4, 0) == drawn
    store.append([make_episode(18, episode_id="e8", size=40)])  # the whole of it is another row
    one.refresh()
    assert "e8" in ids(one.draw(7, 0))
    old = {name: value for name, value in two.state_dict().items() if name != "wanted"}
    two.load_state_dict(old)
    assert len(two.draw(9, 0)) == 5
