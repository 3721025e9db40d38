"""One attempt of somebody else's, as the readers of this folder find it and the writer takes it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from pydantic import BaseModel, ConfigDict

from agentsdpo.collect.progress import zero_counts
from agentsdpo.replay.formats.shapes import arguments_of, text_of
from agentsdpo.types import Criterion, CriterionResult, Json, ToolCall, ToolResult

ANSWERS = ("final_answer", "submit")
"""Tools with which agents hand in, their answer under ``answer``."""


class Said(BaseModel):
    """A part of somebody's file, as far as it matters here; keys it does not name are passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Imported:
    """One attempt.

    Attributes:
        where: file, and line where it has several; for messages to people.
        task_id: of its task. number: which attempt at it; None counts them as they come.
        messages: the whole conversation, OpenAI shape, as it was said.
        outcome: see :data:`agentsdpo.benchmarks.apex.records.OUTCOMES`; one of ``UNSCORED`` is never given a score.
        fault: what broke, for an outcome without score.
        answer: what it handed in.
        criteria, results: its rubric and its grade; no results: nobody graded it.
        kept: JSON files that stand as they are in the attempt's folder, but for what we add under a key of our own.
        initial, final: snapshots as zip; empty where there are none.
        model, judge: who played and who judged, as far as it is said.
    """

    where: str
    task_id: str
    messages: Sequence[Json]
    outcome: str
    answer: str | None
    number: int | None = None
    fault: str = ""
    world_id: str | None = None
    criteria: tuple[Criterion, ...] = ()
    results: tuple[CriterionResult, ...] = ()
    kept: Mapping[str, Any] = field(default_factory=dict)
    initial: bytes = b""
    final: bytes = b""
    tools: tuple[Json, ...] = ()
    model: str = ""
    judge: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    wall_s: float = 0.0
    working_s: float = 0.0
    cost_usd: float = 0.0

    def counts(self) -> dict[str, int]:
        """Totals of the conversation; what it does not say is 0."""
        calls = [call for message in self.messages for call in message.get("tool_calls") or ()]
        same = groupby((call["function"]["name"], str(call["function"].get("arguments"))) for call in calls)
        return zero_counts() | {
            "turns": sum(message["role"] == "assistant" for message in self.messages), "calls": len(calls),
            "longest_repeat": max((sum(1 for _ in run) for _, run in same), default=0),
            "prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}

    def calls(self) -> tuple[tuple[ToolCall, ToolResult], ...]:
        """Calls with their answers, in order, as checks are shown them; what was never answered is left out."""
        waiting: dict[str, ToolCall] = {}
        found = []
        for message in self.messages:
            for call in message.get("tool_calls") or ():
                name, arguments = call["function"]["name"], arguments_of(call["function"].get("arguments"))
                waiting[call.get("id") or ""] = ToolCall(id=call.get("id") or "", name=name, arguments=arguments)
            asked = waiting.pop(message.get("tool_call_id") or "", None) if message["role"] == "tool" else None
            if asked is not None:
                found.append((asked, ToolResult(call_id=asked.id, content=text_of(message.get("content")))))
        return tuple(found)


def answer_of(messages: Sequence[Json]) -> str | None:
    """What a conversation hands in: the last answer that was handed in by a call, else the agent's last words.

    >>> answer_of([{"role": "assistant", "content": "It is 5."}])
    'It is 5.'
    """
    said, handed = None, None
    for message in messages:
        if message["role"] != "assistant":
            continue
        said = text_of(message.get("content")) or None if not message.get("tool_calls") else None
        for call in message.get("tool_calls") or ():
            arguments = arguments_of(call["function"].get("arguments"))
            if call["function"]["name"] in ANSWERS and isinstance(arguments, dict):
                handed = str(arguments.get("answer") or "")
    return said if handed is None else handed


def scored(values: Mapping[str, Any]) -> tuple[CriterionResult, ...]:
    """Results of criteria by id; one whose value is no number from 0 to 1 could not be judged.

    >>> [(result.score, result.rationale) for result in scored({"a": True, "b": 3.5})]
    [(1.0, ''), (None, '3.5 is no score from 0 to 1')]
    """
    return tuple(CriterionResult(id=name, score=float(value))
                 if isinstance(value, (int, float)) and 0 <= value <= 1 else
                 CriterionResult(id=name, status="error", score=None,
                                 rationale=f"{str(value)[:80]} is no score from 0 to 1")
                 for name, value in values.items())
