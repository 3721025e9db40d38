"""How models write tool calls into their text, and how they are read from it. Pure; no tokenizer, no model.

Three forms are read; a model's chat template shows which one it writes (:func:`form_of`):

- ``hermes``: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, of Qwen2.5, Qwen3, Hermes.
- ``xml``: ``<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>``, of Qwen3-Coder and the
  Qwens after it. Values are bare text; the tool's schema says which of them are not strings. These models forget
  ``<tool_call>`` at times: a line that begins with ``<function=`` is a call as well.
- ``json``: the whole turn is ``{"name": ..., "parameters": {...}}``, several behind ``;``, of Llama 3. An object with a
  name and other keys, but without arguments, is an answer.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema_specifications import REGISTRY

from agentsdpo.types import Json, ToolCall, ToolSpec

_TAGGED = re.compile(r"<tool_call>(.*?)(</tool_call>|\Z)", re.DOTALL)
_BARE = re.compile(_TAGGED.pattern + r"|^[ \t]*(<function=.*?(</function>|\Z))", re.DOTALL | re.MULTILINE)
_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*)</function>", re.DOTALL)
_PARAMETER, _END_PARAMETER = "<parameter=", "</parameter>"
_PYTHON_TAG = "<|python_tag|>"
_FIRST = re.compile(r'\{\s*("type"\s*:\s*"function"\s*,\s*)?"name"\s*:')
_BETWEEN = re.compile(r"[\s;]*")
_SPOKEN = {"True": "true", "False": "false", "None": "null"}
"""Templates that turn a value into text by ``string`` write it as Python does, and so do their models."""
_DEPTH = 64
"""Deepest nesting of a call's JSON. Beyond it some reader down the line (validator, store) would run out of stack."""

Schemas = Mapping[str, Json]
"""JSON schema of all arguments, by tool."""
Found = tuple[int, str, bool]
"""Where a call begins in the turn's text, what stands inside it, and whether it was closed."""
Read = tuple[str, Json | str, str]
"""Name, arguments and problem of one call; arguments stay text when there is a problem."""


@dataclass(frozen=True)
class CallForm:
    """One way to write calls.

    Attributes:
        name: of the form. opens, closes: what stands around a call; empty where nothing does.
        find: the calls of a turn, in order.
        read: one body.
    """

    name: str
    opens: str
    closes: str
    find: Callable[[str], list[Found]]
    read: Callable[[str, Schemas], Read]

    def begin(self, text: str) -> int | None:
        """Where the calls of a turn begin in its text; None without any.

        >>> HERMES.begin("So. <tool_call>{}</tool_call>"), JSON.begin('{"name": "f"}'), HERMES.begin("I look.")
        (4, 0, None)
        """
        return next((at for at, _, _ in self.find(text)), None)

    def parse(self, text: str, turn: int, tools: Sequence[ToolSpec] = ()) -> tuple[list[ToolCall], dict[str, str]]:
        """Tool calls of one agent turn, in order, and what is wrong with those that cannot be read.

        Every call has the id ``call_<turn>_<i>``; a broken one keeps its text verbatim as ``arguments`` and has an
        entry in the second value.

        Args:
            text: of the turn, without thoughts.
            turn: its number.
            tools: that the agent has; a form whose values are bare text needs their schemas.

        >>> calls, bad = HERMES.parse('<tool_call>\\n{"name": "calc", "arguments": {"expr": "1"}}\\n</tool_call>', 2)
        >>> calls[0].id, calls[0].name, calls[0].arguments, bad
        ('call_2_0', 'calc', {'expr': '1'}, {})
        >>> HERMES.parse('<tool_call>{"name": ', 0)[1]
        {'call_0_0': 'the call is not closed by </tool_call>'}
        >>> text = "<tool_call><function=calc><parameter=expr>\\n1\\n</parameter></function></tool_call>"
        >>> XML.parse(text, 0)[0][0].arguments
        {'expr': '1'}
        >>> [call.name for call in JSON.parse('{"name": "a", "parameters": {}}; {"name": "b", "parameters": {}}', 0)[0]]
        ['a', 'b']
        """
        known = {tool.name: tool.parameters for tool in tools}
        calls: list[ToolCall] = []
        bad: dict[str, str] = {}
        for i, (_, body, closed) in enumerate(self.find(text)):
            call_id, name, arguments = f"call_{turn}_{i}", "", body
            problem = "" if closed else f"the call is not closed by {self.closes}"
            if not problem:
                name, arguments, problem = self.read(body, known)
            if problem:
                bad[call_id] = problem
            calls.append(ToolCall(id=call_id, name=name, arguments=arguments))
        return calls, bad


def _tagged(text: str) -> list[Found]:
    return [(match.start(), match[1].strip(), bool(match[2])) for match in _TAGGED.finditer(text)]


def _tagged_or_bare(text: str) -> list[Found]:
    return [(match.start(), (match[1] or match[3] or "").strip(), bool(match[2] or match[4]))
            for match in _BARE.finditer(text)]


def _whole(text: str) -> list[Found]:
    """The JSON objects that a turn consists of, if the first is a call; what is no object is one body, to the end."""
    rest, found, at = text.strip().removeprefix(_PYTHON_TAG).strip(), list[Found](), 0
    if not _FIRST.match(rest):
        return []
    decoder = json.JSONDecoder()
    while at < len(rest):
        data, end = None, len(rest)
        if rest[at] == "{":
            with suppress(ValueError, RecursionError):
                data, end = decoder.raw_decode(rest, at)
        if not found and data is not None and not _calls(data):
            return []
        found.append((0, rest[at:end], True))  # a turn that consists of calls says nothing in front of them
        at = _BETWEEN.match(rest, end).end()  # type: ignore[union-attr]
    return found


def _calls(data: Json) -> bool:
    """Whether an object with a name is a call: it has arguments, or nothing else."""
    return "parameters" in data or "arguments" in data or data.keys() <= {"name", "type"}


def _named(body: str, *keys: str) -> Read:
    """A call that is a JSON object of ``name`` and, under the first of these keys that it has, its arguments."""
    data, problem = read_json(body)
    if problem:
        return "", body, f"the call is {problem}"
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        return "", body, f'the call must be an object with "name" and "{keys[0]}"'
    key = next((key for key in keys if key in data), keys[0])
    arguments = data.get(key, {})
    if not isinstance(arguments, dict):
        return data["name"], body, f'"{key}" must be an object'
    return data["name"], arguments, ""


def _function(body: str, known: Schemas) -> Read:
    """A call that is a ``<function=...>`` with its ``<parameter=...>``."""
    match = _FUNCTION.fullmatch(body)
    if not match:
        return "", body, ("the call must be <function=NAME>, for each argument <parameter=KEY>VALUE</parameter>, and "
                          "</function>")
    name, inside = match.group(1).strip(), match.group(2)
    schema = known.get(name, {})
    before, *parts = inside.split(_PARAMETER)  # by hand: a pattern would take the square of the time of what never ends
    arguments: dict[str, Json] = {}
    for part in ([f">{before}"] if before.strip() else []) + parts:
        key, _, rest = part.partition(">")
        value, closed, left = rest.rpartition(_END_PARAMETER)
        if not closed or left.strip() or not key.strip():
            return name, body, f"{(left or rest).strip()[:40]!r} is no <parameter=KEY>VALUE</parameter>"
        if key in arguments:
            return name, body, f"argument {key!r} is given twice"
        arguments[key] = _typed(value.removeprefix("\n").removesuffix("\n"), key, schema)
    return name, arguments, ""


def _typed(value: str, key: str, tool: Json) -> Any:
    """A bare value as the tool's schema wants it; text where that is allowed, or where it is nothing else."""
    properties = tool.get("properties")
    schema = properties.get(key) if isinstance(properties, dict) else None
    kinds = schema.get("type") if isinstance(schema, dict) else "string"
    kinds = [kinds] if isinstance(kinds, str) else kinds
    data, problem = read_json(_SPOKEN.get(value.strip(), value))
    if problem or (isinstance(kinds, list) and "string" in kinds):
        return value
    if isinstance(kinds, list):
        return data
    return data if _accepts(tool, schema, data) and not _accepts(tool, schema, value) else value


def _accepts(tool: Json, schema: Any, value: Any) -> bool:
    """Whether a part of a tool's schema takes this; one that cannot be read (anybody wrote it) takes everything."""
    try:
        return validator(json.dumps(tool)).evolve(schema=schema).is_valid(value)
    except Exception:  # noqa: BLE001 - a $ref to nowhere or in a circle, a type that is none
        return True


@lru_cache(maxsize=1024)
def validator(schema: str) -> Draft202012Validator:
    """What checks values against a JSON schema, which is given as its text; it fetches nothing that this refers to."""
    return Draft202012Validator(json.loads(schema), registry=REGISTRY)


def read_json(text: str) -> tuple[Any, str]:
    """The value of a JSON text of a model, and what is wrong with it: nothing passes that cannot be written again.

    >>> read_json('{"x": 1}'), read_json("NaN")[0], read_json("{")[1][:14]
    (({'x': 1}, ''), None, 'not valid JSON')
    """
    try:
        data = json.loads(text)
        json.dumps(data, allow_nan=False, ensure_ascii=False).encode()  # json reads NaN, 1e999 and lone surrogates too
        deep = _depth(data) > _DEPTH
    except (ValueError, RecursionError) as error:
        return None, f"not valid JSON: {error}"
    return (None, f"nested more than {_DEPTH} levels deep") if deep else (data, "")


def _depth(value: Any) -> int:
    """Levels of nesting of a JSON value; 0 for a plain one."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)


HERMES = CallForm("hermes", "<tool_call>", "</tool_call>", _tagged, lambda body, _: _named(body, "arguments"))
XML = CallForm("xml", "<tool_call>", "</tool_call>", _tagged_or_bare, _function)
JSON = CallForm("json", "", "", _whole, lambda body, _: _named(body, "parameters", "arguments"))
FORMS = (HERMES, XML, JSON)
PROBE = ToolSpec(name="probe", description="", parameters={
    "type": "object", "properties": {"text": {"type": "string"}, "count": {"type": "integer"}}})
PROBED: Json = {"text": "a b", "count": 2}
"""Arguments of the call of :data:`PROBE` that a template is shown."""


def form_of(rendered: str) -> CallForm | None:
    """The form in which a template wrote the call of :data:`PROBE` with :data:`PROBED`; None for one not read here.

    >>> form_of(write_call("probe", PROBED)).name, form_of("[TOOL_CALLS]probe")
    ('hermes', None)
    """
    for form in FORMS:
        calls, bad = form.parse(rendered, 0, [PROBE])
        if not bad and [(call.name, call.arguments) for call in calls] == [(PROBE.name, PROBED)]:
            return form
    return None


def one_by_one(messages: Sequence[Json], form: CallForm) -> list[Json]:
    """A history with one call per message, and broken calls as the text they were: for templates that take no other.

    >>> [two, good] = [{"function": {"name": "f", "arguments": arguments}} for arguments in ("<f", {})]
    >>> told = one_by_one([{"role": "assistant", "content": "So.", "tool_calls": [two, good]}], XML)
    >>> told[0]["content"], "tool_calls" in told[0], told[1]["content"], len(told[1]["tool_calls"])
    ('So.\\n<tool_call>\\n<f\\n</tool_call>', False, '', 1)
    """
    told: list[Json] = []
    for message in messages:
        said = message["content"]
        for call in message.get("tool_calls") or ():
            broken = call["function"]["arguments"]
            if isinstance(broken, str):
                text = "\n".join(part for part in (said, form.opens, broken, form.closes) if part)
                told.append({"role": message["role"], "content": text})
            else:
                told.append({**message, "content": said, "tool_calls": [call]})
            said = ""
        if not message.get("tool_calls"):
            told.append(message)
    return told


def write_call(name: str, arguments: Json) -> str:
    """One call in the ``hermes`` form.

    >>> write_call("submit", {"answer": "done"})
    '<tool_call>\\n{"name": "submit", "arguments": {"answer": "done"}}\\n</tool_call>'
    """
    return f"{HERMES.opens}\n{json.dumps({'name': name, 'arguments': arguments})}\n{HERMES.closes}"


def call_line(name: str, arguments: Json | str) -> str:
    """One call in short, for people and hints.

    >>> call_line("submit", {"answer": "done"}), call_line("f", "{")
    ('submit {"answer": "done"}', 'f {')
    """
    return f"{name} {arguments if isinstance(arguments, str) else json.dumps(arguments)}"
