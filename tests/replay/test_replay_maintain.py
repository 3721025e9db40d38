"""Evict, unevict, gc, pins, folded snapshots: what is hidden, what is deleted, what old snapshots still see."""

import json
import os
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
from replay_factories import make_episode

from agentsdpo.errors import ConfigError, CorruptionError, StoreError
from agentsdpo.replay import Key, ReplayStore, uuid7
from agentsdpo.replay.canonical import canonical_json
from agentsdpo.replay.folding import Fold
from agentsdpo.replay.log import MAINT, RowExpired, entry_path, make_entry
from agentsdpo.replay.upkeep.maintain import commit, evict, fold, unevict
from agentsdpo.replay.upkeep.pinned import clock_us, pin, pins, unpin
from agentsdpo.replay.upkeep.reclaim import gc


def filled(root: Path, n: int = 4, **fields: Any) -> tuple[ReplayStore, list[Key]]:
    """A store of ``n`` files with an episode each, and their keys in the order of appending."""
    store = ReplayStore.open(root)
    ids = [f"e{i}" for i in range(n)]
    for i, name in enumerate(ids):
        shape = {"size": 24, "group_id": f"g{i}", "group_size": 1} | fields
        store.append([make_episode(i, episode_id=name, **shape)])
    return store, [Key(name, 0, 0) for name in ids]


def age(root: Path, *patterns: str, seconds: int = 1_000_000) -> None:
    """Give files an older time stamp, as if written earlier by the store's clock."""
    for pattern in patterns:
        for path in root.glob(pattern):
            stat = path.stat()
            os.utime(path, ns=(stat.st_atime_ns - seconds * 10**9, stat.st_mtime_ns - seconds * 10**9))


def live(root: Path) -> set[Key]:
    return set(ReplayStore.open(root, create=False).snapshot().rows)


# ------------------------------------------------------------------------------------------------- evict, unevict


def test_evict_hides_and_unevict_shows_again(tmp_path: Path) -> None:
    store, keys = filled(tmp_path / "s")
    old = store.snapshot()
    assert evict(store, keys[:1], reason="stale", dry_run=True).keys == (keys[0],)
    assert len(store) == 4
    assert evict(store, keys[:2], reason="stale").keys == tuple(keys[:2])
    assert evict(store, keys[:2], reason="again").keys == ()
    assert set(store.snapshot().rows) == set(keys[2:]) == live(store.root)
    assert len(old.read(keys)) == 4, "an older snapshot still reads them"
    assert unevict(store, keys[1:2]).keys == (keys[1],)
    assert live(store.root) == set(keys[1:])
    assert set(store.snapshot(at=old.vector).rows) == set(keys)
    with pytest.raises(StoreError, match="not among the 4"):
        evict(store, [Key("nobody", 0, 0)], reason="x")


def test_groups_move_together(tmp_path: Path) -> None:
    store, keys = filled(tmp_path / "s", group_id="g", group_size=4)
    store.append([make_episode(9, episode_id="alone", group_id="h", group_size=1, size=24)])
    assert evict(store, keys[:1], reason="stale").keys == tuple(keys)
    assert live(store.root) == {Key("alone", 0, 0)}
    assert unevict(store, keys[2:3]).keys == tuple(keys)


def test_an_evicted_key_stays_hidden_when_it_is_appended_again(tmp_path: Path) -> None:
    store, keys = filled(tmp_path / "s", 1)
    episode = store.episode("e0")
    evict(store, keys, reason="x")
    store.append([episode])
    assert live(store.root) == set()
    with pytest.raises(StoreError, match="already stored with other content"):
        store.append([make_episode(5, episode_id="e0", size=24)])


def test_maintenance_operations_elsewhere_are_refused(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "s", 1)
    writer = uuid7()
    entry = make_entry(writer, 0, "", [{"op": "evict", "keys": [["e0", 0, 0]], "reason": "x"}])
    store.storage.create(entry_path(writer, 0), canonical_json(entry))
    with pytest.raises(StoreError, match="holds the operation 'evict'"):
        store.snapshot()


def test_two_maintainers_never_share_a_slot(tmp_path: Path) -> None:
    """A plan made on an older log is made again, on what somebody else has committed meanwhile."""
    store, keys = filled(tmp_path / "s")
    other, calls = ReplayStore.open(store.root), []

    def plan(state: Fold) -> list[dict]:
        calls.append(len(state.evicted))
        if len(calls) == 1:
            evict(other, keys[:1], reason="first")
        return [{"op": "evict", "keys": keys[1:2], "reason": "second"}]

    commit(store, plan)
    assert calls == [0, 1]
    assert live(store.root) == set(keys[2:])


# ------------------------------------------------------------------------------------------------------ gc, pins


def test_gc_deletes_in_two_phases(tmp_path: Path) -> None:
    store, keys = filled(tmp_path / "s")
    root, old = store.root, store.snapshot()
    evict(store, keys[:2], reason="stale")
    unevict(store, keys[1:2])
    path = old.rows[keys[0]].path
    assert gc(store, dry_run=True).named == (path,)
    first = gc(store)
    assert (first.named, first.deleted) == ((path,), ())
    assert len(old.read(keys)) == 4, "named is not deleted"
    with pytest.raises(RowExpired, match="cannot be shown again"):
        unevict(store, keys[:1])
    assert gc(store).deleted == (), "the grace has not passed"
    age(root, "log/maint/*.json")
    second = gc(store)
    assert (second.named, second.deleted) == ((), (path,))
    assert second.freed_bytes == old.rows[keys[0]].size
    assert not (root / path).exists()
    old = ReplayStore.open(root).snapshot(at=old.vector)
    with pytest.raises(RowExpired, match="was evicted since this snapshot"):
        old.read(keys)
    with pytest.raises(RowExpired, match="was evicted since this snapshot"):
        old.to_arrow()
    assert len(old.read(keys[1:])) == 3
    assert live(root) == set(keys[1:])


def test_lost_files_are_corruption_and_not_expired(tmp_path: Path) -> None:
    store, keys = filled(tmp_path / "s", 1)
    (store.root / store.snapshot().rows[keys[0]].path).unlink()
    with pytest.raises(CorruptionError, match="is missing though the log names it"):
        store.snapshot().read(keys)


def test_pins_hold_what_their_snapshot_shows(tmp_path: Path) -> None:
    store, keys = filled(tmp_path / "s")
    view, path = store.snapshot(), store.snapshot().rows[keys[0]].path
    pin(store, "learner-0", view, ttl_s=3600, state={"samples": 3})
    evict(store, keys[:1], reason="stale")
    assert gc(store, grace_s=0).named == ()
    pin(store, "learner-1", store.snapshot())
    assert [one.state for one in pins(store)] == [{"samples": 3}, {}]
    unpin(store, "learner-0")
    assert gc(store).named == (path,)
    with pytest.raises(RowExpired, match="was reclaimed before the pin of late stood"):
        pin(store, "late", view)
    assert [one.reader for one in pins(store)] == ["learner-1"]
    with pytest.raises(ConfigError, match="no pin for reader '../x'"):
        pin(store, "../x", view)


def test_a_pin_that_gc_had_not_seen_holds_the_file_back(tmp_path: Path) -> None:
    """The pin is written between gc's look at the pins and its commit; the second phase looks again."""
    store, keys = filled(tmp_path / "s")
    view, reader = store.snapshot(), ReplayStore.open(tmp_path / "s")
    evict(store, keys[:1], reason="stale")
    path = view.rows[keys[0]].path
    body = {"v": 1, "reader": "r", "snapshot": view.vector, "ttl_s": 60.0, "state": {}}
    assert gc(store).named == (path,)
    reader.storage.replace("pins/r.json", canonical_json(body))
    age(store.root, "log/maint/*.json")
    report = gc(store)
    assert (report.deleted, report.pinned) == ((), (path,))
    assert len(view.read(keys)) == 4
    age(store.root, "pins/*.json")
    assert gc(store).deleted == (path,), "a lapsed pin holds nothing"


def test_a_damaged_pin_stops_gc(tmp_path: Path) -> None:
    store, keys = filled(tmp_path / "s")
    pin(store, "r", store.snapshot())
    (store.root / "pins" / "r.json").write_bytes(b"{")
    evict(store, keys, reason="x")
    with pytest.raises(CorruptionError, match="pin .* cannot be read"):
        gc(store)


def test_gc_stopped_between_check_and_unlink_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that could need the file again happens while gc sleeps: each is refused, for the file was named."""
    store, keys = filled(tmp_path / "s")
    old = store.snapshot()
    evict(store, keys[:1], reason="stale")
    gc(store)
    age(store.root, "log/maint/*.json")
    remove, done = store.storage.remove, []

    def slow(path: str) -> None:
        if path.startswith("data/") and not done:
            done.append(path)
            other = ReplayStore.open(store.root)
            for attempt in (lambda: unevict(other, keys[:1]), lambda: pin(other, "late", old)):
                with pytest.raises(RowExpired):
                    attempt()
        remove(path)

    monkeypatch.setattr(store.storage, "remove", slow)
    assert gc(store).deleted == (old.rows[keys[0]].path,)
    assert done
    view = ReplayStore.open(store.root).snapshot()
    assert len(view.read(view.keys())) == 3


def test_the_clock_is_the_one_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, keys = filled(tmp_path / "s")
    for jump in (-86_400 * 400, 86_400 * 400):
        monkeypatch.setattr("time.time", lambda jump=jump: 1.8e9 + jump)
        monkeypatch.setattr("time.time_ns", lambda jump=jump: int((1.8e9 + jump) * 1e9))
        evict(store, keys[:1], reason="x")
        assert gc(store).deleted == ()
        if jump < 0:
            assert gc(store, dry_run=True).named == ()
    monkeypatch.undo()
    assert live(store.root) == set(keys[1:])
    assert clock_us(store.storage) > 1.5e15
    assert not list((store.root / "clock").iterdir())


# --------------------------------------------------------------------------------------------- folded snapshots


def rich(root: Path) -> tuple[ReplayStore, list[Key]]:
    """A store with everything a fold can hold."""
    store, keys = filled(root, 6)
    store.add_rewards({keys[0]: 0.5})
    evict(store, keys[1:3], reason="stale")
    gc(store)
    evict(store, keys[3:4], reason="later")
    store.close_group("g5", ["e5"])
    store.close()
    store.append([make_episode(7, episode_id="e7", size=24, group_id="g7", group_size=1)])
    return store, keys


def same(a: Fold, b: Fold) -> bool:
    """Equal in all that a fold says."""
    names = ("rows", "vector", "conflicts", "overlays", "closed", "evicted", "files", "gone", "beaten",
             "outdone", "outlived", "archived", "closures", "epoch", "busy")
    other = [name for name in names if getattr(a, name) != getattr(b, name)]
    assert not other, other
    return {key: row.path for key, row in a.moved.items()} == {key: row.path for key, row in b.moved.items()}


def test_a_folded_snapshot_says_what_the_log_says(tmp_path: Path) -> None:
    store, keys = rich(tmp_path / "s")
    old = store.snapshot()
    path = fold(store)
    assert json.loads((store.root / "snap" / "LATEST.json").read_bytes())["file"] == path
    store.append([make_episode(8, episode_id="e8", size=24)])
    from_snap, from_log = Fold(store.storage), Fold(store.storage, from_snapshot=False)
    from_snap.refresh()
    from_log.refresh()
    assert same(from_snap, from_log)
    again = ReplayStore.open(store.root)
    assert again.snapshot().id == store.snapshot().id
    assert len(again.snapshot(at=old.vector)) == len(old)
    assert again.snapshot().read(keys[:1])[0].reward == 0.5
    assert evict(again, keys[3:4], reason="x").keys == ()


def test_positions_from_before_the_fold_still_resolve(tmp_path: Path) -> None:
    store, keys = filled(tmp_path / "s")
    vectors = []
    for i in range(3):
        vectors.append((store.snapshot().vector, len(store)))
        store.append([make_episode(10 + i, episode_id=f"n{i}", size=24)])
    evict(store, keys[:1], reason="x")
    fold(store)
    again = ReplayStore.open(store.root)
    for vector, n in vectors:
        view = again.snapshot(at=vector)
        assert (len(view), len(view.read(view.keys()))) == (n, n)


@pytest.mark.parametrize("what", ["file", "latest", "gone"])
def test_a_damaged_folded_snapshot_is_passed_over(tmp_path: Path, what: str) -> None:
    store, _ = rich(tmp_path / "s")
    path = store.root / fold(store)
    target = path if what != "latest" else store.root / "snap" / "LATEST.json"
    data = bytearray(target.read_bytes())
    rng = random.Random(0)
    for _ in range(20 if what != "gone" else 1):
        at, bit = rng.randrange(len(data)), rng.randrange(8)
        data[at] ^= 1 << bit
        target.write_bytes(data) if what != "gone" else target.unlink()
        with pytest.warns(RuntimeWarning, match="folded snapshot .* is damaged, the whole log is read instead"):
            assert set(ReplayStore.open(store.root).snapshot().rows) == set(store.snapshot().rows)
        data[at] ^= 1 << bit
    with pytest.warns(RuntimeWarning, match="is damaged"):
        fold(store)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ReplayStore.open(store.root).snapshot()


def test_a_truncated_log_is_noticed(tmp_path: Path) -> None:
    store, _ = rich(tmp_path / "s")
    fold(store)
    last = max(store.root.glob(f"log/{store.writer_id}/*.json"))
    last.unlink()
    with pytest.raises(CorruptionError, match="the log was truncated or changed"):
        ReplayStore.open(store.root).snapshot()
    with pytest.raises(CorruptionError, match="truncated"):
        fold(store)
    fold(store, anew=True)
    assert Key("e7", 0, 0) not in live(store.root)


def test_gaps_behind_a_folded_snapshot_are_errors(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "s", 2)
    fold(store)
    for i in (5, 6):
        store.append([make_episode(i, episode_id=f"e{i}", size=24)])
    sorted(store.root.glob(f"log/{store.writer_id}/*.json"))[-2].unlink()
    with pytest.raises(CorruptionError, match="lacks entry 3"):
        ReplayStore.open(store.root).snapshot()


def test_maintenance_needs_exclusive_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, keys = filled(tmp_path / "s", 1)

    def refuse() -> None:
        raise StoreError("no exclusive create here")

    monkeypatch.setattr(store.storage, "demand_exclusive", refuse)
    with pytest.raises(StoreError, match="no exclusive create"):
        evict(store, keys, reason="x")
    evict(store, keys, reason="x", sole_maintainer=True)
    assert store.fold().vector[MAINT][0] == 0
