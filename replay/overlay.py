"""Overlays: values that become known after an episode was sealed. This release reads and writes hints.

``overlay/hint/<uuid7>.parquet`` has the columns episode_id, branch_id, attempt, call_id, target_sha256 (the row's
``content_sha256``), revision, value (a hint as canonical JSON), author, t_created. Behaviour data is never rewritten.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from agentsdpo.errors import CorruptionError
from agentsdpo.replay.canonical import canonical_json
from agentsdpo.replay.ids import Key
from agentsdpo.replay.log import Located
from agentsdpo.replay.storage import Storage, read_whole
from agentsdpo.types import Hint, Json

SCHEMA = pa.schema([
    ("episode_id", pa.string()), ("branch_id", pa.int32()), ("attempt", pa.int32()), ("call_id", pa.string()),
    ("target_sha256", pa.binary(32)), ("revision", pa.int64()), ("value", pa.string()), ("author", pa.string()),
    ("t_created", pa.timestamp("us", tz="UTC"))])


class LateHint(NamedTuple):
    """A hint from an overlay; the highest ``(revision, path)`` wins."""

    revision: int
    path: str
    target_sha256: str
    value: str


def encode_hints(hints: Mapping[Key, tuple[Located, int, Hint]]) -> bytes:
    """Parquet bytes of an overlay: per key the row it is meant for, its revision and the hint."""
    now = time.time_ns() // 1000
    rows = [{"episode_id": key.episode_id, "branch_id": key.branch_id, "attempt": key.attempt, "call_id": None,
             "target_sha256": bytes.fromhex(row.content_sha256), "revision": revision, "author": hint.author,
             "value": canonical_json(hint.model_dump()).decode(), "t_created": now}
            for key, (row, revision, hint) in hints.items()]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def read_hints(storage: Storage, op: Json) -> dict[Key, LateHint]:
    """The hints of one ``overlay`` operation.

    Raises:
        CorruptionError: the file is missing or not the one that was committed.
    """
    data = read_whole(storage, op["path"])
    if hashlib.sha256(data).hexdigest() != op["sha256"]:
        raise CorruptionError(f"overlay {storage.uri}/{op['path']} is not the file that was committed",
                              fix="restore it from a backup")
    table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
    return {Key(row["episode_id"], row["branch_id"], row["attempt"]):
            LateHint(row["revision"], op["path"], row["target_sha256"].hex(), row["value"])
            for row in table.to_pylist()}


def resolve(late: LateHint | None, row: Located) -> Hint | None:
    """The overlay's hint for a row, None when there is none.

    Raises:
        CorruptionError: the hint was written for other content under the same key.
    """
    if late is None:
        return None
    if late.target_sha256 != row.content_sha256:
        raise CorruptionError(f"a hint in {late.path} targets content {late.target_sha256[:12]} of branch {row.key}, "
                              f"the store holds {row.content_sha256[:12]}", fix="write the hint again for this content")
    return Hint(**json.loads(late.value))
