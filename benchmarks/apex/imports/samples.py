"""Samples of Inspect logs: ``EvalLog`` version 2 as JSON.

A score that is a dict holds criteria by name; without such a one every score is a criterion. A sample with an error is
unscored.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from agentsdpo.benchmarks.apex.imports.found import Imported, Said, scored
from agentsdpo.errors import FormatError
from agentsdpo.replay.formats.files import read_lines
from agentsdpo.replay.formats.reading import Notes, checked
from agentsdpo.replay.formats.shapes import Message
from agentsdpo.types import Criterion, Json

OUTCOMES = {"turn": "budget_turns", "message": "budget_turns", "token": "budget_tokens", "cost": "budget_tokens",
            "time": "budget_time", "working": "budget_time", "context": "context_overflow", "custom": "budget_calls",
            "operator": "cancelled"}
"""Outcomes of Inspect's limits."""
LETTERS: dict[Any, float] = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}
"""Inspect's values for correct, partial, incorrect and no answer."""


class _Score(Said):
    value: Any = None


class _Error(Said):
    message: str = ""


class _Limit(Said):
    type: str


class _Output(Said):
    completion: str = ""
    model: str = ""


class _Usage(Said):
    input_tokens: int | None = None
    output_tokens: int | None = None


class _Sample(Said):
    id: int | str
    epoch: int = Field(default=1, ge=1)
    messages: list[Json] = []
    output: _Output = _Output()
    scores: dict[str, _Score] | None = None
    error: _Error | None = None
    limit: _Limit | None = None
    model_usage: dict[str, _Usage] = {}
    total_time: float | None = None
    working_time: float | None = None


class _Spec(Said):
    model: str = ""


class _Log(Said):
    version: int
    eval: _Spec = _Spec()
    samples: list[Json] = []


class _Conversation(Said):
    """Messages, checked."""

    messages: list[Message]


def read_inspect(path: Path, notes: Notes) -> Iterator[Imported]:
    """Samples of a log, or of all logs of a folder.

    Raises:
        FormatError: no log of version 2 in JSON, or messages that are none.
    """
    for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
        if file.suffix != ".json":
            raise FormatError(f"{file} is no Inspect log in JSON", fix="convert it: inspect log convert --to json")
        (where, value), = read_lines(file)
        log = checked(_Log, value, where)
        if log.version != 2:
            raise FormatError(f"{where} has version {log.version}, not 2", fix="convert it: inspect log convert")
        for number, said in enumerate(log.samples):
            yield _attempt(said, f"{where}: samples[{number}]", log.eval.model)


def _attempt(said: Json, where: str, model: str) -> Imported:
    sample = checked(_Sample, said, where)
    messages = [_message(message) for message in sample.messages]
    checked(_Conversation, {"messages": messages}, where)
    values = _values(sample.scores or {})
    ended = OUTCOMES.get(sample.limit.type, "budget_calls") if sample.limit else "completed"
    usage = list(sample.model_usage.values())
    return Imported(
        where=where, task_id=str(sample.id), number=sample.epoch - 1, messages=messages,
        answer=sample.output.completion or None, outcome="env_error" if sample.error else ended,
        fault=sample.error.message if sample.error else "", results=scored(values),
        criteria=tuple(Criterion(id=name, text=name) for name in values), model=model or sample.output.model,
        kept={"sample": {name: value for name, value in said.items() if name != "messages"}},
        prompt_tokens=sum(one.input_tokens or 0 for one in usage),
        completion_tokens=sum(one.output_tokens or 0 for one in usage),
        wall_s=sample.total_time or 0.0, working_s=sample.working_time or 0.0)


def _values(scores: dict[str, _Score]) -> dict[str, Any]:
    """Criteria of a sample, by name; letters as numbers.

    >>> _values({"match": _Score(value="C"), "f1": _Score(value=0.5)})
    {'match': 1.0, 'f1': 0.5}
    """
    inside = {name: value for score in scores.values() if isinstance(score.value, dict)
              for name, value in score.value.items()}
    found = inside or {name: score.value for name, score in scores.items()}
    return {name: LETTERS.get(value, value) if isinstance(value, str) else value for name, value in found.items()}


def _message(message: Json) -> Json:
    """A message in OpenAI's shape; what is none stays as it is, for :class:`_Conversation` to refuse."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_call(call) if isinstance(call, dict) else call for call in calls]}


def _call(call: Json) -> Json:
    """A call; arguments that Inspect could not read are as they were said."""
    more = {name: value for name, value in call.items() if name != "arguments"}
    return {**more, "type": "function",
            "function": {"name": call.get("function"), "arguments": call.get("arguments")}}
