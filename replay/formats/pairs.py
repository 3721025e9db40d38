"""Preference pairs (``prompt``, ``chosen``, ``rejected``): two attempts at one task, the better reward chosen.

Within a group of rollouts, or among the ungrouped attempts at one task, the best is paired with the worst, the second
best with the second worst, and so on while rewards differ; no episode is used twice. ``prompt`` is the messages both
share before the agent first said different things.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

import pyarrow as pa

from agentsdpo.replay.canonical import to_json
from agentsdpo.replay.formats.files import valid_text
from agentsdpo.replay.formats.shapes import message_of
from agentsdpo.types import Episode, Json

Name = tuple[str, int]
"""Episode id and attempt."""
_COLUMNS = ["episode_id", "attempt", "env_id", "task_id", "run_id", "group_id", "group_size", "reward"]


def plan(scalars: pa.Table, skipped: Counter[str]) -> list[tuple[Name, Name]]:
    """Which episodes to pair, (better, worse), by group in the order of the table.

    Args:
        scalars: rows to choose from; an episode has the reward of its first one.
        skipped: gets what cannot be paired.
    """
    groups: dict[tuple[str, ...], dict[Name, float]] = defaultdict(dict)
    unscored: set[Name] = set()
    for row in scalars.select(_COLUMNS).to_pylist():
        name = (row["episode_id"], row["attempt"])
        if row["reward"] is None:
            unscored.add(name)
            continue
        own = (row["run_id"], row["group_id"]) if row["group_size"] > 1 else ()
        groups[row["env_id"], row["task_id"], *own].setdefault(name, row["reward"])
    found = [pair for rewards in groups.values() for pair in _pairs(rewards)]
    skipped["episodes without a reward"] += len(unscored)
    skipped["episodes without a partner"] += sum(map(len, groups.values())) - 2 * len(found)
    return found


def _pairs(rewards: dict[Name, float]) -> list[tuple[Name, Name]]:
    """Best with worst, inwards, while the margin is positive.

    >>> _pairs({("a", 0): 0.5, ("b", 0): 1.0, ("c", 0): 0.0, ("d", 0): 0.5})
    [(('b', 0), ('c', 0))]
    """
    order = sorted(rewards, key=lambda name: (-rewards[name], name))
    pairs = zip(order[:len(order) // 2], reversed(order), strict=False)
    return [(better, worse) for better, worse in pairs if rewards[better] > rewards[worse]]


def line(chosen: Episode, rejected: Episode) -> Json | None:
    """One pair as TRL and others take it; None when the two share no prompt that the agent answers in both."""
    better, worse = ([message_of(message) for message in episode.messages] for episode in (chosen, rejected))
    shared = next((i for i, (a, b) in enumerate(zip(better, worse, strict=False)) if a != b),
                  min(len(better), len(worse)))
    if not shared or not (_answers(better, shared) and _answers(worse, shared)):
        return None
    return valid_text({
        "prompt": better[:shared], "chosen": better[shared:], "rejected": worse[shared:],
        "tools": to_json(list(chosen.tools)) if chosen.tools else None,
        "score_chosen": chosen.reward, "score_rejected": rejected.reward, "task_id": chosen.task_id,
        "chosen_episode_id": chosen.episode_id, "rejected_episode_id": rejected.episode_id})


def _answers(messages: Sequence[Json], shared: int) -> bool:
    return len(messages) > shared and messages[shared]["role"] == "assistant"
