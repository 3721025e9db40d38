"""Recovery: what dead, stopped and closed writers leave behind, and that nothing acknowledged is among what is lost."""

import errno
import os
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from replay_factories import make_episode, same_episode

from agentsdpo.benchmarks.perf.killloop import Nursery, about, calls_after, kill_loop, plan
from agentsdpo.replay import ReplayConfig, ReplayStore, Sampler
from agentsdpo.replay.ids import Key
from agentsdpo.replay.salvage import salvage
from agentsdpo.replay.spool import Spool
from agentsdpo.replay.upkeep import recover as recovery
from agentsdpo.replay.upkeep.recover import RecoverReport, _Recovery, recover
from agentsdpo.types import Episode


class Elsewhere:
    """A writer on another machine, which has died unless told otherwise."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        with patch.context() as now:
            now.setattr(socket, "gethostname", lambda: "elsewhere")
            self.store = ReplayStore.open(root)
            self.id = self.store.writer_id
        self.spool = Spool(self.store)

    def play(self, number: int, steps: int, **more: Any) -> Path:
        """The journal of an episode cut off after some steps, with its lock let go."""
        journal = self.spool.begin(about(1, number) | more)
        assert journal is not None
        for growth, messages in plan(1, number)[1][:steps]:
            journal.step(growth, messages)
        journal.close()
        return journal.path


@pytest.fixture
def writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    return Elsewhere(tmp_path / "store", monkeypatch)


@pytest.fixture
def store(writer: Elsewhere) -> ReplayStore:
    return ReplayStore.open(writer.store.root, create=False)


def ends(report: RecoverReport) -> dict[str, str]:
    """What became of each thing, by its file name."""
    return {Path(found.path).name: found.what for found in report.found}


def files(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["tenant/7", "../../../7", "x" * 300, "7\0", "..", "sé\n"])
def test_no_id_hides_a_journal_from_recovery(writer: Elsewhere, store: ReplayStore, name: str) -> None:
    path = writer.play(0, 4, episode_id=name)
    assert path.parent.name == writer.id, "and nothing is written outside the spool"
    assert recover(store, close=True).count("salvaged") == 1
    assert store.episode(name).metadata["salvaged"]["steps"] == 4
    assert not path.exists()


def test_a_cut_episode_is_salvaged_and_gives_way_to_a_whole_one(writer: Elsewhere, store: ReplayStore) -> None:
    path = writer.play(0, 4)
    before = files(store.root)
    rehearsal = recover(store, close=True, dry_run=True)
    assert files(store.root) == before
    report = recover(store, close=True)
    assert [found.what for found in report.found] == [found.what for found in rehearsal.found] == ["closed", "salvaged"]
    assert report.found[1].detail == "4 steps, the episode had not ended"
    assert not path.exists()
    assert not path.parent.exists()
    truth, view = plan(1, 0)[0], store.snapshot()
    row = view.rows[Key(truth.episode_id, 0, 0)]
    left = store.episode(truth.episode_id)
    assert (row.status, row.trainable, len(left.branches[0].calls)) == ("salvaged", True, calls_after(4))
    assert left.messages == truth.messages[:4]
    assert left.metadata["salvaged"] == {"steps": 4, "finished": False}
    again = recover(store, close=True)
    assert again.changed == 0
    store.append([truth])
    assert same_episode(store.episode(truth.episode_id), truth)
    assert store.snapshot().rows[row.key].status == "sealed"


def test_a_journal_of_a_live_writer_and_its_stream_are_left_alone(writer: Elsewhere, store: ReplayStore) -> None:
    journal = writer.spool.begin(about(1, 0))
    assert journal is not None
    growth, messages = plan(1, 0)[1][0]
    journal.step(growth, messages)
    report = recover(store)
    assert [found.what for found in report.found] == ["open", "running"]
    assert report.as_json()["changed"] == 0
    journal.step(*plan(1, 0)[1][1])
    writer.store.append([plan(1, 0)[0]])
    journal.close()
    assert ends(recover(store))[journal.path.name] == "committed"
    assert store.snapshot().rows[Key(about(1, 0)["episode_id"], 0, 0)].status == "sealed"
    assert not journal.path.exists()


def test_a_finished_episode_keeps_its_grade(writer: Elsewhere, store: ReplayStore) -> None:
    truth = make_episode(3)
    journal = writer.spool.begin(about(1, 0) | {"tokenizer_sha256": truth.tokenizer_sha256})
    assert journal is not None
    for growth, messages in plan(1, 0)[1]:
        journal.step(growth, messages)
    journal.step(about=truth.model_dump(mode="json", include={"stop_reason", "grade", "metadata"}))
    journal.close()
    recover(store)
    left = store.episode(about(1, 0)["episode_id"])
    assert (left.grade, left.stop_reason, left.tokenizer_sha256) == (truth.grade, truth.stop_reason, "a" * 64)
    assert left.metadata == truth.metadata | {"salvaged": {"steps": 7, "finished": True}}


def test_what_cannot_be_used_is_set_aside_and_what_says_nothing_goes(writer: Elsewhere, store: ReplayStore) -> None:
    forbidden, torn, rotten = writer.play(0, 3, train_allowed=False), writer.play(1, 3), writer.play(2, 3)
    empty, untouched = writer.play(3, 0), writer.play(4, 2)
    untouched.write_bytes(b"")
    torn.write_bytes(torn.read_bytes()[:-5])
    rotten.write_bytes(b"x" + rotten.read_bytes()[1:])
    report = recover(store)
    assert ends(report) == {writer.id: "open", forbidden.name: "set_aside", torn.name: "salvaged",
                            rotten.name: "set_aside", empty.name: "empty", untouched.name: "empty"}
    aside = sorted(path.name for path in (torn.parent.parent / "lost+found").iterdir())
    assert len(aside) == 3
    assert all(name.startswith(writer.id) for name in aside)
    assert any("train_allowed=False" in found.detail for found in report.found)
    assert len(store.episode(about(1, 1)["episode_id"]).branches[0].calls) == calls_after(2)
    assert recover(store).changed == 0


def test_journals_of_other_users_are_left_to_them(writer: Elsewhere, store: ReplayStore,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = writer.play(0, 3), writer.play(1, 3)
    real = os.open

    def guarded(path: Any, *rest: Any, **named: Any) -> int:
        if path == theirs:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", guarded)
        patch.setattr(socket, "gethostname", lambda: "elsewhere")
        patch.setattr(recovery, "_runs", lambda pid: False)
        patch.setattr(os, "getpid", lambda: 1)
        report = recover(store)
    assert ends(report) == {writer.id: "open", theirs.name: "left", ours.name: "salvaged"}
    assert "Permission denied: recover as the user it belongs to" in {found.detail for found in report.found}
    assert theirs.exists()
    assert recover(store).count("salvaged") == 1


def test_two_recoveries_at_once_do_not_mind_each_other(writer: Elsewhere, store: ReplayStore,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = writer.play(0, 3), Path.rmdir

    def beaten(folder: Path) -> None:
        real(folder)
        real(folder)

    monkeypatch.setattr(Path, "rmdir", beaten)
    assert recover(store, close=True).count("salvaged") == 1
    assert not path.parent.exists()


def test_a_recovery_cut_off_behind_its_append_keeps_the_unread_tail(writer: Elsewhere, store: ReplayStore) -> None:
    path = writer.play(0, 4)
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1
    path.write_bytes(damaged)
    left = salvage(path).episode
    assert left is not None
    store.append([left], salvaged=True)
    assert ends(recover(store))[path.name] == "committed"
    assert [aside.read_bytes() for aside in (path.parent.parent / "lost+found").iterdir()] == [damaged]
    store.append([plan(1, 0)[0]])
    path.write_bytes(damaged)
    recover(store)
    assert not path.exists()
    assert len(list((path.parents[1] / "lost+found").iterdir())) == 1, "the whole episode is there, nothing is missed"


def test_two_journals_of_one_episode_leave_the_longer(writer: Elsewhere, store: ReplayStore,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    writer.play(0, 2)
    Elsewhere(store.root, monkeypatch).play(0, 5)
    report = recover(store)
    assert report.count("salvaged") + report.count("committed") == 2
    assert len(store.episode(about(1, 0)["episode_id"]).branches[0].calls) == calls_after(5)


# ------------------------------------------------------------------------------------------------------- orphans


def orphan(writer: Elsewhere, episode: Episode) -> str:
    """A data file whose commit never came."""
    writer.store.append([episode])
    path = writer.store.snapshot().rows[Key(episode.episode_id, 0, 0)].path
    entry = max((writer.store.root / "log" / writer.id).iterdir())
    entry.unlink()
    return path


@pytest.mark.parametrize("adopt", [False, True])
def test_orphans_are_put_away_or_adopted(writer: Elsewhere, store: ReplayStore, adopt: bool) -> None:
    episode = make_episode(1)
    path = orphan(writer, episode)
    assert recover(store, adopt=adopt).changed == 0  # its stream is open: the commit may be on its way
    report = recover(store, adopt=adopt, close=True)
    assert ends(report)[Path(path).name] == ("adopted" if adopt else "lost")
    assert not (store.root / path).exists()
    assert (store.root / "lost+found" / Path(path).name).exists() != adopt
    assert len(store) == adopt
    if adopt:
        assert same_episode(store.episode(episode.episode_id), episode)
    assert recover(store, adopt=adopt, close=True).changed == 0


def test_a_damaged_orphan_is_never_adopted(writer: Elsewhere, store: ReplayStore) -> None:
    path = store.root / orphan(writer, make_episode(1))
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 8
    path.write_bytes(data)
    assert ends(recover(store, adopt=True, close=True))[path.name] == "lost"
    assert (store.root / "lost+found" / path.name).read_bytes() == data
    assert len(store) == 0


def test_an_orphan_moved_half_way_is_moved_to_the_end(writer: Elsewhere, store: ReplayStore) -> None:
    path = store.root / orphan(writer, make_episode(1))
    (store.root / "lost+found").mkdir()
    os.link(path, store.root / "lost+found" / path.name)
    assert ends(recover(store, close=True))[path.name] == "lost"
    assert not path.exists()


# ------------------------------------------------------------------------------------------------ closed writers


def test_a_closed_writer_goes_on_under_a_new_name(writer: Elsewhere, store: ReplayStore) -> None:
    first, second = make_episode(1), make_episode(2)
    writer.store.append([first])
    assert recover(store, close=True).count("closed") == 1
    writer.store.append([second])
    key = Key(first.episode_id, 0, 0)
    assert writer.store.writer_id != writer.id
    store.close_group("g", [first.episode_id])
    assert {key, Key(second.episode_id, 0, 0)} == set(store.snapshot().rows)


@pytest.mark.parametrize("what", ["hint", "group", "close"])
def test_other_commits_survive_a_closure_too(writer: Elsewhere, store: ReplayStore, what: str) -> None:
    episode = make_episode(1)
    writer.store.append([episode])
    recover(store, close=True)
    assert episode.hint is not None
    if what == "hint":
        writer.store.add_hints({Key(episode.episode_id, 0, 0): episode.hint.model_copy(update={"text": "late"})})
        assert store.episode(episode.episode_id).hint.text == "late"  # pyright: ignore[reportOptionalMemberAccess]
    elif what == "group":
        writer.store.close_group("g", [episode.episode_id])
        assert store.fold().closures == {"g": [episode.episode_id]}
    else:
        writer.store.close()
    assert len(store) == 1


def test_a_writer_that_takes_the_slot_first_is_closed_behind_it(writer: Elsewhere, store: ReplayStore,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    episodes, create = [make_episode(i) for i in range(3)], store.storage.create

    def slow(path: str, data: Any) -> None:
        if path.startswith("log/") and len(writer.store) < 2:
            writer.store.append([episodes[len(writer.store)]])
        create(path, data)

    monkeypatch.setattr(store.storage, "create", slow)
    work = _Recovery(store, store.root / "spool", False)
    work.close_streams(everyone=True)
    assert [found.what for found in work.found] == ["closed"]
    writer.store.append([episodes[2]])
    assert len(store) == 3


# -------------------------------------------------------------------------------------------------------- clocks


def test_clocks_decide_neither_order_nor_what_is_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two writers under a frozen clock, under one that jumps a day back and forth, and under an honest one."""
    day, real, frozen = 86_400 * 10**9, time.time_ns, time.time_ns()
    jumps = iter(range(10**6))
    clocks = {"honest": real, "frozen": lambda: frozen, "jumping": lambda: frozen + (-1) ** next(jumps) * day}
    seen = []
    for name, clock in clocks.items():
        with monkeypatch.context() as patch:
            patch.setattr(time, "time_ns", clock)
            stores = [ReplayStore.open(tmp_path / name) for _ in range(2)]
            for i in range(6):
                stores[i % 2].append([make_episode(i, episode_id=f"e-{i}", version=i // 2)])
            Spool(stores[0]).begin(about(1, 0)).close()  # pyright: ignore[reportOptionalMemberAccess]
            assert recover(stores[1], close=True).count("closed") == 0
            view = stores[1].snapshot()
        rows = [(key, row.content_sha256) for key, row in sorted(view.rows.items())]
        orders = [Sampler(stores[0], ReplayConfig(strategy=s), seed=0, tokenizer_sha256=None, max_staleness=None)
                  .draw(6, 9) for s in ("fifo", "uniform")]
        seen.append(([key for key, _ in rows], orders))
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0][0]) == 6


# --------------------------------------------------------------------------------------------- real processes


def acked(path: Path) -> list[list[str]]:
    """Whole lines only."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [line.split() for line in lines if line.endswith("\n")]


def until(path: Path, lines: int) -> None:
    deadline = time.monotonic() + 60
    while len(acked(path)) < lines:
        assert time.monotonic() < deadline, "the writer does not get on"
        time.sleep(0.01)


@pytest.mark.slow
def test_a_stopped_writer_that_is_closed_loses_nothing_when_it_wakes(tmp_path: Path) -> None:
    store, acks = ReplayStore.open(tmp_path / "store"), tmp_path / "acks"
    with Nursery() as nursery:
        pid = nursery.start(1, acks, store.root)
        until(acks, 10)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.05)
        assert recover(store).changed == 0
        report = recover(store, close=True)
        assert report.count("closed") == 1
        assert report.count("salvaged") == 0  # it holds its journal, though it does not run
        before = len(acked(acks))
        os.kill(pid, signal.SIGCONT)
        until(acks, before + 30)
        nursery.kill(pid)
    recover(store)
    rows = store.snapshot().rows
    for kind, number, done in acked(acks):
        row = rows.get(Key(about(1, int(number))["episode_id"], 0, 0))
        assert row is not None, (kind, number, done)
        assert kind == "step" or row.status == "sealed"
    assert len(store.storage.folders("log")) >= 2, "what it wrote when awake went into a stream that was not closed"
    assert recover(store).changed == 0


@pytest.mark.slow
def test_sixty_killed_writers_lose_nothing_acknowledged(tmp_path: Path) -> None:
    report = kill_loop(60, writers=2, folder=tmp_path)
    assert (report.lost, report.wrong) == ([], [])
    assert report.rounds == 60
    assert report.episodes > 60
    assert report.steps > 5 * report.episodes
    assert report.salvaged > 10
    shutil.rmtree(tmp_path)
