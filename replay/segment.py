"""Segments: whole Parquet files of sealed rows, encoded in memory and verified on every read."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from agentsdpo.errors import CorruptionError, StoreError
from agentsdpo.replay.log import Located, MissingSegment, entry_rows
from agentsdpo.replay.rows import RowReader
from agentsdpo.replay.schema import LEARNER_COLUMNS, SCHEMA, TOKEN_COLUMNS, WRITE_OPTIONS
from agentsdpo.replay.storage import Storage, mend
from agentsdpo.types import Json

GROUP_TOKENS, GROUP_ROWS = 65_536, 256
"""A row group is closed once it holds this many tokens or rows: a random read decodes the whole of it, while its
columns' headers and footer take 15 kB, however few tokens it holds."""
_ENTRY_NAMES = ("episode_id", "branch_id", "attempt", "policy_version_min", "policy_version_max", "group_id",
                "group_size", "tokens_sha256", "content_sha256", "n_tokens", "n_trainable", "status", "trainable",
                "train_allowed", "tokenizer_sha256", "chat_template_sha256", "logprob_kind", "kept_set")


def encode(table: pa.Table) -> tuple[pa.Buffer, Json]:
    """Parquet bytes of a table of rows, and the ``add`` operation that commits them (without ``path``)."""
    bounds = group_bounds(table.column("n_tokens").to_pylist())
    return encode_groups(table.slice(start, stop - start) for start, stop in bounds)


def encode_groups(tables: Iterable[pa.Table]) -> tuple[pa.Buffer, Json]:
    """As :func:`encode`, one row group per table; only one of them need be in memory at a time."""
    sink, groups = pa.BufferOutputStream(), list[int]()
    columns: dict[str, list[Any]] = {name: [] for name in _ENTRY_NAMES}
    with pq.ParquetWriter(sink, SCHEMA, **WRITE_OPTIONS) as writer:
        for group, table in enumerate(tables):
            writer.write_table(table, row_group_size=len(table))
            groups += [group] * len(table)
            for name in _ENTRY_NAMES:
                columns[name] += table.column(name).to_pylist()
    data = sink.getvalue()
    tail = _footer_len(data[-8:].to_pybytes()) + 8
    return data, {"op": "add", "bytes": data.size, "sha256": hashlib.sha256(data).hexdigest(), "footer_len": tail - 8,
                  "footer_sha256": hashlib.sha256(data[-tail:]).hexdigest(), "rows": entry_rows(columns, groups)}


def _footer_len(tail: bytes) -> int:
    """Length of the Parquet metadata from the last 8 bytes of a file."""
    return int.from_bytes(tail[:4], "little")


def group_bounds(n_tokens: Sequence[int]) -> list[tuple[int, int]]:
    """Row ranges of the row groups; a row is never split.

    >>> group_bounds([40_000, 40_000, 10])
    [(0, 2), (2, 3)]
    """
    bounds, start, tokens = [], 0, 0
    for i, n in enumerate(n_tokens, 1):
        tokens += n
        if tokens >= GROUP_TOKENS or i - start >= GROUP_ROWS:
            bounds.append((start, i))
            start, tokens = i, 0
    return bounds + [(start, len(n_tokens))] * (start < len(n_tokens))


def open_segment(storage: Storage, row: Located) -> pq.ParquetFile:
    """Open the file of a row; its size and footer are checked now, its pages whenever they are read.

    Raises:
        CorruptionError: the file is missing, has another size, or another footer than was committed.
    """
    path, tail = f"{storage.uri}/{row.path}", row.footer_len + 8
    try:
        source = storage.open(row.path)
        if source.size() != row.size:
            raise CorruptionError(f"{path} has {source.size()} bytes, {row.size} were written",
                                  fix=mend(storage.uri))
        source.seek(row.size - tail)
        if hashlib.sha256(source.read(tail)).hexdigest() != row.footer_sha256:
            raise CorruptionError(f"the footer of {path} is not the one that was written",
                                  fix=mend(storage.uri))
        remote = isinstance(source, pa.PythonFile)  # a request per column chunk would be slow: fetch them together
        return pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=remote)
    except FileNotFoundError as error:
        raise MissingSegment(f"{path} is missing though the log names it", fix=mend(storage.uri)) from error
    except StoreError:  # a storage that could not be reached says nothing about the bytes in it
        raise
    except (pa.ArrowException, OSError) as error:
        raise _damaged(error, row, storage.uri) from error


def read_group(readers: "Readers", row: Located, columns: Sequence[str]) -> pa.Table:
    """One row group with verified page checksums; ``columns`` the file does not have are left out.

    Raises:
        CorruptionError: damaged pages; names file, row group and key.
    """
    file, lock = readers.get(row)
    try:
        with lock:
            return file.read_row_group(row.row_group, columns=list(columns), use_threads=False)
    except StoreError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        readers.forget(row)
        raise _damaged(error, row, readers.uri) from error


def _damaged(error: Exception, row: Located, uri: str) -> CorruptionError:
    return CorruptionError(f"{uri}/{row.path}, row group {row.row_group}, branch {row.key} cannot be read: {error}",
                           fix=mend(uri))


class Readers:
    """Open files, the least recently used closed first: parsing a footer costs as much as reading a row group.

    A file is immutable, so one that is held open stays right when it is moved or deleted.
    """

    MOST = 64

    def __init__(self, storage: Storage) -> None:
        self.uri, self._storage, self._lock = storage.uri, storage, Lock()
        self._open: OrderedDict[str, tuple[pq.ParquetFile, Lock]] = OrderedDict()

    def get(self, row: Located) -> tuple[pq.ParquetFile, Lock]:
        """The file of a row, and the lock to hold while reading it. Raises what :func:`open_segment` does."""
        with self._lock:
            if row.path in self._open:
                self._open.move_to_end(row.path)
                return self._open[row.path]
        opened = open_segment(self._storage, row), Lock()
        with self._lock:
            self._open[row.path] = opened
            while len(self._open) > self.MOST:
                self._open.popitem(last=False)
        return opened

    def forget(self, row: Located) -> None:
        """Open the file anew next time."""
        with self._lock:
            self._open.pop(row.path, None)


class GroupCache:
    """Decoded row groups, the least recently used dropped first.

    Args:
        storage: of the store.
        max_bytes: Arrow bytes to keep; a row group that is larger alone is decoded anew for every read.
    """

    def __init__(self, storage: Storage, max_bytes: int) -> None:
        self._max, self._held, self._lock = max_bytes, 0, Lock()
        self._groups: OrderedDict[tuple[str, int, bool], RowReader] = OrderedDict()
        self._readers = Readers(storage)

    def tokens(self, row: Located) -> RowReader:
        """Keys and token columns of a row's row group, or all of it when that is at hand. Raises as :meth:`get`."""
        found = self._at_hand(row, True)
        found = self._at_hand(row, False) if found is None else found
        return self._decode(row, False) if found is None else found

    def get(self, row: Located) -> RowReader:
        """The row group of a row with all a learner needs. Raises what :func:`read_group` does."""
        found = self._at_hand(row, True)
        return self._decode(row, True) if found is None else found

    def _at_hand(self, row: Located, whole: bool) -> RowReader | None:
        at = (row.path, row.row_group, whole)
        with self._lock:
            if at in self._groups:
                self._groups.move_to_end(at)
                return self._groups[at]
        return None

    def _decode(self, row: Located, whole: bool) -> RowReader:
        reader = RowReader(read_group(self._readers, row, LEARNER_COLUMNS if whole else TOKEN_COLUMNS))
        at = (row.path, row.row_group, whole)
        with self._lock:
            if reader.nbytes <= self._max and at not in self._groups:
                self._groups[at] = reader
                self._held += reader.nbytes
                while self._held > self._max:
                    self._held -= self._groups.popitem(last=False)[1].nbytes
        return reader
