"""Which branches a store can do without: too stale, too old, used up, or more than fits. Whole groups, always."""

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from agentsdpo.replay.ids import Key
from agentsdpo.replay.log import Located
from agentsdpo.replay.snapshot import Snapshot
from agentsdpo.replay.upkeep.maintain import unit


@dataclass(frozen=True)
class Bounds:
    """What a store is to keep; None is no bound.

    Attributes:
        max_staleness: policy versions the oldest token of a group may lie behind ``current``.
        current: policy version staleness is counted from; the newest in the store when None.
        before_us: groups whose newest row was committed before this time, microseconds UTC, are too old.
        max_bytes: of segment files; what was sampled by the oldest policies goes first.
        max_uses: draws, counted in ``uses``.
        uses: of each row so far.
    """

    max_staleness: int | None = None
    current: int | None = None
    before_us: int | None = None
    max_bytes: int | None = None
    max_uses: int | None = None
    uses: dict[Key, int] | None = None


def superfluous(view: Snapshot, bounds: Bounds, among: Collection[Key]) -> list[Key]:
    """Keys of the groups beyond some bound, ascending; groups without a key in ``among`` are never chosen."""
    groups = _groups(view, among)
    chosen = {name for name, rows in groups.items() if _stale(rows, bounds, view) or _old(rows, bounds)
              or _used(rows, bounds)}
    chosen |= _beyond(view, {name: rows for name, rows in groups.items() if name not in chosen}, chosen, groups, bounds)
    return sorted(row.key for name in chosen for row in groups[name])


def _groups(view: Snapshot, among: Collection[Key]) -> dict[tuple, list[Located]]:
    """All rows by group, of the groups that have one of these keys."""
    wanted = {unit(view.rows[key]) for key in among}
    groups: dict[tuple, list[Located]] = defaultdict(list)
    for row in view.rows.values():
        if unit(row) in wanted:
            groups[unit(row)].append(row)
    return groups


def newest(view: Snapshot) -> int:
    """The newest policy version that sampled a token of the store; -1 when none is known."""
    return max((row.version_max for row in view.rows.values()), default=-1)


def _stale(rows: list[Located], bounds: Bounds, view: Snapshot) -> bool:
    """Whether the oldest known version of a group is behind the bound."""
    if bounds.max_staleness is None:
        return False
    current = bounds.current if bounds.current is not None else newest(view)
    known = [row.version_min for row in rows if row.version_min >= 0]
    return bool(known) and current - min(known) > bounds.max_staleness


def _old(rows: list[Located], bounds: Bounds) -> bool:
    return bounds.before_us is not None and max(row.ts_us for row in rows) < bounds.before_us


def _used(rows: list[Located], bounds: Bounds) -> bool:
    """Whether every branch that can be trained on was drawn often enough."""
    if bounds.max_uses is None:
        return False
    uses = bounds.uses or {}
    counted = [uses.get(row.key, 0) for row in rows if row.trainable]
    return bool(counted) and min(counted) >= bounds.max_uses


def _beyond(view: Snapshot, left: dict[tuple, list[Located]], gone: Collection[tuple],
            groups: dict[tuple, list[Located]], bounds: Bounds) -> set[tuple]:
    """Groups to go until the rest of the store fits, the oldest policies first."""
    if bounds.max_bytes is None:
        return set()
    share = _bytes(view)
    total = sum(share.values()) - _sum(share, (row for name in gone for row in groups[name]))
    chosen = set()
    for name in sorted(left, key=lambda name: (min(row.version_min for row in left[name]), name)):
        if total <= bounds.max_bytes:
            break
        total -= _sum(share, left[name])
        chosen.add(name)
    return chosen


def _bytes(view: Snapshot) -> dict[Key, float]:
    """Bytes of each row: its share of the tokens of its file."""
    tokens: dict[str, int] = defaultdict(int)
    for row in view.rows.values():
        tokens[row.path] += max(row.n_tokens, 1)
    return {key: row.size * max(row.n_tokens, 1) / tokens[row.path] for key, row in view.rows.items()}


def _sum(share: dict[Key, float], rows: Iterable[Located]) -> float:
    return sum(share[row.key] for row in rows)
