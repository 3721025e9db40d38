"""Maintenance of a store: hide episodes and show them again, fold the log.

All of it goes through one stream, ``log/maint/``, whose next slot is taken exclusively: whoever commits has seen all
that was committed before, or finds the slot taken and looks again. No clock and no lock is needed for that.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

from agentsdpo.errors import StoreError
from agentsdpo.replay import snapfile
from agentsdpo.replay.canonical import canonical_json
from agentsdpo.replay.folding import Fold
from agentsdpo.replay.ids import Key
from agentsdpo.replay.log import MAINT, Located, RowExpired, WriterFenced, entry_path, make_entry
from agentsdpo.replay.storage import listing
from agentsdpo.replay.store import ReplayStore
from agentsdpo.types import Json

Plan = Callable[[Fold], list[Json]]
"""From the log as it stands to the operations to commit; none: nothing to do. Called again when the slot was taken."""


@dataclass(frozen=True, slots=True)
class EvictReport:
    """Branches that were hidden or shown again, the rest of their groups included."""

    keys: tuple[Key, ...]
    dry_run: bool

    def as_json(self) -> Json:
        """For the command line."""
        return asdict(self) | {"keys": [str(key) for key in self.keys]}


def commit(store: ReplayStore, plan: Plan, *, epoch: int | None = None, sole_maintainer: bool = False) -> list[Json]:
    """Commit operations to the maintenance stream in one entry; returns them.

    Args:
        store: where.
        plan: what to commit; see :data:`Plan`.
        epoch: take-over this work began under; the current one by default.
        sole_maintainer: go on where the storage cannot take a slot exclusively, since nobody else maintains the store.

    Raises:
        WriterFenced: somebody took over since.
        StoreError: the storage cannot take slots exclusively, or the entry could not be written.
    """
    store.check_writable()
    if not sole_maintainer:
        store.storage.demand_exclusive()
    while True:
        fold = store.fold()
        if epoch is not None and fold.epoch != epoch:
            raise WriterFenced(f"maintenance of {store.storage.uri} was taken over (epoch {fold.epoch}, this is "
                               f"{epoch})", fix="nothing was changed or lost; run it again when the other has ended")
        seq, prev = fold.vector.get(MAINT, (-1, ""))
        ops = plan(fold)
        if not ops:
            return []
        data = canonical_json(make_entry(MAINT, seq + 1, prev, ops))
        try:
            store.storage.create(entry_path(MAINT, seq + 1), data)
        except FileExistsError:
            continue
        return ops


# ------------------------------------------------------------------------------------------------- hide and show


def evict(store: ReplayStore, keys: Iterable[Key], *, reason: str, dry_run: bool = False,
          sole_maintainer: bool = False) -> EvictReport:
    """Hide branches from all later snapshots, together with the rest of their groups; nothing is deleted.

    Args:
        store: where.
        keys: of the branches; those already hidden are passed over.
        reason: for people, kept in the log.
        dry_run: only say what would be hidden.
        sole_maintainer: see :func:`commit`.

    Raises:
        StoreError: a key is not in the store, or see :func:`commit`.
    """
    wanted = list(keys)

    def plan(fold: Fold) -> list[Json]:
        chosen = sorted(whole_groups(fold.rows, wanted, store.storage.uri) - fold.evicted.keys())
        return [{"op": "evict", "keys": chosen, "reason": reason}] if chosen else []

    return _hide_or_show(store, plan, dry_run, sole_maintainer)


def unevict(store: ReplayStore, keys: Iterable[Key], *, dry_run: bool = False,
            sole_maintainer: bool = False) -> EvictReport:
    """Show evicted branches again, together with the rest of their groups. Arguments as for :func:`evict`.

    Raises:
        RowExpired: a file of these rows was handed to :func:`~agentsdpo.replay.gc` since.
        StoreError: as :func:`evict`.
    """
    wanted = list(keys)

    def plan(fold: Fold) -> list[Json]:
        chosen = sorted(whole_groups(fold.rows, wanted, store.storage.uri) & fold.evicted.keys())
        lost = [key for key in chosen if fold.rows[key].path in fold.gone]
        if lost:
            path = fold.rows[lost[0]].path
            raise RowExpired(f"branch {lost[0]} cannot be shown again: entry {fold.gone[path]} of the maintenance "
                             f"stream reclaimed its file {path}", fix="leave it evicted")
        return [{"op": "unevict", "keys": chosen}] if chosen else []

    return _hide_or_show(store, plan, dry_run, sole_maintainer)


def _hide_or_show(store: ReplayStore, plan: Plan, dry_run: bool, sole_maintainer: bool) -> EvictReport:
    ops = plan(store.fold()) if dry_run else commit(store, plan, sole_maintainer=sole_maintainer)
    return EvictReport(tuple(Key(*key) for op in ops for key in op["keys"]), dry_run)


def whole_groups(rows: Mapping[Key, Located], keys: Iterable[Key], uri: str) -> set[Key]:
    """The keys with all members of their groups; an episode outside a group is one of its own.

    Raises:
        StoreError: a key is not among the rows.
    """
    wanted = set()
    for key in keys:
        if key not in rows:
            raise StoreError(f"branch {key} is not among the {len(rows)} of {uri}", fix=listing(uri))
        wanted.add(unit(rows[key]))
    return {key for key, row in rows.items() if unit(row) in wanted}


def unit(row: Located) -> tuple[str, str, int]:
    """What is hidden and shown as one: rows of one group, or of one attempt at an episode."""
    grouped = row.group_id and row.group_size > 1
    return (row.group_id, "", 0) if grouped else ("", row.key.episode_id, row.key.attempt)


# -------------------------------------------------------------------------------------------------------- fold


def fold(store: ReplayStore, *, anew: bool = False) -> str:
    """Write the folded snapshot, so that opening the store reads one file and what came after; returns its path.

    Args:
        store: whose log to fold.
        anew: read the whole log again, where an older folded snapshot says that the log was longer. What was cut off
            is given up with that: try to restore it first.

    Raises:
        CorruptionError: the log is damaged.
        StoreError: it cannot be written.
    """
    store.check_writable()
    state = Fold(store.storage, from_snapshot=not anew)
    state.refresh()
    return snapfile.write(state)
