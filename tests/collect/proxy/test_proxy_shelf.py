"""Shelves without a proxy: what dead ones left behind goes to whom it belongs, once."""

import logging
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from agentsdpo.benchmarks.perf.killloop import about, plan
from agentsdpo.collect.proxy import shelf as shelves
from agentsdpo.collect.proxy.feedback import item
from agentsdpo.collect.proxy.shelf import Shelf, make_shelf
from agentsdpo.replay.formats.redact import Redactor
from agentsdpo.replay.spool import set_aside
from agentsdpo.replay.storage import LocalStorage
from agentsdpo.replay.store import ReplayStore
from agentsdpo.replay.upkeep.recover import recover
from agentsdpo.types import Hint


def shelf_at(uri: Path | str, *, spool: Path | str = "", train_allowed: bool = False,
             redactor: Redactor | None = None) -> Shelf:
    return make_shelf(str(uri), redactor, train_allowed=train_allowed, durability="step", spool=str(spool))


def begun(shelf: Shelf, number: int, **more: Any) -> Path:
    """The journal of a conversation whose proxy died."""
    journal = shelf.begin(about(1, number) | {"env_id": "proxy"} | more)
    for growth, messages in plan(1, number)[1]:
        journal.step(growth, messages)
    journal.close()
    return journal.path


def recordings(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("recordings/*.parquet"))


@pytest.mark.parametrize("shared", ["bucket", "setting"])
def test_tenants_recover_nothing_of_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: str) -> None:
    """The journals of all buckets lie in one folder of this machine."""
    root, spool = (f"s3://bucket{tmp_path}", "") if shared == "bucket" else (str(tmp_path), tmp_path / "spool")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(shelves, "storage_for", lambda uri: LocalStorage(Path(uri.removeprefix("s3://bucket"))))
    journals = [begun(shelf_at(f"{root}/{tenant}", spool=spool), i) for i, tenant in enumerate(("ann", "bob"))]
    assert journals[0].parent.parent != journals[1].parent.parent
    assert shelf_at(f"{root}/bob", spool=spool).recover() == 1
    assert [len(recordings(tmp_path / tenant)) for tenant in ("ann", "bob")] == [0, 1]
    assert shelf_at(f"{root}/ann/", spool=spool).recover() == 1
    assert recordings(tmp_path / "ann") == [f"{journals[0].stem}-0000.parquet"]


def test_what_an_earlier_release_left_in_a_local_folder_is_recovered(tmp_path: Path) -> None:
    journal = begun(shelf_at(tmp_path), 0)
    assert journal.parent.parent == tmp_path / "spool" / "recordings"
    assert shelf_at(tmp_path).recover() == 1


def test_what_an_earlier_release_left_beside_others_is_nobodys(tmp_path: Path, caplog: pytest.LogCaptureFixture
                                                               ) -> None:
    caplog.set_level(logging.WARNING, logger="agentsdpo")
    spool = tmp_path / "spool"
    journal = begun(shelf_at(tmp_path / "ann", spool=spool), 0)
    mine = journal.parent.parent.rename(spool / "recordings")
    assert shelf_at(tmp_path / "ann", spool=spool).recover() == 0
    assert f"the journals in {mine} are of an earlier release and do not say of which store" in caplog.text
    mine.rename(journal.parent.parent)
    assert shelf_at(tmp_path / "ann", spool=spool).recover() == 1


SECRET = "sk-" + 40 * "a"


def test_the_stores_own_recovery_leaves_conversations_to_the_proxy(tmp_path: Path) -> None:
    shelf = shelf_at(tmp_path, train_allowed=True)
    said = [item("text", f"Never {SECRET}.")]
    path = begun(shelf, 0, metadata={"feedback": said})
    store = ReplayStore.open(tmp_path, create=False)
    for _ in range(2):
        (found,) = [found for found in recover(store).found if found.path == str(path)]
        assert (found.what, found.detail.partition(": ")[2]) == (
            "left", "start `agentsdpo proxy --train-allowed` on its store")
        assert not store.snapshot().rows
    assert recover(store).changed == 0
    assert shelf_at(tmp_path, train_allowed=True, redactor=Redactor(tokens="mask")).recover() == 1
    episode = store.snapshot().episode(path.stem)
    assert episode.hint is not None
    assert "redacted" in episode.hint.text
    assert SECRET not in episode.model_dump_json(exclude={"branches"})
    assert not path.exists()


def test_a_collectors_episodes_keep_the_hint_they_came_with(tmp_path: Path) -> None:
    shelf = shelf_at(tmp_path, train_allowed=True)
    path = begun(shelf, 0, env_id="desk", hint=Hint(text="A rule.", source="gold", author="env").model_dump())
    assert shelf_at(tmp_path, train_allowed=True).recover() == 0
    hint = ReplayStore.open(tmp_path, create=False).snapshot().episode(path.stem).hint
    assert hint is not None
    assert hint.text == "A rule."


def test_two_proxies_on_one_folder_lose_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="agentsdpo")
    first, second = shelf_at(tmp_path), shelf_at(tmp_path)
    episode = plan(1, 0)[0]
    other = plan(1, 1)[0].model_copy(update={"episode_id": episode.episode_id})
    journal = begun(first, 0)
    first.put([episode])
    second.put([other])
    assert recordings(tmp_path) == [f"{episode.episode_id}-000{attempt}.parquet" for attempt in (0, 1)]
    assert "0000.parquet is of another conversation of that name: give each proxy a --store of its own" in caplog.text
    tables = [pq.read_table(tmp_path / "recordings" / name) for name in recordings(tmp_path)]
    assert [table.column("token_ids").to_pylist() for table in tables] == [
        [one.branches[0].token_ids.tolist()] for one in (episode, other)]
    assert [table.column("attempt").to_pylist() for table in tables] == [[0], [1]]
    assert journal.exists()
    assert shelf_at(tmp_path).recover() == 1, "its proxy was killed before it deleted the journal"
    assert not journal.exists()
    assert len(recordings(tmp_path)) == 2


def test_two_proxies_on_one_store_lose_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As while one takes over from another: both have the conversation open, as the same attempt."""
    caplog.set_level(logging.WARNING, logger="agentsdpo")
    first, second = (shelf_at(tmp_path, train_allowed=True) for _ in range(2))
    episode, other, third = (plan(1, number)[0].model_copy(update={"episode_id": plan(1, 0)[0].episode_id})
                             for number in range(3))
    journal = begun(first, 0)
    first.put([episode])
    assert shelf_at(tmp_path, train_allowed=True).recover() == 1, "its proxy was killed before it deleted the journal"
    assert not journal.exists()
    assert not caplog.text
    second.put([other])
    begun(second, 2, episode_id=episode.episode_id)
    assert shelf_at(tmp_path, train_allowed=True).recover() == 1, "that of a proxy that was killed"
    assert f"attempt 0 of {episode.episode_id} in {tmp_path} is another conversation of that name" in caplog.text
    view = ReplayStore.open(tmp_path, create=False).snapshot()
    for attempt, put in enumerate((episode, other, third)):
        assert view.episode(episode.episode_id, attempt).branches[0].token_ids.tolist() == \
            put.branches[0].token_ids.tolist()
    assert len(view.rows) == 3


@pytest.mark.parametrize("train_allowed", [True, False])
def test_a_journal_that_was_set_aside_stays_there(tmp_path: Path, train_allowed: bool) -> None:
    aside = set_aside(begun(shelf_at(tmp_path, train_allowed=train_allowed), 0))
    assert shelf_at(tmp_path, train_allowed=train_allowed).recover() == 0
    assert aside.exists()
