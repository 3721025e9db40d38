"""From records of a foreign file to episodes: what every reader shares."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from agentsdpo.errors import FormatError
from agentsdpo.replay.canonical import canonical_json
from agentsdpo.replay.formats.assembly import Recorded, assemble
from agentsdpo.replay.formats.bag import Stored, describe
from agentsdpo.replay.ids import derived_uuid
from agentsdpo.types import Episode, Grade, Json, StopReason

ENV_ID = "imported"
"""Environment of episodes whose own is not known."""


@dataclass(frozen=True)
class Found:
    """One episode of a file.

    Attributes:
        episode: its ids are those of the file; the import gives it new ones.
        stamp: whether the file says that it may be trained on; None: it does not say.
        source_id: its id in the file.
        where: file and line.
        salvaged: whether its rows had the status ``salvaged``.
        policies: what the policy versions in it are, as far as the file says.
    """

    episode: Episode
    stamp: bool | None
    source_id: str
    where: str
    salvaged: bool = False
    policies: dict[int, Json] = field(default_factory=dict)


def ours(stored: Stored, where: str) -> Found:
    """An episode that this package exported."""
    episode = stored.episode
    return Found(episode, episode.train_allowed, episode.episode_id, where, stored.status == "salvaged",
                 stored.policies)


@dataclass
class Notes:
    """What a reader could not keep, by path of the field."""

    lost: Counter[str] = field(default_factory=Counter)

    def lose(self, path: str, value: Any = True) -> None:
        """Count a field that finds no place; one that is None or empty was not there."""
        self.lost[path] += value not in (None, "", [], {})




def digest(*parts: Any) -> str:
    """Hash of JSON values, hex."""
    return hashlib.sha256(canonical_json(list(parts))).hexdigest()


def task_of(messages: Sequence[Json]) -> str:
    """A task id that conversations with the same opening share.

    >>> task_of([{"role": "user", "content": "x"}]) == task_of([{"role": "user", "content": "x"},
    ...                                                         {"role": "assistant", "content": "y"}])
    True
    """
    return derived_uuid("task", digest(*opening(messages)))


def opening(messages: Sequence[Json]) -> Sequence[Json]:
    """Messages before the first one of the agent."""
    first = next((i for i, message in enumerate(messages) if message.get("role") == "assistant"), len(messages))
    return messages[:first]


Model = TypeVar("Model", bound=BaseModel)


def checked(model: type[Model], value: Any, where: str) -> Model:
    """A value as a strict model.

    Raises:
        FormatError: something is unknown, missing or of the wrong type; names file, line and path.
    """
    try:
        return model.model_validate(value)
    except (ValidationError, RecursionError) as error:
        raise FormatError(f"{where}: {describe(error)}", fix="mend the file: nothing was imported") from error


def foreign(found: "Foreign") -> Episode:
    """An episode that cannot be trained on, from what a foreign file says.

    Ids of calls follow from the conversation, so that the same one always has the same ``content_sha256``.
    """
    identity = digest(found.format, list(found.messages), found.metadata)
    named = [[replace(call, call_id=derived_uuid(identity, place, i)) for i, call in enumerate(calls)]
             for place, calls in enumerate([found.calls, *found.subagents])]
    branches = assemble(named[0])
    for calls in named[1:]:
        branches += assemble(calls, first_id=len(branches), parent_id=0)
    return Episode(
        episode_id=identity, task_id=found.task_id or task_of(found.messages), env_id=found.env_id,
        run_id=found.run_id, group_id=found.group_id, branches=tuple(branches), stop_reason=found.stop_reason,
        grade=found.grade, model_id=found.model_id, messages=tuple(found.messages), tools=tuple(found.tools),
        metadata=found.metadata, engine=found.format)


@dataclass(frozen=True)
class Foreign:
    """What a foreign file says about one episode.

    Attributes:
        format: its name, which becomes the episode's ``engine``.
        messages: the conversation, OpenAI shape.
        calls: that wrote the agent's messages, in order; their ids are given by :func:`foreign`.
        subagents: calls of sub-agents' conversations.
        metadata: what has no other place.
    """

    format: str
    messages: Sequence[Json]
    calls: Sequence[Recorded]
    subagents: Sequence[Sequence[Recorded]] = ()
    tools: Sequence[Json] = ()
    metadata: Json = field(default_factory=dict)
    task_id: str = ""
    env_id: str = ENV_ID
    run_id: str = ""
    group_id: str = ""
    model_id: str = ""
    stop_reason: StopReason = StopReason.COMPLETED
    grade: Grade | None = None


def silent(messages: Sequence[Json], reason: str = "no_token_ids") -> list[Recorded]:
    """One call without tokens for each message of the agent.

    >>> [call.turn for call in silent([{"role": "user"}, {"role": "assistant"}, {"role": "assistant"}])]
    [0, 1]
    """
    count = sum(message.get("role") == "assistant" for message in messages)
    return [Recorded("", turn, reason=reason) for turn in range(count)]
