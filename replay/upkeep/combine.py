"""Two stores into one, one store into two, and what they differ in: by key, byte for byte, and safe to repeat.

Rows are copied as they are: their ids, calls, hashes and the writer that sealed them stay. Groups of rollouts move
whole. What two stores hold under one key must be the same content, and one policy version must be the same weights:
otherwise nothing is written.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate

import pyarrow as pa

from agentsdpo.errors import ConfigError, CorruptionError, StoreError
from agentsdpo.replay.ids import Key
from agentsdpo.replay.log import Located
from agentsdpo.replay.policies import IDENTITY, recorded
from agentsdpo.replay.snapshot import Condition, Snapshot
from agentsdpo.replay.storage import mend
from agentsdpo.replay.store import ReplayStore
from agentsdpo.replay.upkeep.maintain import unit
from agentsdpo.replay.upkeep.overlay_copy import copy_overlays, missing
from agentsdpo.types import Json

_BATCH_TOKENS = 1 << 20
"""Tokens read and written at once."""


@dataclass(frozen=True)
class CopyReport:
    """What was copied, or would be.

    Attributes:
        copied: rows that were not there; ``episodes`` of them.
        same: rows that were there already, with the same content.
        older: rows that are there in a better state (whole instead of salvaged).
        hidden: rows that were evicted there, or are in conflict; left as they are.
        tokens: of the rows copied.
        late: late hints, rewards, labels and trainers' log-probs copied.
        policies: policy versions copied.
    """

    copied: int
    episodes: int
    same: int
    older: int
    hidden: int
    tokens: int
    late: int
    policies: int

    def as_json(self) -> Json:
        """All fields by name."""
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """Keys of two snapshots: only in the first, only in the second, in both with the same and with other content."""

    only_a: list[Key]
    only_b: list[Key]
    same: list[Key]
    other: list[Key]

    def as_json(self) -> Json:
        """All fields by name, keys as ``episode/branch/attempt``."""
        return {name: [str(key) for key in keys] for name, keys in vars(self).items()}


def diff(a: Snapshot, b: Snapshot) -> Difference:
    """Compare two snapshots by key and ``content_sha256``; no data file is opened."""
    both = sorted(a.rows.keys() & b.rows.keys())
    same = [key for key in both if a.rows[key].content_sha256 == b.rows[key].content_sha256]
    return Difference(sorted(a.rows.keys() - b.rows.keys()), sorted(b.rows.keys() - a.rows.keys()), same,
                      sorted(set(both) - set(same)))


# --------------------------------------------------------------------------------------------------------- merging


def merge(into: ReplayStore, source: ReplayStore, *, where: Condition | None = None,
          keys: Collection[Key] | None = None, dry_run: bool = False,
          done: Callable[[], None] = lambda: None) -> CopyReport:
    """Copy live rows of ``source`` that ``into`` lacks, with their late values, closed groups and the policies.

    Args:
        into: where to.
        source: where from; one snapshot of it is taken.
        where: copy these; every group and episode that has one of them is copied whole.
        keys: instead of ``where``, exactly these.
        dry_run: only report.
        done: called once per row that is copied.

    Raises:
        StoreError: the stores hold other content under one key, or other weights under one policy version; nothing
            was written then.
        CorruptionError: a row is not what was written; what was copied before it stays.
    """
    view, there = source.snapshot(), into.snapshot()
    wanted = sorted(keys) if keys is not None else whole_groups(view, view.keys(where))
    plan, late = _plan(view, there, wanted, source, into), missing(view, there, wanted)
    policies = _policies(source, into)
    report = CopyReport(copied=len(plan.new), episodes=len({(key.episode_id, key.attempt) for key in plan.new}),
                        same=plan.same, older=plan.older, hidden=plan.hidden,
                        tokens=sum(view.rows[key].n_tokens for key in plan.new), late=len(late), policies=len(policies))
    if dry_run:
        return report
    for version, manifest in policies.items():
        into.record_policy(version, manifest)
    for batch in _batches(view, plan.new):
        rows = verified(view, batch)
        into.append_rows(lambda writer_id, rows=rows: rows)
        for _ in batch:
            done()
    copy_overlays(view, into, late)
    for group in sorted({view.rows[key].group_id for key in wanted} & view.closures.keys()):
        if set(view.closures[group]) - set(there.closures.get(group, ())):
            into.close_group(group, view.closures[group])
    return report


@dataclass(frozen=True)
class _Plan:
    new: list[Key]
    same: int
    older: int
    hidden: int


def _plan(view: Snapshot, there: Snapshot, wanted: Iterable[Key], source: ReplayStore, into: ReplayStore) -> _Plan:
    """Which rows to copy; refuses keys that hold two contents."""
    new, same, older, hidden, known = [], 0, 0, 0, into.fold().rows
    for key in wanted:
        ours, theirs = view.rows[key], there.rows.get(key)
        if theirs is None and key in known:
            hidden += 1
        elif theirs is None:
            new.append(key)
        elif theirs.content_sha256 == ours.content_sha256:
            same += 1
        elif ours.status == "salvaged":
            older += 1
        elif theirs.status == "salvaged":
            new.append(key)
        else:
            raise StoreError(f"branch {key} has content {ours.content_sha256[:12]} in {source.storage.uri} and "
                             f"{theirs.content_sha256[:12]} in {into.storage.uri}",
                             fix="compare the stores with agentsdpo replay diff; keep one of the two apart")
    return _Plan(new, same, older, hidden)


def whole_groups(view: Snapshot, keys: Iterable[Key]) -> list[Key]:
    """These keys and all others of their episodes and groups, ascending."""
    chosen = {unit(view.rows[key]) for key in keys}
    return sorted(key for key, row in view.rows.items() if unit(row) in chosen)


def _name(row: Located) -> str:
    """What moves together: the group of rollouts, or the episode where there is none."""
    group, episode, attempt = unit(row)
    return f"group {group}" if group else f"episode {episode}, attempt {attempt}"


def _policies(source: ReplayStore, into: ReplayStore) -> dict[int, Json]:
    """Manifests to copy; refuses a version that is something else there."""
    found = {}
    for version in recorded(source.storage):
        ours, theirs = source.policy(version) or {}, into.policy(version)
        other = [name for name in IDENTITY if theirs and name in ours and ours[name] != theirs.get(name, ours[name])]
        if other and theirs:
            raise StoreError(f"policy version {version} has {other[0]} {str(ours[other[0]])[:12]!r} in "
                             f"{source.storage.uri} and {str(theirs[other[0]])[:12]!r} in {into.storage.uri}",
                             fix="stores of two runs count their versions apart: keep them apart, and train on both")
        if theirs is None:
            found[version] = ours
    return found


def _batches(view: Snapshot, keys: Sequence[Key]) -> Iterable[list[Key]]:
    """Keys in runs of about a million tokens; the branches of an episode stay together."""
    batch, tokens = list[Key](), 0
    for i, key in enumerate(keys):
        batch.append(key)
        tokens += view.rows[key].n_tokens
        last = i + 1 == len(keys)
        if last or (tokens >= _BATCH_TOKENS and keys[i + 1].episode_id != key.episode_id):
            yield batch
            batch, tokens = [], 0


def verified(view: Snapshot, keys: Sequence[Key]) -> pa.Table:
    """The rows of these keys as they are stored, once their tokens and content hash to what was committed.

    Raises:
        CorruptionError: they do not; names the branch.
    """
    view.read(keys)
    table = view.stored(keys)
    for key, content in zip(keys, table.column("content_sha256").to_pylist(), strict=True):
        if content.hex() != view.rows[key].content_sha256:
            raise CorruptionError(f"branch {key} of {view.storage.uri} does not have the content that was committed",
                                  fix=mend(view.storage.uri))
    return table


# -------------------------------------------------------------------------------------------------------- splitting


def parts_by_column(view: Snapshot, column: str, keys: Collection[Key]) -> dict[str, list[Key]]:
    """Keys by the value of a scalar column.

    Raises:
        ConfigError: a group has several values.
    """
    table = view.scalars()
    names = [Key(*each) for each in zip(*(table.column(name).to_pylist() for name in Key._fields), strict=True)]
    values = {key: str(value) for key, value in zip(names, table.column(column).to_pylist(), strict=True)}
    seen: dict[str, str] = {}
    parts: dict[str, list[Key]] = defaultdict(list)
    for key in sorted(keys):
        group = _name(view.rows[key])
        if seen.setdefault(group, values[key]) != values[key]:
            raise ConfigError(f"{group} has both {seen[group]!r} and {values[key]!r} as {column}",
                              fix="split by a column that is the same within each group, or by --parts")
        parts[values[key]].append(key)
    return dict(parts)


def parts_by_share(view: Snapshot, shares: Mapping[str, float], seed: int,
                   keys: Collection[Key]) -> dict[str, list[Key]]:
    """Keys by a hash of seed and group, in these shares: a group falls into the same part in every store and for ever.

    Args:
        view: where the keys are.
        shares: name of each part and its share, above 0; they add up to 1.
        seed: another one, another split.
        keys: what to split.
    """
    parts: dict[str, list[Key]] = {name: [] for name in shares}
    edges = list(zip(shares, accumulate(shares.values()), strict=True))
    for key in sorted(keys):
        digest = hashlib.blake2b(f"{seed}/{_name(view.rows[key])}".encode(), digest_size=8).digest()
        at = int.from_bytes(digest, "big") / 2**64
        parts[next((name for name, edge in edges if at < edge), edges[-1][0])].append(key)
    return parts
