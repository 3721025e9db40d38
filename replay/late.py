"""What may be said about stored branches later, and the checks before an overlay is written."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from agentsdpo.errors import RowError, StoreError
from agentsdpo.replay.canonical import canonical_json, canonical_nan
from agentsdpo.replay.ids import Key
from agentsdpo.replay.overlay import Entry, Slot
from agentsdpo.replay.snapshot import Snapshot
from agentsdpo.replay.storage import listing
from agentsdpo.types import Grade, Hint

RewardStatus = Literal["final", "provisional"]
MAX_LABEL = 1_000
"""Characters of a label."""


class LateValues(ABC):
    """What can be said about the branches of a store after they were appended."""

    @abstractmethod
    def _overlay(self, kind: str, make: Callable[[Snapshot], list[Entry]]) -> None:
        """Write late values, made from the store as it is now, and commit them."""

    def add_hints(self, hints: Mapping[Key | str, Hint]) -> None:
        """Attach hints that were written after the append; each replaces the hint its branch had.

        Args:
            hints: by key of a branch, or by episode id: all branches of its latest attempt.

        Raises:
            StoreError: a key is not in the store, or the overlay cannot be written.
            RowError: a hint says nothing, or does not say which turn it speaks of.
        """
        self._overlay("hint", lambda view: _hints(view, hints))

    def add_rewards(self, rewards: Mapping[Key | str, float | Grade], *, author: str = "",
                    status: RewardStatus = "final") -> None:
        """Say what branches earned, later or again; every reader sees the latest. Keys as in :meth:`add_hints`.

        A bare number is a grade without criteria. Of a grade without criteria the reward counts, while the criteria
        that are stored, and the feedback where it has none, stay. Raises also RowError: a reward is not finite.

        >>> from agentsdpo.replay.example import example
        >>> store = example()
        >>> store.add_rewards({"e-0": 0.25}, author="grader-2")
        >>> [row.reward for row in store.branches("episode_id == 'e-0'")]
        [0.25]
        """
        self._overlay("reward", lambda view: _rewards(view, rewards, author, status))

    def add_labels(self, labels: Mapping[Key | str, str], *, author: str = "") -> None:
        """Mark branches with a short text to filter by; the latest counts. Keys as in :meth:`add_hints`.

        Raises also RowError: a label is empty or longer than 1,000 characters.

        >>> from agentsdpo.replay.example import example
        >>> store = example()
        >>> store.add_labels({"e-1": "reviewed"})
        >>> [row.key.episode_id for row in store.branches("label == 'reviewed'")]
        ['e-1']
        """
        self._overlay("label", lambda view: _labels(view, labels, author))

    def add_relogprobs(self, logprobs: Mapping[Key, np.ndarray], *, policy_version: int, trainer_id: str) -> None:
        """Keep what a trainer computed for stored tokens, float32[T] per branch, NaN where nothing was scored.

        One set per policy version and trainer; the behaviour log-probs stay as they are. Read them back with
        :meth:`Snapshot.relogprobs`. Raises also RowError: a wrong length, or a value outside (-1000, 1e-4].
        """
        self._overlay("relogprob", lambda view: _relogprobs(view, logprobs, policy_version, trainer_id))


def _hints(view: Snapshot, values: Mapping[Key | str, Hint]) -> list[Entry]:
    """Entries of late hints.

    Raises:
        RowError: a teacher could not read one. StoreError: as :func:`_keys`.
    """
    for name, hint in values.items():
        if fault := _fault(hint):
            raise RowError(f"the hint of {name} {fault}", fix="give a text, or turns = ((turn, text), ...), each turn "
                           "once, with placement system_prefix or last_user_suffix and scope episode")
    return [Entry(Slot("hint", key), hint.author, canonical_json(hint.model_dump()).decode())
            for name, hint in values.items() for key in _keys(view, name)]


def _fault(hint: Hint) -> str:
    """Why a hint could not be read by a teacher: found here, where it can be mended, and not by a run days later."""
    turns = [turn for turn, _ in hint.turns]
    if hint.scope == "turn" or hint.placement == "turn_local":
        return "does not say which turn it speaks of"
    if not hint.turns and not hint.text.strip():
        return "says nothing"
    for turn, text in hint.turns:
        fault = f"speaks of turn {turn}" if turn < 0 else f"says nothing of turn {turn}" if not text.strip() else (
            f"speaks of turn {turn} twice" if turns.count(turn) > 1 else "")
        if fault:
            return fault
    return ""


def _rewards(view: Snapshot, values: Mapping[Key | str, float | Grade], author: str,
            status: RewardStatus) -> list[Entry]:
    """Entries of late rewards; a bare number is a grade without criteria.

    Raises:
        RowError: a reward is not finite.
        StoreError: as :func:`_keys`.
    """
    entries = []
    for name, value in values.items():
        grade = value if isinstance(value, Grade) else Grade(results=(), mean=float(value), passed=None)
        if grade.mean is not None and not math.isfinite(grade.mean):
            raise RowError(f"the reward of {name} is {grade.mean}", fix="give a finite number, or leave it out")
        said = {"reward": grade.mean, "status": "none" if grade.mean is None else status, "grade": grade.model_dump()}
        entries += [Entry(Slot("reward", key), author, canonical_json(said).decode()) for key in _keys(view, name)]
    return entries


def _labels(view: Snapshot, values: Mapping[Key | str, str], author: str) -> list[Entry]:
    """Entries of labels.

    Raises:
        RowError: a label is empty or longer than 1,000 characters.
        StoreError: as :func:`_keys`.
    """
    bad = next((name for name, label in values.items() if not 0 < len(label) <= MAX_LABEL), None)
    if bad is not None:
        raise RowError(f"the label of {bad} has {len(values[bad])} characters", fix=f"write 1 to {MAX_LABEL}")
    return [Entry(Slot("label", key), author, canonical_json(label).decode())
            for name, label in values.items() for key in _keys(view, name)]


def _relogprobs(view: Snapshot, values: Mapping[Key, np.ndarray], policy_version: int, trainer_id: str) -> list[Entry]:
    """Entries of a trainer's own log-probs, float32[T] per branch.

    Raises:
        RowError: a wrong length, or values outside (-1000, 1e-4] that are not NaN.
        StoreError: a key is not in the store.
    """
    entries = []
    for key, logprobs in values.items():
        n_tokens = view.located(key).n_tokens
        array = canonical_nan(np.asarray(logprobs, np.float32))
        scored = array[~np.isnan(array)]
        if array.shape != (n_tokens,) or not ((scored > -1000) & (scored <= 1e-4)).all():
            low, high = scored.min(initial=0), scored.max(initial=-1000)
            raise RowError(f"log-probs of branch {key} have shape {array.shape} and lie in [{low:g}, {high:g}], "
                           f"the branch has {n_tokens} tokens",
                           fix="give one number in (-1000, 1e-4] per token, NaN where nothing was scored")
        entries.append(Entry(Slot("relogprob", key, f"{policy_version}/{trainer_id}"), trainer_id, None, array))
    return entries


def _keys(view: Snapshot, name: Key | str) -> list[Key]:
    """The branch of a key, or all branches of an episode id's latest attempt.

    Raises:
        StoreError: neither is in the store.
    """
    if isinstance(name, Key):
        return [view.located(name).key]
    found = view.attempt(name)
    if not found:
        raise StoreError(f"no episode {name!r} among {len(view)} branches", fix=listing(view.storage.uri))
    return found
