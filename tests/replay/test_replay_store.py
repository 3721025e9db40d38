import errno
import json
import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import independent_reader
import numpy as np
import pyarrow.parquet as pq
import pytest
from replay_factories import TOKENIZER, make_branch, make_episode, same_branch, same_episode

from agentsdpo.errors import CorruptionError, RowError, StoreError, TokenizerMismatch, TrainForbidden
from agentsdpo.replay import Key, ReplayStore, files, fold, verify
from agentsdpo.replay.canonical import canonical_json
from agentsdpo.replay.log import make_entry
from agentsdpo.replay.overlay import Slot
from agentsdpo.replay.rows import to_rows
from agentsdpo.replay.segment import GROUP_TOKENS, encode
from agentsdpo.replay.spool import Spool
from agentsdpo.types import Hint

LATE = Hint(text="late", source="user", author="me")


def segments(store: ReplayStore) -> list[Path]:
    return sorted(store.root.glob("data/*/*.parquet"))


def entries(store: ReplayStore) -> list[Path]:
    return sorted(store.root.glob("log/*/*.json"))


def test_append_read_and_reopen(store: ReplayStore) -> None:
    first, second = make_episode(1, version=[3, 5]), make_episode(2)
    store.append([first])
    before = store.snapshot()
    store.append([second])
    assert (len(before), len(store), len(ReplayStore.open(store.root, create=False))) == (1, 2, 2)
    assert before.id != store.snapshot().id == ReplayStore.open(store.root).snapshot().id
    row = store.snapshot().read([Key(first.episode_id, 0, 0)])[0]
    assert same_branch(row.branch, first.branches[0])
    assert (row.hint, row.grade, row.reward, row.policy_versions) == (first.hint, first.grade, 0.5, (3, 5))
    assert (row.task_id, row.tokenizer_sha256, row.train_allowed) == ("task-1", TOKENIZER, True)
    assert not row.branch.token_ids.flags.writeable
    assert same_episode(ReplayStore.open(store.root).episode(second.episode_id), second)
    with pytest.raises(StoreError, match="not part of this snapshot"):
        before.read([Key(second.episode_id, 0, 0)])


def test_snapshot_of_a_position_is_the_same_after_appends(store: ReplayStore) -> None:
    store.append([make_episode(1)])
    old = store.snapshot()
    vector = json.loads(json.dumps(old.vector))
    store.append([make_episode(2)])
    again = ReplayStore.open(store.root).snapshot(at=vector)
    assert (again.id, again.keys()) == (old.id, old.keys())
    writer = next(iter(vector))
    with pytest.raises(StoreError, match="the log was changed"):
        store.snapshot(at={writer: [1, "0" * 64]})


def test_many_branches_split_into_row_groups(store: ReplayStore) -> None:
    rng = np.random.default_rng(0)
    episodes = [make_episode(i, branches=tuple(make_branch(rng, size=GROUP_TOKENS // 2, branch_id=b) for b in range(3)))
                for i in range(2)]
    store.append(episodes)
    assert pq.ParquetFile(segments(store)[0]).num_row_groups == 3
    assert [row.key.branch_id for row in store.snapshot().read(store.snapshot().keys())] == [0, 1, 2, 0, 1, 2]
    assert all(same_episode(store.episode(e.episode_id), e) for e in episodes)
    assert store.to_arrow()["episode_id"].to_pylist() == [key.episode_id for key in store.snapshot().keys()]  # noqa: SIM118


def test_token_columns_alone_are_those_of_the_rows(store: ReplayStore) -> None:
    rng = np.random.default_rng(0)
    for i in range(4):
        store.append([make_episode(i, branches=tuple(make_branch(rng, size=GROUP_TOKENS // 2, branch_id=b)
                                                     for b in range(2)))])
    view = store.snapshot()
    keys = view.keys()[::-1] + view.keys()[:1]
    for row, tokens in zip(view.read(keys), view.tokens(keys), strict=True):
        assert tokens.key == row.key
        for name in ("token_ids", "token_kind", "logprobs", "kept_ids", "kept_counts"):
            mine, theirs = getattr(tokens, name), getattr(row.branch, name)
            assert (mine is None) == (theirs is None)
            assert mine is None or mine.tobytes() == theirs.tobytes()
    assert view.tokens([]) == []
    with pytest.raises(StoreError, match="not part of this snapshot"):
        view.tokens([Key("nobody", 0, 0)])


def test_scalars_are_in_key_order_without_arrays(store: ReplayStore) -> None:
    store.append([make_episode(i, version=i) for i in range(5)])
    table = store.snapshot().scalars()
    assert table["episode_id"].to_pylist() == [key.episode_id for key in store.snapshot().keys()]  # noqa: SIM118
    assert "token_ids" not in table.schema.names
    assert sorted(table["policy_version_min"].to_pylist()) == [0, 1, 2, 3, 4]
    assert len(ReplayStore.open(store.root / "empty").snapshot().scalars()) == 0


def test_attempts_are_kept_apart(store: ReplayStore) -> None:
    store.append([make_episode(1, episode_id="e"), make_episode(2, episode_id="e", attempt=1)])
    assert len(store) == 2
    assert store.episode("e").task_id == "task-2"
    assert store.episode("e", 0).task_id == "task-1"
    with pytest.raises(StoreError, match="no attempt 5"):
        store.episode("e", 5)


# ---------------------------------------------------------------------------------------------------- refusals


def test_evaluation_only_episodes_are_refused_whole(store: ReplayStore) -> None:
    with pytest.raises(TrainForbidden, match="train_allowed=False"):
        store.append([make_episode(1), make_episode(2, train_allowed=False)])
    assert len(store) == 0
    assert not segments(store)


def test_reused_ids_are_refused_and_repeats_are_harmless(store: ReplayStore) -> None:
    episode = make_episode(1, episode_id="e")
    store.append([episode])
    store.append([episode])
    assert len(store) == 1
    with pytest.raises(RowError, match="already stored with other content"):
        ReplayStore.open(store.root).append([make_episode(2, episode_id="e")])
    with pytest.raises(RowError, match="twice"):
        store.append([make_episode(3, episode_id="f"), make_episode(3, episode_id="f")])
    with pytest.raises(RowError, match="branch ids \\[\\]"):
        store.append([episode.model_copy(update={"branches": ()})])


def test_policies_guard_tokenizer_and_vocabulary(store: ReplayStore) -> None:
    store.record_policy(0, {"weights_id": "w", "tokenizer_sha256": TOKENIZER, "vocab_size": 1000})
    store.record_policy(0, {"weights_id": "w", "note": "same"})
    store.append([make_episode(1)])
    manifest = ReplayStore.open(store.root).policy(0)
    assert manifest == {"weights_id": "w", "tokenizer_sha256": TOKENIZER, "vocab_size": 1000}
    assert store.policy(9) is None
    with pytest.raises(StoreError, match="recorded with weights_id 'w', not 'v'"):
        store.record_policy(0, {"weights_id": "v"})
    with pytest.raises(StoreError, match="version -1 is negative"):
        store.record_policy(-1, {"weights_id": "w"})
    with pytest.raises(TokenizerMismatch, match="policy 0 has 'aaa"):
        store.append([make_episode(2, tokenizer_sha256="c" * 64)])
    store.record_policy(1, {"vocab_size": 10})
    with pytest.raises(RowError, match="the vocabulary has 10 ids"):
        store.append([make_episode(2, version=1)])


def test_newer_formats_and_other_folders_are_refused(tmp_path: Path, store: ReplayStore) -> None:
    about = json.loads((store.root / "STORE.json").read_text())
    assert about["format"] == "agentsdpo-replay/1"
    assert "duckdb" in (store.root / "FORMAT.md").read_text().lower()
    for change in ({"format": "agentsdpo-replay/2"}, {"min_reader": 2}, {"features": ["x"]}):
        (store.root / "STORE.json").write_text(json.dumps(about | change))
        with pytest.raises(StoreError, match="install a newer agentsdpo"):
            ReplayStore.open(store.root)
    (store.root / "STORE.json").write_text(json.dumps(about | {"min_writer": 2}))
    newer = ReplayStore.open(store.root)
    assert len(newer) == 0
    with pytest.raises(StoreError, match="needs writer 2"):
        newer.append([make_episode(1)])
    (store.root / "STORE.json").write_text("{}")
    with pytest.raises(StoreError, match="damaged"):
        ReplayStore.open(store.root)
    with pytest.raises(StoreError, match="not a replay store"):
        ReplayStore.open(tmp_path / "nothing", create=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="no STORE.json"):
        ReplayStore.open(tmp_path / "full")


def test_operations_of_a_newer_release_are_refused(store: ReplayStore) -> None:
    store.append([make_episode(1)])
    folder = store.root / "log" / "maint"
    folder.mkdir()
    (folder / f"{0:012d}.json").write_bytes(canonical_json(make_entry("maint", 0, "", [{"op": "shred", "keys": []}])))
    with pytest.raises(StoreError, match="operation 'shred'; install a newer"):
        ReplayStore.open(store.root).snapshot()


@contextmanager
def unprivileged(root: Path) -> Iterator[None]:
    """Take write permission away; root drops to another user as well, since permissions do not bind it."""
    modes = {path: path.stat().st_mode for path in [root, *root.rglob("*")] if path.is_dir()}
    for path in modes:
        path.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        for path, mode in modes.items():
            path.chmod(mode)


def test_a_read_only_store_can_be_read() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        store = ReplayStore.open(Path(folder) / "store")
        store.append([make_episode(1)])
        with unprivileged(store.root):
            again = ReplayStore.open(store.root)
            assert len(again.snapshot().read(again.snapshot().keys())) == 1
            with pytest.raises(StoreError, match="cannot be written.*write permission"):
                again.append([make_episode(2)])
        assert len(store) == 1


def test_no_space_is_said_plainly_and_leaves_nothing(store: ReplayStore) -> None:
    store.append([make_episode(1)])
    before = sorted(p for p in store.root.rglob("*") if p.is_file())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(StoreError, match="no room for .* bytes .*nothing of this write is visible; free space"):
            store.append([make_episode(i, size=5000) for i in range(2, 6)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p for p in store.root.rglob("*") if p.is_file()) == before
    store.append([make_episode(2)])
    assert len(ReplayStore.open(store.root)) == 2


@pytest.mark.parametrize("visible", [False, True])
def test_a_failed_commit_leaves_no_orphan_unless_it_shows(store: ReplayStore, monkeypatch: pytest.MonkeyPatch,
                                                          visible: bool) -> None:
    """The entry cannot be linked, or it was linked and only the last fsync failed."""
    store.append([make_episode(1)])

    def fail(*args: object) -> None:
        if "/log/" in str(args[-1]):
            raise OSError(errno.EIO, "broken")
        if not visible:
            link(*args)  # pyright: ignore[reportArgumentType]

    link = os.link
    monkeypatch.setattr(*((files, "sync_folder") if visible else (os, "link")), fail)
    with pytest.raises(StoreError, match="nothing was acknowledged"):
        store.append([make_episode(2)])
    monkeypatch.undo()
    assert len(segments(store)) == len(ReplayStore.open(store.root)) == 1 + visible
    store.append([make_episode(3)])
    view = ReplayStore.open(store.root).snapshot()
    assert len(view.read(view.keys())) == 2 + visible


# -------------------------------------------------------------------------------------------- log and overlays


def test_a_closed_stream_is_left_for_a_new_one(store: ReplayStore) -> None:
    store.append([make_episode(1)])
    store.close()
    store.append([make_episode(2)])
    assert len({path.parent for path in entries(store)}) == 2
    assert len(ReplayStore.open(store.root)) == 2


def test_a_fenced_writer_moves_to_a_new_stream(store: ReplayStore) -> None:
    store.append([make_episode(1)])
    last = entries(store)[-1]
    entry = json.loads(last.read_bytes())
    closing = make_entry(entry["writer"], 2, entry["sha"], [{"op": "close"}])
    (last.parent / f"{2:012d}.json").write_bytes(canonical_json(closing))
    store.append([make_episode(2)])
    assert len(ReplayStore.open(store.root)) == 2
    assert len({path.parent for path in entries(store)}) == 2


def forge(store: ReplayStore, episode_rows: object, writer: str) -> None:
    """Commit a table by hand, in a stream of its own."""
    data, op = encode(episode_rows)  # pyright: ignore[reportArgumentType]
    path = store.root / "data" / f"{writer}.parquet"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    folder = store.root / "log" / writer
    folder.mkdir(parents=True)
    entry = make_entry(writer, 0, "", [{**op, "path": f"data/{writer}.parquet"}])
    (folder / f"{0:012d}.json").write_bytes(canonical_json(entry))


def test_the_best_of_two_rows_wins_and_two_whole_ones_conflict(store: ReplayStore) -> None:
    whole, other = (to_rows([make_episode(i, episode_id="e", hint=False)]) for i in (1, 2))
    status = whole.schema.get_field_index("status")
    salvaged = other.set_column(status, "status", [["salvaged"]])
    forge(store, salvaged, "b")
    forge(store, whole, "a")
    view = ReplayStore.open(store.root).snapshot()
    assert view.read(view.keys())[0].task_id == "task-1"
    forge(store, other, "c")
    view = ReplayStore.open(store.root).snapshot()
    assert (len(view), view.conflicts) == (0, {Key("e", 0, 0)})
    with pytest.raises(StoreError, match="is in conflict"):
        view.read([Key("e", 0, 0)])


def test_a_store_stays_where_it_is_when_the_process_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    store = ReplayStore.open("runs/store")
    spool, key = Spool(store, folder="spool"), Key("e", 0, 0)
    store.append([make_episode(1, episode_id="d")])
    monkeypatch.chdir(tmp_path / "elsewhere")
    journal = spool.begin({"episode_id": "e"})
    assert journal is not None
    assert journal.path.is_relative_to(tmp_path / "spool")
    store.append([make_episode(2, episode_id="e")])
    assert len(store) == 2
    assert ReplayStore.open(tmp_path / "runs/store", create=False).snapshot().read([key])
    assert not list((tmp_path / "elsewhere").iterdir())
    assert store.storage.uri == "runs/store", "messages name it as it was named"


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("first", ["whole", "salvaged"])
@pytest.mark.parametrize("numbers", [(0,), (0, 1), (3,)])
def test_an_episode_is_never_half_of_one_play_and_half_of_another(store: ReplayStore, numbers: tuple[int, ...],
                                                                  first: str, folded: bool) -> None:
    """A crash left three branches; played anew under the same id, the episode had others."""
    rng, other = np.random.default_rng(0), ReplayStore.open(store.root)
    cut = make_episode(1, episode_id="e", branches=tuple(make_branch(rng, size=8, branch_id=i) for i in range(3)))
    whole = make_episode(2, episode_id="e", branches=tuple(make_branch(rng, size=12, branch_id=i) for i in numbers))
    store.append([make_episode(3, episode_id="another")])
    for name in sorted(("salvaged", "whole"), key=first.__ne__):
        try:
            (store if name == "whole" else other).append([whole if name == "whole" else cut],
                                                         salvaged=name == "salvaged")
        except RowError:
            assert first == "whole", "a crash leaves nothing of what is whole"
        if folded:
            fold(store)
    want = [Key("another", 0, 0), *(Key("e", i, 0) for i in numbers)]
    for reader in (store, other, ReplayStore.open(store.root)):
        assert reader.snapshot().keys() == want
        assert same_episode(reader.episode("e"), whole)
    assert verify(store).problems == ()
    assert sorted(independent_reader.read(store.root)) == want


def test_late_hints_replace_the_stamped_one(store: ReplayStore) -> None:
    store.append([make_episode(1), make_episode(2, hint=False)])
    stamped, bare = sorted(store.snapshot().keys(), key=lambda k: store.episode(k.episode_id).task_id)
    store.add_hints({bare: LATE})
    old = store.snapshot()
    store.add_hints({bare: LATE.model_copy(update={"text": "later"})})
    assert [row.hint.text if row.hint else None for row in old.read([stamped, bare])] == ["write the file", "late"]
    again = ReplayStore.open(store.root)
    assert [row.hint.text if row.hint else None for row in again.snapshot().read([stamped, bare])] == [
        "write the file", "later"]
    assert again.episode(bare.episode_id).hint == LATE.model_copy(update={"text": "later"})
    assert len(again.snapshot(at=old.vector)) == 2
    assert again.snapshot(at=old.vector).read([bare])[0].hint == LATE
    with pytest.raises(StoreError, match="not part of this snapshot"):
        store.add_hints({Key("nobody", 0, 0): LATE})


def test_a_hint_for_other_content_is_an_error(store: ReplayStore) -> None:
    store.append([make_episode(1)])
    key = store.snapshot().keys()[0]
    store.add_hints({key: LATE})
    view = store.snapshot()
    slot = Slot("hint", key)
    view.late = replace(view.late, latest={slot: view.late.latest[slot]._replace(target_sha256="0" * 64)})
    with pytest.raises(CorruptionError, match="targets content 000000000000"):
        view.read([key])
