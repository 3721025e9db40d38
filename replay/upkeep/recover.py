"""Making a store whole after a crash: dead writers are closed, their journals salvaged, their orphans dealt with.

Safe beside live writers, and harmless to run again. Nothing that was written is thrown away: what cannot be used goes
to ``lost+found/``, and a journal is deleted only when the store holds all that it says.
"""

import json
import os
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from agentsdpo.errors import RowError, TokenizerMismatch, TrainForbidden
from agentsdpo.replay import archive
from agentsdpo.replay.canonical import canonical_json
from agentsdpo.replay.folding import Fold
from agentsdpo.replay.ids import Key
from agentsdpo.replay.journal import SUFFIX, try_lock
from agentsdpo.replay.log import MAINT, Located, entry_path, make_entry
from agentsdpo.replay.salvage import Salvage, salvage
from agentsdpo.replay.spool import LOST, default_spool, set_aside
from agentsdpo.replay.store import ReplayStore
from agentsdpo.replay.upkeep.adopt import adopted_rows
from agentsdpo.types import Branch, Json

What = Literal["running", "left", "committed", "empty", "salvaged", "set_aside", "open", "closed", "adopted", "lost"]
PROXY = "proxy"
"""``env_id`` of conversations that ``agentsdpo proxy`` recorded."""
_UNTOUCHED = ("running", "left", "open")
_UNFIT = (RowError, TrainForbidden, TokenizerMismatch)
"""Why the store refuses an episode or a file for what it is, not for the state of the disk."""


@dataclass(frozen=True, slots=True)
class Found:
    """One thing a recovery met, and what became of it.

    Attributes:
        what: of a journal: ``running`` (its writer lives), ``left`` (for the proxy, which knows what secrets to take
            out, or for the user it belongs to), ``committed`` and ``empty`` (deleted), ``salvaged``, ``set_aside``; of
            a stream: ``open`` (untouched), ``closed``; of a data file: ``adopted``, ``lost``.
        path: of the journal, or inside the store.
        writer: id of the writer it belongs to.
        detail: how much was salvaged, or why it went where it went.
    """

    what: What
    path: str
    writer: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class RecoverReport:
    """What a recovery found; with ``dry_run`` what it would have done."""

    found: tuple[Found, ...]
    dry_run: bool

    @property
    def changed(self) -> int:
        """Things that were changed."""
        return sum(found.what not in _UNTOUCHED for found in self.found)

    def count(self, what: What) -> int:
        """How many things ended so."""
        return sum(found.what == what for found in self.found)

    def as_json(self) -> Json:
        """For the command line."""
        return {"dry_run": self.dry_run, "changed": self.changed, "found": [asdict(found) for found in self.found]}


def recover(store: ReplayStore, *, spool: Path | str | None = None, adopt: bool = False, close: bool = False,
            dry_run: bool = False) -> RecoverReport:
    """Make a store whole again after a crash.

    A writer is taken for dead when it ran on this machine, its process is gone and nobody holds one of its journals. A
    writer that was closed while it lived goes on under a new name and loses nothing.

    Args:
        store: where; salvaged episodes are appended through it.
        spool: folder of the journals; None is the store's default.
        adopt: take data files whose commit was cut off into the store, where all checks pass, instead of moving them
            to ``lost+found/``.
        close: close every other writer's stream, those on other machines and those alive included.
        dry_run: only say what would be done.

    Raises:
        StoreError: the disk is full or failing, or ``close`` where slots cannot be taken exclusively. What was done
            until then stays done; run it again.
    """
    store.check_writable()
    if close:
        store.storage.demand_exclusive()
    work = _Recovery(store, Path(spool) if spool else default_spool(store), dry_run)
    work.close_streams(everyone=close)
    work.settle_orphans(adopt)
    work.settle_journals()
    return RecoverReport(tuple(work.found), dry_run)


class _Recovery:
    """One run of :func:`recover`."""

    def __init__(self, store: ReplayStore, spool: Path, dry_run: bool) -> None:
        self.store, self.dry_run, self.found = store, dry_run, list[Found]()
        self._folder = spool / store.about["store_id"]
        self._fold = Fold(store.storage)  # of its own: what it said at the beginning counts, whatever is appended
        self._fold.refresh()
        self._over = self._fold.closed | self._fold.archived.keys()

    def _note(self, what: What, path: Path | str, writer: str, detail: str = "") -> None:
        self.found.append(Found(what, str(path), writer, detail))

    # ------------------------------------------------------------------------------------------------- streams

    def close_streams(self, *, everyone: bool) -> None:
        """Close the streams of dead writers, or of all but this process's own."""
        for writer in sorted(self._fold.vector.keys() - self._over - {MAINT, archive.FOLDER}):
            host, pid = self._origin(writer)
            here = host == socket.gethostname()
            alive = not here or _runs(pid) or self._holds_journal(writer)
            own = here and pid == os.getpid()
            if own or (alive and not everyone) or not self.store.storage.exclusive:
                self._note("open", f"log/{writer}", writer, f"process {pid} on {host}")
                continue
            if not self.dry_run:
                self._close(writer)
            self._over.add(writer)
            self._note("closed", f"log/{writer}", writer, f"process {pid} on {host}")

    def _origin(self, writer: str) -> tuple[str, int]:
        """Machine and process that a stream's first entry names."""
        opened = json.loads(self.store.storage.read(entry_path(writer, 0)))["ops"][0]
        return opened["host"], opened["pid"]

    def _holds_journal(self, writer: str) -> bool:
        return any(not _unlocked(path) for path in (self._folder / writer).glob(f"*{SUFFIX}"))

    def _close(self, writer: str) -> None:
        """Take the writer's next slot. It races for the same one: whoever loses looks again or is fenced."""
        while writer not in self._fold.closed:
            seq, prev = self._fold.vector[writer]
            entry = make_entry(writer, seq + 1, prev, [{"op": "close", "by": f"recover on {socket.gethostname()}"}])
            with suppress(FileExistsError):
                self.store.storage.create(entry_path(writer, seq + 1), canonical_json(entry))
            self._fold.refresh()

    # ------------------------------------------------------------------------------------------------- orphans

    def settle_orphans(self, adopt: bool) -> None:
        """Adopt or put away data files of closed streams that no entry names."""
        named = self._fold.files.keys() | self._fold.gone.keys()
        for info in self.store.storage.list("data"):
            writer = info.path.rpartition("/")[2][:_UUID]
            if info.path not in named and writer in self._over:
                self._settle_orphan(info.path, writer, adopt)

    def _settle_orphan(self, path: str, writer: str, adopt: bool) -> None:
        why = "no log entry names it"
        if adopt:
            try:
                rows = adopted_rows(self.store.storage, path)
                if not self.dry_run:
                    self.store.append_rows(rows)
                    self.store.storage.remove(path)
                self._note("adopted", path, writer)
                return
            except _UNFIT as error:
                why = str(error)
        if not self.dry_run:
            try:
                self.store.storage.move(path, f"{LOST}/{path.rpartition('/')[2]}")
            except FileExistsError:  # an earlier recovery was cut off between the two names of one file
                self.store.storage.remove(path)
        self._note("lost", path, writer, why)

    # ------------------------------------------------------------------------------------------------ journals

    def settle_journals(self) -> None:
        """Salvage what the store does not hold; delete journals of which it holds everything."""
        for path in sorted(self._folder.glob(f"*/*{SUFFIX}")):
            if path.parent.name != LOST:
                self._visit(path)
        for folder in sorted(self._folder.glob("*")):
            if folder.name in self._over and not self.dry_run:
                with suppress(OSError):  # it is not empty, or another recovery was faster, or it is another user's
                    folder.rmdir()

    def _visit(self, path: Path) -> None:
        """Settle one journal under its lock, unless its writer lives or another recovery was faster."""
        try:
            handle = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            return
        except PermissionError as error:
            self._note("left", path, path.parent.name, f"{error.strerror}: recover as the user it belongs to")
            return
        try:
            if not try_lock(handle):
                self._note("running", path, path.parent.name)
            elif os.fstat(handle).st_nlink:
                self._settle(path, salvage(path))
        finally:
            os.close(handle)

    def _settle(self, path: Path, left: Salvage) -> None:
        if left.episode is None:
            unread = left.lost and path.stat().st_size
            self._finish(path, "set_aside" if unread else "empty", left.lost)
        elif self._stands(left):
            self._finish(path, "committed", keep=bool(left.lost) and not self._whole(left))
        elif left.about.get("env_id") == PROXY:  # its hint, and its secrets, are still to be seen to
            self._note("left", path, path.parent.name,
                       f"{left.steps} steps of a conversation: start `agentsdpo proxy --train-allowed` on its store")
        else:
            try:
                if not self.dry_run:
                    self.store.append([left.episode], salvaged=True)
            except _UNFIT as error:
                self._finish(path, "set_aside", str(error))
                return
            steps = f"{left.steps} steps" + ("" if left.finished else ", the episode had not ended")
            self._finish(path, "salvaged", f"{steps}; {left.lost}" if left.lost else steps, keep=bool(left.lost))

    def _finish(self, path: Path, what: What, detail: str = "", *, keep: bool = False) -> None:
        """Delete a journal, or set it aside where it says more than was believed."""
        if not self.dry_run:
            if keep or what == "set_aside":
                detail = f"{detail}; kept as {set_aside(path)}"
            else:
                path.unlink(missing_ok=True)
        self._note(what, path, path.parent.name, detail)

    def _stands(self, left: Salvage) -> bool:
        """Whether the store holds the whole episode, or at least as much of it as the journal does."""
        return self._whole(left) or all(row is not None and row.n_tokens >= len(branch.token_ids)
                                        for branch, row in self._held(left))

    def _whole(self, left: Salvage) -> bool:
        """Whether the store holds the episode as it ended, not what a crash left of it."""
        return any(row is not None and row.status != "salvaged" for _, row in self._held(left))

    def _held(self, left: Salvage) -> list[tuple[Branch, Located | None]]:
        """The branches of a journal, each with what the store holds of it."""
        episode, rows = left.episode, self.store.fold().rows
        assert episode is not None
        return [(branch, rows.get(Key(episode.episode_id, branch.branch_id, episode.attempt)))
                for branch in episode.branches]


_UUID = 36


def _runs(pid: int) -> bool:
    """Whether a process of this machine is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _unlocked(path: Path) -> bool:
    """Whether nobody holds this journal; one of another user is for that user to judge."""
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    except PermissionError:
        return False
    try:
        return try_lock(handle)
    finally:
        os.close(handle)
