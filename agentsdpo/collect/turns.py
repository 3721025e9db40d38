"""From an agent's raw text to calls, the checks a call must pass before an environment sees it, and failed answers."""

import json
import re
from collections.abc import Sequence

from jsonschema.exceptions import best_match

from agentsdpo.calls import HERMES, CallForm, validator
from agentsdpo.types import Completion, ErrorKind, Json, ModelTurn, ToolCall, ToolResult, ToolSpec

OPEN_CALL = HERMES.opens
_THINK, _END_THINK = "<think>", "</think>"
_FAILED = re.compile(r"\s*(\{\s*\"(error|is_error)\"|error\b|traceback\b|exception\b)", re.IGNORECASE)


def visible(text: str) -> str:
    """What the agent said after it had thought; empty when the thought never ended.

    >>> visible("<think>maybe 4</think>\\n\\nIt is 5."), visible("<think>so long"), visible("It is 5.")
    ('It is 5.', '', 'It is 5.')
    >>> visible("Put it behind <think>.")
    'Put it behind <think>.'
    """
    return text[_thought_to(text):].strip()


def _thought_to(text: str) -> int:
    """Where a turn's thought ends in its text: at 0 without one, at the end of the text when it never ends."""
    end = text.rfind(_END_THINK)
    if end >= 0:
        return end + len(_END_THINK)
    return len(text) if text.lstrip().startswith(_THINK) else 0


def read_turn(text: str, turn: int, completion: Completion | None = None, *, form: CallForm = HERMES,
              tools: Sequence[ToolSpec] = ()) -> ModelTurn:
    """Parse one turn; calls that cannot be read are listed with the answer they are owed.

    >>> turn = read_turn('<tool_call>{"name": }</tool_call>', 0)
    >>> turn.calls[0].id, turn.malformed[0].error_kind
    ('call_0_0', 'bad_arguments')
    """
    thought = _thought_to(text)
    said = text[thought:]
    calls, bad = form.parse(said, turn, tools)
    at = form.begin(said)
    owed = tuple(refusal(call_id, "bad_arguments", problem) for call_id, problem in bad.items())
    return ModelTurn(text=text, calls=tuple(calls), calls_at=None if at is None else thought + at,
                     completion=completion, malformed=owed)


def refusal(call_id: str, kind: ErrorKind, why: str) -> ToolResult:
    """The answer to a call that no environment will see."""
    return ToolResult(call_id=call_id, content=f"Error: {why}", is_error=True, error_kind=kind)


def failed(text: str) -> bool:
    """Whether a tool's answer tells of a fault; an empty ``error`` field does not.

    >>> failed("Error: no such file"), failed('{"error": null, "rows": 3}'), failed("No errors found")
    (True, False, False)
    """
    if not _FAILED.match(text):
        return False
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return True
    return bool(said.get("error") or said.get("is_error")) if isinstance(said, dict) else True


def unique_ids(calls: Sequence[ToolCall], turn: int, taken: set[str]) -> tuple[list[ToolCall], dict[str, list[str]]]:
    """Calls with ids that are unique in the episode: empty and repeated ones become ``call_<turn>_<i>``.

    Args:
        calls: as the agent sent them.
        turn: index of the turn.
        taken: ids used so far; extended by those given out here.

    Returns:
        the calls, and for each id the agent wrote the ids its calls carry now, in order.

    >>> a = ToolCall(id="x", name="f", arguments={})
    >>> [c.id for c in unique_ids([a, a], 3, set())[0]]
    ['x', 'call_3_1']
    """
    renamed: list[ToolCall] = []
    now: dict[str, list[str]] = {}
    reserved = taken | {call.id for call in calls}
    for i, call in enumerate(calls):
        call_id = call.id
        if not call_id or call_id in taken:
            call_id, extra = f"call_{turn}_{i}", 0
            while call_id in reserved:
                extra += 1
                call_id = f"call_{turn}_{i}_{extra}"
        taken.add(call_id)
        reserved.add(call_id)
        now.setdefault(call.id, []).append(call_id)
        renamed.append(call if call_id == call.id else call.model_copy(update={"id": call_id}))
    return renamed, now


def schema_error(spec: ToolSpec, arguments: Json) -> str | None:
    """What is wrong with the arguments under the tool's JSON schema, None when nothing is.

    >>> spec = ToolSpec(name="f", description="", parameters={"type": "object", "required": ["x"]})
    >>> schema_error(spec, {}), schema_error(spec, {"x": 1})
    ("arguments of f: 'x' is a required property", None)
    """
    try:
        error = best_match(validator(json.dumps(spec.parameters)).iter_errors(arguments))
    except Exception:  # noqa: BLE001 - a pattern of another dialect, a $ref to nowhere: anybody's schema
        return None  # the tool has to look for itself
    if error is None:
        return None
    where = "".join(f".{part}" for part in error.absolute_path)
    return f"arguments{where} of {spec.name}: {error.message[:300]}"


def check_call(call: ToolCall, tools: dict[str, ToolSpec]) -> ToolResult | None:
    """The refusal a call has earned, None when it may run."""
    if not isinstance(call.arguments, dict):
        return refusal(call.id, "bad_arguments", "the arguments must be a JSON object")
    if call.name not in tools:
        return refusal(call.id, "unknown_tool", f"no tool {call.name!r}; the tools are {', '.join(tools)}")
    problem = schema_error(tools[call.name], call.arguments)
    return refusal(call.id, "bad_arguments", problem) if problem else None
