"""All of the log, read for damage: where reading stops at the first error, this goes on and lists every one."""

import json
from collections.abc import Set
from typing import NamedTuple

from agentsdpo.errors import StoreError
from agentsdpo.replay import archive
from agentsdpo.replay.folding import Fold
from agentsdpo.replay.ids import Key
from agentsdpo.replay.log import MAINT, Located, check_entry, entry_path, located
from agentsdpo.replay.policies import recorded
from agentsdpo.replay.storage import Storage, read_whole
from agentsdpo.types import Json


class Problem(NamedTuple):
    """One thing that is wrong: at which level it shows, in which file, for which branch (or None), and what to do."""

    level: str
    path: str
    key: str | None
    what: str
    fix: str


RESTORE = "restore it from a backup"


class Committed(NamedTuple):
    """A data file as the log describes it."""

    size: int
    sha256: str
    rows: list[Located]


class Walk:
    """Every entry of every stream, checked; what is good is folded.

    Attributes:
        problems: what is wrong with the log.
        state: the fold of all good entries.
        files: every data file that was ever committed.
        entries: number of good entries.
        maintenance: the operations of the maintenance stream by the number of their entry, in order.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage, self.problems, self.entries = storage, list[Problem](), 0
        self.state, self.files = Fold(storage, from_snapshot=False), dict[str, Committed]()
        self.maintenance: dict[int, list[Json]] = {}
        self._packs = archive.Packs(storage)
        self._stream(MAINT)
        for writer in sorted({*storage.folders("log"), *self.state.archived} - {MAINT, archive.FOLDER}):
            self._stream(writer)
        self._check_replaces()

    def _bad(self, path: str, what: str, fix: str = RESTORE, key: Key | None = None) -> None:
        self.problems.append(Problem("fast", path, str(key) if key else None, what, fix))

    def _stream(self, writer: str) -> None:
        """Read one stream to its end, or to its first damaged entry."""
        place, prev = self.state.archived.get(writer), ""
        last = place.seq if place else self._last(writer)
        for seq in range(last + 1):
            path = place.path if place else entry_path(writer, seq)
            try:
                raw = self._packs.entry(writer, seq, place) if place else read_whole(self.storage, path)
                entry = check_entry(raw or b"", path, writer, seq, prev)
                self.state.take(entry)
            except (StoreError, KeyError, TypeError, ValueError) as error:
                left = f"; the {last - seq} entries behind it are unread" if seq < last else ""
                self._bad(path, f"{error.what if isinstance(error, StoreError) else repr(error)}{left}")
                return
            self._note(entry)
            prev = entry["sha"]
        if place:
            self._left_over(writer, place, prev)

    def _left_over(self, writer: str, place: archive.Place, head: str) -> None:
        """An archived stream ends as it did; its own files, until gc deletes them, say the same."""
        if head != place.sha:
            self._bad(place.path, f"stream {writer} ends with another entry than when it was archived")
        for seq in range(self._last(writer) + 1):
            path = entry_path(writer, seq)
            if self.storage.exists(path) and self.storage.read(path) != self._packs.entry(writer, seq, place):
                self._bad(path, f"it says otherwise than {place.path}, which is read instead", "delete it, as gc does")

    def _last(self, writer: str) -> int:
        """Number of the last entry of a stream."""
        names = [name.removesuffix(".json") for name in self.storage.names(f"log/{writer}")]
        return max((int(name) for name in names if name.isdigit()), default=-1)

    def _note(self, entry: Json) -> None:
        self.entries += 1
        for op in entry["ops"]:
            for file in [op] if op["op"] == "add" else op["out"] if op["op"] == "replace" else []:
                if file["path"] in self.files:
                    self._bad(file["path"], "two log entries name this file")
                self.files[file["path"]] = Committed(file["bytes"], file["sha256"], located(file, entry["ts_us"]))
        if entry["writer"] == MAINT:
            self.maintenance[entry["seq"]] = entry["ops"]

    # ------------------------------------------------------------------------------------------------ maintenance

    def _check_replaces(self) -> None:
        """Outputs hold exactly the live keys of the inputs, with the same content; an entry counts as a whole."""
        hidden, gone = set[Key](), set[str]()
        for seq, ops in self.maintenance.items():
            before = frozenset(hidden)
            for op in ops:
                keys = {Key(*key) for key in op.get("keys", ())}
                hidden = hidden - keys if op["op"] == "unevict" else hidden | keys
            for op in (op for op in ops if op["op"] == "replace"):
                self._check_replace(entry_path(MAINT, seq), op, before, hidden, gone)
            gone |= {path for op in ops if op["op"] == "gc" for path in op["paths"]}

    def _check_replace(self, path: str, op: Json, before: Set[Key], after: Set[Key], gone: Set[str]) -> None:
        """``before`` and ``after`` the entry these keys were hidden, and these files ``gone``."""
        fix = "do not run gc; evict the branch, or restore the store from a backup"
        for name in op["in"]:
            if name not in self.files or name in gone:
                self._bad(path, f"it replaces {name}, which was {'reclaimed' if name in gone else 'never added'}", fix)
        had: dict[Key, set[str]] = {}
        for row in (row for name in op["in"] if name in self.files for row in self.files[name].rows):
            had.setdefault(row.key, set()).add(row.content_sha256)
        out = [row for file in op["out"] for row in located(file, 0)]
        for row in out:
            if row.content_sha256 not in had.get(row.key, ()):
                self._bad(path, "it moves a row that none of its inputs holds", fix, row.key)
            elif row.key in before:
                self._bad(path, "it moves a row that was evicted", fix, row.key)
        if len({row.key for row in out}) < len(out):
            self._bad(path, "it moves a row to two places", fix)
        for key in had.keys() - {row.key for row in out} - after - self.state.conflicts.keys():
            if key not in self.state.rows or self.state.rows[key].path in op["in"]:
                self._bad(path, "it leaves out a live row of its inputs", fix, key)


def check_small_files(storage: Storage) -> list[Problem]:
    """Pins and manifests of policies: what is no JSON."""
    found = []
    for path in [*(info.path for info in storage.list("pins")), *recorded(storage).values()]:
        try:
            if not isinstance(json.loads(storage.read(path)), dict):
                raise ValueError("not an object")
        except FileNotFoundError:
            continue
        except ValueError as error:
            fix = "pin again, or remove it with unpin" if path.startswith("pins/") else RESTORE
            found.append(Problem("fast", path, None, f"it cannot be read: {error}", fix))
    return found


