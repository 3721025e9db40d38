"""ATIF trajectories, and the trials of Harbor that hold one each.

A folder of Harbor is searched for trials: ``result.json`` with a ``trial_name``, ``agent/trajectory.json`` beside it.
Every reward of the verifier is a criterion; an exception leaves a trial unscored, but for the agent's time-out.
"""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from agentsdpo.benchmarks.apex.imports.found import Imported, Said, answer_of, scored
from agentsdpo.errors import FormatError
from agentsdpo.replay.formats import atif
from agentsdpo.replay.formats.files import read_lines
from agentsdpo.replay.formats.reading import Found, Notes, checked
from agentsdpo.types import Criterion

TIMED_OUT = "AgentTimeoutError"
"""The exception of a trial whose agent ran out of time: it is graded on what is there."""


class _Rewards(Said):
    rewards: dict[str, float] | None = None


class _Usage(Said):
    n_input_tokens: int | None = None
    n_output_tokens: int | None = None
    cost_usd: float | None = None


class _Fault(Said):
    exception_type: str
    exception_message: str = ""


class _Span(Said):
    started_at: datetime | None = None
    finished_at: datetime | None = None

    def seconds(self) -> float:
        """How long it took; 0 where that is not said."""
        if self.started_at is None or self.finished_at is None:
            return 0.0
        return max(0.0, (self.finished_at - self.started_at).total_seconds())


class _Trial(_Span):
    """``result.json`` of one trial."""

    task_name: str
    trial_name: str
    agent_result: _Usage | None = None
    verifier_result: _Rewards | None = None
    exception_info: _Fault | None = None
    agent_execution: _Span | None = None


def read_atif(path: Path, notes: Notes) -> Iterator[Imported]:
    """Trajectories of a file, one a line or one in a ``.json`` file, or of all such files of a folder.

    ATIF has no grades; those that this project put into its own are read.

    Raises:
        FormatError: not ATIF 1.0 to 1.8.
    """
    files = sorted([*path.rglob("*.json"), *path.rglob("*.jsonl")]) if path.is_dir() else [path]
    for file in files:
        for found in atif.read(file, notes, frozenset()):
            yield _attempt(found)


def read_harbor(path: Path, notes: Notes) -> Iterator[Imported]:
    """Trials of a job's folder, or one trial's.

    Raises:
        FormatError: a result that is none, or a trajectory that is no ATIF.
    """
    for file in sorted(path.rglob("result.json")):
        (where, said), = read_lines(file)
        if not isinstance(said, dict) or "trial_name" not in said:
            continue  # that of the whole job
        trial, place = checked(_Trial, said, where), file.parent / "agent" / "trajectory.json"
        found = list(atif.read(place, notes, frozenset())) if place.is_file() else []
        if not found and trial.exception_info is None:
            raise FormatError(f"{file.parent} has a result and no agent/trajectory.json",
                              fix="import trials of an agent that writes ATIF trajectories")
        yield _trial(trial, where, found[0] if found else None, said)


def _attempt(found: Found) -> Imported:
    """A trajectory that nothing else is said of."""
    episode, results = found.episode, found.episode.grade.results if found.episode.grade else ()
    return Imported(where=found.where, task_id=episode.task_id, messages=episode.messages,
                    answer=answer_of(episode.messages), outcome="completed", tools=episode.tools,
                    model=episode.model_id, results=results,
                    criteria=tuple(Criterion(id=result.id, text=result.id) for result in results))


def _trial(trial: _Trial, where: str, found: Found | None, said: object) -> Imported:
    messages = found.episode.messages if found else ()
    fault, usage = trial.exception_info, trial.agent_result or _Usage()
    rewards = (trial.verifier_result.rewards if trial.verifier_result else None) or {}
    timed_out = fault is not None and fault.exception_type == TIMED_OUT
    return Imported(
        where=where, task_id=trial.task_name, messages=messages, answer=answer_of(messages), kept={"result": said},
        outcome="budget_time" if timed_out else "env_error" if fault else "completed",
        fault=f"{fault.exception_type}: {fault.exception_message}" if fault else "", results=scored(rewards),
        criteria=tuple(Criterion(id=name, text=f"Reward {name} of Harbor's verifier") for name in rewards),
        tools=found.episode.tools if found else (), model=found.episode.model_id if found else "",
        prompt_tokens=usage.n_input_tokens or 0, completion_tokens=usage.n_output_tokens or 0,
        cost_usd=usage.cost_usd or 0.0, wall_s=trial.seconds(),
        working_s=trial.agent_execution.seconds() if trial.agent_execution else 0.0)
