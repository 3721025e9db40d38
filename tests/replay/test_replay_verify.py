"""verify finds every kind of damage and names it; quarantine keeps what is whole."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from replay_factories import make_branch, make_episode
from test_replay_compact import rows_of
from test_replay_maintain import age, filled, live

from agentsdpo.benchmarks.perf.bitflips import CLASSES, build, sweep
from agentsdpo.errors import ConfigError, CorruptionError, StoreError
from agentsdpo.replay import Key, ReplayStore, compact, evict, fold, gc, pin, to_rows, unevict, verify
from agentsdpo.replay.canonical import canonical_json
from agentsdpo.replay.log import entry_path, make_entry
from agentsdpo.replay.segment import encode
from agentsdpo.replay.storage import Storage
from agentsdpo.replay.upkeep import quarantine


@pytest.fixture
def damaged(tmp_path: Path) -> ReplayStore:
    """A store with something of everything, to be damaged."""
    store, keys = filled(tmp_path / "s", 5)
    store.add_rewards({keys[0]: 0.5})
    store.close()
    compact(store)
    store.append([make_episode(7, episode_id="e7", size=24, group_id="g7", group_size=1)])
    evict(store, keys[4:], reason="x")
    fold(store)
    store.record_policy(0, {"weights_id": "w"})
    pin(store, "r", store.snapshot())
    return store


def file_of(store: ReplayStore, episode: str) -> Path:
    return store.root / store.snapshot().rows[Key(episode, 0, 0)].path


def test_a_branch_without_calls_is_no_damage(tmp_path: Path) -> None:
    """Whatever shares its row group: what failed before its first call is kept like everything else."""
    bare = make_branch(np.random.default_rng(0), size=8).model_copy(update={
        "token_ids": np.zeros(0, np.int32), "token_kind": np.zeros(0, np.uint8), "logprobs": np.zeros(0, np.float32),
        "calls": ()})
    store = ReplayStore.open(tmp_path / "s")
    for i in range(2):
        store.append([make_episode(i, episode_id=f"e{i}", branches=(bare,), group_size=1)])
    store.record_policy(0, {"weights_id": "w"})
    assert verify(store, "deep").problems == ()
    store.append([make_episode(2, episode_id="e2", size=24, group_size=1)])
    assert compact(store).rows == 3
    assert verify(store, "deep").problems == ()
    assert [len(row.branch.calls) for row in store.branches()] == [0, 0, 2]


def test_a_good_store_is_good_at_every_level(damaged: ReplayStore) -> None:
    for level in ("fast", "full", "deep"):
        report = verify(ReplayStore.open(damaged.root), level)
        assert report.problems == ()
        assert (report.rows, report.ok) == (5, True)
    gc(damaged)
    age(damaged.root, "log/maint/*", "log/archive/*", "snap/*", "pins/*")
    assert gc(damaged).deleted
    assert verify(ReplayStore.open(damaged.root), "deep").problems == ()
    (damaged.root / "data" / "x.parquet").write_bytes(b"orphan")
    (damaged.root / "policies" / ".DS_Store").write_bytes(b"\0")
    report = verify(damaged, "deep")
    assert (report.problems, report.orphans) == ((), 1)
    assert json.loads(json.dumps(report.as_json()))["ok"]
    with pytest.raises(ConfigError, match="no level 'deeper'"):
        verify(damaged, "deeper")  # pyright: ignore[reportArgumentType]


DAMAGE: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "no STORE.json": ("STORE.json", "fast", Path.unlink),
    "missing entry": ("log/maint/000000000001.json", "fast", Path.unlink),
    "missing data": ("data/compact/*.parquet", "fast", Path.unlink),
    "short data": ("data/compact/*.parquet", "fast", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "missing overlay": ("overlay/reward/*.parquet", "fast", Path.unlink),
    "missing archive": ("log/archive/*.jsonl", "fast", Path.unlink),
    "missing snapshot": ("snap/*.parquet", "fast", Path.unlink),
    "broken pin": ("pins/r.json", "fast", lambda path: path.write_bytes(b"[]")),
    "broken policy": ("policies/*.json", "fast", lambda path: path.write_bytes(b"{")),
    "no policy": ("policies/*.json", "deep", Path.unlink),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_named(damaged: ReplayStore, name: str) -> None:
    pattern, level, harm = DAMAGE[name]
    path = max(damaged.root.glob(pattern), key=lambda path: path.stat().st_mtime_ns)
    harm(path)
    report = verify(damaged, "deep")
    assert any(problem.level == level for problem in report.problems), report.problems
    said = " ".join(f"{problem.path} {problem.what}" for problem in report.problems)
    assert path.name in said
    assert all(problem.what and problem.fix for problem in report.problems)
    if level == "fast":
        assert not verify(damaged, "fast").ok


def test_a_segment_replaced_by_another_is_found(damaged: ReplayStore) -> None:
    """The other one is a good file of this store, and even has the same size."""
    one, other = file_of(damaged, "e7"), damaged.root / "copy.parquet"
    data, _ = encode(to_rows([make_episode(7, episode_id="e8", size=24, group_id="g7", group_size=1)]))
    other.write_bytes(data)
    shutil.copy(other, one)
    other.unlink()
    with pytest.raises(CorruptionError, match=r"footer|bytes|another row"):
        damaged.snapshot().read([Key("e7", 0, 0)])
    assert {Path(problem.path).name for problem in verify(damaged).problems} == {one.name}


def commit_by_hand(store: ReplayStore, writer: str, seq: int, prev: str, ops: list[dict]) -> str:
    entry = make_entry(writer, seq, prev, ops)
    store.storage.create(entry_path(writer, seq), canonical_json(entry))
    return entry["sha"]


@pytest.mark.parametrize("how", ["left out", "not theirs", "evicted", "reclaimed"])
def test_a_wrong_replace_is_found(tmp_path: Path, how: str) -> None:
    store, keys = filled(tmp_path / "s", 3)
    paths = {key: row.path for key, row in store.snapshot().rows.items()}
    moved = {"left out": ["e0"], "not theirs": ["e0", "e1", "e2"]}.get(how, ["e0", "e1"])
    data, op = encode(to_rows([store.episode(name) for name in moved]))
    store.storage.create("data/compact/x.parquet", data)
    out = {name: value for name, value in op.items() if name != "op"} | {"path": "data/compact/x.parquet"}
    inputs = [paths[keys[0]], paths[keys[1]]]
    seq, prev = -1, ""
    if how in ("evicted", "reclaimed"):
        prev = commit_by_hand(store, "maint", 0, "", [{"op": "evict", "keys": [keys[1]], "reason": "x"}])
        seq = 0
    if how == "reclaimed":
        prev = commit_by_hand(store, "maint", 1, prev, [{"op": "gc", "paths": [paths[keys[1]]]}])
        seq = 1
    commit_by_hand(store, "maint", seq + 1, prev, [{"op": "replace", "in": inputs, "out": [out]}])
    words = {"left out": "leaves out a live row", "not theirs": "none of its inputs holds",
             "evicted": "was evicted", "reclaimed": "was reclaimed"}[how]
    problems = verify(store, "fast").problems
    assert any(words in problem.what for problem in problems), problems
    assert {problem.path for problem in problems} == {f"log/maint/{seq + 1:012d}.json"}


def forge(store: ReplayStore, table: object, name: str) -> None:
    """Commit a table by hand, in a stream of its own."""
    data, op = encode(table)  # pyright: ignore[reportArgumentType]
    store.storage.create(f"data/{name}.parquet", data)
    commit_by_hand(store, name, 0, "", [{**op, "path": f"data/{name}.parquet"}])


def test_two_contents_of_one_key_are_found(damaged: ReplayStore) -> None:
    forge(damaged, to_rows([make_episode(9, episode_id="e0", size=24)]), "other")
    (problem,) = verify(damaged, "fast").problems
    assert "two whole rows of unequal content" in problem.what
    assert problem.key == "e0/0/0"
    evict(damaged, [Key("e0", 0, 0)], reason="conflict")
    assert verify(damaged, "full").ok


def test_rows_of_other_software_that_break_rules_are_found(damaged: ReplayStore) -> None:
    fork = make_branch(np.random.default_rng(1), size=24)
    child = make_branch(np.random.default_rng(2), size=24, branch_id=1, parent_branch_id=0,
                        fork_at=6, fork_reason="compaction")
    forge(damaged, to_rows([make_episode(9, episode_id="bad-fork", branches=(fork, child))]), "a")
    good = to_rows([make_episode(10, episode_id="bad-count", size=24)])
    at = good.schema.get_field_index("n_trainable")
    forge(damaged, good.set_column(at, good.schema.field(at), pa.array([3], pa.int32())), "b")
    assert verify(damaged, "full").ok
    problems = {problem.path: problem.what for problem in verify(damaged, "deep").problems}
    assert "differs from its parent before fork_at=6" in problems["data/a.parquet"]
    assert "recorded as (0, 0, 24, 3)" in problems["data/b.parquet"]


def test_late_values_for_other_content_are_found(damaged: ReplayStore) -> None:
    view = damaged.snapshot()
    data = (damaged.root / next(iter(damaged.fold().overlays["reward"]))["path"]).read_bytes()
    table = pq.read_table(pa.BufferReader(data))
    at = table.schema.get_field_index("target_sha256")
    table = table.set_column(at, table.schema.field(at), pa.array([b"\0" * 32], pa.binary(32)))
    path = damaged.root / "overlay" / "reward" / "x.parquet"
    pq.write_table(table, path)
    data = path.read_bytes()
    commit_by_hand(damaged, "w", 0, "", [{"op": "overlay", "kind": "reward", "path": "overlay/reward/x.parquet",
                                          "bytes": len(data), "rows": 1, "sha256": hashlib.sha256(data).hexdigest()}])
    assert len(view) == 5
    assert any("a late value is for a branch that has content" in p.what for p in verify(damaged, "deep").problems)


def test_a_damaged_footer_is_not_parsed(damaged: ReplayStore) -> None:
    """It may hold text that is none, or lengths that fill the memory."""
    path = file_of(damaged, "e7")
    data = path.read_bytes()
    footer = int.from_bytes(data[-8:-4], "little") + 8
    for at in range(len(data) - footer, len(data), footer // 20):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x81]) + data[at + 1:])
        assert {problem.key for problem in verify(damaged).problems} == {None, "e7/0/0"}
    verify(damaged, quarantine=True)
    assert len(ReplayStore.open(damaged.root).snapshot()) == 4


# -------------------------------------------------------------------------------------------------- quarantine


def test_quarantine_keeps_what_is_whole(tmp_path: Path) -> None:
    """One flipped byte in a page of one of three row groups: the rows of that group are lost, the others are not."""
    store = ReplayStore.open(tmp_path / "s")
    episodes = [make_episode(i, episode_id=f"e{i}", size=80_000, group_id=f"g{i}", group_size=1) for i in range(3)]
    store.append(episodes)
    before, path = rows_of(store), file_of(store, "e0")
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[column.dictionary_page_offset + column.total_compressed_size - 2] ^= 8
    path.write_bytes(data)
    report = verify(ReplayStore.open(store.root), quarantine=True)
    assert {problem.key for problem in report.problems} == {None, "e1/0/0"}
    assert report.quarantined == (str(path.relative_to(store.root)),)
    assert (report.saved, report.lost) == (2, 1)
    assert (store.root / "quarantine" / report.quarantined[0]).exists()
    fresh = ReplayStore.open(store.root)
    assert rows_of(fresh) == {key: value for key, value in before.items() if key.episode_id != "e1"}
    assert verify(fresh, "full").ok
    data[column.dictionary_page_offset + column.total_compressed_size - 2] ^= 8
    path.write_bytes(data)  # restored from a backup
    unevict(fresh, [Key("e1", 0, 0)])
    assert rows_of(ReplayStore.open(store.root)) == before
    assert verify(fresh, "full").ok


def test_quarantine_gives_up_what_is_missing(damaged: ReplayStore) -> None:
    file_of(damaged, "e7").unlink()
    next(damaged.root.glob("overlay/reward/*")).write_bytes(b"damaged")
    for path in damaged.root.glob("snap/*-late.parquet"):  # which know what the overlay said
        path.unlink()
    with pytest.warns(RuntimeWarning, match="late values"), pytest.raises(CorruptionError, match="overlay"):
        ReplayStore.open(damaged.root).snapshot()
    report = verify(damaged, quarantine=True)
    assert len(report.quarantined) == 2
    store = ReplayStore.open(damaged.root)
    assert live(store.root) == {Key(f"e{i}", 0, 0) for i in range(4)}
    assert verify(store, "full").ok
    assert store.fold().evicted[Key("e7", 0, 0)].reason.startswith("quarantine: ")


def test_quarantine_never_moves_rows_into_a_file_that_gc_named(tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    store = ReplayStore.open(tmp_path / "s")
    store.append([make_episode(i, episode_id=f"e{i}", size=80_000, group_id="", group_size=1) for i in range(2)])
    before, path = rows_of(store), file_of(store, "e0")
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[column.dictionary_page_offset + column.total_compressed_size - 2] ^= 8
    path.write_bytes(data)
    save = quarantine._save  # pyright: ignore[reportPrivateUsage]

    def then_gc(storage: Storage, *rest: Any) -> Any:
        saved = save(storage, *rest)
        assert saved is not None
        age(store.root, "data/compact/*")
        assert saved["path"] in gc(ReplayStore.open(store.root)).named
        return saved

    monkeypatch.setattr(quarantine, "_save", then_gc)
    with pytest.raises(StoreError, match="reclaimed while it went into quarantine"):
        verify(ReplayStore.open(store.root), quarantine=True)
    monkeypatch.undo()
    assert verify(ReplayStore.open(store.root), quarantine=True).quarantined
    age(store.root, "log/maint/*")
    gc(store)
    assert rows_of(ReplayStore.open(store.root)) == {key: row for key, row in before.items() if key.episode_id == "e0"}


def test_quarantine_leaves_a_damaged_log_alone(damaged: ReplayStore) -> None:
    next(damaged.root.glob("log/archive/*")).unlink()
    with pytest.raises(CorruptionError, match="nothing was moved"):
        verify(damaged, quarantine=True)


# --------------------------------------------------------------------------------------------------- bit flips


@pytest.mark.slow
def test_no_flipped_bit_is_silent(tmp_path: Path) -> None:
    counts = sweep(build(tmp_path / "s"), flips=8 * len(CLASSES), seed=1)
    assert set(counts) == set(CLASSES)
    for name, count in counts.items():
        assert count.flips == 8, name
        assert count.found == count.flips, f"verify missed flips in {name}"
        assert count.silent == 0, f"a learner read other bytes than were written: {name}"
