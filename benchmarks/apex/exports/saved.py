"""Attempts of a run as their files have them, one after another."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentsdpo.benchmarks.apex.episode import grade_file
from agentsdpo.benchmarks.apex.records import Attempt
from agentsdpo.benchmarks.apex.runfolder import BenchFolder
from agentsdpo.benchmarks.apex.shapes import OURS
from agentsdpo.errors import FormatError
from agentsdpo.types import Json


@dataclass(frozen=True)
class Saved:
    """One attempt.

    Attributes:
        place: its folder. attempt: its line.
        opening: messages before the agent's first. trajectory, agent: ``trajectory.json``, ``agent_config.json``.
        verifiers: its criteria. grades: that of the grading that counts, None where there is no score.
    """

    place: Path
    attempt: Attempt
    opening: list[Json]
    trajectory: Json
    agent: Json
    verifiers: list[Json]
    grades: Json | None

    @property
    def messages(self) -> list[Json]:
        """The whole conversation."""
        return [*self.opening, *self.trajectory["messages"]]

    @property
    def train_allowed(self) -> bool:
        """The stamp of its task."""
        return self.agent[OURS]["train_allowed"] is True


def saved(folder: BenchFolder) -> Iterator[Saved]:
    """Attempts that left files, in order; those that never began have none.

    Raises:
        FormatError: a file is missing or damaged; names it.
    """
    for attempt in folder.records():
        place = folder.episode(attempt.task_id, attempt.attempt)
        if (place / "trajectory.json").is_file():
            yield Saved(place, attempt, *(read(place / f"{name}.json") for name in (
                "initial_messages", "trajectory", "agent_config", "verifiers")),
                grades=read(grade_file(place, attempt.grading)) if attempt.scored else None)


def read(path: Path) -> Any:
    """A JSON file of an attempt."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read: {error}",
                          fix="play the attempt again: delete its line in attempts.jsonl and resume the run") from error
