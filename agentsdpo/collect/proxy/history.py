"""Histories: messages in the form the chat template reads, and which recorded conversation a request continues.

An answer is known again by what the client was told, not by its tokens: a digest runs over tools and messages, and a
request that begins with a recorded digest continues there. Its tokens are then those that were sampled.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from agentsdpo.calls import read_json
from agentsdpo.collect.branch import ForkReason
from agentsdpo.collect.proxy.refusals import Refused
from agentsdpo.types import Json, ToolSpec

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
         "function": "tool"}


def read_messages(value: Any) -> list[Json]:
    """A request's messages as the template takes them: text contents, call arguments as objects.

    Raises:
        Refused: 400, something that no chat template can read.

    >>> read_messages([{"role": "user", "content": [{"type": "text", "text": "hi"}]}])
    [{'role': 'user', 'content': 'hi'}]
    """
    if not isinstance(value, list) or not value:
        raise Refused(400, "messages is not a list with at least one message", param="messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(value)]


def _message(value: Any, where: str) -> Json:
    role = value.get("role") if isinstance(value, dict) else None
    if not isinstance(role, str) or role not in ROLES:
        raise Refused(400, f"{where} has no known role", fix=f"use {', '.join(ROLES)}", param=where)
    message: Json = {"role": ROLES[role], "content": read_text(value.get("content"), where)}
    if value.get("tool_calls"):
        message["tool_calls"] = [_call(call, where) for call in _list(value["tool_calls"], where)]
    if message["role"] == "tool":
        message["tool_call_id"] = str(value.get("tool_call_id") or value.get("name") or "")
    return message


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise Refused(400, f"tool_calls of {where} is not a list", param=where)
    return value


def read_text(content: Any, where: str) -> str:
    """A content, text or parts of text, as one text. Raises Refused with 400 for anything else."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [None]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") in _TEXTS else part for part in parts]
    good = [text for text in texts if isinstance(text, str)]
    if len(good) < len(texts):
        raise Refused(400, f"{where} holds something other than text", code="not_text", param=where,
                      fix="send text alone: pictures and sound cannot be recorded token by token")
    return "".join(good)


_TEXTS = ("text", "input_text", "output_text")


def _call(value: Any, where: str) -> Json:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Refused(400, f"a tool call in {where} has no function name", param=where)
    return {"id": str(value.get("id") or ""), "type": "function",
            "function": {"name": function["name"], "arguments": read_arguments(function.get("arguments"))}}


def read_arguments(value: Any) -> Any:
    """Arguments as an object where they are one that can be written again, else as they are."""
    if isinstance(value, dict):
        return value
    parsed = read_json(value or "{}")[0] if isinstance(value, str | None) else None
    return parsed if isinstance(parsed, dict) else str(value)


def read_tools(value: Any) -> tuple[ToolSpec, ...]:
    """A request's tools.

    Raises:
        Refused: 400, a tool that is no function with a name.
    """
    if value is None:
        return ()
    return tuple(_tool(tool, f"tools[{i}]") for i, tool in enumerate(value if isinstance(value, list) else [None]))


def _tool(value: Any, where: str) -> ToolSpec:
    about = value.get("function") if isinstance(value, dict) else None
    about = about if isinstance(about, dict) else {}
    name, parameters = about.get("name"), about.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(name, str) or not name or not isinstance(parameters, dict):
        raise Refused(400, f"{where} is no function with a name", param=where)
    return ToolSpec(name=name, description=str(about.get("description") or ""), parameters=parameters)


# --------------------------------------------------------------------------------------------------------- digests


def digests(tools: Sequence[ToolSpec], messages: Sequence[Json]) -> list[bytes]:
    """Digest of the tools, then of tools and messages up to each message: one more than there are messages."""
    chain = [hashlib.sha256(json.dumps([tool.openai() for tool in tools], sort_keys=True).encode()).digest()]
    for message in messages:
        chain.append(after(chain[-1], message))
    return chain


def after(digest: bytes, message: Json) -> bytes:
    """Digest of a history with one more message."""
    return hashlib.sha256(digest + _identity(message)).digest()


def _identity(message: Json) -> bytes:
    """What makes a message the same one: not the ids of its calls, nor the space around an agent's words, nor whether
    arguments are an object or its text, as those of a broken call may be, nor how a whole number is written."""
    role, content = message["role"], message["content"]
    made = [call["function"] for call in message.get("tool_calls", ())]
    calls = [(call["name"], read_arguments(call["arguments"])) for call in made]
    said = json.dumps(json.loads(json.dumps(calls), parse_float=_number), sort_keys=True) if calls else ""
    words = content.strip() if role == "assistant" else content
    return f"{role} {len(words)} {words}{said}".encode("utf-8", "surrogatepass")


def _number(text: str) -> int | float:
    """A number as clients send it back whose language has one kind of numbers: 1250 for 1250.0."""
    value = float(text)
    return int(value) if value.is_integer() else value


def fork_reason(old: Sequence[Json], new: Sequence[Json], *, same_tools: bool) -> ForkReason:
    """Why a history that does not go on from a recorded one is another.

    Args:
        old: messages of the branch that was used last.
        new: messages of the request.
        same_tools: whether both were rendered with the same tools.

    >>> a, b = {"role": "user", "content": "a"}, {"role": "user", "content": "b"}
    >>> fork_reason([a, b, b], [a, a], same_tools=True), fork_reason([a, b], [b], same_tools=True)
    ('compaction', 'subagent')
    """
    same = shared(old, new)
    if same == 0:
        return "subagent"
    if same == len(new):
        return "retry"
    edited = rewritten(old, new) is not None
    return "compaction" if same_tools and not edited and len(new) < len(old) else "template_rewrite"


def rewritten(old: Sequence[Json], new: Sequence[Json]) -> int | None:
    """Where an answer came back as another one; None where none did, as when a later one stands there because what was
    between them is left out.

    >>> a, b, c = ({"role": "assistant", "content": text} for text in "abc")
    >>> rewritten([a, b], [a, c]), rewritten([a, b, c], [a, c])
    (1, None)
    """
    at = shared(old, new)
    if at >= min(len(old), len(new)) or not old[at]["role"] == new[at]["role"] == "assistant":
        return None
    return None if _identity(new[at]) in map(_identity, old[at:]) else at


def shared(old: Sequence[Json], new: Sequence[Json]) -> int:
    """Messages that two histories have in common at their start."""
    pairs = zip(old, new, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if _identity(a) != _identity(b)), min(len(old), len(new)))
