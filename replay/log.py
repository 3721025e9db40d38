"""The commit log: one stream of immutable JSON files per writer; :mod:`agentsdpo.replay.folding` reads it.

``log/<writer_id>/<seq:012d>.json`` holds ``{v, writer, seq, prev, ts_us, ops, sha}`` as canonical JSON; ``sha`` hashes
all other fields and ``prev`` is the ``sha`` of the entry before (empty for entry 0), so that a stream is a chain.
Streams are never shared: an append needs no lock and no compare-and-swap, and the fold does not depend on the order
in which streams are read. An entry exists, hence its rows are visible, or it does not.
"""

import hashlib
import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from agentsdpo.errors import CorruptionError, StoreError
from agentsdpo.replay.canonical import canonical_json
from agentsdpo.replay.ids import Key, uuid7
from agentsdpo.replay.storage import Storage
from agentsdpo.types import Json

MAINT = "maint"
"""The stream of maintenance: one for the whole store, where all others belong to one process each."""
_RANK = {"sealed": 3, "truncated": 2, "aborted": 1, "salvaged": 0}
Vector = dict[str, tuple[int, str]]
"""Per stream the last entry that was read: its number and its ``sha``."""


class WriterFenced(StoreError):
    """The next slot of a writer's stream is taken: somebody closed the stream; a new one must be opened."""

    exit_code = 5


class RowExpired(StoreError):
    """A row of an older snapshot was evicted since, and its file reclaimed."""


class MissingSegment(CorruptionError):
    """A data file is not there: it was reclaimed after its rows were moved or evicted, or it is lost."""


class Evicted(NamedTuple):
    """Why a key is hidden, and by which entry of the maintenance stream."""

    seq: int
    reason: str


@dataclass(frozen=True, slots=True)
class Located:
    """A live row: where it is, what it must hash to, and what a sampler filters by."""

    key: Key
    path: str
    row_group: int
    index: int
    size: int
    footer_len: int
    footer_sha256: str
    tokens_sha256: str
    content_sha256: str
    n_tokens: int
    n_trainable: int
    version_min: int
    version_max: int
    group_id: str
    group_size: int
    status: str
    trainable: bool
    train_allowed: bool
    tokenizer_sha256: str
    chat_template_sha256: str
    logprob_kind: str
    kept_set: str
    ts_us: int

    @property
    def rank(self) -> tuple[int, int, int]:
        """Which of several rows of one key wins: whole before salvaged, longer before shorter, then the lower hash."""
        return (_RANK[self.status], self.n_tokens, -int(self.content_sha256, 16))


def make_entry(writer: str, seq: int, prev: str, ops: list[Json]) -> Json:
    """A signed log entry; the clock in it is for people and never decides order."""
    entry: Json = {"v": 1, "writer": writer, "seq": seq, "prev": prev, "ts_us": time.time_ns() // 1000, "ops": ops}
    return entry | {"sha": hashlib.sha256(canonical_json(entry)).hexdigest()}


def check_entry(raw: bytes, path: str, writer: str, seq: int, prev: str) -> Json:
    """One log entry from its bytes; ``path`` is what messages call it.

    Raises:
        CorruptionError: not canonical JSON, a wrong hash, or a link to another entry than ``prev``.
        StoreError: an entry of a newer release.
    """
    try:
        entry = json.loads(raw)
        body = {name: value for name, value in entry.items() if name != "sha"}
        whole = canonical_json(entry) == raw and entry["sha"] == hashlib.sha256(canonical_json(body)).hexdigest()
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CorruptionError(f"log entry {path} is not readable: {error}", fix="restore it from a backup") from error
    if not whole or (entry["writer"], entry["seq"], entry["prev"]) != (writer, seq, prev):
        raise CorruptionError(f"log entry {path} does not match its hash or its place in the chain",
                              fix="restore it from a backup")
    if entry["v"] != 1:
        raise StoreError(f"log entry {path} has version {entry['v']}, this release reads 1",
                         fix="install a newer agentsdpo")
    return entry


class LogWriter:
    """One stream, of one process lifetime. Entry 0 says who writes."""

    def __init__(self, storage: Storage) -> None:
        self.writer_id, self.pid = uuid7(), os.getpid()
        self._storage, self._seq, self._prev = storage, 0, ""
        self.commit([{"op": "open", "host": socket.gethostname(), "pid": self.pid}])

    def commit(self, ops: list[Json]) -> None:
        """Write the next entry; it is durable and visible when this returns.

        Raises:
            WriterFenced: the slot is taken.
            StoreError: the entry could not be written. The stream must not be used again.
        """
        entry = make_entry(self.writer_id, self._seq, self._prev, ops)
        try:
            self._storage.create(entry_path(self.writer_id, self._seq), canonical_json(entry))
        except FileExistsError as error:
            raise WriterFenced(f"slot {self._seq} of stream {self.writer_id} is taken",
                               fix="open a new stream") from error
        self._seq, self._prev = self._seq + 1, entry["sha"]

    def names(self, path: str) -> bool:
        """Whether the entry of a failed :meth:`commit` stands in its slot after all and names this file."""
        try:
            return path.encode() in self._storage.read(entry_path(self.writer_id, self._seq))
        except FileNotFoundError:
            return False


def entry_path(writer: str, seq: int) -> str:
    """File of one entry, from the root of the store."""
    return f"log/{writer}/{seq:012d}.json"


def check_gaps(storage: Storage, writer: str, start: int = 0) -> None:
    """A stream read for the first time must hold every number from ``start`` up to its last one.

    Raises:
        CorruptionError: an entry is missing in the middle.
    """
    names = [name.removesuffix(".json") for name in storage.names(f"log/{writer}")]
    there = {int(name) for name in names if name.isdigit()}
    last = max(there, default=-1)
    # a number written while the names were listed may be missing among them: look again, one by one
    holes = (seq for seq in range(start, last + 1) if seq not in there)
    gap = next((seq for seq in holes if not storage.exists(entry_path(writer, seq))), -1)
    if gap >= 0:
        raise CorruptionError(f"stream {storage.uri}/log/{writer} has entry {last} but lacks entry {gap}",
                              fix="restore the missing file: rows behind a gap are never shown")


def located(op: Json, ts_us: int) -> list[Located]:
    """The rows of an ``add`` operation, in file order."""
    rows: list[Located] = []
    place: dict[int, int] = {}
    for row in op["rows"]:
        group, index = row["rg"], place.get(row["rg"], 0)
        place[group] = index + 1
        rows.append(Located(
            key=Key(*row["key"]), path=op["path"], row_group=group, index=index, size=op["bytes"],
            footer_len=op["footer_len"], footer_sha256=op["footer_sha256"], version_min=row["pv"][0],
            version_max=row["pv"][1], group_id=row["group"][0], group_size=row["group"][1], ts_us=ts_us,
            **{name: row[name] for name in ENTRY_COLUMNS}))
    return rows


ENTRY_COLUMNS: tuple[str, ...] = ("tokens_sha256", "content_sha256", "n_tokens", "n_trainable", "status", "trainable",
                                  "train_allowed", "tokenizer_sha256", "chat_template_sha256", "logprob_kind",
                                  "kept_set")
"""Columns an ``add`` operation repeats for every row, so that folding and sampling open no data file."""


def entry_rows(columns: Mapping[str, list[Any]], row_groups: list[int]) -> list[Json]:
    """The ``rows`` of an ``add`` operation from the columns of the table that was written."""
    rows = []
    for i, group in enumerate(row_groups):
        row: Json = {name: columns[name][i] for name in ENTRY_COLUMNS}
        row |= {"tokens_sha256": row["tokens_sha256"].hex(), "content_sha256": row["content_sha256"].hex(), "rg": group,
                "key": [columns[name][i] for name in Key._fields],
                "pv": [columns["policy_version_min"][i], columns["policy_version_max"][i]],
                "group": [columns["group_id"][i], columns["group_size"][i]]}
        rows.append(row)
    return rows
