"""Is a data file what was committed? Its bytes, its pages, and every row's hashes, recomputed."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from agentsdpo.replay.canonical import Columns, Nested, content_sha256
from agentsdpo.replay.ids import Key
from agentsdpo.replay.log import Located
from agentsdpo.replay.rows import RowReader


class Damage(NamedTuple):
    """What is wrong with a file: with the whole of it, or with one row."""

    key: Key | None
    what: str


def inspect(data: pa.Buffer | bytes, rows: Iterable[Located], sha256: str) -> list[Damage]:
    """All damage of one data file.

    Args:
        data: all of its bytes.
        rows: what the log says is in there (not necessarily every row).
        sha256: the hash of the whole file in the log.
    """
    expected = list(rows)
    broken = _footer_damage(data, expected)
    if broken:  # a damaged footer is not parsed: it may claim anything
        return [Damage(None, broken), *(Damage(row.key, f"it is out of reach: {broken}") for row in expected)]
    whole = hashlib.sha256(data).hexdigest() == sha256
    found = [] if whole else [Damage(None, "its bytes do not hash to what was committed")]
    with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
        groups: dict[int, list[Located]] = defaultdict(list)
        for row in expected:
            groups[row.row_group].append(row)
        for i in sorted(groups.keys() | set(range(file.num_row_groups))):
            found += _group_damage(file, i, groups[i])
    return found


def _footer_damage(data: pa.Buffer | bytes, rows: list[Located]) -> str:
    """What is wrong with the size or the footer, "" when nothing is."""
    size = len(memoryview(data))
    if any(row.size != size for row in rows):
        return f"the file has {size} bytes, {rows[0].size} were written"
    tails = {(row.footer_len + 8, row.footer_sha256) for row in rows}
    same = all(hashlib.sha256(memoryview(data)[-length:]).hexdigest() == sha for length, sha in tails)
    return "" if same else "the footer of the file is not the one that was written"


def _group_damage(file: pq.ParquetFile, i: int, rows: list[Located]) -> list[Damage]:
    """Every column decoded with its page checksums, then the rows."""
    try:
        table = file.read_row_group(i, use_threads=False)
    except (pa.ArrowException, OSError, ValueError, IndexError) as error:
        return [Damage(row.key, f"row group {i} cannot be read: {error}") for row in rows] or [
            Damage(None, f"row group {i} cannot be read: {error}")]
    return [damage for damage in map(GroupCheck(table).damage, rows) if damage]


class GroupCheck:
    """Checks rows of one decoded row group against the log."""

    def __init__(self, table: pa.Table) -> None:
        self._reader, calls = RowReader(table), table.column("calls").combine_chunks()
        array = calls.chunk(0) if isinstance(calls, pa.ChunkedArray) else calls
        self._at = array.offsets.to_numpy()
        first, stop = int(self._at[0]), int(self._at[-1])
        self._at, self._calls = self._at - first, _columns(array.values.slice(first, stop - first))

    def damage(self, row: Located) -> Damage | None:
        """What is wrong with one row, None when nothing is."""
        if row.index >= len(self._reader) or self._reader.key(row.index) != row.key:
            return Damage(row.key, f"another row stands in its place in row group {row.row_group}")
        tokens = self._reader.tokens_sha256(row.index)
        if tokens.hex() != row.tokens_sha256:
            return Damage(row.key, "its tokens and log-probs do not hash to what was committed")
        start, stop = int(self._at[row.index]), int(self._at[row.index + 1])
        if content_sha256(tokens, _cut(self._calls, start, stop), stop - start).hex() != row.content_sha256:
            return Damage(row.key, "its calls do not hash to what was committed")
        return None


def _columns(array: Any) -> Columns:
    """The fields of a struct array as Python values; those without any value are left out."""
    found: Columns = {}
    for field in array.type:
        values = array.field(field.name)
        if values.null_count == len(values):
            continue
        if pa.types.is_list(field.type):
            at = values.offsets.to_numpy()
            inner = values.values.slice(int(at[0]), int(at[-1] - at[0]))
            found[field.name] = Nested(np.diff(at).tolist(), _columns(inner))
        elif not pa.types.is_timestamp(field.type):
            found[field.name] = values.to_pylist()
    return found


def _cut(columns: Columns, start: int, stop: int) -> Columns:
    """Structs ``start`` to ``stop``."""
    found: Columns = {}
    for name, values in columns.items():
        if isinstance(values, Nested):
            first, count = sum(values.counts[:start]), sum(values.counts[start:stop])
            found[name] = Nested(values.counts[start:stop], _cut(values.columns, first, first + count))
        else:
            found[name] = values[start:stop]
    return found
