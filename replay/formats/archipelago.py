"""archipelago's ``trajectory.json``: the messages of one run; several, one a line, in a ``.jsonl`` file.

Messages before the agent's first come from ``initial_messages.json`` beside it, where the trajectory does not hold
them. There are no tokens. Runs of the benchmark that archipelago was made for are under a licence that forbids
training: tasks, worlds and verifiers with ids of its form, in the file or in those beside it, say so.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from agentsdpo.replay.formats.files import read_lines
from agentsdpo.replay.formats.reading import Foreign, Found, Notes, checked, foreign, silent
from agentsdpo.replay.formats.shapes import Message
from agentsdpo.types import Json, StopReason

STOPS = {"completed": StopReason.COMPLETED, "failed": StopReason.MAX_TURNS}
"""Stop reasons of a status; any other one is a run that broke or never ended."""
_THEIRS = re.compile(r"(?:task|world|ver)_[0-9a-f]{32}")
_BESIDE = ("initial_messages.json", "verifiers.json", "agent_config.json")


class _Run(BaseModel):
    """One run; keys beyond these are kept as they are."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)

    messages: list[Message]
    status: str | None = None
    task_id: str | None = None
    trajectory_id: str | None = None
    model: str | None = None
    train_allowed: bool | None = None


class _Opening(BaseModel):
    """What ``initial_messages.json`` holds."""

    model_config = ConfigDict(strict=True, frozen=True)

    messages: list[Message]


def read(path: Path, notes: Notes, siblings: frozenset[Path]) -> Iterator[Found]:
    """Runs of a file; nothing in them is lost.

    Raises:
        FormatError: a message has no role, an unknown one, or parts of the wrong type.
    """
    beside = {name: next(read_lines(path.parent / name))[1] for name in _BESIDE
              if path.name == "trajectory.json" and (path.parent / name).is_file()}
    for where, value in read_lines(path):
        run = checked(_Run, value, where)
        messages = _whole(value["messages"], beside.get("initial_messages.json", []), f"{where}: initial_messages.json")
        about = {name: inner for name, inner in value.items() if name != "messages"}
        episode = foreign(Foreign(
            format="archipelago", messages=messages, calls=silent(messages), task_id=run.task_id or "",
            model_id=run.model or "", metadata={"archipelago": about},
            stop_reason=STOPS.get(run.status or "completed", StopReason.ENGINE_ERROR)))
        yield Found(episode, False if _closed([about, *beside.values()]) else run.train_allowed,
                    run.trajectory_id or where, where)


def _whole(messages: list[Json], opening: Any, where: str) -> list[Json]:
    """The messages with those before them, unless they begin with those already."""
    checked(_Opening, {"messages": opening}, where)
    return messages if messages[:len(opening)] == opening else [*opening, *messages]


def _closed(value: Any) -> bool:
    """Whether somewhere below ids stand a name of the benchmark's own, or a stamp that forbids training."""
    if isinstance(value, dict):
        named = any(isinstance(value.get(key), str) and _THEIRS.fullmatch(value[key])
                    for key in ("task_id", "world_id", "verifier_id"))
        return named or value.get("train_allowed") is False or any(map(_closed, value.values()))
    return any(map(_closed, value)) if isinstance(value, list) else False
