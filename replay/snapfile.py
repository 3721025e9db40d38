"""The folded snapshot: what log and overlays say, in two Parquet files, so that opening a store reads neither.

``snap/<uuid7>.parquet`` has a row per key with ``state`` live, evicted, outlived or conflict, where the row is and what
it must hash to; the positions in all streams, the overlays and what maintenance remembers stand in the metadata of its
schema. ``snap/<uuid7>-late.parquet`` has a row per late value that counts, and the overlay it is from.
``snap/LATEST.json`` names the newest file and its hash. Both are disposable: damaged ones are passed over with a
warning and the log is read instead. What they say about the log is believed only if the log still says so.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from agentsdpo.errors import CorruptionError
from agentsdpo.replay import archive
from agentsdpo.replay.canonical import canonical_json
from agentsdpo.replay.ids import Key, uuid7
from agentsdpo.replay.log import Evicted, Located, Vector, entry_path
from agentsdpo.replay.overlay import Late, Overlays, Slot
from agentsdpo.replay.storage import Storage
from agentsdpo.types import Json

if TYPE_CHECKING:
    from agentsdpo.replay.folding import Fold

LATEST = "snap/LATEST.json"
REBUILD = "write a new one: agentsdpo replay snapshot"
_META = b"agentsdpo.fold"
_PLACE = [field.name for field in fields(Located) if field.name != "key"]
_INTS = {"row_group", "index", "size", "footer_len", "n_tokens", "n_trainable", "version_min", "version_max",
         "group_size", "ts_us"}
_BOOLS = {"trainable", "train_allowed"}
SCHEMA = pa.schema([
    ("episode_id", pa.string()), ("branch_id", pa.int32()), ("attempt", pa.int32()), ("state", pa.string()),
    ("reason", pa.string()), ("evicted_by", pa.int64()), ("moved", pa.bool_()), ("file_sha256", pa.string()),
    *((name, pa.int64() if name in _INTS else pa.bool_() if name in _BOOLS else pa.string()) for name in _PLACE)])
"""Columns of a folded snapshot. ``size`` and ``file_sha256`` are those of the data file ``path``."""
_PLAIN = ["episode_id", "file_sha256", "footer_sha256", "tokens_sha256", "content_sha256"]
LATE = pa.schema([
    ("kind", pa.string()), ("episode_id", pa.string()), ("branch_id", pa.int32()), ("attempt", pa.int32()),
    ("by", pa.string()), ("revision", pa.int64()), ("path", pa.string()), ("row", pa.int64()),
    ("target_sha256", pa.string()), ("value", pa.string())])
"""Columns of the late values: slot, then what counts there."""


# ----------------------------------------------------------------------------------------------------- writing


def write(fold: "Fold") -> str:
    """Write what a fold holds and make it the latest; returns the path of the file."""
    path = f"snap/{uuid7()}.parquet"
    data = _encode(fold, _write_late(fold, beside(path)))
    fold.storage.create(path, data)
    about: Json = {"v": 1, "file": path, "bytes": data.size, "sha256": hashlib.sha256(data).hexdigest(),
                   "rows": len(fold.live())}
    fold.storage.replace(LATEST, canonical_json(about | {"sha": _sha(about)}))
    return path


def beside(path: str) -> str:
    """Where the late values of a folded snapshot stand, if it has any.

    >>> beside("snap/7.parquet")
    'snap/7-late.parquet'
    """
    return path.removesuffix(".parquet") + "-late.parquet"


def _write_late(fold: "Fold", path: str) -> Json | None:
    """Write the late values that count; None where there are none, or an overlay is damaged: its readers say so."""
    try:
        found = late(fold).read(fold.overlays, fold.outdone)
    except CorruptionError:
        return None
    if not found.latest:
        return None
    rows = [(slot.kind, *slot.key, slot.by, *value) for slot, value in sorted(found.latest.items())]
    table = pa.Table.from_pylist([dict(zip(LATE.names, row, strict=True)) for row in rows], LATE)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    data = sink.getvalue()
    fold.storage.create(path, data)
    return {"file": path, "sha256": hashlib.sha256(data).hexdigest()}


def _sha(about: Json) -> str:
    return hashlib.sha256(canonical_json({name: value for name, value in about.items() if name != "sha"})).hexdigest()


def _encode(fold: "Fold", about_late: Json | None) -> pa.Buffer:
    """Parquet bytes of a fold."""
    apart = [row for rows in fold.conflicts.values() for row in map(fold.place, rows)]
    rows = sorted(chain(apart, (row for key, row in fold.rows.items() if key not in fold.conflicts)),
                  key=attrgetter("key"))
    known = {path: segment.sha256 for path, segment in fold.files.items()}
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in _PLACE}
    columns |= {name: [getattr(row.key, name) for row in rows] for name in Key._fields}
    hidden = [fold.evicted.get(row.key) for row in rows]
    columns["state"] = ["conflict" if row.key in fold.conflicts else "evicted" if gone else
                        "outlived" if row.key in fold.outlived else "live"
                        for row, gone in zip(rows, hidden, strict=True)]
    columns["reason"] = [gone and gone.reason for gone in hidden]
    columns["evicted_by"] = [gone and gone.seq for gone in hidden]
    columns["moved"] = [row.key in fold.moved and fold.moved[row.key].path == row.path for row in rows]
    columns["file_sha256"] = [known.get(row.path) for row in rows]
    table = pa.Table.from_pydict(columns, SCHEMA.with_metadata({
        _META: canonical_json(_rest(fold, columns["path"]) | {"late": about_late})}))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True,
                   use_dictionary=[name for name in SCHEMA.names if name not in _PLAIN])  # pyright: ignore[reportArgumentType]
    return sink.getvalue()


def _rest(fold: "Fold", used: list[str]) -> Json:
    """What a fold holds besides rows."""
    packs: dict[str, list[Any]] = {}
    for writer, place in fold.archived.items():
        packs.setdefault(place.path, [place.size, place.sha256, []])[2].append(writer)
    empty = fold.files.keys() - set(used)
    return {"v": 1, "vector": fold.vector, "closed": sorted(fold.closed), "overlays": fold.overlays,
            "gone": fold.gone, "beaten": sorted(fold.beaten), "outdone": sorted(fold.outdone), "archives": packs,
            "closures": fold.closures, "epoch": fold.epoch, "busy": fold.busy,
            "files": {path: fold.files[path] for path in sorted(empty)}}


# ----------------------------------------------------------------------------------------------------- reading


def restore(fold: "Fold", upto: Mapping[str, tuple[int, str]] | None, packs: archive.Packs) -> None:
    """Fill an empty fold from the latest folded snapshot, where there is one that is not beyond ``upto``.

    Raises:
        CorruptionError: an entry it was folded from is not in the log any more.
    """
    try:
        table = load(fold.storage)
        if table is None:
            return
        rest = json.loads(table.schema.metadata[_META])
        vector: Vector = {writer: (seq, sha) for writer, (seq, sha) in rest["vector"].items()}
    except (CorruptionError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"the folded snapshot of {fold.storage.uri} is damaged, the whole log is read instead: {error}",
                      RuntimeWarning, stacklevel=2)
        return
    if upto is not None and any(seq > upto.get(writer, (-1, ""))[0] for writer, (seq, _) in vector.items()):
        return
    _fill(fold, table, rest, vector)
    for writer in vector.keys() - fold.closed - fold.archived.keys():
        _check_head(fold, writer, packs)


def load(storage: Storage) -> pa.Table | None:
    """The latest folded snapshot, None when there is none.

    Raises:
        CorruptionError: it is not what was written, or of a newer release.
    """
    about = _about(storage)
    if about is None:
        return None
    return _read(storage, about["file"], about["sha256"])


def _read(storage: Storage, path: str, sha: str) -> pa.Table:
    """One of the two files. Raises CorruptionError."""
    try:
        data = storage.read(path)
    except FileNotFoundError:
        raise CorruptionError(f"{storage.uri}/{path} is missing though {LATEST} leads to it", fix=REBUILD) from None
    if hashlib.sha256(data).hexdigest() != sha:
        raise CorruptionError(f"{storage.uri}/{path} is not the file that was written", fix=REBUILD)
    with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:  # read_table loads pandas
        return file.read(use_threads=False)


def late(fold: "Fold") -> Overlays:
    """The late values beside the folded snapshot that a fold began with; none where they cannot be had.

    They are those of all overlays the snapshot knew; while one of these is given up, they are not believed.
    """
    none = Overlays(fold.storage)
    if fold.late is None:
        return none
    (about, paths), known = fold.late, {op["path"]: op for ops in fold.overlays.values() for op in ops}
    if not paths <= known.keys():
        return none
    try:
        table = _read(fold.storage, about["file"], about["sha256"])
        columns = [table.column(name).to_pylist() for name in LATE.names]
    except (CorruptionError, pa.ArrowException, KeyError) as error:
        warnings.warn(f"the late values beside the folded snapshot of {fold.storage.uri} are damaged, all overlays are "
                      f"read instead: {error}", RuntimeWarning, stacklevel=2)
        return none
    values = {Slot(kind, Key(*key), by): Late(*value) for kind, *key, by, value in zip(
        *columns[:5], zip(*columns[5:], strict=True), strict=True)}
    return replace(none, latest=values, files={path: known[path] for path in paths})


def latest(storage: Storage) -> str | None:
    """Path of the latest folded snapshot, None when there is none or nobody can tell."""
    try:
        about = _about(storage)
    except CorruptionError:
        return None
    return about["file"] if about else None


def _about(storage: Storage) -> Json | None:
    """Contents of ``LATEST.json``, None when there is none. Raises CorruptionError."""
    try:
        about = json.loads(storage.read(LATEST))
        whole = about["v"] == 1 and about["sha"] == _sha(about)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptionError(f"{storage.uri}/{LATEST} cannot be read: {error!r}", fix=REBUILD) from error
    if not whole:
        raise CorruptionError(f"{storage.uri}/{LATEST} is not what was written", fix=REBUILD)
    return about


def _fill(fold: "Fold", table: pa.Table, rest: Json, vector: Vector) -> None:
    """Everything :func:`write` took from a fold."""
    columns = {name: table.column(name).to_pylist() for name in table.schema.names}
    keys = list(map(Key, *(columns[name] for name in Key._fields)))
    rows = list(map(Located, keys, *(columns[name] for name in _PLACE)))
    fold.put_back(rows, columns["state"], columns["moved"])
    for row, seq, reason in zip(rows, columns["evicted_by"], columns["reason"], strict=True):
        if seq is not None:
            fold.evicted[row.key] = Evicted(seq, reason)
    fold.note_files(zip(columns["path"], columns["size"], columns["file_sha256"], strict=True))
    fold.note_files((path, *segment) for path, segment in rest["files"].items())
    fold.vector, fold.epoch, fold.busy, fold.closed = vector, rest["epoch"], rest["busy"], set(rest["closed"])
    fold.overlays, fold.gone, fold.closures = rest["overlays"], rest["gone"], rest["closures"]
    fold.beaten = set(rest["beaten"])
    if rest.get("late"):  # earlier builds wrote none
        fold.late = rest["late"], frozenset(op["path"] for ops in fold.overlays.values() for op in ops)
    fold.outdone = {(Key(*key), sha) for key, sha in rest.get("outdone", ())}  # earlier builds wrote none
    fold.archived = {writer: archive.Place(path, size, sha, *vector[writer])
                     for path, (size, sha, writers) in rest["archives"].items() for writer in writers}


def _check_head(fold: "Fold", writer: str, packs: archive.Packs) -> None:
    """The entry a stream was folded up to is still in the log, or in the archive it was packed into since."""
    (seq, sha), storage = fold.vector[writer], fold.storage
    try:
        raw = storage.read(entry_path(writer, seq))
    except FileNotFoundError:
        raw = fold.packed(writer, seq, packs)
    try:
        there = json.loads(raw).get("sha")
    except (ValueError, AttributeError):
        there = None
    if there != sha:
        raise CorruptionError(
            f"{storage.uri}/{entry_path(writer, seq)} is not the entry that was there when the log was folded: the log "
            "was truncated or changed", fix="restore it from a backup; or, to go on with what the log holds now, write "
            "a new folded snapshot: agentsdpo replay snapshot --anew")
