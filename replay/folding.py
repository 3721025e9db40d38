"""The fold: all streams of the log into the rows that are live, whatever order the streams are read in.

A key is live if some ``add`` names it and the last maintenance operation on it is no ``evict``. It lies where the
latest ``replace`` put it, else where it was added. Maintenance is one stream, ``log/maint/``, hence totally ordered; it
is read before the others, so that everything it speaks of is there when they are read.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import NamedTuple

from agentsdpo.errors import CorruptionError, StoreError
from agentsdpo.replay import archive, snapfile
from agentsdpo.replay.ids import Key
from agentsdpo.replay.log import MAINT, Evicted, Located, Vector, check_entry, check_gaps, entry_path, located
from agentsdpo.replay.storage import Storage
from agentsdpo.types import Json

_EVERYWHERE = ("open", "add", "overlay", "group_close", "close")
_MAINTENANCE = ("takeover", "replace", "evict", "unevict", "gc", "archive")


class Segment(NamedTuple):
    """What a data file must be: its size in bytes and its hash."""

    size: int
    sha256: str


@dataclass
class Fold:
    """What the log says after all entries read so far; :meth:`refresh` reads what is new and nothing else.

    Attributes:
        rows: every key the log names, live or not, with its best row and where that is now.
        evicted: the hidden ones among them.
        conflicts: keys with two whole rows of unequal content, which are both withheld; all their rows.
        files: data files that rows may be in; those handed to ``gc`` are in ``gone``, by the number of that entry.
        moved: where the latest ``replace`` put a key.
        beaten: files that hold a row which lost to a better one of its key; ``outdone`` has key and
            ``content_sha256`` of such rows.
        outlived: salvaged rows of attempts that came whole after all: those were played anew, and need not have the
            same branches.
        archived: closed streams that were packed.
        closures: members of groups that were closed by name.
        epoch: number of take-overs of the maintenance stream.
        busy: entry of the last take-over while its compaction has come to no end, else None.
        from_snapshot: whether to begin with the folded snapshot, where there is one.
        late: what that says of its late values, and the overlays they are from.
    """

    storage: Storage
    from_snapshot: bool = True
    rows: dict[Key, Located] = field(default_factory=dict)
    vector: Vector = field(default_factory=dict)
    conflicts: dict[Key, list[Located]] = field(default_factory=dict)
    overlays: dict[str, list[Json]] = field(default_factory=dict)
    closed: set[str] = field(default_factory=set)
    evicted: dict[Key, Evicted] = field(default_factory=dict)
    files: dict[str, Segment] = field(default_factory=dict)
    gone: dict[str, int] = field(default_factory=dict)
    moved: dict[Key, Located] = field(default_factory=dict)
    beaten: set[str] = field(default_factory=set)
    outdone: set[tuple[Key, str]] = field(default_factory=set)
    outlived: set[Key] = field(default_factory=set)
    archived: dict[str, archive.Place] = field(default_factory=dict)
    closures: dict[str, list[str]] = field(default_factory=dict)
    epoch: int = 0
    busy: int | None = None
    late: tuple[Json, frozenset[str]] | None = None
    _added: dict[Key, Located] = field(default_factory=dict)
    _checked: set[str] = field(default_factory=set)
    _left: dict[tuple[str, int], set[Key]] = field(default_factory=dict)
    _headless: set[tuple[str, int]] = field(default_factory=set)

    def live(self) -> dict[Key, Located]:
        """The rows a reader sees."""
        hidden = self.evicted.keys() | self.conflicts.keys() | self.outlived
        return {key: row for key, row in self.rows.items() if key not in hidden} if hidden else dict(self.rows)

    # ------------------------------------------------------------------------------------------------- reading

    def refresh(self, upto: Mapping[str, tuple[int, str]] | None = None) -> None:
        """Read all new entries, or those up to the position ``upto``.

        Raises:
            CorruptionError: an entry is damaged, or missing in the middle of its stream.
            StoreError: the log has another history than ``upto``, or holds operations of a newer release.
        """
        packs = archive.Packs(self.storage)
        if not self.vector and self.from_snapshot:
            snapfile.restore(self, upto, packs)
        if upto is not None:
            self._refresh_upto(upto, packs)
            return
        self._read(MAINT, packs)
        for writer in self._open_streams():
            try:
                self._read(writer, packs)
            except CorruptionError:
                self._read(MAINT, packs)
                if writer not in self.archived:  # else its files were removed while they were read
                    raise
        self._read(MAINT, packs)
        for writer in [writer for writer, place in self.archived.items() if self._seq(writer) < place.seq]:
            self._read(writer, packs)

    def _open_streams(self) -> list[str]:
        done = self.closed | self.archived.keys() | {MAINT, archive.FOLDER}
        return [writer for writer in self.storage.folders("log") if writer not in done]

    def _seq(self, writer: str) -> int:
        return self.vector.get(writer, (-1, ""))[0]

    def _read(self, writer: str, packs: archive.Packs, last: int | None = None) -> None:
        """Everything new in one stream, or what is new up to entry ``last``."""
        if last is None and writer not in self._checked and writer not in self.archived:
            check_gaps(self.storage, writer, self._seq(writer) + 1)
            self._checked.add(writer)
        for entry in self._entries(writer, packs, last):
            self.take(entry)

    def take(self, entry: Json) -> None:
        """Fold in the next entry of its stream. Raises StoreError for operations of a newer release."""
        for op in entry["ops"]:
            self._apply(op, entry)
        self.vector[entry["writer"]] = (entry["seq"], entry["sha"])

    def _entries(self, writer: str, packs: archive.Packs, last: int | None) -> Iterator[Json]:
        """Entries behind the position in a stream, checked."""
        seq, prev = self.vector.get(writer, (-1, ""))
        while last is None or seq < last:
            place, path = self.archived.get(writer), entry_path(writer, seq + 1)
            try:
                raw = packs.entry(writer, seq + 1, place) if place else self.storage.read(path)
            except FileNotFoundError:
                return
            if raw is None:
                return
            entry = check_entry(raw, f"{self.storage.uri}/{place.path if place else path}", writer, seq + 1, prev)
            yield entry
            seq, prev = seq + 1, entry["sha"]

    def _refresh_upto(self, upto: Mapping[str, tuple[int, str]], packs: archive.Packs) -> None:
        """All streams up to a position; what was archived after it is found in its archive."""
        self._read(MAINT, packs, upto.get(MAINT, (-1, ""))[0])
        self._note_archives(packs)
        for writer in sorted(upto):
            self._read(writer, packs, upto[writer][0])
            have, want = self.vector.get(writer, (-1, "")), upto[writer]
            if have != tuple(want):
                raise StoreError(f"stream {writer} holds {have[1][:12]} at {have[0]}, the snapshot was taken at "
                                 f"{want[1][:12]} of {want[0]}", fix="the log was changed since; take a new snapshot")

    def _note_archives(self, packs: archive.Packs) -> None:
        """Archives that maintenance made behind the position of this fold."""
        for entry in self._entries(MAINT, packs, None):
            for op in entry["ops"]:
                self._note_archive(op)

    def packed(self, writer: str, seq: int, packs: archive.Packs) -> bytes:
        """An entry of a stream that was archived, possibly behind the position of this fold; empty if it was not."""
        if writer not in self.archived:
            self._note_archives(packs)
        place = self.archived.get(writer)
        return (packs.entry(writer, seq, place) if place else None) or b""

    # ------------------------------------------------------------------------------------------------- folding

    def _apply(self, op: Json, entry: Json) -> None:
        """Fold one operation in."""
        kind, maintenance = op.get("op"), entry["writer"] == MAINT
        if maintenance and kind in _MAINTENANCE:
            self._maintain(kind, op, entry)
        elif maintenance or kind not in _EVERYWHERE:
            raise StoreError(f"stream {entry['writer']} of {self.storage.uri} holds the operation {kind!r}",
                             fix="install a newer agentsdpo")
        elif kind == "add":
            self._file(op)
            for row in located(op, entry["ts_us"]):
                self._add(row)
        elif kind == "overlay":
            if op["path"] not in self.gone:
                self.overlays.setdefault(op["kind"], []).append(op)
        elif kind == "group_close":
            self.closures[op["group_id"]] = sorted({*self.closures.get(op["group_id"], ()), *op["episode_ids"]})
        elif kind == "close":
            self.closed.add(entry["writer"])

    def _maintain(self, kind: str, op: Json, entry: Json) -> None:
        """Fold in one operation of the maintenance stream."""
        if kind == "takeover":
            self.epoch, self.busy = op["epoch"], None if op.get("released") else entry["seq"]
        elif kind == "evict":
            self.evicted |= {Key(*key): Evicted(entry["seq"], op["reason"]) for key in op["keys"]}
        elif kind == "unevict":
            for key in op["keys"]:
                self.evicted.pop(Key(*key), None)
        elif kind == "gc":
            self.gone |= dict.fromkeys(op["paths"], entry["seq"])
            for path in op["paths"]:
                self.files.pop(path, None)
            self.overlays = {name: [op for op in ops if op["path"] not in self.gone]
                             for name, ops in self.overlays.items()}
        elif kind == "archive":
            self._note_archive(op)
        else:
            self.busy = None
            for out in op["out"]:
                self._file(out)
                self.moved |= {row.key: row for row in located(out, entry["ts_us"])}
                for row in out["rows"]:
                    self._put(Key(*row["key"]))

    def _note_archive(self, op: Json) -> None:
        if op["op"] == "archive":
            self.archived |= {writer: archive.Place(op["path"], op["bytes"], op["sha256"], *at)
                              for writer, at in op["streams"].items()}

    def _file(self, op: Json) -> None:
        self.note_files([(op["path"], op["bytes"], op["sha256"])])

    def _add(self, row: Located) -> None:
        """Keep the best row of a key; two whole rows of unequal content are a conflict and both withheld."""
        best = self._added.get(row.key)
        if best is not None and best.content_sha256 != row.content_sha256:
            if best.status == row.status == "sealed":
                self.conflicts.setdefault(row.key, [best]).append(row)
            else:
                self.beaten.add((row if best.rank > row.rank else self.rows[row.key]).path)
                self.outdone.add((row.key, min(best, row, key=attrgetter("rank")).content_sha256))
        if best is None or row.rank > best.rank or (row.rank == best.rank and row.path < best.path):
            self._added[row.key] = row
            self._put(row.key)
            self._outlive(row)

    def _outlive(self, row: Located) -> None:
        """What a crash left of an attempt does not count once the attempt came whole, under whatever branches."""
        attempt = row.key.episode_id, row.key.attempt
        if row.status != "salvaged":
            self.outlived |= self._left.pop(attempt, set())
            self.outlived.discard(row.key)
            if not self._came_whole(row.key):
                self._headless.add(attempt)
        elif attempt in self._headless or self._came_whole(row.key):
            self.outlived.add(row.key)
        else:
            self._left.setdefault(attempt, set()).add(row.key)

    def _came_whole(self, key: Key) -> bool:
        """Whether the first branch of an attempt is there as it ended."""
        first = self._added.get(key._replace(branch_id=0) if key.branch_id else key)
        return first is not None and first.status != "salvaged"

    def _put(self, key: Key) -> None:
        added = self._added.get(key)
        if added is not None:
            self.rows[key] = self.place(added)

    def place(self, row: Located) -> Located:
        """Where an added row is: what was moved had the same content, or was another row of its key."""
        moved = self.moved.get(row.key)
        same = moved is not None and moved.content_sha256 == row.content_sha256
        return replace(moved, ts_us=row.ts_us) if moved and same else row

    # --------------------------------------------------------------------- what a folded snapshot is read into

    def put_back(self, rows: list[Located], states: list[str], moved: list[bool]) -> None:
        """Rows of a folded snapshot: several of a key in state ``conflict``; in compacted files if ``moved``."""
        self.rows = {row.key: row for row in rows}
        self.moved = {row.key: row for row, is_moved in zip(rows, moved, strict=True) if is_moved}
        for row in (row for row, state in zip(rows, states, strict=True) if state == "conflict"):
            self.conflicts.setdefault(row.key, []).append(row)
        self.rows |= {key: max(several, key=attrgetter("rank")) for key, several in self.conflicts.items()}
        self._added = dict(self.rows)
        for row in self.rows.values():
            if row.key.branch_id or row.status == "salvaged":  # whole first branches are found by their key
                self._outlive(row)

    def note_files(self, files: Iterable[tuple[str, int, str | None]]) -> None:
        """Data files by path, size and hash; those without a hash, or handed to gc, are no more."""
        self.files |= {path: Segment(size, sha) for path, size, sha in files if sha and path not in self.gone}
