"""What may be said about stored branches later: the checks before an overlay is written."""

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np

from agentsdpo.errors import RowError, StoreError
from agentsdpo.replay.canonical import canonical_json, canonical_nan
from agentsdpo.replay.ids import Key
from agentsdpo.replay.overlay import Entry, Slot
from agentsdpo.replay.snapshot import Snapshot
from agentsdpo.types import Grade, Hint

RewardStatus = Literal["final", "provisional"]
MAX_LABEL = 1_000
"""Characters of a label."""


def hints(view: Snapshot, values: Mapping[Key | str, Hint]) -> list[Entry]:
    """Entries of late hints. Raises as :func:`keys`."""
    return [Entry(Slot("hint", key), hint.author, canonical_json(hint.model_dump()).decode())
            for name, hint in values.items() for key in keys(view, name)]


def rewards(view: Snapshot, values: Mapping[Key | str, float | Grade], author: str,
            status: RewardStatus) -> list[Entry]:
    """Entries of late rewards; a bare number is a grade without criteria.

    Raises:
        RowError: a reward is not finite.
        StoreError: as :func:`keys`.
    """
    entries = []
    for name, value in values.items():
        grade = value if isinstance(value, Grade) else Grade(results=(), mean=float(value), passed=None)
        if grade.mean is not None and not math.isfinite(grade.mean):
            raise RowError(f"the reward of {name} is {grade.mean}", fix="give a finite number, or leave it out")
        said = {"reward": grade.mean, "status": "none" if grade.mean is None else status, "grade": grade.model_dump()}
        entries += [Entry(Slot("reward", key), author, canonical_json(said).decode()) for key in keys(view, name)]
    return entries


def labels(view: Snapshot, values: Mapping[Key | str, str], author: str) -> list[Entry]:
    """Entries of labels.

    Raises:
        RowError: a label is empty or longer than 1,000 characters.
        StoreError: as :func:`keys`.
    """
    bad = next((name for name, label in values.items() if not 0 < len(label) <= MAX_LABEL), None)
    if bad is not None:
        raise RowError(f"the label of {bad} has {len(values[bad])} characters", fix=f"write 1 to {MAX_LABEL}")
    return [Entry(Slot("label", key), author, canonical_json(label).decode())
            for name, label in values.items() for key in keys(view, name)]


def relogprobs(view: Snapshot, values: Mapping[Key, np.ndarray], policy_version: int, trainer_id: str) -> list[Entry]:
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


def keys(view: Snapshot, name: Key | str) -> list[Key]:
    """The branch of a key, or all branches of an episode id's latest attempt.

    Raises:
        StoreError: neither is in the store.
    """
    if isinstance(name, Key):
        return [view.located(name).key]
    found = view.attempt(name)
    if not found:
        raise StoreError(f"no episode {name!r} among {len(view)} branches", fix="list keys()")
    return found
