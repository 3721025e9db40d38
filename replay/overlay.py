"""Overlays: what becomes known after an episode was sealed. Behaviour data is never rewritten.

``overlay/<kind>/<uuid7>.parquet`` has the columns episode_id, branch_id, attempt, call_id (null: the whole branch),
target_sha256 (the row's ``content_sha256``), revision, value, author, t_created. The highest revision counts, between
equal ones the later uuid7. ``value`` is canonical JSON:

    hint       {"text", "turns", "source", "author", "placement", "scope", "answer_bearing"}
    reward     {"reward", "status": final | provisional, "grade": {...}}
    label      a text
    relogprob  null; the trainer's log-probs stand in three more columns: policy_version, trainer_id, logprobs
"""

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from agentsdpo.errors import CorruptionError
from agentsdpo.replay.ids import Key
from agentsdpo.replay.log import Located
from agentsdpo.replay.rows import Row
from agentsdpo.replay.schema import GIVEN, listed
from agentsdpo.replay.storage import Storage, mend, read_whole
from agentsdpo.types import Episode, Grade, Hint, Json

SCHEMA = pa.schema([
    ("episode_id", pa.string()), ("branch_id", pa.int32()), ("attempt", pa.int32()), ("call_id", pa.string()),
    ("target_sha256", pa.binary(32)), ("revision", pa.int64()), ("value", pa.string()), ("author", pa.string()),
    ("t_created", pa.timestamp("us", tz="UTC"))])
RELOGPROB = pa.schema([*SCHEMA, ("policy_version", pa.int64()), ("trainer_id", pa.string()),
                       ("logprobs", listed(pa.float32()))])


class Slot(NamedTuple):
    """What a late value is about. ``by`` tells log-probs of several trainers apart: ``<policy version>/<trainer>``."""

    kind: str
    key: Key
    by: str = ""


class Entry(NamedTuple):
    """One late value about to be written."""

    slot: Slot
    author: str
    value: str | None
    logprobs: np.ndarray | None = None


class Late(NamedTuple):
    """A late value as it was read; the greatest wins its slot. ``row`` is its place in the file."""

    revision: int
    path: str
    row: int
    target_sha256: str
    value: str | None


def encode(kind: str, entries: Iterable[tuple[Entry, Located, int]]) -> bytes:
    """Parquet bytes of an overlay: per late value the row it is meant for and its revision."""
    now = time.time_ns() // 1000
    rows = [_record(entry, row, revision) | {"t_created": now} for entry, row, revision in entries]
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(rows, RELOGPROB if kind == "relogprob" else SCHEMA)
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def _record(entry: Entry, row: Located, revision: int) -> Json:
    (kind, key, by), record = entry.slot, {"target_sha256": bytes.fromhex(row.content_sha256), "revision": revision}
    record |= {**key._asdict(), "call_id": None, "value": entry.value, "author": entry.author}
    if kind == "relogprob":
        version, _, trainer = by.partition("/")
        record |= {"policy_version": int(version), "trainer_id": trainer, "logprobs": entry.logprobs}
    return record


def read(storage: Storage, op: Json) -> pa.Table:
    """The file of one ``overlay`` operation.

    Raises:
        CorruptionError: it is missing or not the one that was committed.
    """
    data = read_whole(storage, op["path"])
    if hashlib.sha256(data).hexdigest() != op["sha256"]:
        raise CorruptionError(f"overlay {storage.uri}/{op['path']} is not the file that was committed",
                              fix=mend(storage.uri))
    with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
        return file.read(use_threads=False)  # read_table takes four times as long, and there may be many small files


def _slots(kind: str, path: str, table: pa.Table) -> dict[Slot, Late]:
    """The late values of one file; those about single calls are of later releases and left alone."""
    wide = [name for name in table.schema.names if name != "logprobs"]
    found = {}
    for i, row in enumerate(table.select(wide).to_pylist()):
        by = f"{row['policy_version']}/{row['trainer_id']}" if kind == "relogprob" else ""
        if row["call_id"] is None:
            slot = Slot(kind, Key(row["episode_id"], row["branch_id"], row["attempt"]), by)
            found[slot] = Late(row["revision"], path, i, row["target_sha256"].hex(), row["value"])
    return found


KINDS = ("hint", "label", "relogprob", "reward")


@dataclass(frozen=True)
class Overlays:
    """The late values that count, as of some position in the log. Immutable.

    Attributes:
        latest: by slot.
        files: operations whose files were read, by path.
    """

    storage: Storage
    latest: Mapping[Slot, Late] = field(default_factory=dict)
    files: Mapping[str, Json] = field(default_factory=dict)
    _held: dict[str, pa.ChunkedArray] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def _about(self) -> dict[Key, list[Slot]]:
        """What is said about each key."""
        found: dict[Key, list[Slot]] = defaultdict(list)
        for slot in self.latest:
            found[slot.key].append(slot)
        return dict(found)

    def read(self, ops: Mapping[str, list[Json]], outdone: Collection[tuple[Key, str]] = ()) -> "Overlays":
        """These and what newer ``overlay`` operations (by kind) add. Raises as :func:`read`.

        Args:
            ops: all there are.
            outdone: key and content of rows that lost to a better one of their key, as what a crash left of an episode
                does: what was said of them does not hold for the row that took their place.
        """
        if any(self.latest[slot].target_sha256 == sha for key, sha in outdone for slot in self._about.get(key, ())):
            return Overlays(self.storage).read(ops, outdone)  # a value may stand behind the one that fell away
        new = [op for kind in KINDS for op in ops.get(kind, ()) if op["path"] not in self.files]
        if not new:
            return self
        latest = dict(self.latest)
        for op in new:
            for slot, late in _slots(op["kind"], op["path"], read(self.storage, op)).items():
                fell = (slot.key, late.target_sha256) in outdone
                if not fell and (slot not in latest or late > latest[slot]):
                    latest[slot] = late
        return replace(self, latest=latest, files={**self.files, **{op["path"]: op for op in new}})

    def revision(self, slot: Slot) -> int:
        """Revision that the next value of a slot gets; the first is 1."""
        return self.latest[slot].revision + 1 if slot in self.latest else 1

    def find(self, slot: Slot, row: Located) -> Late | None:
        """The late value of a slot, meant for this row.

        Raises:
            CorruptionError: it was written for other content under the same key.
        """
        late = self.latest.get(slot)
        if late is not None and late.target_sha256 != row.content_sha256:
            raise CorruptionError(
                f"a {slot.kind} in {late.path} targets content {late.target_sha256[:12]} of branch {row.key}, "
                f"the store holds {row.content_sha256[:12]}", fix=f"write the {slot.kind} again for this content")
        return late

    def _value(self, kind: str, row: Located) -> Any:
        late = self.find(Slot(kind, row.key), row)
        return None if late is None else json.loads(late.value or "null")

    # ------------------------------------------------------------------------------------------------ merging in

    def onto_row(self, row: Row, at: Located) -> Row:
        """A row with its late hint, reward and label."""
        hint, reward, label = (self._value(kind, at) for kind in ("hint", "reward", "label"))
        changes: Json = {"hint": Hint(**hint)} if hint else {}
        if reward:
            own = row.grade.model_dump() if row.grade else None
            changes |= {"reward": reward["reward"], "grade": Grade(**_grade(reward["grade"], own))}
        return replace(row, **changes, label=label) if changes or label is not None else row

    def onto_episode(self, episode: Episode, first: Located) -> Episode:
        """An episode with the late hint and reward of its first branch."""
        hint, reward = self._value("hint", first), self._value("reward", first)
        late_hint: Json = {"hint": Hint(**hint)} if hint else {}
        own = episode.grade.model_dump() if episode.grade else None
        late_grade: Json = {"grade": Grade(**_grade(reward["grade"], own))} if reward else {}
        return episode.model_copy(update=late_hint | late_grade)

    def onto_table(self, table: pa.Table, rows: list[Located]) -> pa.Table:
        """A table of these rows with the late rewards, and at its end ``label`` and ``t_stored``."""
        about = [(i, row) for i, row in enumerate(rows) if row.key in self._about] if self.latest else []
        late = {i: value for i, row in about if (value := self._value("reward", row)) is not None}
        for name, of in _REWARD_COLUMNS.items() if late else ():
            if name in table.schema.names:
                values = table.column(name).to_pylist()
                for i, value in late.items():
                    values[i] = of(value, values[i])
                at = table.schema.get_field_index(name)
                table = table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))
        labels: list[str | None] = [None] * len(rows)
        for i, row in about:
            labels[i] = self._value("label", row)
        for column, values in zip(GIVEN, (labels, [row.ts_us for row in rows]), strict=True):
            table = table.append_column(column, pa.array(values, column.type))
        return table

    def relogprobs(self, row: Located) -> dict[tuple[int, str], np.ndarray]:
        """Per (policy version, trainer id) its log-probs float32[T] of a row. Raises as :func:`read`, :meth:`find`."""
        found = {}
        for slot in self._about.get(row.key, ()):
            late = self.find(slot, row) if slot.kind == "relogprob" else None
            if late is not None:
                version, _, trainer = slot.by.partition("/")
                found[int(version), trainer] = self._arrays(late.path)[late.row].values.to_numpy()
        return found

    def _arrays(self, path: str) -> pa.ChunkedArray:
        """Log-probs of one file; those of the last one are kept, as whoever asks goes through it."""
        held = self._held.get(path)
        if held is None:
            held = read(self.storage, self.files[path]).column("logprobs")
            self._held.clear()
            self._held[path] = held
        return held


def _grade(late: Json, own: Json | None) -> Json:
    """A late grade over the row's own: without criteria it changes the verdict, and what the grader said stays."""
    if own is None or late["results"]:
        return late
    return late | {"results": own["results"], "feedback": late["feedback"] or own["feedback"]}


_REWARD_COLUMNS: dict[str, Callable[[Json, Any], Any]] = {
    "reward": lambda late, own: late["reward"], "reward_status": lambda late, own: late["status"],
    "rewards_json": lambda late, own: json.dumps(_grade(late["grade"], json.loads(own) if own else None),
                                                 separators=(",", ":"))}
