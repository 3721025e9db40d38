"""Canonical JSON and canonical bytes: what the hashes of the store are taken over.

``tokens_sha256`` hashes token_ids, token_kind, logprobs, kept_ids, kept_counts, in this order: one byte (0 null,
1 present), the number of elements as u32, the elements, little-endian and of fixed width, NaN as 0x7fc00000.

``content_sha256`` hashes ``tokens_sha256`` and then the calls, field by field: their number as u32; then for every
field of ``calls``, in schema order, that is not null in all of them, its name (u32 length, bytes), one byte per call
(0 null, 1 present), and the present values: numbers as above (NaN 0x7ff8000000000000), all u32 lengths and then all
bytes of strings, all u32 lengths and then the fields of a list of structs in the same way. Timings are left out. A
field that a later release adds counts only where it is not null, so that both hashes survive a rewrite of the file. A
branch without calls has one field, ``versions``.
"""

import hashlib
import json
import math
import struct
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from agentsdpo.errors import RowError
from agentsdpo.replay.schema import CALL

_TIMINGS = ("t_request", "t_first_token", "t_done", "mono_ns")


_ORDERED = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_SORTED = json.JSONEncoder(separators=(",", ":"), allow_nan=False, sort_keys=True)


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys, no spaces, ASCII only; equal values give equal bytes.

    Raises:
        RowError: the value is no JSON, or holds NaN or an infinity.

    >>> canonical_json({"b": 1, "a": [True, None]})
    b'{"a":[true,null],"b":1}'
    """
    return to_json(value, sort_keys=True).encode()


def to_json(value: Any, *, sort_keys: bool = False) -> str:
    """Compact ASCII JSON; keys keep their order unless ``sort_keys``. Raises what :func:`canonical_json` does."""
    try:
        return (_SORTED if sort_keys else _ORDERED).encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(f"a value cannot be stored as JSON: {error}",
                       fix="keep plain strings, finite numbers, lists and objects in messages and metadata") from error


def canonical_nan(logprobs: np.ndarray) -> np.ndarray:
    """float32[T] with every NaN replaced by the one of bits 0x7fc00000."""
    return np.where(np.isnan(logprobs), np.float32(np.nan), logprobs).astype("<f4")


def tokens_sha256(token_ids: np.ndarray, token_kind: np.ndarray, logprobs: np.ndarray,
                  kept_ids: np.ndarray | None, kept_counts: np.ndarray | None) -> bytes:
    """Hash over ids int32[T], kinds uint8[T], log-probs float32[T] and kept set int32[K], int32[n_sampled]; 32 bytes.

    Log-probs are hashed as they are: pass them through :func:`canonical_nan` before writing.
    """
    digest = hashlib.sha256()
    arrays = (token_ids, token_kind, logprobs, kept_ids, kept_counts)
    for array, dtype in zip(arrays, ("<i4", "u1", "<f4", "<i4", "<i4"), strict=True):
        if array is None:
            digest.update(b"\0")
        else:
            digest.update(struct.pack("<BI", 1, len(array)))
            digest.update(np.ascontiguousarray(array, dtype).data)
    return digest.digest()


class Nested(NamedTuple):
    """A column of lists of structs: the length of each list, and the columns of the structs of all of them."""

    counts: list[int]
    columns: "Columns"


Columns = dict[str, "list[Any] | Nested"]
"""Values by field name, one per struct; a missing field is null everywhere."""
_NO_CALLS: Columns = {"versions": Nested([], {})}


def content_sha256(tokens: bytes, calls: Columns, n_calls: int) -> bytes:
    """Hash over ``tokens_sha256`` and the columns of all calls of one branch; 32 bytes."""
    # without calls a file cannot tell a column of nulls from one that was written: all of them say the same
    columns = calls if n_calls else _NO_CALLS
    return hashlib.sha256(b"".join([tokens, *_struct_bytes(_CALL_PLAN, columns, n_calls)])).digest()


def _struct_bytes(plan: "_Plan", columns: Columns, n: int) -> list[bytes]:
    """Canonical bytes of ``n`` structs."""
    parts = [struct.pack("<I", n)]
    for name, (head, code) in plan.items():
        values = columns.get(name)
        if isinstance(values, Nested) and not isinstance(code, str):
            parts += [head, b"\1" * n, struct.pack(f"<{n}I", *values.counts)]
            parts += _struct_bytes(code, values.columns, sum(values.counts))
        elif values is not None and (present := [v for v in values if v is not None]):
            parts += [head, bytes([v is not None for v in values]), *_value_bytes(str(code), present)]
    return parts


def _value_bytes(code: str, values: list[Any]) -> list[bytes]:
    """Bytes of the present values of one field: numbers, or strings and hashes with their lengths in front."""
    if code in "iq?":
        return [struct.pack(f"<{len(values)}{code}", *values)]
    if code == "d":
        return [struct.pack(f"<{len(values)}d", *(v if v == v else math.nan for v in values))]
    raw = [value.encode() for value in values] if code == "text" else values
    return [struct.pack(f"<{len(raw)}I", *map(len, raw)), *raw]


_Plan = dict[str, "tuple[bytes, str | _Plan]"]
_CODES = {pa.string(): "text", pa.binary(32): "bytes", pa.int32(): "i", pa.int64(): "q", pa.float64(): "d",
          pa.bool_(): "?"}


def _plan(kind: pa.StructType) -> _Plan:
    """Per hashed field, in schema order: the bytes of its name, and its number code or the plan of its structs."""
    return {f.name: (struct.pack("<I", len(f.name)) + f.name.encode(),
                     _plan(f.type.value_type) if pa.types.is_list(f.type) else _CODES[f.type])
            for f in kind if f.name not in _TIMINGS}


_CALL_PLAN = _plan(CALL)
