"""What a store holds, in numbers: rows to list, counts by any column, bytes by column."""

from collections import Counter
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
import pyarrow as pa

from agentsdpo.errors import ConfigError, StoreNotFound
from agentsdpo.replay.ids import Key
from agentsdpo.replay.log import Located
from agentsdpo.replay.schema import SCHEMA
from agentsdpo.replay.segment import open_segment
from agentsdpo.replay.snapshot import Snapshot
from agentsdpo.types import Json

_SHORT = {"policy_version": "policy_version_min", "env": "env_id", "task": "task_id", "run": "run_id",
          "group": "group_id", "episode": "episode_id", "branch": "branch_id", "stop": "stop_reason"}


def column(name: str, table: pa.Table) -> str:
    """The column a person means by a name.

    Raises:
        ConfigError: no such column; names the nearest.
    """
    name = _SHORT.get(name, name)
    if name not in table.column_names:
        near = get_close_matches(name, [*table.column_names, *_SHORT], 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(table.column_names)}"
        raise ConfigError(f"there is no column {name!r} to list or sort by", fix=hint)
    return name


def find_episode(view: Snapshot, prefix: str, withheld: Collection[Key] = ()) -> str:
    """The episode whose id starts so.

    Args:
        view: where to look.
        prefix: the beginning of an id.
        withheld: keys that count beside the rows.

    Raises:
        StoreNotFound: none does.
        ConfigError: several do.
    """
    found = sorted({key.episode_id for key in (*view.rows, *withheld) if key.episode_id.startswith(prefix)})
    if prefix in found:
        return prefix
    if not found:
        raise StoreNotFound(f"no episode id starts with {prefix!r} among {len(view)} branches",
                            fix="list them with: agentsdpo replay ls")
    if len(found) > 1:
        some = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise ConfigError(f"{len(found)} episode ids start with {prefix!r}: {some}", fix="give more of the id")
    return found[0]


def newest_episode(view: Snapshot) -> str:
    """The episode that was committed last. Raises StoreNotFound in an empty store."""
    if not view.rows:
        raise StoreNotFound("the store holds no episode", fix="append some, or look into another store")
    return max(view.rows.values(), key=lambda row: (row.ts_us, row.key)).key.episode_id


def counts(table: pa.Table, current: int | None = None) -> Json:
    """Sizes, versions, rewards and reasons of a table of rows; staleness is counted from version ``current``."""
    versions = table.column("policy_version_min").to_numpy()
    known = versions[versions >= 0]
    report: Json = {
        "branches": len(table), "episodes": len(set(table.column("episode_id").to_pylist())),
        "groups": len(set(table.column("group_id").to_pylist())),
        **{name: int(table.column(f"n_{name}").to_numpy().sum()) for name in ("tokens", "sampled", "trainable")},
        "trainable_branches": table.column("trainable").to_pylist().count(True),
        "reward": spread(table.column("reward").drop_null().to_numpy()),
        "policy_version": spread(known),
        **{name: tally(table.column(name)) for name in ("status", "stop_reason", "untrainable_reason")}}
    if current is not None:
        report["staleness"] = spread(current - known)
    return report


def spread(values: np.ndarray) -> Json:
    """``n``, and of at least one value ``min``, ``mean``, ``p95`` and ``max``.

    >>> spread(np.array([1, 3]))
    {'n': 2, 'min': 1.0, 'mean': 2.0, 'p95': 2.9, 'max': 3.0}
    """
    if not len(values):
        return {"n": 0}
    return {"n": len(values), "min": float(values.min()), "mean": float(values.mean()),
            "p95": round(float(np.percentile(values, 95)), 6), "max": float(values.max())}


def tally(column: pa.ChunkedArray) -> dict[str, int]:
    """How often each value stands there, the most frequent first; nulls are left out."""
    found = Counter(map(str, column.drop_null().to_pylist()))
    return dict(sorted(found.items(), key=lambda each: (-each[1], each[0])))


def grouped(table: pa.Table, names: Sequence[str], current: int | None = None) -> list[Json]:
    """:func:`counts` for every combination of values of some columns, in order of the values."""
    names = [column(name, table) for name in names]
    values = list(zip(*(table.column(name).to_pylist() for name in names), strict=True))
    places: dict[tuple[Any, ...], list[int]] = {}
    for i, value in enumerate(values):
        places.setdefault(value, []).append(i)
    order = sorted(places, key=lambda value: [(v is None, v) for v in value])
    return [{**dict(zip(names, value, strict=True)), **counts(table.take(places[value]), current)} for value in order]


def segments(view: Snapshot) -> dict[str, Located]:
    """One row of every segment file that holds a live row, by path."""
    return {row.path: row for row in sorted(view.rows.values(), key=lambda row: row.key)}


def column_sizes(view: Snapshot) -> list[Json]:
    """Type, encodings, bytes on disk and bytes per token of every column, in the order of the schema.

    Raises:
        CorruptionError: the footer of a segment is not the one that was written.
    """
    found: dict[str, Json] = {field.name: {"column": field.name, "type": str(field.type), "encodings": set(),
                                           "bytes": 0, "raw_bytes": 0} for field in SCHEMA}
    for row in segments(view).values():
        with open_segment(view.storage, row) as file:
            for group in range(file.num_row_groups):
                meta = file.metadata.row_group(group)
                for i in range(meta.num_columns):
                    _add_column(found, meta.column(i))
    tokens = sum(row.n_tokens for row in view.rows.values())
    return [{**each, "encodings": sorted(each["encodings"]), "bytes_per_token": each["bytes"] / max(tokens, 1)}
            for each in found.values()]


def _add_column(found: dict[str, Json], chunk: Any) -> None:
    """Count one column of one row group; columns of a newer release get a line of their own."""
    name = chunk.path_in_schema.partition(".")[0]
    into = found.setdefault(name, {"column": name, "type": "unknown", "encodings": set(), "bytes": 0, "raw_bytes": 0})
    into["bytes"] += chunk.total_compressed_size
    into["raw_bytes"] += chunk.total_uncompressed_size
    into["encodings"] |= set(chunk.encodings) - {"RLE"}
