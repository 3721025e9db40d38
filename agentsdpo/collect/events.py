"""What happened in an episode, as JSON and back: the payload of each line of ``events.jsonl``.

Token arrays stand as base64 of little-endian int32, uint8 and float32, so that log-probs come back to the bit.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from agentsdpo.collect.progress import Compacted, Heard
from agentsdpo.replay.journal import Growth
from agentsdpo.types import Call, Json, Task, ToolCall, ToolResult, Usage

TYPES = ("start", "model_call", "tool_result", "compaction", "checkpoint", "budget", "final", "grade", "error")
"""All types of events; ``grade`` is written by whoever graded the episode."""


Event = tuple[str, Json]
"""Type and fields of one event."""


def plain(value: Any) -> Any:
    """A value as it comes back from JSON: tuples are lists."""
    return json.loads(json.dumps(value))


def heard_json(turn: int, heard: Heard) -> Json:
    """A turn of the agent: ``text`` as sampled, ``calls`` with the ids they are answered under, ``tokens``."""
    event: Json = {"turn": turn, "text": heard.text, "calls": [call.model_dump() for call in heard.calls],
                   "usage": heard.usage.model_dump(exclude_defaults=True)}
    if heard.calls_at is not None:
        event["calls_at"] = heard.calls_at
    if heard.owed:
        event["owed"] = [result.model_dump(exclude_defaults=True) for result in heard.owed.values()]
    if heard.renamed:
        event["renamed"] = dict(heard.renamed)
    return event | _tokens(heard.growth)


def heard_of(event: Json) -> Heard:
    """The inverse of :func:`heard_json`."""
    owed = [ToolResult(**result) for result in event.get("owed", ())]
    return Heard(event["text"], tuple(ToolCall(**call) for call in event["calls"]), {r.call_id: r for r in owed},
                 Usage(**event["usage"]), growth_of(event), event.get("renamed", {}), event.get("calls_at"))


def result_json(result: ToolResult) -> Json:
    """A tool's result as the agent was shown it."""
    return {"result": result.model_dump(exclude_defaults=True)}


def result_of(event: Json) -> ToolResult:
    """The inverse of :func:`result_json`."""
    return ToolResult(**event["result"])


def compaction_json(change: Compacted) -> Json:
    """A history cut down: what stands in the place of what, and the tokens of the summary."""
    event: Json = {"manager": change.manager, "before": change.before, "after": change.after,
                   "tail_from": change.tail_from, "inserted": list(change.inserted), "accepted": change.accepted}
    if change.usage is not None:
        event["usage"] = change.usage.model_dump(exclude_defaults=True)
    return event | _tokens(change.growth)


def compaction_of(event: Json) -> Compacted:
    """The inverse of :func:`compaction_json`."""
    usage = Usage(**event["usage"]) if "usage" in event else None
    return Compacted(event["manager"], event["before"], event["after"], event["tail_from"], tuple(event["inserted"]),
                     usage, growth_of(event), event["accepted"])


def growth_of(event: Json) -> tuple[Growth, ...]:
    """What the token record grew by in one event."""
    return tuple(_growth(part) for part in event.get("tokens", ()))


def task_sha256(task: Task) -> str:
    """Hash of a task with its rubric and budget."""
    return hashlib.sha256(task.model_dump_json().encode("utf-8", "surrogatepass")).hexdigest()


def _tokens(grown: Sequence[Growth]) -> Json:
    return {"tokens": [_part(growth) for growth in grown]} if grown else {}


def _part(growth: Growth) -> Json:
    part: Json = {"branch": growth.branch_id, "ids": _pack(growth.token_ids, "<i4"),
                  "kinds": _pack(growth.token_kind, "u1"), "logps": _pack(growth.logprobs, "<f4"),
                  "calls": [call.model_dump(mode="json") for call in growth.calls]}
    if growth.fork:
        part["fork"] = growth.fork
    if any(growth.kept):
        part["kept"] = [list(ids) for ids in growth.kept]
    elif growth.kept:
        part["kept"] = len(growth.kept)  # so many tokens of which nothing was cut
    return part


def _growth(part: Json) -> Growth:
    kept = part.get("kept", ())
    return Growth(part["branch"], part.get("fork", {}), _unpack(part["ids"], "<i4"), _unpack(part["kinds"], "u1"),
                  _unpack(part["logps"], "<f4"), [Call(**call) for call in part["calls"]],
                  [()] * kept if isinstance(kept, int) else [tuple(ids) for ids in kept])


def _pack(values: Sequence[Any], dtype: str) -> str:
    return base64.b64encode(np.asarray(values, dtype).tobytes()).decode()


def _unpack(text: str, dtype: str) -> list[Any]:
    return np.frombuffer(base64.b64decode(text), dtype).tolist()
