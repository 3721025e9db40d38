"""Data files whose commit a crash cut off: may they be taken into the store?"""

from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq

from agentsdpo.errors import RowError
from agentsdpo.replay.rows import to_episode, to_rows
from agentsdpo.replay.rules import check_episode
from agentsdpo.replay.schema import SCHEMA, conform
from agentsdpo.replay.storage import Storage

_HASHES = ("tokens_sha256", "content_sha256")


def adopted_rows(storage: Storage, path: str) -> Callable[[str], pa.Table]:
    """The rows of a data file, for :meth:`~agentsdpo.replay.store.ReplayStore.append_rows`.

    They pass only if the pages match their checksums, every episode keeps the row rules and may be trained on, and both
    hashes of every row come out as they stand there.

    Raises:
        RowError: one of these is not so; names the file.
        StoreError: the file cannot be read at all.
    """
    data = storage.read(path)
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        table = conform(file.read(use_threads=False))
        episodes = [to_episode(part) for part in _attempts(table)]
        for episode in episodes:
            check_episode(episode)
        again = to_rows(episodes)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise RowError(f"{storage.uri}/{path} cannot be adopted: {error}") from error
    keys = [(name, "ascending") for name in ("episode_id", "attempt", "branch_id")]
    if not table.sort_by(keys).select(_HASHES).equals(again.sort_by(keys).select(_HASHES)):
        raise RowError(f"{storage.uri}/{path} cannot be adopted: its rows do not hash to what stands there")
    at = SCHEMA.get_field_index("writer_id")
    return lambda writer_id: table.set_column(at, SCHEMA.field(at), [pa.repeat(writer_id, len(table))])


def _attempts(table: pa.Table) -> list[pa.Table]:
    """The rows of each attempt at each episode."""
    names = list(zip(table["episode_id"].to_pylist(), table["attempt"].to_pylist(), strict=True))
    return [table.take([i for i, own in enumerate(names) if own == name]) for name in dict.fromkeys(names)]
