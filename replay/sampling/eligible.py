"""What one draw may take: rows grouped into units, the filters rows fail, and the numbers draws depend on.

Units are numbered in order of arrival: each refresh numbers its new rows by (oldest version, key), whatever order they
were appended in. Refused rows belong to no unit.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from agentsdpo.replay.ids import Key
from agentsdpo.replay.log import Located

REFUSED = ("untrainable", "not_allowed", "tokenizer", "template", "no_logprob", "no_version", "where")
"""Filters that do not depend on the learner's version, in the order they are counted."""
_ENDED = ("sealed", "truncated", "aborted")


@dataclass(frozen=True)
class Filters:
    """What the learner cannot use, or does not want. None accepts every tokenizer, every template, or every branch."""

    tokenizer_sha256: str | None
    chat_template_sha256: str | None
    where: str | None

    def reason(self, row: Located, wanted: Collection[Key] | None) -> str | None:
        """The first of :data:`REFUSED` that a row fails, None when it passes all; ``where`` keeps the ``wanted``."""
        exact = row.logprob_kind == "processed" or (row.logprob_kind == "tempered" and row.kept_set == "not_needed")
        checks = (row.trainable, row.train_allowed, self.tokenizer_sha256 in (None, row.tokenizer_sha256),
                  self.chat_template_sha256 in (None, row.chat_template_sha256), exact and row.kept_set != "missing",
                  row.version_min >= 0, wanted is None or row.key in wanted)
        return next((name for name, good in zip(REFUSED, checks, strict=True) if not good), None)


@dataclass
class Memory:
    """What is remembered of each unit, one number per unit: arrays of length U.

    ``uses`` draws so far; ``last_pass`` the pass it was last drawn in, -1 never; ``last_draw`` the number of its last
    draw, -1 never; ``priority`` above 0.
    """

    uses: np.ndarray
    last_pass: np.ndarray
    last_draw: np.ndarray
    priority: np.ndarray

    @classmethod
    def of(cls, units: Sequence[Sequence[float]]) -> "Memory":
        """From one (uses, last_pass, last_draw, priority) per unit."""
        columns = np.array(units, np.float64).reshape(-1, 4).T
        uses, last_pass, last_draw = (column.astype(np.int64) for column in columns[:3])
        return cls(uses, last_pass, last_draw, columns[3].copy())

    def grow(self, other: "Memory") -> None:
        """Append the units of another one."""
        for name in ("uses", "last_pass", "last_draw", "priority"):
            setattr(self, name, np.concatenate([getattr(self, name), getattr(other, name)]))

    def of_unit(self, unit: int) -> list[float]:
        """What :meth:`of` takes for one unit."""
        return [int(self.uses[unit]), int(self.last_pass[unit]), int(self.last_draw[unit]), float(self.priority[unit])]


class Units:
    """Rows that joined, and the units they form.

    Args:
        filters: what is refused for good.
        unit: ``branch``, ``episode`` (all its branches of one attempt) or ``group`` (all attempts compared).
        closed_only: units of groups that are not complete wait; the oldest version of a unit is that of its group.

    Attributes:
        rows: all rows that joined, refused ones too, in order of arrival.
        members: per unit the places of its rows in ``rows``.
        refused: rows by filter.
        memory: what is remembered of each unit.
        unit_of: unit by key, of rows that are not refused.
        oldest: int64[U], the oldest policy version that sampled a token of the unit.
        closed: bool[U], whether a unit need not wait for the rest of its group.
    """

    def __init__(self, filters: Filters, unit: str, closed_only: bool) -> None:
        self._filters, self._unit, self._closed_only = filters, unit, closed_only
        self.rows: list[Located] = []
        self.members: list[list[int]] = []
        self.refused: dict[str, int] = dict.fromkeys(REFUSED, 0)
        self.memory = Memory.of([])
        self.unit_of: dict[Key, int] = {}
        self._by_key: np.ndarray | None = None
        self._at: dict[str, int] = {}
        self._oldest: list[int] = []
        self._group_oldest: dict[str, int] = {}
        self._groups = Groups()

    def __len__(self) -> int:
        return len(self.members)

    @property
    def names(self) -> list[str]:
        """Name of each unit: of a branch its key, of an episode ``<id>/<attempt>``, of a group its id."""
        return list(self._at)

    def join(self, rows: Iterable[Located], remembered: Mapping[str, Sequence[float]],
             closures: Mapping[str, Sequence[str]], wanted: Collection[Key] | None = None) -> list[str]:
        """Number new rows and their units; returns the names of the units that are new.

        Args:
            rows: in order of arrival.
            remembered: of units by name; a unit without memory starts unused, at the greatest priority there is.
            closures: groups closed by name, with the episodes that belong to each.
            wanted: keys that may be used; None is all.
        """
        first = len(self)
        for row in rows:
            self._add(row, wanted)
        names = list(self._at)[first:]
        known = [float(remembered[name][3]) for name in names if name in remembered]
        top = float(max([*self.memory.priority.tolist(), *known], default=1.0))
        self.memory.grow(Memory.of([remembered.get(name, (0, -1, -1, top)) for name in names]))
        self._by_key = None
        self._settle(closures)
        return names

    @property
    def by_key(self) -> np.ndarray:
        """int64[U]: all units, by the first of their keys ascending."""
        if self._by_key is None:
            firsts = [self.keys(unit)[0] for unit in range(len(self))]
            self._by_key = np.array(sorted(range(len(self)), key=firsts.__getitem__), np.int64)
        return self._by_key

    def _add(self, row: Located, wanted: Collection[Key] | None) -> None:
        self.rows.append(row)
        self._groups.add(row)
        reason = self._filters.reason(row, wanted)
        if reason is not None:
            self.refused[reason] += 1
            return
        unit = self._at.setdefault(self._name(row), len(self._at))
        if unit == len(self.members):
            self.members.append([])
            self._oldest.append(row.version_min)
        self.members[unit].append(len(self.rows) - 1)
        self.unit_of[row.key] = unit
        self._oldest[unit] = min(self._oldest[unit], row.version_min)
        group = group_of(row)
        self._group_oldest[group] = min(self._group_oldest.get(group, row.version_min), row.version_min)

    def _name(self, row: Located) -> str:
        if self._unit == "group":
            return group_of(row)
        return str(row.key) if self._unit == "branch" else f"{row.key.episode_id}/{row.key.attempt}"

    def _settle(self, closures: Mapping[str, Sequence[str]]) -> None:
        """Take the oldest versions, and which groups are complete, into arrays: int64[U], bool[U]."""
        if not self._closed_only:
            self.oldest, self.closed = np.array(self._oldest, np.int64), np.ones(len(self), bool)
            return
        groups = [group_of(self.rows[members[0]]) for members in self.members]
        closed = self._groups.closed(closures)
        self.oldest = np.array([self._group_oldest[group] for group in groups], np.int64)
        self.closed = np.array([group in closed for group in groups], bool)

    def keys(self, unit: int) -> list[Key]:
        """Keys of a unit's rows, ascending."""
        return sorted(self.rows[i].key for i in self.members[unit])


class Groups:
    """Which rollouts are compared with each other, and which comparisons are complete."""

    def __init__(self) -> None:
        self._ended: dict[str, set[str]] = defaultdict(set)
        self._size: dict[str, int] = {}

    def add(self, row: Located) -> None:
        """Take a row into account. A salvaged one has not ended: its rollout was lost."""
        group = group_of(row)
        self._size[group] = max(self._size.get(group, 1), row.group_size)
        if row.status in _ENDED:
            self._ended[group].add(row.key.episode_id)

    def closed(self, closures: Mapping[str, Sequence[str]]) -> set[str]:
        """Groups with as many ended episodes as their size says, or whose named members have all ended."""
        by_size = {group for group, size in self._size.items() if len(self._ended[group]) >= size}
        return by_size | {group for group, episodes in closures.items() if self._ended[group] >= set(episodes)}


def group_of(row: Located) -> str:
    """Group of a row; an episode without one is a group of its own."""
    return row.group_id or row.key.episode_id
