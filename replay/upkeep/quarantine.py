"""Quarantine: take damaged files out of the way and keep what is whole in them.

Whole rows of a damaged data file are written to a new one; the others are evicted, with their groups; one entry of the
maintenance stream says both. Then the file moves to ``quarantine/``, where a person may look at it. If it can be
restored, put it back under its old path and ``unevict``. Late values of a damaged overlay are given up.
"""

from collections.abc import Iterator, Sequence

import pyarrow as pa

from agentsdpo.errors import CorruptionError, StoreError
from agentsdpo.replay.folding import Fold
from agentsdpo.replay.ids import Key, uuid7
from agentsdpo.replay.log import Located
from agentsdpo.replay.schema import conform
from agentsdpo.replay.segment import encode_groups, open_segment
from agentsdpo.replay.storage import Storage
from agentsdpo.replay.store import ReplayStore
from agentsdpo.replay.upkeep.inspection import GroupCheck
from agentsdpo.replay.upkeep.logwalk import Problem, Walk
from agentsdpo.replay.upkeep.maintain import commit, whole_groups
from agentsdpo.replay.upkeep.reclaim import COMPACTED
from agentsdpo.replay.upkeep.verification import REASON
from agentsdpo.types import Json


def set_aside(store: ReplayStore, walk: Walk, problems: Sequence[Problem], *,
              sole_maintainer: bool = False) -> tuple[tuple[str, ...], int, int]:
    """Move the damaged data files and overlays among the problems to ``quarantine/``.

    Returns:
        Their paths, how many branches were saved, and how many were lost.

    Raises:
        CorruptionError: the log itself is damaged, so that nobody can tell what is in the files.
        StoreError: the storage failed.
    """
    if walk.problems:
        raise CorruptionError(f"the log of {store.storage.uri} is damaged ({walk.problems[0].path}): nothing was moved",
                              fix="restore the log first")
    named = {problem.path for problem in problems}
    overlays = sorted(op["path"] for ops in walk.state.overlays.values() for op in ops if op["path"] in named)
    data = sorted(path for path in named if path in walk.state.files)
    saved, lost = set[Key](), set[Key]()
    for path in data:
        kept, gone = _give_up(store, path, sole_maintainer)
        saved, lost = saved | kept, lost | gone
    if overlays:
        commit(store, lambda _: [{"op": "gc", "paths": overlays}], sole_maintainer=sole_maintainer)
    for path in (*data, *overlays):
        if store.storage.exists(path):
            store.storage.move(path, f"quarantine/{path}")
    return (*data, *overlays), len(saved - lost), len(lost)


def _give_up(store: ReplayStore, path: str, sole_maintainer: bool) -> tuple[set[Key], set[Key]]:
    """Save the whole rows of a file, evict the others with their groups, in one entry; returns both."""
    rows = _live(store.fold(), path)
    saved = _save(store.storage, path, rows)
    kept = {Key(*row["key"]) for row in saved["rows"]} if saved else set[Key]()
    gone = set[Key]()

    def plan(now: Fold) -> list[Json]:
        if _live(now, path) != rows or (saved and saved["path"] in now.gone):
            raise StoreError(f"rows of {path} were evicted, moved or reclaimed while it went into quarantine",
                             fix="run it again")
        lost = sorted(whole_groups(now.rows, [row.key for row in rows if row.key not in kept], store.storage.uri)
                      - now.evicted.keys())
        gone.clear()  # planned again where another was faster
        gone.update(lost)
        ops: list[Json] = [{"op": "replace", "in": [path], "out": [saved]}] if saved else []
        return ops + ([{"op": "evict", "keys": lost, "reason": f"{REASON}{path} is damaged"}] if lost else [])

    commit(store, plan, sole_maintainer=sole_maintainer)
    return kept, gone


def _live(state: Fold, path: str) -> list[Located]:
    """Live rows in a file."""
    return [row for key, row in sorted(state.rows.items()) if row.path == path and key not in state.evicted]


def _save(storage: Storage, path: str, rows: list[Located]) -> Json | None:
    """Write the rows that are whole to a file of their own; None when there are none."""
    tables = list(_whole(storage, rows))
    if not tables:
        return None
    data, op = encode_groups(tables)
    saved = f"{COMPACTED}/{uuid7()}.parquet"
    storage.create(saved, data)
    return {name: value for name, value in op.items() if name != "op"} | {"path": saved}


def _whole(storage: Storage, rows: list[Located]) -> Iterator[pa.Table]:
    """Per row group the rows that are what was committed, in the order they stand in."""
    if not rows:
        return
    try:
        file = open_segment(storage, rows[0])
    except CorruptionError:
        return  # missing, or its footer is damaged: nothing in it can be found
    for group in sorted({row.row_group for row in rows}):
        try:
            table = conform(file.read_row_group(group, use_threads=False))
        except (pa.ArrowException, OSError, ValueError, IndexError, CorruptionError):
            continue
        check = GroupCheck(table)
        good = sorted(row.index for row in rows if row.row_group == group and check.damage(row) is None)
        if good:
            yield table.take(good)
