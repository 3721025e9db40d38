"""A store under random work, beside a dict that does the same: append, crash, hide, show, move, reclaim, fold, read."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from replay_factories import TOKENIZER, make_episode
from test_replay_maintain import age

from agentsdpo.replay import (
    Key,
    ReplayConfig,
    ReplayStore,
    Sampler,
    Snapshot,
    compact,
    evict,
    fold,
    gc,
    pin,
    unevict,
    unpin,
    verify,
)
from agentsdpo.replay.log import RowExpired
from agentsdpo.types import Branch, Episode

GROUPS = 3
PICK = st.integers(0, 10_000)


def content(branch: Branch) -> bytes:
    return branch.token_ids.tobytes() + branch.logprobs.tobytes()


class StoreMachine(RuleBasedStateMachine):
    """The model: what was appended, which groups are hidden, which of those were handed to gc, and old snapshots."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="agentsdpo-machine-"))
        self.store = ReplayStore.open(self.folder / "s")
        self.rows: dict[Key, bytes] = {}
        self.group: dict[Key, str] = {}
        self.rewards: dict[Key, float] = {}
        self.hidden: set[Key] = set()
        self.reclaimed: set[Key] = set()
        self.old: list[tuple[Snapshot, dict[Key, bytes]]] = []
        self.pinned: dict[Key, bytes] | None = None
        self.count = 0

    def teardown(self) -> None:
        assert verify(ReplayStore.open(self.store.root), "full").problems == ()
        shutil.rmtree(self.folder)

    # ------------------------------------------------------------------------------------------------- writing

    def _episode(self, group: int) -> Episode:
        self.count += 1
        return make_episode(self.count, episode_id=f"e{self.count:03}", size=12, group_id=f"g{group}", group_size=9)

    def _note(self, episode: Episode) -> None:
        for branch in episode.branches:
            key = Key(episode.episode_id, branch.branch_id, 0)
            self.rows[key], self.group[key] = content(branch), episode.group_id

    @initialize()
    def begin(self) -> None:
        self.append(0, 2)

    @rule(group=st.integers(0, GROUPS - 1), n=st.integers(1, 2))
    def append(self, group: int, n: int) -> None:
        episodes = [self._episode(group) for _ in range(n)]
        self.store.append(episodes)
        for episode in episodes:
            self._note(episode)

    @rule(group=st.integers(0, GROUPS - 1))
    def salvage_then_finish(self, group: int) -> None:
        """A row that a crash cut short, moved or not, gives way to the whole one."""
        whole = self._episode(group)
        short = make_episode(999, episode_id=whole.episode_id, size=8, group_id=whole.group_id, group_size=9)
        self.store.append([short], salvaged=True)
        if group:
            compact(self.store, takeover_after_s=0)
        self.store.append([whole])
        self._note(whole)

    @rule()
    def crash(self) -> None:
        """A data file is there, its entry is not, and the process is gone."""
        victim = next(iter(self.store.root.glob("data/*/*.parquet")), None)
        self.count += 1
        if victim:
            shutil.copy(victim, victim.with_name(f"orphan-{self.count}.parquet"))
        self.store = ReplayStore.open(self.store.root)

    @rule()
    def end_stream(self) -> None:
        self.store.close()

    @precondition(lambda self: self._live())
    @rule(pick=PICK, reward=st.floats(0, 1, width=16))
    def overlay(self, pick: int, reward: float) -> None:
        key = self._choose(self._live(), pick)
        self.store.add_rewards({key: reward})
        self.rewards[key] = reward

    # --------------------------------------------------------------------------------------------- maintenance

    @precondition(lambda self: self.rows)
    @rule(pick=PICK)
    def hide(self, pick: int) -> None:
        key = self._choose(self.rows, pick)
        evict(self.store, [key], reason="machine")
        self.hidden |= self._members(key)

    @precondition(lambda self: self.hidden)
    @rule(pick=PICK)
    def show(self, pick: int) -> None:
        key = self._choose(self.hidden, pick)
        members = self._members(key) & self.hidden
        if members & self.reclaimed:
            with pytest.raises(RowExpired):
                unevict(self.store, [key])
        else:
            unevict(self.store, [key])
            self.hidden -= members

    @rule()
    def compact(self) -> None:
        compact(self.store, takeover_after_s=0)

    @rule(later=st.booleans())
    def collect(self, later: bool) -> None:
        gc(self.store)
        state = self.store.fold()
        self.reclaimed = {key for key in self.hidden if state.rows[key].path in state.gone}
        if later:
            age(self.store.root, "log/maint/*", "log/archive/*", "snap/*.parquet", "data/compact/*")
            gc(self.store)

    @rule()
    def fold(self) -> None:
        fold(self.store)

    @rule()
    def pin(self) -> None:
        pin(self.store, "reader", self.store.snapshot())
        self.pinned = self._live()

    @rule()
    def unpin(self) -> None:
        unpin(self.store, "reader")
        self.pinned = None

    # ------------------------------------------------------------------------------------------------- reading

    @rule()
    def remember(self) -> None:
        self.old = [*self.old[-3:], (self.store.snapshot(), self._live())]

    @precondition(lambda self: self.old)
    @rule(pick=PICK, fresh=st.booleans())
    def look_back(self, pick: int, fresh: bool) -> None:
        """An old snapshot has the same rows for ever; those that were hidden since may be reclaimed."""
        view, want = self.old[pick % len(self.old)]
        if fresh:
            view = ReplayStore.open(self.store.root).snapshot(at=view.vector)
        assert set(view.rows) == set(want)
        for key in want:
            try:
                assert content(view.read([key])[0].branch) == want[key]
            except RowExpired:
                assert key in self.reclaimed or want[key] != self.rows[key]
                assert self.pinned is None or key not in self.pinned

    @precondition(lambda self: self._live())
    @rule(seed=st.integers(0, 5))
    def sample(self, seed: int) -> None:
        sampler = Sampler(self.store, ReplayConfig(unit="branch"), seed=seed, tokenizer_sha256=TOKENIZER,
                          max_staleness=None)
        drawn = sampler.sample(len(self._live()), 0)
        assert {row.key: content(row.branch) for row in drawn} == self._live()

    @rule()
    def reopen(self) -> None:
        self.store = ReplayStore.open(self.store.root)

    @invariant()
    def the_store_is_the_model(self) -> None:
        view = self.store.snapshot()
        assert set(view.rows) == set(self._live())
        for row in view.read(view.keys()):
            assert content(row.branch) == self.rows[row.key]
            assert row.key not in self.rewards or row.reward == self.rewards[row.key]

    def _live(self) -> dict[Key, bytes]:
        return {key: value for key, value in self.rows.items() if key not in self.hidden}

    def _members(self, key: Key) -> set[Key]:
        return {other for other, group in self.group.items() if group == self.group[key]}

    def _choose(self, keys: "dict[Key, bytes] | set[Key]", pick: int) -> Key:
        return sorted(keys)[pick % len(keys)]


TestStore = pytest.mark.slow(StoreMachine.TestCase)
TestStore.settings = settings(max_examples=12, stateful_step_count=25, deadline=None, derandomize=True,
                              suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
