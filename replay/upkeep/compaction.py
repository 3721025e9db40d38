"""Compaction: many small files become few large ones, sorted as the learner draws; not a byte of a row changes.

The plan is made from the log, the inputs are verified (bytes, page checksums, hashes of every row), the outputs are
written and verified, and one ``replace`` entry moves all rows at once. Whoever takes over meanwhile takes the slot that
entry needs: the loser stops, and what it wrote are files that nothing names. Inputs are deleted by ``gc``, later.
"""

import hashlib
import os
import socket
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import attrgetter

import pyarrow as pa

from agentsdpo.errors import ConfigError, CorruptionError, StoreError
from agentsdpo.replay import archive
from agentsdpo.replay.folding import Fold
from agentsdpo.replay.ids import uuid7
from agentsdpo.replay.log import MAINT, Located, check_entry, entry_path, located
from agentsdpo.replay.schema import SCHEMA, conform
from agentsdpo.replay.segment import encode_groups, group_bounds, open_segment
from agentsdpo.replay.storage import Storage, read_whole
from agentsdpo.replay.store import ReplayStore
from agentsdpo.replay.upkeep.inspection import GroupCheck, inspect
from agentsdpo.replay.upkeep.maintain import commit, fold
from agentsdpo.replay.upkeep.pinned import clock_us
from agentsdpo.replay.upkeep.reclaim import COMPACTED
from agentsdpo.types import Json

_HELD = 8
"""Decoded row groups kept while rows are gathered."""
_DEAD = 0.25
"""Share of evicted tokens from which a compacted file is written anew."""


class StoreLocked(StoreError):
    """Somebody else is doing the work that was asked for."""

    exit_code = 5


@dataclass(frozen=True, slots=True)
class CompactReport:
    """What one run did, or would do.

    Attributes:
        inputs, outputs: paths; no outputs on a dry run.
        skipped: files with columns of a newer release, which only that may rewrite.
        rows: moved.
        bytes_before, bytes_after: of inputs and outputs.
        archived: closed streams packed into one file.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    skipped: tuple[str, ...]
    rows: int
    bytes_before: int
    bytes_after: int
    archived: int
    dry_run: bool

    def as_json(self) -> Json:
        """For the command line."""
        return asdict(self)


def compact(store: ReplayStore, *, target_bytes: int = 128 << 20, max_row_groups: int = 512, dry_run: bool = False,
            purge: bool = False, takeover_after_s: float = 60.0, sole_maintainer: bool = False) -> CompactReport:
    """Rewrite small files, and compacted ones that hold many evicted rows; pack closed streams; fold the log.

    Rows are sorted by (policy_version_min, group_id, episode_id); a row group is closed at 65,536 tokens or 256 rows.

    Args:
        store: where.
        target_bytes: size of an output, about; files from half of this on are left alone.
        max_row_groups: of one output.
        dry_run: only say what would be rewritten.
        purge: rewrite every file that holds an evicted row, so that ``gc`` can delete the last of it.
        takeover_after_s: when another compaction under way has shown no life for so long, by the store's clock, it is
            taken over.
        sole_maintainer: see :func:`~agentsdpo.replay.upkeep.maintain.commit`.

    Raises:
        StoreLocked: another compaction is under way.
        WriterFenced: this one was taken over; nothing was changed.
        CorruptionError: an input is not what was committed; nothing was changed.
        StoreError: rows were evicted or shown again meanwhile, or the storage failed; nothing was changed.
    """
    if target_bytes <= 0 or max_row_groups <= 0:
        raise ConfigError(f"target_bytes={target_bytes}, max_row_groups={max_row_groups}", fix="make both positive")
    state = store.fold()
    plan = _Plan(store.storage, state, target_bytes, max_row_groups, 0.0 if purge else _DEAD)
    streams = sorted(state.closed - state.archived.keys())
    report = CompactReport(tuple(plan.inputs), (), tuple(plan.skipped), len(plan.rows), plan.size, 0, len(streams),
                           dry_run)
    if dry_run or not (plan.inputs or streams):
        return report
    epoch = _take_over(store, takeover_after_s, sole_maintainer)
    outputs: list[Json] = []
    try:
        if plan.inputs:
            outputs = plan.write()
            commit(store, lambda now: plan.operation(now, outputs), epoch=epoch, sole_maintainer=sole_maintainer)
        _archive(store, streams, epoch, sole_maintainer)
    finally:
        _release(store, epoch, sole_maintainer)
    fold(store)
    return CompactReport(report.inputs, tuple(out["path"] for out in outputs), report.skipped, report.rows,
                         report.bytes_before, sum(out["bytes"] for out in outputs), report.archived, dry_run)


# ----------------------------------------------------------------------------------------------------- one at a time


def _take_over(store: ReplayStore, after_s: float, sole_maintainer: bool) -> int:
    """Begin an epoch of maintenance. Heartbeats only spare needless fights: slots alone keep the log right."""
    def plan(state: Fold) -> list[Json]:
        if state.busy is not None and _seen_alive(store.storage, state, after_s):
            raise StoreLocked(f"another compaction of {store.storage.uri} is under way (epoch {state.epoch})",
                              fix=f"wait for it; it is taken over when it shows no life for {after_s:g} s")
        return [{"op": "takeover", "epoch": state.epoch + 1, "host": socket.gethostname(), "pid": os.getpid()}]

    return commit(store, plan, sole_maintainer=sole_maintainer)[0]["epoch"]


def _seen_alive(storage: Storage, state: Fold, after_s: float) -> bool:
    """Whether the compaction under way began, or wrote an output, less than ``after_s`` ago."""
    begun = entry_path(MAINT, state.busy or 0)
    signs = [info.mtime_us for info in storage.list(f"log/{MAINT}") if info.path == begun]
    signs += [info.mtime_us for info in storage.list(COMPACTED) if info.path not in state.files]
    return max(signs, default=0) > clock_us(storage) - after_s * 1e6


def _release(store: ReplayStore, epoch: int, sole_maintainer: bool) -> None:
    """Let the next compaction begin at once, whether this one came to its end or not."""
    def plan(state: Fold) -> list[Json]:
        mine = state.epoch == epoch and state.busy is not None
        return [{"op": "takeover", "epoch": epoch, "released": True}] if mine else []

    commit(store, plan, sole_maintainer=sole_maintainer)


# ---------------------------------------------------------------------------------------------------------- rewriting


class _Plan:
    """Which rows go where, from the log alone; then the reading, checking and writing of them."""

    def __init__(self, storage: Storage, state: Fold, target_bytes: int, max_row_groups: int, most_dead: float) -> None:
        self._storage, self._max_groups = storage, max_row_groups
        live, dead = defaultdict[str, list[Located]](list), defaultdict[str, int](int)
        for key, row in state.rows.items():
            if key in state.evicted:
                dead[row.path] += max(row.n_tokens, 1)  # one of messages alone is one, too
            else:
                live[row.path].append(row)
        apart = {state.place(row).path for rows in state.conflicts.values() for row in rows}
        chosen = [path for path, rows in live.items()
                  if path not in apart and (not path.startswith(f"{COMPACTED}/") or _holds(rows, dead[path]) > most_dead
                                            or state.files[path].size < target_bytes / 2)]
        self.skipped = [path for path in chosen if not self._known(live[path][0])]
        inputs = sorted(set(chosen) - set(self.skipped))
        self.inputs = [] if len(inputs) < 2 and not any(dead[path] for path in inputs) else inputs
        self.files = {path: state.files[path] for path in self.inputs}
        self.size = sum(segment.size for segment in self.files.values())
        self.rows = sorted((row for path in self.inputs for row in live[path]), key=_order)
        tokens = sum(row.n_tokens for row in self.rows) + sum(dead[path] for path in self.inputs)
        self._target_tokens = max(1, int(target_bytes / max(self.size / max(tokens, 1), 1e-9)))
        self._held: dict[tuple[str, int], pa.Table] = {}

    def _known(self, row: Located) -> bool:
        """Whether this release knows all columns of a file; it must not drop what a newer one wrote."""
        with open_segment(self._storage, row) as file:
            return _fields(file.schema_arrow) <= _fields(SCHEMA)

    def write(self) -> list[Json]:
        """Verify all inputs, then write all outputs; returns their operations."""
        for path, segment in self.files.items():
            if hashlib.sha256(read_whole(self._storage, path)).hexdigest() != segment.sha256:
                raise CorruptionError(f"{self._storage.uri}/{path} is not the file that was committed", fix=_MEND)
        return [self._write_one(groups) for groups in self._outputs()]

    def _outputs(self) -> Iterator[list[list[Located]]]:
        """Rows of every output, by row group."""
        bounds = group_bounds([row.n_tokens for row in self.rows])
        output, tokens = list[list[Located]](), 0
        for start, stop in bounds:
            output.append(self.rows[start:stop])
            tokens += sum(row.n_tokens for row in output[-1])
            if tokens >= self._target_tokens or len(output) >= self._max_groups:
                yield output
                output, tokens = [], 0
        if output:
            yield output

    def _write_one(self, groups: list[list[Located]]) -> Json:
        """Encode, decode again and compare with the log, then store one output."""
        data, op = encode_groups(self._gather(rows) for rows in groups)
        path = f"{COMPACTED}/{uuid7()}.parquet"
        placed = located({**op, "path": path}, 0)
        wanted = [row for rows in groups for row in rows]
        same = all((new.key, new.content_sha256, new.tokens_sha256) == (old.key, old.content_sha256, old.tokens_sha256)
                   for new, old in zip(placed, wanted, strict=True))
        if not same or inspect(data, placed, op["sha256"]):
            raise CorruptionError(f"rows read for {path} are not those that were committed", fix=_MEND)
        self._storage.create(path, data)
        return {name: value for name, value in op.items() if name != "op"} | {"path": path}

    def _gather(self, rows: list[Located]) -> pa.Table:
        """The rows of one new row group in order, each verified."""
        parts, order = [], []
        by_group = sorted(enumerate(rows), key=lambda item: (item[1].path, item[1].row_group))
        for _, members in groupby(by_group, key=lambda item: (item[1].path, item[1].row_group)):
            chosen = list(members)
            table = self._group(chosen[0][1])
            check = GroupCheck(table)
            for _, row in chosen:
                damage = check.damage(row)
                if damage:
                    raise CorruptionError(f"{self._storage.uri}/{row.path}, branch {row.key}: {damage.what}", fix=_MEND)
            parts.append(table.take([row.index for _, row in chosen]))
            order += [i for i, _ in chosen]
        place = sorted(range(len(order)), key=order.__getitem__)
        return pa.concat_tables(parts).take(place).combine_chunks()

    def _group(self, row: Located) -> pa.Table:
        """One decoded row group of an input."""
        at = (row.path, row.row_group)
        if at not in self._held:
            with open_segment(self._storage, row) as file:
                try:
                    self._held[at] = conform(file.read_row_group(row.row_group, use_threads=False))
                except (pa.ArrowException, OSError) as error:
                    where = f"{self._storage.uri}/{row.path}, row group {row.row_group}, branch {row.key}"
                    raise CorruptionError(f"{where} cannot be read: {error}", fix=_MEND) from error
            while len(self._held) > _HELD:
                self._held.pop(next(iter(self._held)))
        return self._held[at]

    def operation(self, now: Fold, outputs: list[Json]) -> list[Json]:
        """The ``replace``, if the log still says what it said when the plan was made."""
        inputs = set(self.inputs)
        there = {key: row for key, row in now.rows.items() if row.path in inputs and key not in now.evicted}
        lost = [out["path"] for out in outputs if out["path"] in now.gone]
        if lost or there != {row.key: row for row in self.rows} or inputs & now.gone.keys():
            raise StoreError("rows were evicted, shown again or moved while they were compacted; nothing was changed",
                             fix="run it again")
        return [{"op": "replace", "in": self.inputs, "out": outputs}]


_MEND = "nothing was changed; find out more with: agentsdpo replay verify --level full"
_order = attrgetter("version_min", "group_id", "key")


def _holds(rows: list[Located], dead: int) -> float:
    """Share of evicted tokens in a file with these live rows and so many tokens of evicted ones."""
    return dead / max(dead + sum(row.n_tokens for row in rows), 1)


def _fields(schema: pa.Schema | pa.StructType, prefix: str = "") -> set[str]:
    """Names of all columns and of the fields inside them."""
    found = set()
    for field in schema:
        kind = field.type.value_type if pa.types.is_list(field.type) else field.type
        found.add(prefix + field.name)
        if pa.types.is_struct(kind):
            found |= _fields(kind, f"{prefix}{field.name}.")
    return found


# ------------------------------------------------------------------------------------------------------------ archive


def _archive(store: ReplayStore, streams: list[str], epoch: int, sole_maintainer: bool) -> None:
    """Pack closed streams into one file and say so in the log; their own files are deleted by ``gc``."""
    if not streams:
        return
    storage, heads, packed = store.storage, {}, []
    for writer in streams:
        last, prev, entries = store.fold().vector[writer][0], "", []
        for seq in range(last + 1):
            entries.append(read_whole(storage, entry_path(writer, seq)))
            prev = check_entry(entries[-1], entry_path(writer, seq), writer, seq, prev)["sha"]
        heads[writer] = [last, prev]
        packed.append(entries)
    data, path = archive.pack(packed), f"log/{archive.FOLDER}/{uuid7()}.jsonl"
    storage.create(path, data)
    op = {"op": "archive", "path": path, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(),
          "streams": heads}
    commit(store, lambda now: [] if now.archived.keys() & heads.keys() else [op], epoch=epoch,
           sole_maintainer=sole_maintainer)
