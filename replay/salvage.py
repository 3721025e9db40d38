"""What a journal still says after a crash: the episode up to its last whole step.

A batch counts when Arrow can read it, its rows carry the checksums that follow from all rows before it, and its number
is the next one. Reading stops at the first that does not count; what comes after is not believed.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from agentsdpo.errors import CorruptionError, RowError, StoreError
from agentsdpo.replay.journal import DTYPES, SCHEMA, row_crc
from agentsdpo.types import Branch, Episode, Json, StopReason

_SAMPLED = (1, 4, 5)


@dataclass(frozen=True)
class Salvage:
    """What was found in one journal.

    Attributes:
        about: fields of the episode that the journal names; empty when not even its first batch is whole.
        episode: the episode so far, None when nothing was sampled or nothing can be read. Ended ones have the stop
            reason and the grade they ended with, others ``engine_error`` and none.
        steps: whole steps. finished: whether the last of them is the end of the episode.
        lost: why reading stopped before the end of the file, "" when all of it was read.
    """

    about: Json
    episode: Episode | None
    steps: int
    finished: bool
    lost: str = ""


def salvage(path: Path) -> Salvage:
    """Read a journal up to the first batch that is torn or does not match its checksum. Nothing is changed.

    Raises:
        StoreError: the file cannot be read at all.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}", fix="check the disk") from error
    batches, lost = read_batches(data)
    rebuilt = _Rebuilt()
    for batch in batches:
        for row in batch:
            rebuilt.add(row)
    try:
        episode = rebuilt.episode(len(batches) - 1)
    except (RowError, ValueError, TypeError) as error:
        return Salvage(rebuilt.about, None, len(batches) - 1, rebuilt.finished, lost or f"no episode: {error}")
    return Salvage(rebuilt.about, episode, max(len(batches) - 1, 0), rebuilt.finished, lost)


def read_batches(data: bytes) -> tuple[list[list[Json]], str]:
    """The whole batches of a journal as rows, and why reading stopped before its end ("" when it did not)."""
    source, batches, crc = pa.BufferReader(data), [], 0
    try:
        if pa.ipc.read_schema(pa.ipc.read_message(source)) != SCHEMA:
            return [], "it has the columns of another release"
        while source.tell() < len(data):
            at = source.tell()
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(source), SCHEMA)
            batch.validate(full=True)
            rows = _rows(batch)
            for row in rows:
                crc = row_crc(row, crc)
                if row["crc32"] != crc or row["batch"] != len(batches):
                    raise CorruptionError(f"the checksum of the batch at byte {at} is wrong")
            batches.append(rows)
    except (pa.ArrowException, CorruptionError, OSError, EOFError, ValueError, MemoryError, TypeError) as error:
        return batches, f"after batch {len(batches) - 1}: {error}" if len(data) else "it is empty"
    return batches, ""


def _rows(batch: pa.RecordBatch) -> list[Json]:
    """Rows of a batch, token columns as arrays."""
    columns = {name: batch.column(name) for name in SCHEMA.names}
    return [{name: _value(column, i) for name, column in columns.items()} for i in range(batch.num_rows)]


def _value(column: Any, i: int) -> Any:
    value = column[i]
    if not value.is_valid or column.type not in DTYPES:
        return value.as_py()
    return value.values.to_numpy(zero_copy_only=False)


@dataclass
class _Grown:
    """A branch as it is put together."""

    fork: Json
    ids: list[np.ndarray] = field(default_factory=list)
    kinds: list[np.ndarray] = field(default_factory=list)
    logps: list[np.ndarray] = field(default_factory=list)
    calls: list[Json] = field(default_factory=list)
    kept_ids: list[np.ndarray] = field(default_factory=list)
    kept_counts: list[np.ndarray] = field(default_factory=list)

    def add(self, row: Json) -> None:
        """Append the growth of one step."""
        self.ids.append(row["token_ids"])
        self.kinds.append(row["token_kind"])
        self.logps.append(row["logprobs"])
        self.calls += json.loads(row["calls_json"] or "[]")
        if row["kept_ids"] is not None:
            self.kept_ids.append(row["kept_ids"])
        counts = row["kept_counts"]
        self.kept_counts.append(np.zeros(int(np.isin(row["token_kind"], _SAMPLED).sum())) if counts is None else counts)

    def branch(self, branch_id: int) -> Branch:
        """The branch. Raises RowError where it breaks a row rule."""
        kept = any(len(ids) for ids in self.kept_ids)
        calls: Any = tuple(self.calls)  # as JSON: the model makes them calls
        return Branch(branch_id=branch_id, **self.fork, calls=calls, token_ids=_joined(self.ids, np.int32),
                      token_kind=_joined(self.kinds, np.uint8), logprobs=_joined(self.logps, np.float32),
                      kept_ids=_joined(self.kept_ids, np.int32) if kept else None,
                      kept_counts=_joined(self.kept_counts, np.int32) if kept else None)


@dataclass
class _Rebuilt:
    """An episode as it is put together from the rows of its journal."""

    about: Json = field(default_factory=dict)
    messages: list[Json] = field(default_factory=list)
    branches: dict[int, _Grown] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return "stop_reason" in self.about

    def add(self, row: Json) -> None:
        """Take in one row."""
        if row["episode_json"] is not None:
            self.about |= json.loads(row["episode_json"])
        if row["messages_json"] is not None:
            self.messages[row["messages_from"]:] = json.loads(row["messages_json"])
        if row["branch_id"] is not None:
            self.branches.setdefault(row["branch_id"], _Grown(json.loads(row["fork_json"] or "{}"))).add(row)

    def episode(self, steps: int) -> Episode | None:
        """The episode, None when no branch holds a token."""
        if not self.branches:
            return None
        about = {"stop_reason": StopReason.ENGINE_ERROR, **self.about}
        metadata = {**about.pop("metadata", {}), "salvaged": {"steps": steps, "finished": self.finished}}
        branches = tuple(grown.branch(i) for i, grown in sorted(self.branches.items()))
        return Episode(**about, branches=branches, messages=tuple(self.messages), metadata=metadata)


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts or [np.empty(0)]).astype(dtype)
