"""SQL over a store's live rows, through DuckDB (extra ``sql``)."""

from collections.abc import Iterable
from importlib.util import find_spec
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs as pa_fs

from agentsdpo.errors import ConfigError, CorruptionError
from agentsdpo.replay.cli.summary import segments
from agentsdpo.replay.ids import Key
from agentsdpo.replay.overlay import Slot
from agentsdpo.replay.schema import GIVEN, SCHEMA
from agentsdpo.replay.segment import open_segment
from agentsdpo.replay.snapshot import Snapshot
from agentsdpo.replay.storage import LocalStorage, mend

if TYPE_CHECKING:
    import duckdb

_LATE = ("reward", "reward_status", "rewards_json")
_VIEW = """CREATE {temporary} VIEW branches AS SELECT s.* EXCLUDE (_path) REPLACE (
             CASE WHEN l._late THEN l._reward ELSE s.reward END AS reward,
             CASE WHEN l._late THEN l._reward_status ELSE s.reward_status END AS reward_status,
             CASE WHEN l._late THEN l._rewards_json ELSE s.rewards_json END AS rewards_json), l.label, l.t_stored
           FROM {segments} s JOIN {live} l ON s._path = l._path AND s.episode_id = l.episode_id
             AND s.branch_id = l.branch_id AND s.attempt = l.attempt"""
"""Live rows with their latest rewards and labels, and when each was committed."""


def connect(view: Snapshot) -> "duckdb.DuckDBPyConnection":
    """A DuckDB connection in memory with the view ``branches``: the live rows of a snapshot, all columns.

    Columns and rows that a query does not need are not read; page checksums are verified on what is. Nothing can be
    written: neither the store nor any other file.

    Raises:
        ConfigError: duckdb is not installed.
        CorruptionError: the footer of a segment is not the one that was written.
    """
    connection = _duckdb().connect(":memory:", config={"enable_external_access": "false"})
    connection.register("_segments", _dataset(view))
    connection.register("_live", _live(view))
    connection.execute(_VIEW.format(temporary="TEMP", segments="_segments", live="_live"))
    return connection


def run(view: Snapshot, query: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Column names, each one once, and rows of one query.

    Raises:
        ConfigError: DuckDB refuses it, or duckdb is not installed.
        CorruptionError: a page is not as it was written.
    """
    with connect(view) as connection:
        try:
            answer = connection.execute(query)
            if answer is None:
                raise ConfigError("the query is empty", fix='ask something, as in "SELECT count(*) FROM branches"')
            return _apart(column[0] for column in answer.description or []), answer.fetchall()
        except _duckdb().Error as error:
            if "CRC" in str(error):
                raise CorruptionError(f"a segment of {view.storage.uri} is damaged: {error}",
                                      fix=mend(view.storage.uri)) from error
            raise ConfigError(f"DuckDB refuses the query: {str(error).splitlines()[0]}",
                              fix="select from the view branches; its columns are listed by: agentsdpo replay schema"
                              ) from error


def _apart(names: Iterable[str]) -> list[str]:
    """The names of columns; where two are the same, the later one gets a number.

    >>> _apart(["a", "b", "a"])
    ['a', 'b', 'a_1']
    """
    found: list[str] = []
    for name in names:
        more = (f"{name}_{i}" for i in count(1))
        found.append(next(one for one in chain([name], more) if one not in found))
    return found


def create_view(view: Snapshot, path: Path) -> None:
    """A DuckDB database with the view ``branches`` over the files of a local store, as they are in this snapshot.

    Raises:
        ConfigError: the path is taken or cannot be made, the store is not local, or duckdb is not installed.
    """
    duckdb = _duckdb()
    if not isinstance(view.storage, LocalStorage):
        raise ConfigError(f"{view.storage.uri} is no local folder", fix="use agentsdpo replay sql, or copy the store "
                          "with agentsdpo replay fork")
    if path.exists():
        raise ConfigError(f"{path} exists", fix="name a new file; a view shows one snapshot and is made anew")
    root = view.storage.root.resolve()
    files = [str(root / name) for name in segments(view)]
    live = _live(view, prefix=f"{root}/")
    try:
        database = duckdb.connect(str(path))
    except duckdb.IOException as error:
        raise ConfigError(f"{path} cannot be made: {str(error).splitlines()[0]}",
                          fix="name a file in a folder that exists, with room and permission") from error
    with database as connection:
        connection.register("_rows", live)
        connection.execute("CREATE TABLE live AS SELECT * FROM _rows")
        listed = ", ".join("'" + name.replace("'", "''") + "'" for name in files)
        source = (f"(SELECT * EXCLUDE (filename), filename AS _path FROM read_parquet([{listed}], filename=true, "
                  "union_by_name=true))") if files else "(SELECT *, '' AS _path FROM _none)"
        if not files:
            connection.register("_empty", SCHEMA.empty_table())
            connection.execute("CREATE TABLE _none AS SELECT * FROM _empty")
        connection.execute(_VIEW.format(temporary="", segments=source, live="live"))


def _duckdb() -> Any:
    """The module, or how to get it."""
    missing = [name for name in ("duckdb", "pytz") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"SQL needs {missing[0]}, which is not installed", fix="pip install 'agentsdpo[sql]'")
    import duckdb

    return duckdb


def _live(view: Snapshot, prefix: str = "") -> pa.Table:
    """Key and file of every live row, what is given to it, and its reward where that came late."""
    rows = [view.rows[key] for key in sorted(view.rows)]
    kinds = {name: SCHEMA.field(name).type for name in Key._fields}
    columns = {name: pa.array([getattr(row.key, name) for row in rows], kind) for name, kind in kinds.items()}
    bare = pa.table({name: pa.nulls(len(rows), SCHEMA.field(name).type) for name in _LATE})
    given = [view.late.find(Slot("reward", row.key), row) is not None for row in rows]
    graded = view.stored([row.key for row, has in zip(rows, given, strict=True) if has], ["rewards_json"])
    own = iter(graded.column("rewards_json").to_pylist())
    bare = bare.set_column(bare.schema.get_field_index("rewards_json"), "rewards_json",
                           pa.array([next(own) if has else None for has in given], pa.string()))
    late = view.late.onto_table(bare, rows)
    return pa.table({"_path": pa.array([prefix + row.path for row in rows], pa.string()), **columns,
                     **{name: late.column(name) for name in GIVEN.names}, "_late": pa.array(given, pa.bool_()),
                     **{f"_{name}": late.column(name) for name in _LATE}})


def _dataset(view: Snapshot) -> ds.Dataset:
    """All live row groups, each row with the file it stands in; checksums are verified when a page is read."""
    options = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
    kind = ds.ParquetFileFormat(default_fragment_scan_options=options)
    groups: dict[str, set[int]] = {}
    for row in view.rows.values():
        groups.setdefault(row.path, set()).add(row.row_group)
    fragments, schema = [], SCHEMA
    for path, row in segments(view).items():
        with open_segment(view.storage, row) as file:
            schema = pa.unify_schemas([schema, file.schema_arrow])
        fragments.append(kind.make_fragment(
            *_source(view, path), partition_expression=ds.field("_path") == path,  # pyright: ignore
            row_groups=sorted(groups[path])))
    schema = schema.append(pa.field("_path", pa.string()))
    return ds.FileSystemDataset(fragments, schema, kind) if fragments else ds.dataset(schema.empty_table())


def _source(view: Snapshot, path: str) -> tuple[Any, ...]:
    """What a fragment reads from: a local path, opened when it is needed, or an open file elsewhere."""
    if isinstance(view.storage, LocalStorage):
        return str(view.storage.at(path)), pa_fs.LocalFileSystem()
    return (view.storage.open(path),)
