"""Messages and tools in OpenAI's shape, checked on the way in and made uniform on the way out."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from agentsdpo.errors import FormatError
from agentsdpo.replay.canonical import to_json
from agentsdpo.replay.formats.files import parse
from agentsdpo.types import Json


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)


class Function(_Open):
    """What a tool call calls."""

    name: str
    arguments: str | dict[str, Any] = "{}"


class Called(_Open):
    """One tool call of a message."""

    id: str | None = None
    type: str | None = None
    function: Function


class Message(_Open):
    """One message; fields beyond these are kept as they are."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[Called] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _by_role(self) -> "Message":
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls belong to the assistant, this message is of the {self.role}")
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of the {self.role} has no content")
        return self


def text_of(content: Any) -> str:
    """The text of a content; parts that are no text are shown as JSON.

    >>> text_of([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x.png"}}])
    'a\\n{"type":"image_url","image_url":{"url":"x.png"}}'
    """
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    return "\n".join(str(part["text"]) if isinstance(part, dict) and part.get("type") == "text" and "text" in part
                     else part if isinstance(part, str) else to_json(part) for part in parts)


def arguments_of(arguments: Any) -> Any:
    """Arguments of a tool call as an object where they are one; otherwise what they are.

    >>> arguments_of('{"a": 1}'), arguments_of("{")
    ({'a': 1}, '{')
    """
    if isinstance(arguments, str):
        try:
            read = parse(arguments.encode(), "")
        except (FormatError, UnicodeEncodeError):
            return arguments
        return read if isinstance(read, dict) else arguments
    return {} if arguments is None else arguments


def message_of(message: Json) -> Json:
    """A message with the fields that trainers know, in one order; arguments of tool calls are JSON text.

    >>> message_of({"content": "x", "role": "user", "at": 3})
    {'role': 'user', 'content': 'x'}
    """
    made: Json = {"role": message.get("role"), "content": _content(message.get("content"))}
    if message.get("tool_calls"):
        made["tool_calls"] = [_call(call) for call in message["tool_calls"]]
    return made | {name: message[name] for name in ("tool_call_id", "name", "reasoning_content", "weight")
                   if message.get(name) is not None}


def _content(content: Any) -> str:
    return content if isinstance(content, str) else text_of(content)


def _call(call: Json) -> Json:
    function = call.get("function") or {}
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else to_json({} if arguments is None else arguments)
    return {"id": call.get("id") or "", "type": "function",
            "function": {"name": function.get("name") or "", "arguments": text}}
