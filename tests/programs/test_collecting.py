"""A collector as a program: it follows the registry, keeps pace, and loses or doubles nothing when it is killed."""

import asyncio
import contextlib
import random
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from agentsdpo.errors import CorruptionError, EngineError, StoreError
from agentsdpo.programs.flow import LEARNER, Learnt, limit
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.replay.sampling.limiter import RateLimiter
from agentsdpo.replay.store import ReplayStore
from agentsdpo.replay.upkeep.pinned import pin
from agentsdpo.replay.upkeep.verification import verify
from agentsdpo.types import Episode


def run(program: Any) -> list[Episode]:
    asyncio.run(program.run())
    return list(program.store.episodes())


@pytest.fixture
def make(counting: SimpleNamespace, registry: PolicyRegistry, tmp_path: Path) -> Any:
    def made(*sets: str, **more: Any) -> Any:
        return counting.collecting(tmp_path / "store", registry.root, counting.config(*sets), **more)

    return made


def test_it_stores_what_was_asked_for_once(make: Any) -> None:
    told: list[str] = []
    program = make(episodes=10, say=told.append)
    episodes = run(program)
    assert sorted(e.episode_id for e in episodes) == sorted(program.episode_id(n) for n in range(10))
    assert all(e.grade is not None and e.hint is None and e.train_allowed for e in episodes)
    assert not list(program.store.root.glob("spool/*/*/*.arrows")), "journals are gone once the episodes are stored"
    assert (program.store.policy(0) or {})["vocab_size"] == 5000
    again = make(episodes=12)
    assert len(run(again)) == 12
    assert again.stored == 2, "what an earlier life stored is not played again"


def test_no_two_collectors_play_the_same_episode(make: Any) -> None:
    ids = [{make(number=k).episode_id(nth) for nth in range(50)} for k in (0, 1, 1000)]
    assert len(set.union(*ids)) == 150
    one, other = make(number=0), make("seed=1", number=0)
    assert not {one.place(n)[0] for n in range(10_000)} & {other.place(n)[0] for n in range(10_000)}
    assert one.place(10_000)[0] == one.place(0)[0], "after all tasks of a seed the next lap has another seed"
    assert one.place(10_000)[1] != one.place(0)[1]


def test_new_weights_are_taken_in_the_middle_of_an_episode_and_the_spans_say_so(
        make: Any, registry: PolicyRegistry) -> None:
    program = make("collect.concurrency=2", episodes=2, token_s=0.05)

    async def publish() -> None:
        await asyncio.sleep(0.5)
        registry.publish({"w": np.ones(4, np.float32)}, learner_step=1)

    async def both() -> None:
        await asyncio.gather(program.run(), publish())

    asyncio.run(both())
    episodes = list(program.store.episodes())
    assert {e.policy_versions for e in episodes} == {(0, 1)}
    spans = [[span.version for span in call.versions] for e in episodes for call in e.branches[0].calls]
    assert [0] in spans
    assert [1] in spans, "later turns of the same episode are of the new version alone"
    assert program.store.policy(1) is not None, "the store is told of a version before anything it sampled"


def test_it_serves_versions_behind_the_latest_where_that_is_wanted(make: Any, registry: PolicyRegistry) -> None:
    for step in (1, 2):
        registry.publish({"w": np.full(4, step, np.float32)}, learner_step=step)
    assert {e.policy_versions for e in run(make("staleness=2", "learn.max_staleness=4", episodes=2))} == {(0, 0)}


@pytest.mark.parametrize("moment", ["verify_files", "read_tensors"])
def test_a_version_that_is_pruned_while_it_is_read_is_passed_over_and_a_damaged_one_is_not(
        make: Any, registry: PolicyRegistry, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    from agentsdpo.publish import registry as room

    registry.publish({"w": np.ones(4, np.float32)}, learner_step=1)
    program, own = make("staleness=1", "learn.max_staleness=4", episodes=1), getattr(room, moment)

    def prune_first(*args: Any) -> Any:
        if registry.latest() == 1:
            registry.publish({"w": np.full(4, 2, np.float32)}, learner_step=2)
            assert registry.prune(1, staleness=1) == [0]
        return own(*args)

    monkeypatch.setattr(room, moment, prune_first)
    assert {e.policy_versions for e in run(program)} == {(1, 1)}
    (registry.folder(1) / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CorruptionError, match="of policy version 1 has sha256"):
        run(make("staleness=1", "learn.max_staleness=4", episodes=2))


def test_episodes_go_on_while_the_store_cannot_be_read(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    program = make("collect.concurrency=2", episodes=2, token_s=0.05, say=told.append)
    looks = count()

    def learners(store: ReplayStore) -> list[Learnt]:
        if next(looks) in (1, 2):
            raise StoreError("AWS Error NETWORK_CONNECTION")
        return []

    monkeypatch.setattr("agentsdpo.programs.collecting.learners", learners)
    assert len(run(program)) == 2
    assert [line for line in told if "AWS" in line] == [
        f"the next look is in {pause} s: AWS Error NETWORK_CONNECTION" for pause in ("0.5", "1")]


def test_it_pauses_while_the_learner_is_behind(make: Any) -> None:
    program = make("learn.batch=4", "episodes_per_step=4", "flow.ahead=2", "collect.concurrency=16")
    limiter = RateLimiter(limit(program.config))
    pin(program.store, LEARNER, program.store.snapshot(), state=Learnt(limiter, 0, 0, 0).as_json())

    async def watch() -> list[int]:
        playing = asyncio.create_task(program.run())
        counts = []
        for joined in (0, 8):
            for _ in range(60):
                await asyncio.sleep(0.1)
                if program.paused and len(program.store) >= 8 + joined:
                    break
            counts.append(len(program.store))
            limiter.insert(8)
            limiter.sample(8)
            pin(program.store, LEARNER, program.store.snapshot(),
                state=Learnt(limiter, len(program.store), 0, 1).as_json())
        playing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await playing
        return counts

    first, then = asyncio.run(watch())
    assert 8 <= first <= 11, "two batches ahead, and one more for the first four that nobody counts"
    assert first < then <= first + 8


def test_what_breaks_is_played_again_and_left_out_at_last(make: Any, counting: SimpleNamespace) -> None:
    told: list[str] = []
    program = make("collect.concurrency=2", episodes=4, say=told.append)
    program.engine.broken = 3
    assert len(run(program)) == 4
    assert any("will be played again: EngineError: connection refused" in line for line in told)
    down = make("collect.concurrency=1", episodes=9, number=1, say=told.append)
    down.engine.broken = 10**6
    with pytest.raises(EngineError, match="none of the first 2 episodes could be scored: EngineError: connection"):
        run(down)
    assert not list(down.store.root.glob("spool/*/*/*.arrows"))


def test_interrupted_it_keeps_what_had_ended(make: Any) -> None:
    program = make("collect.concurrency=3")

    async def interrupt() -> None:
        playing = asyncio.create_task(program.run())
        while program.stored < 5:
            await asyncio.sleep(0.01)
        playing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await playing

    asyncio.run(interrupt())
    assert len(program.store) == program.stored >= 5
    again = make(episodes=program.stored + 3)
    assert len(run(again)) == program.stored + 3
    assert all(e.grade is not None for e in again.store.episodes())


@pytest.mark.slow
def test_killed_again_and_again_no_episode_is_lost_or_doubled(
        counting: SimpleNamespace, registry: PolicyRegistry, tmp_path: Path, make: Any) -> None:
    wanted, rng, kills = 60, random.Random(7), 0
    command = [sys.executable, str(counting.path), str(tmp_path / "store"), str(registry.root), str(wanted)]
    store = ReplayStore.open(tmp_path / "store")
    acked: set[str] = set()
    while True:
        process = subprocess.Popen(command)
        before, deadline = len(store), time.monotonic() + 120
        while process.poll() is None and len(store) < min(before + 7, wanted) and time.monotonic() < deadline:
            time.sleep(rng.uniform(0.0, 0.05))
        if process.poll() is None and kills < 5:
            process.kill()
            kills += 1
        assert process.wait(120) in (0, -9)
        rows = store.snapshot().rows
        whole = {key.episode_id for key, row in rows.items() if row.status != "salvaged"}
        assert acked <= whole, "what was stored once stays"
        acked = whole
        if process.returncode == 0:
            break
    program = make(episodes=wanted)
    assert kills == 5
    assert {key.episode_id for key in rows} == {program.episode_id(n) for n in range(wanted)}
    assert len(rows) == wanted
    assert all(e.grade is not None for e in store.episodes())
    assert not list(store.root.glob("spool/*/*/*.arrows"))
    assert not verify(store, "full").problems
