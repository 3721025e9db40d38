"""Compaction: the same rows in fewer files, whoever stops, dies or comes back in the middle of it."""

import hashlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from replay_factories import make_branch, make_episode, same_episode
from test_replay_maintain import age, filled, live, same

from agentsdpo.errors import CorruptionError, StoreError
from agentsdpo.replay import Key, ReplayStore, compact, evict, fold, gc, unevict, verify
from agentsdpo.replay.folding import Fold
from agentsdpo.replay.formats.redact import dropped
from agentsdpo.replay.log import WriterFenced
from agentsdpo.replay.schema import SCHEMA
from agentsdpo.replay.segment import GROUP_TOKENS
from agentsdpo.replay.upkeep.compaction import StoreLocked
from agentsdpo.replay.upkeep.maintain import commit

CHILD = Path(__file__).parent / "replay_maintainer.py"


def rows_of(store: ReplayStore) -> dict[Key, bytes]:
    """Everything a learner gets, as bytes."""
    view = store.snapshot()
    return {row.key: row.branch.token_ids.tobytes() + row.branch.logprobs.tobytes() + repr(row.branch.calls).encode()
            for row in view.read(view.keys())}


def test_the_same_rows_in_fewer_files(tmp_path: Path) -> None:
    store = ReplayStore.open(tmp_path / "s")
    rng = np.random.default_rng(0)
    episodes = [make_episode(i, episode_id=f"e{i:02}", version=int(rng.integers(0, 4)), size=40, group_size=1)
                for i in range(12)]
    fork = make_branch(np.random.default_rng(1), size=40)
    episodes.append(make_episode(50, episode_id="forked", branches=(fork, fork.model_copy(update={"branch_id": 1}))))
    for episode in episodes:
        store.append([episode])
    store.close()
    old, before = store.snapshot(), rows_of(store)
    dry = compact(store, dry_run=True)
    assert (len(dry.inputs), dry.outputs, dry.rows, dry.archived) == (13, (), 14, 1)
    report = compact(store)
    assert (report.inputs, len(report.outputs), report.rows, report.archived) == (dry.inputs, 1, 14, 1)
    assert report.bytes_after < report.bytes_before
    assert rows_of(store) == before == rows_of(ReplayStore.open(store.root))
    order = [(row["policy_version_min"], row["group_id"], row["episode_id"], row["branch_id"])
             for row in pq.read_table(store.root / report.outputs[0]).to_pylist()]
    assert order == sorted(order)
    assert compact(store).inputs == (), "nothing is left to do"
    gc(store)
    age(store.root, "log/maint/*", "log/archive/*", "snap/*.parquet")
    assert set(report.inputs) <= set(gc(store).deleted)
    assert len(list(store.root.glob("data/*/*.parquet"))) == 1
    assert len([p for p in store.root.glob("log/*/*.json") if p.parent.name != "maint"]) == 0
    assert rows_of(ReplayStore.open(store.root)) == before
    again = ReplayStore.open(store.root)
    old_view = again.snapshot(at=old.vector)
    assert len(old_view.read(old_view.keys())) == 14, "an older position resolves through archive and replace"
    assert len(old.to_arrow()) == len(old_view.scalars()) == 14
    assert all(same_episode(again.episode(e.episode_id), e) for e in episodes)
    fresh = Fold(store.storage, from_snapshot=False)
    fresh.refresh()
    assert same(fresh, again.fold())


def test_row_groups_have_a_floor_and_outputs_a_limit(tmp_path: Path) -> None:
    store = ReplayStore.open(tmp_path / "s")
    for i in range(8):
        store.append([make_episode(i, size=GROUP_TOKENS // 2 + 8, turns=2, group_size=1)])
    before = rows_of(store)
    report = compact(store, max_row_groups=2)
    files = [pq.ParquetFile(store.root / path).metadata for path in report.outputs]
    assert [file.num_row_groups for file in files] == [2, 2]
    assert [file.row_group(i).num_rows for file in files for i in range(file.num_row_groups)] == [2, 2, 2, 2]
    assert rows_of(store) == before
    small = ReplayStore.open(tmp_path / "t")
    for i in range(4):
        small.append([make_episode(i, size=GROUP_TOKENS, group_size=1)])
    assert len(compact(small, max_row_groups=1).outputs) == 4
    other = ReplayStore.open(tmp_path / "u")
    for i in range(4):
        other.append([make_episode(i, size=GROUP_TOKENS, group_size=1)])
    assert len(compact(other, target_bytes=1).outputs) == 4


def test_evicted_rows_stay_behind_and_can_come_back(tmp_path: Path) -> None:
    store, keys = filled(tmp_path / "s", 6)
    before = rows_of(store)
    evict(store, keys[:2], reason="x")
    assert compact(store).rows == 4
    unevict(store, keys[:1])
    assert rows_of(store) == {key: before[key] for key in before if key != keys[1]}
    evict(store, keys[3:5], reason="y")
    report = compact(store)
    assert len(report.inputs) == 2, "the file of the one shown again, and the one with evicted rows"
    gc(store)
    age(store.root, "log/maint/*")
    gc(store)
    assert rows_of(ReplayStore.open(store.root)) == {key: before[key] for key in (keys[0], keys[2], keys[5])}


@pytest.mark.parametrize("tokens", [True, False])
def test_a_purge_leaves_nothing_of_what_was_removed(tmp_path: Path, tokens: bool) -> None:
    """Neither in a large file of which it is a small part, nor where it has no tokens to be counted by."""
    store, secret = ReplayStore.open(tmp_path / "s"), "hunter-2-" * 4
    for i in range(12):
        store.append([make_episode(i, episode_id=f"e{i:02}", size=40, group_size=1)])
    leaky = make_episode(12, episode_id="leaky", size=40, group_size=1, task_id=secret)
    if not tokens:
        leaky = leaky.model_copy(update={"branches": tuple(map(dropped, leaky.branches))})
    store.append([leaky])
    compact(store, target_bytes=1 << 13)
    evict(store, [Key("leaky", 0, 0)], reason="it held a password")
    assert compact(store, target_bytes=1 << 13).inputs == (), "it is a small part of a large file"
    before = rows_of(store)
    assert compact(store, target_bytes=1 << 13, purge=True).rows == 12
    assert compact(store, target_bytes=1 << 13, purge=True).inputs == ()
    gc(store)
    age(store.root, "log/maint/*", "snap/*.parquet")
    gc(store)
    assert rows_of(ReplayStore.open(store.root)) == before
    assert not [path for path in store.root.glob("data/**/*.parquet") if secret in str(pq.read_table(path)["task_id"])]
    assert verify(store).problems == ()


def test_a_salvaged_row_that_was_moved_gives_way_to_a_whole_one(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "s", 3)
    whole = make_episode(7, episode_id="x", size=48, group_size=1)
    store.append([make_episode(8, episode_id="x", size=24, group_size=1)], salvaged=True)
    compact(store)
    store.append([whole])
    assert same_episode(store.episode("x"), whole)
    fold(store)
    again = ReplayStore.open(store.root)
    assert same_episode(again.episode("x"), whole)
    compact(again)
    assert same_episode(ReplayStore.open(store.root).episode("x"), whole)


def test_damaged_inputs_stop_it(tmp_path: Path) -> None:
    store, keys = filled(tmp_path / "s", 3)
    path = store.root / store.snapshot().rows[keys[1]].path
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    log = sorted(store.root.glob("data/**/*"))
    with pytest.raises(CorruptionError, match=f"{path.name} is not the file that was committed"):
        compact(store)
    assert sorted(store.root.glob("data/**/*")) == log
    data[100] ^= 1
    path.write_bytes(data)
    assert compact(store).rows == 3, "a failed run does not stand in the way of the next"


def test_files_of_a_newer_release_are_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, keys = filled(tmp_path / "s", 3)
    known = SCHEMA.remove(SCHEMA.get_field_index("quantisation"))
    monkeypatch.setattr("agentsdpo.replay.upkeep.compaction.SCHEMA", known)
    report = compact(store)
    assert (report.inputs, len(report.skipped)) == ((), 3)
    assert live(store.root) == set(keys)


def test_what_changed_meanwhile_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, keys = filled(tmp_path / "s")
    other = ReplayStore.open(store.root)
    create = store.storage.create

    def interrupted(path: str, data: bytes) -> None:
        create(path, data)
        if path.startswith("data/compact/"):
            evict(other, keys[:1], reason="meanwhile")

    monkeypatch.setattr(store.storage, "create", interrupted)
    with pytest.raises(StoreError, match="evicted, shown again or moved while they were compacted"):
        compact(store)
    monkeypatch.undo()
    assert live(store.root) == set(keys[1:])
    assert compact(store).rows == 3
    assert live(store.root) == set(keys[1:])


def test_one_compaction_at_a_time(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "s")
    commit(store, lambda state: [{"op": "takeover", "epoch": state.epoch + 1}])
    with pytest.raises(StoreLocked, match="another compaction .* is under way"):
        compact(store)
    age(store.root, "log/maint/*")
    assert compact(store).rows == 4
    assert store.fold().epoch == 2


@pytest.mark.parametrize("left", [2, None])
def test_readers_go_on_while_archived_streams_vanish(tmp_path: Path, left: int | None) -> None:
    """The files of a stream, all or all but one, are removed between a reader's looks at maintenance and at them."""
    store, keys = filled(tmp_path / "s")
    store.close()
    reader = ReplayStore.open(store.root)
    state = Fold(store.storage, from_snapshot=False)
    names = state.storage.folders

    class Late:
        """The storage, but everything is archived and removed right after the streams were listed."""

        def __getattr__(self, name: str) -> object:
            return getattr(store.storage, name)

        def folders(self, prefix: str) -> list[str]:
            found = names(prefix)
            if prefix == "log" and not list(store.root.glob("log/archive/*")):
                compact(store)
                for path in store.root.glob("log/*/*.json"):
                    if path.parent.name != "maint" and int(path.stem) != left:
                        path.unlink()
            return found

    state.storage = Late()  # pyright: ignore[reportAttributeAccessIssue]
    state.refresh()
    assert set(state.live()) == set(keys) == set(reader.snapshot().rows)


# --------------------------------------------------------------------------------------------------- processes


def start(*args: object) -> subprocess.Popen[str]:
    """A process that says ``ready`` once it has imported everything, and begins when told to."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen([sys.executable, str(CHILD), *map(str, args)], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True, env=env)


def say(child: subprocess.Popen[str], word: str) -> None:
    """A line to the child."""
    assert child.stdin is not None
    child.stdin.write(f"{word}\n")
    child.stdin.flush()


def hear(child: subprocess.Popen[str]) -> str:
    """A line from the child."""
    assert child.stdout is not None
    return child.stdout.readline().strip()


def end(child: subprocess.Popen[str]) -> int:
    """Wait for the child to be done."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.close()
    code = child.wait(120)
    child.stdout.close()
    return code


@pytest.mark.parametrize("left", [False, True])
def test_an_older_folded_snapshot_finds_what_was_archived_since(tmp_path: Path, left: bool) -> None:
    store, keys = filled(tmp_path / "s", 3)
    fold(store)
    old = (store.root / "snap/LATEST.json").read_bytes()
    store.close()
    compact(store)  # killed before its last act, or beside a slower fold: the older snapshot stays the latest
    (store.root / "snap/LATEST.json").write_bytes(old)
    gc(store)
    age(store.root, "log/maint/*", "log/archive/*")
    gc(store)
    assert {path.parent.name for path in store.root.glob("log/*/*.json")} == {"maint"}, "the stream is in the archive"
    if left:
        archive = next(store.root.glob("log/archive/*"))
        archive.write_bytes(archive.read_bytes()[:-1])
        with pytest.raises(CorruptionError, match="archive"):
            ReplayStore.open(store.root).snapshot()
    else:
        assert live(store.root) == set(keys)
        assert verify(ReplayStore.open(store.root)).ok


def test_a_zombie_compactor_finds_its_slot_taken(tmp_path: Path) -> None:
    store, keys = filled(tmp_path / "s", 6)
    before = rows_of(store)
    zombie = start("compact", store.root)
    assert hear(zombie) == "ready"
    say(zombie, "go")
    assert hear(zombie) == "written"  # its outputs are there, its entry is not
    zombie.send_signal(signal.SIGSTOP)
    with pytest.raises(StoreLocked):
        compact(store)
    assert compact(store, takeover_after_s=0).rows == 6
    store.append([make_episode(20, episode_id="late", size=24)])
    gc(store, grace_s=0)
    zombie.send_signal(signal.SIGCONT)
    say(zombie, "on")
    assert hear(zombie).startswith("WriterFenced: maintenance of")
    assert end(zombie) == 0
    assert len(list(store.root.glob("data/compact/*"))) == 2
    age(store.root, "log/maint/*", "data/compact/*")
    gc(store)
    age(store.root, "log/maint/*")
    gc(store)
    assert len(list(store.root.glob("data/compact/*"))) == 1, "the orphan is gone"
    after = rows_of(ReplayStore.open(store.root))
    assert {key: after[key] for key in keys} == before
    assert len(after) == 7


def test_a_killed_compactor_leaves_orphans_only(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "s", 5)
    before = rows_of(store)
    child = start("compact", store.root)
    assert hear(child) == "ready"
    say(child, "go")
    assert hear(child) == "written"
    child.kill()
    end(child)
    assert rows_of(ReplayStore.open(store.root)) == before
    assert compact(store, takeover_after_s=0).rows == 5
    assert rows_of(ReplayStore.open(store.root)) == before


@pytest.mark.slow
def test_many_writers_beside_compaction_and_readers(tmp_path: Path) -> None:
    """8 processes append 40 episodes each while one compacts and collects garbage and one reads everything."""
    root, writers, each = tmp_path / "s", 8, 40
    ReplayStore.open(root)
    crew = [start("write", root, writers, each), start("maintain", root), start("read", root)]
    assert {hear(child) for child in crew} == {"ready"}
    for child in crew:
        say(child, "go")
    acked = {hear(crew[0]) for _ in range(writers * each)}
    for child in crew[1:]:
        say(child, "stop")
    said = [hear(child) for child in crew[1:]]
    assert [end(child) for child in crew] == [0] * len(crew)
    assert len(acked) == writers * each
    assert int(said[0]) > 0, "no compaction happened"
    assert said[1].startswith("ok "), said[1]
    store = ReplayStore.open(root)
    compact(store, takeover_after_s=0)
    final = rows_of(ReplayStore.open(root))
    assert {key.episode_id for key in final} == acked
    numbers = {path.parent.name: sorted(int(p.stem) for p in path.parent.glob("*.json"))
               for path in root.glob("log/*/*.json")}
    assert all(seqs == list(range(len(seqs))) for seqs in numbers.values())


def test_two_processes_that_claim_one_writer_id(tmp_path: Path) -> None:
    """The second finds the slot taken, whichever comes first, and goes on under an id of its own."""
    store, _ = filled(tmp_path / "s", 1)
    twin = ReplayStore.open(store.root)
    twin._own_writer()
    theirs, mine = twin._writer, store._writer
    assert theirs is not None
    assert mine is not None
    theirs.writer_id, theirs._seq, theirs._prev = mine.writer_id, mine._seq, mine._prev
    twin.append([make_episode(5, episode_id="twin", size=24)])
    store.append([make_episode(6, episode_id="mine", size=24)])
    assert live(store.root) == {Key("e0", 0, 0), Key("twin", 0, 0), Key("mine", 0, 0)}
    assert store.writer_id != mine.writer_id
    with pytest.raises(WriterFenced, match="is taken"):
        mine.commit([{"op": "close"}])


def test_hashes_of_the_same_order_are_the_same(tmp_path: Path) -> None:
    """Rows appended in any order compact to the same bytes."""
    rng, digests = random.Random(0), set()
    episodes = [make_episode(i, episode_id=f"e{i}", size=24, group_size=1) for i in range(5)]
    for i in range(2):
        store = ReplayStore.open(tmp_path / str(i))
        for episode in rng.sample(episodes, 5):
            store.append([episode])
        report = compact(store)
        table = pq.read_table(store.root / report.outputs[0]).drop_columns("writer_id")
        digests.add(hashlib.sha256(repr(table.to_pylist()).encode()).hexdigest())
    assert len(digests) == 1
