"""The journal of a running episode: every call and every tool result is on disk before anybody acts on it.

``SPOOL/<store_id>/<writer_id>/<episode_id>.arrows`` is an Arrow IPC stream; where the id is no plain name of a file, a
name that follows from it stands there. Its first batch says which episode this is; each later one holds what the
episode grew by since, as one row per branch that grew; the messages and the facts about the episode stand in the
batch's first row. Arrow IPC has no checksums, so every row carries a crc32 over all its columns, which goes on from the
row before: a batch that was changed, dropped or moved ends what is believed.

The process that writes a journal holds an ``flock`` on it, which the system lets go of when it dies, however it dies.
"""

import fcntl
import os
import re
import struct
import sys
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from agentsdpo.errors import StoreError
from agentsdpo.files import FULL
from agentsdpo.replay.canonical import to_json
from agentsdpo.replay.files import ensure_folder, sync_folder
from agentsdpo.replay.ids import derived_uuid
from agentsdpo.types import Call, Json

SUFFIX = ".arrows"
_IDS, _KINDS, _LOGPS = pa.list_(pa.int32()), pa.list_(pa.uint8()), pa.list_(pa.float32())
SCHEMA = pa.schema([
    ("batch", pa.int32()), ("episode_json", pa.string()), ("messages_from", pa.int32()), ("messages_json", pa.string()),
    ("branch_id", pa.int32()), ("fork_json", pa.string()), ("token_ids", _IDS), ("token_kind", _KINDS),
    ("logprobs", _LOGPS), ("calls_json", pa.string()), ("kept_ids", _IDS), ("kept_counts", _IDS),
    ("crc32", pa.uint32())])
"""Columns of a journal. ``messages_json`` replaces the messages from number ``messages_from`` on; null: nothing new."""
DTYPES = {_IDS: "<i4", _KINDS: "u1", _LOGPS: "<f4"}


class JournalError(StoreError):
    """A step could not be made durable; the journal takes no more, what was acknowledged before is safe."""


@dataclass(frozen=True, slots=True)
class Growth:
    """What one branch grew by: tokens at its end, and the calls whose completions lie among them.

    Args:
        branch_id: index of the branch in its episode.
        fork: ``parent_branch_id``, ``fork_at``, ``fork_reason`` of a branch that forked; {} for the first branch.
        token_ids, token_kind, logprobs: of the new tokens, NaN where nothing was sampled.
        calls: the new calls; their spans count from the start of the branch.
        kept: per new sampled token the ids it was drawn from, ``()`` where nothing was cut.
    """

    branch_id: int
    fork: Json
    token_ids: Sequence[int]
    token_kind: Sequence[int]
    logprobs: Sequence[float]
    calls: Sequence[Call] = ()
    kept: Sequence[Sequence[int]] = ()


class Journal:
    """One episode while it runs; made by :meth:`open`, grown by :meth:`step`, ended by :meth:`seal` or :meth:`close`.

    Attributes:
        path: the file.
        steps: steps written so far.
    """

    def __init__(self, path: Path, handle: int, *, sync: bool) -> None:
        self.path, self.steps = path, 0
        self._handle, self._sync, self._crc, self._batches = handle, sync, 0, 0
        self._messages: list[Json] = []

    @classmethod
    def open(cls, spool: Path, store_id: str, writer_id: str, episode_id: str, about: Json | None = None, *,
             sync: bool = True) -> "Journal":
        """Begin the journal of an episode.

        Args:
            spool: folder on a local disk that all stores of this machine may share.
            store_id: of the store the episode is for.
            writer_id: of the log stream it will be appended through.
            episode_id: of the episode.
            about: fields of the :class:`~agentsdpo.types.Episode` that are known already.
            sync: wait for the disk after every step; without it a step survives a killed process, not a power cut.

        Raises:
            JournalError: there is a journal of this episode, its id could not be stored, or the disk is full, read-only
                or failing.
        """
        path = spool / store_id / writer_id / f"{_name(episode_id)}{SUFFIX}"
        try:
            _make_folder(path.parent, spool, sync)
            journal = cls(path, _create_locked(path), sync=sync)
        except OSError as error:
            if not (isinstance(error, FileExistsError) and path.exists()):
                raise _failed(error, path) from error
            raise JournalError(f"{path} exists: two episodes of one writer share an id", fix="give each an id of its "
                               "own; after a crash run `agentsdpo replay recover`") from error
        try:
            if sync:
                sync_folder(path.parent)
            journal._append([{"episode_json": to_json({"episode_id": episode_id, **(about or {})})}], _SCHEMA_BYTES)
        except OSError as error:
            journal.close()
            with suppress(OSError):  # nothing in it was acknowledged, and its name may be wanted again
                path.unlink()
            raise error if isinstance(error, JournalError) else _failed(error, path) from error
        return journal

    def step(self, grown: Sequence[Growth] = (), messages: Sequence[Json] | None = None, *,
             about: Json | None = None) -> None:
        """Write what is new; it is durable when this returns. Nothing new is nothing written.

        Args:
            grown: what each branch grew by since the last step, branches ascending.
            messages: the whole conversation so far; only what differs from the last step is written.
            about: more fields of the episode (stop reason, grade, metadata once it has ended).

        Raises:
            JournalError: the disk is full or failing; this journal takes no more steps.
        """
        rows = [_growth_row(growth) for growth in grown if len(growth.token_ids) or growth.calls]
        first: dict[str, Any] = {} if about is None else {"episode_json": to_json(about)}
        if messages is not None:
            first |= self._new_messages(messages)
        if not rows and not first:
            return
        rows = rows or [{}]
        rows[0] |= first
        self._append(rows)
        if messages is not None:
            self._messages = list(messages)
        self.steps += 1

    def seal(self) -> None:
        """The episode is committed to the store: delete the journal. After a power cut it may be back.

        Raises:
            JournalError: it cannot be deleted; a later recovery will, as the store holds the episode.
        """
        try:
            if self._handle >= 0:
                self.path.unlink(missing_ok=True)
        except OSError as error:
            raise JournalError(f"the journal {self.path} of a committed episode cannot be deleted ({error.strerror})",
                               fix="check the disk, then run `agentsdpo replay recover`") from error
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the file as it stands, for a later recovery; harmless when done already."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)

    def _new_messages(self, messages: Sequence[Json]) -> Json:
        """Columns that turn the messages of the last step into these."""
        pairs = zip(messages, self._messages, strict=False)
        same = next((i for i, (new, old) in enumerate(pairs) if new is not old and new != old),
                    min(len(messages), len(self._messages)))
        if same == len(messages) == len(self._messages):
            return {}
        return {"messages_from": same, "messages_json": to_json(list(messages[same:]))}

    def _append(self, rows: list[dict[str, Any]], head: bytes = b"") -> None:
        """Write one batch at the end and wait for the disk. After a failure the tail is in doubt: nothing follows."""
        if self._handle < 0:
            raise JournalError(f"{self.path} is closed", fix="begin a new episode")
        crc = self._crc
        for row in rows:
            row["batch"] = self._batches
            crc = row["crc32"] = row_crc(row, crc)
        try:
            left = memoryview(head + _encode(rows))
            while left:
                left = left[os.write(self._handle, left):]
            if self._sync:
                sync_data(self._handle)
        except OSError as error:
            self.close()
            raise _failed(error, self.path) from error
        self._crc, self._batches = crc, self._batches + 1


_PLAIN = re.compile(r"\w[\w.-]{0,99}", re.ASCII)


def _name(episode_id: str) -> str:
    """The id, or where a file cannot be called so, or would lie where no recovery looks, a name that follows from it.

    Raises:
        JournalError: the store takes no such id.
    """
    if not episode_id or any("\ud800" <= char <= "\udfff" for char in episode_id):
        raise JournalError(f"no episode can have the id {episode_id!r}", fix="give it one of valid Unicode, not empty")
    return episode_id if _PLAIN.fullmatch(episode_id) else derived_uuid("journal", episode_id)


def sync_data(handle: int) -> None:
    """Wait until the bytes of an open file are on the disk, its length included."""
    if sys.platform == "darwin":
        fcntl.fcntl(handle, fcntl.F_FULLFSYNC)  # fsync alone leaves them in the drive's cache there
    else:
        os.fdatasync(handle)


def try_lock(handle: int) -> bool:
    """Take the lock of an open journal; False when its writer lives, even stopped."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def row_crc(row: dict[str, Any], before: int) -> int:
    """crc32 over all columns of a row but the last, after ``before``: per column 0 for null, else 1 and its bytes.

    >>> row_crc({"batch": 0}, 0) == row_crc({"batch": 0}, 1)
    False
    """
    crc = before
    for field in _COVERED:
        value = row.get(field.name)
        if value is None:
            crc = zlib.crc32(b"\0", crc)
            continue
        raw = struct.pack("<i", value) if field.type == pa.int32() else value.encode() if field.type == pa.string() \
            else np.ascontiguousarray(value, DTYPES[field.type]).tobytes()
        crc = zlib.crc32(raw, zlib.crc32(struct.pack("<BI", 1, len(raw)), crc))
    return crc


_COVERED = [field for field in SCHEMA if field.name != "crc32"]
_ROW = pa.struct(list(SCHEMA))
_SCHEMA_BYTES = SCHEMA.serialize().to_pybytes()


def _growth_row(growth: Growth) -> dict[str, Any]:
    """Columns of one branch's growth."""
    row: dict[str, Any] = {
        "branch_id": growth.branch_id, "fork_json": to_json(growth.fork) if growth.fork else None,
        "token_ids": np.asarray(growth.token_ids, np.int32), "token_kind": np.asarray(growth.token_kind, np.uint8),
        "logprobs": np.asarray(growth.logprobs, np.float32)}
    if growth.calls:
        row["calls_json"] = to_json([call.model_dump(mode="json") for call in growth.calls])
    if growth.kept:
        row["kept_ids"] = np.array([i for ids in growth.kept for i in ids], np.int32)
        row["kept_counts"] = np.array([len(ids) for ids in growth.kept], np.int32)
    return row


def _encode(rows: list[dict[str, Any]]) -> bytes:
    """One record batch as an IPC message; all columns in one conversion, which takes a fifth of thirteen."""
    return pa.RecordBatch.from_struct_array(pa.array(rows, _ROW)).serialize().to_pybytes()


_durable: set[Path] = set()
"""Folders that this process made and made durable."""


def _make_folder(folder: Path, spool: Path, sync: bool) -> None:
    """The folder of a writer, durable when ``sync``."""
    if sync and (folder not in _durable or not folder.is_dir()):  # a recovery removes the empty one of a closed writer
        ensure_folder(folder, within=spool)
        _durable.add(folder)
    folder.mkdir(parents=True, exist_ok=True)


def _create_locked(path: Path) -> int:
    """A new file with its lock held, before anybody can have taken it for a dead writer's."""
    while True:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle
        os.close(handle)  # a recovery saw it between the two lines above, empty and without lock, and removed it


def _failed(error: OSError, path: Path) -> JournalError:
    remedy = "free space" if error.errno in FULL else "check the disk and the permissions"
    return JournalError(f"the journal {path} cannot be written ({error.strerror or error}); its steps so far are safe",
                        fix=f"{remedy}, then run `agentsdpo replay recover` and go on")
