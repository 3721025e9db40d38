"""``gc``: delete files nobody needs, in two phases, so that nobody is surprised.

First an entry of the maintenance stream names the files; from then on no row may go back to them. Once that entry is
older than the grace, by the store's own clock, a later run looks at stream and pins again and deletes. A file that was
named is never needed again, so it does no harm if a stopped ``gc`` wakes up and deletes it after all.
"""

from dataclasses import asdict, dataclass

from agentsdpo.replay import archive, snapfile
from agentsdpo.replay.folding import Fold
from agentsdpo.replay.log import MAINT
from agentsdpo.replay.storage import FileInfo, Storage
from agentsdpo.replay.store import ReplayStore
from agentsdpo.replay.upkeep.maintain import commit
from agentsdpo.replay.upkeep.pinned import Pin, clock_us, standing
from agentsdpo.types import Json

COMPACTED = "data/compact"
"""Folder of compacted files."""


@dataclass(frozen=True, slots=True)
class GcReport:
    """What one run did, or would do: paths named now, paths deleted, paths that pins still hold, bytes deleted."""

    named: tuple[str, ...]
    deleted: tuple[str, ...]
    pinned: tuple[str, ...]
    freed_bytes: int
    dry_run: bool

    def as_json(self) -> Json:
        """For the command line."""
        return asdict(self)


def gc(store: ReplayStore, *, grace_s: float = 86_400.0, dry_run: bool = False,
       sole_maintainer: bool = False) -> GcReport:
    """Name the files nobody needs, and delete those that were named longer ago than the grace.

    Needed are the files of live rows, of rows in conflict, and of rows that a pinned snapshot shows. A file of an
    evicted row is not: once it is named, ``unevict`` is refused. Also deleted, after the same grace: log files of
    archived streams, older folded snapshots, and outputs of compactions that did not come to their end.

    Args:
        store: where.
        grace_s: seconds between naming and deleting, between time stamps the storage gives.
        dry_run: only say what would be done.
        sole_maintainer: see :func:`~agentsdpo.replay.upkeep.maintain.commit`.

    Raises:
        CorruptionError: the log or a pin cannot be read; nothing is deleted then.
        StoreError: the storage cannot take slots exclusively, or does not let go of a file.
    """
    storage, before = store.storage, _before(store, grace_s)

    def plan(fold: Fold) -> list[Json]:
        held = needed(fold, standing(store))
        orphans = {info.path for info in storage.list(COMPACTED) if info.mtime_us <= before} - fold.files.keys()
        paths = sorted((fold.files.keys() - held) | (orphans - fold.gone.keys()))
        return [{"op": "gc", "paths": paths}] if paths else []

    ops = plan(store.fold()) if dry_run else commit(store, plan, sole_maintainer=sole_maintainer)
    fold, pins = store.fold(), standing(store)
    due, pinned = _due(store, fold, pins, before)
    if not dry_run:
        for info in due:
            storage.remove(info.path)
    named = tuple(path for op in ops for path in op["paths"])
    return GcReport(named, tuple(info.path for info in due), tuple(pinned), sum(info.size for info in due), dry_run)


def _before(store: ReplayStore, grace_s: float) -> int:
    """Files from before this time are older than the grace."""
    return clock_us(store.storage) - int(grace_s * 1e6)


def needed(fold: Fold, pins: list[Pin]) -> set[str]:
    """Data files that somebody needs."""
    seen = min((pin.maintained for pin in pins), default=None)
    paths = {fold.place(row).path for rows in fold.conflicts.values() for row in rows}
    paths |= {row.path for key, row in fold.rows.items() if key not in fold.evicted}
    if seen is not None:
        paths |= {fold.rows[key].path for key, gone in fold.evicted.items() if gone.seq > seen and key in fold.rows}
        paths |= fold.beaten
    return paths


def _due(store: ReplayStore, fold: Fold, pins: list[Pin], before: int) -> tuple[list[FileInfo], list[str]]:
    """Files to delete now, and those a pin holds back."""
    storage = store.storage
    written = {info.path.rpartition("/")[2]: info.mtime_us for info in storage.list(f"log/{MAINT}")}
    ripe = {path for path, seq in fold.gone.items() if written.get(f"{seq:012d}.json", before + 1) <= before}
    held = needed(fold, pins) if pins else set()
    there = [info for info in storage.list("data") if info.path in ripe]
    due = [info for info in there if info.path not in held] + _read_elsewhere(storage, fold, before)
    return due, [info.path for info in there if info.path in held]


def _read_elsewhere(storage: Storage, fold: Fold, before: int) -> list[FileInfo]:
    """Log files of streams that are read from an archive, and folded snapshots but the latest."""
    packed = {info.path for info in storage.list(f"log/{archive.FOLDER}") if info.mtime_us <= before}
    streams = {writer for writer, place in fold.archived.items() if place.path in packed}
    latest = snapfile.latest(storage)
    kept = (latest, snapfile.beside(latest), snapfile.LATEST) if latest else ()
    old = [info for info in storage.list("snap") if latest and info.path not in kept]
    logs = [info for info in storage.list("log") if info.path.split("/")[1] in streams] if streams else []
    return logs + [info for info in old if info.mtime_us <= before]
