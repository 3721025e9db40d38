"""Requests of Anthropic's Messages API as what is sampled, and answers in its shape. Pure.

Inside, everything is as in OpenAI's chat API: a block ``tool_use`` is a call, a block ``tool_result`` a message of the
role ``tool``. What was thought is told and not read back, since chat templates leave it out of earlier answers.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import orjson

from agentsdpo.collect.proxy.history import read_arguments, read_text, read_tools
from agentsdpo.collect.proxy.refusals import Refused
from agentsdpo.collect.proxy.shapes import Asked, Reply, cut_up, read_common
from agentsdpo.types import Json, ToolSpec

_THOUGHTS = ("thinking", "redacted_thinking")
_STOPS = {"tool_calls": "tool_use", "length": "max_tokens", "stop": "end_turn"}
_KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
          413: "request_too_large", 429: "rate_limit_error", 504: "timeout_error"}


def read_message(body: Json, default_max: int) -> Asked:
    """A request of ``/v1/messages`` or of ``/v1/messages/count_tokens``.

    Raises:
        Refused: 400, something that cannot be done.

    >>> read_message({"system": "Be brief.", "messages": [{"role": "user", "content": "Sum?"}]}, 9).messages
    [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Sum?'}]
    """
    value = body.get("messages")
    if not isinstance(value, list) or not value:
        raise Refused(400, "messages is not a list with at least one message", param="messages")
    messages = [] if not body.get("system") else [{"role": "system", "content": _words(body["system"], "system")}]
    for i, message in enumerate(value):
        messages += _messages(message, f"messages[{i}]")
    if messages[-1]["role"] == "assistant":
        raise Refused(400, "the last message is the model's own: an answer that was begun for it cannot be recorded",
                      param="messages", fix="end with a message of the user")
    choice = body.get("tool_choice")
    none = isinstance(choice, dict) and choice.get("type") == "none"
    return Asked(messages=messages, tools=_tools(body.get("tools")), no_tools=none, objects=True,
                 **read_common(_as_openai(body), default_max))


def _as_openai(body: Json) -> Json:
    """Parameters of sampling by OpenAI's names."""
    same = {name: body.get(name) for name in ("max_tokens", "temperature", "top_p", "top_k", "stream")}
    config = body.get("output_config")
    form = config.get("format") if isinstance(config, dict) else None
    if isinstance(form, dict):
        form = {"type": form.get("type"), "json_schema": form}
    return {**same, "stop": body.get("stop_sequences"), "response_format": form}


def _tools(value: Any) -> tuple[ToolSpec, ...]:
    tools = value or []
    for i, tool in enumerate(tools if isinstance(tools, list) else ()):
        if not isinstance(tool, dict) or tool.get("type") not in (None, "custom"):
            raise Refused(400, f"tools[{i}] is none that the request describes", param=f"tools[{i}]",
                          fix="send tools with a name and an input_schema: others than these are known to Anthropic's "
                          "models alone, or run on its servers")
    if not isinstance(tools, list):
        raise Refused(400, "tools is not a list", param="tools")
    return read_tools([{"function": {**tool, "parameters": tool.get("input_schema")}} for tool in tools])


# ---------------------------------------------------------------------------------------------------------- messages


def _messages(value: Any, where: str) -> list[Json]:
    """One message as those it is inside: the results of tools stand alone."""
    role = value.get("role") if isinstance(value, dict) else None
    if not isinstance(role, str) or role not in ("user", "assistant", "system"):
        raise Refused(400, f"{where} has no known role", fix="use user, assistant or system", param=where)
    blocks = _blocks(value.get("content"), where)
    if role == "assistant":
        return [_answer(blocks, where)]
    if role == "user" and any(block["type"] == "tool_result" for block in blocks):
        return [message for result, group in groupby(blocks, lambda block: block["type"] == "tool_result")
                for message in ([_result(block, where) for block in group] if result
                                else [_said(role, list(group), where)])]
    return [_said(role, blocks, where)]


def _blocks(content: Any, where: str) -> list[Json]:
    """A content as a list of blocks; a text is one."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise Refused(400, f"{where} is neither a text nor a list of blocks", param=where)
    return [{**block, "type": block.get("type")} for block in content]


def _said(role: str, blocks: list[Json], where: str) -> Json:
    return {"role": role, "content": "\n".join(read_text([block], where) for block in blocks)}


def _words(content: Any, where: str) -> str:
    return "\n".join(read_text([block], where) for block in _blocks(content, where))


def _result(block: Json, where: str) -> Json:
    """What a tool answered, and whether that was a fault."""
    content = block.get("content")
    message = {"role": "tool", "content": _words(content, where) if content else "",
               "tool_call_id": str(block.get("tool_use_id") or "")}
    return {**message, "is_error": True} if block.get("is_error") else message


def _answer(blocks: list[Json], where: str) -> Json:
    """An answer that comes back."""
    calls = [_call(block, where) for block in blocks if block["type"] == "tool_use"]
    words = [read_text([block], where) for block in blocks if block["type"] not in ("tool_use", *_THOUGHTS)]
    message: Json = {"role": "assistant", "content": "".join(words)}
    return {**message, "tool_calls": calls} if calls else message


def _call(block: Json, where: str) -> Json:
    name, given = block.get("name"), block.get("input")
    if not isinstance(name, str) or not isinstance(given, dict):
        raise Refused(400, f"a tool_use in {where} has no name, or no object as its input", param=where)
    return {"id": str(block.get("id") or ""), "type": "function", "function": {"name": name, "arguments": given}}


# ---------------------------------------------------------------------------------------------------------- answers


def whole(reply: Reply) -> Json:
    """The answer as one object."""
    return {**_head(reply), "content": list(_content(reply)), **_end(reply), "usage": {
        "input_tokens": reply.prompt_tokens, "output_tokens": reply.completion_tokens}}


def _head(reply: Reply) -> Json:
    return {"id": reply.id.replace("chatcmpl-", "msg_", 1), "type": "message", "role": "assistant",
            "model": reply.model}


def _end(reply: Reply) -> Json:
    reason = "stop_sequence" if reply.finish == "stop" and reply.stopped else _STOPS[reply.finish]
    return {"stop_reason": reason, "stop_sequence": reply.stopped if reason == "stop_sequence" else None}


def _content(reply: Reply) -> Iterator[Json]:
    """What was thought, said and called, as blocks."""
    message = reply.message or {}
    if message.get("reasoning_content"):
        yield {"type": "thinking", "thinking": message["reasoning_content"], "signature": ""}
    if message.get("content"):
        yield {"type": "text", "text": message["content"]}
    for call in message.get("tool_calls", ()):
        yield {"type": "tool_use", "id": call["id"], "name": call["function"]["name"],
               "input": call["function"]["arguments"]}


def stream(reply: Reply) -> Iterator[bytes]:
    """The answer as the events of a stream."""
    for event in _events(reply):
        yield b"event: " + event["type"].encode() + b"\ndata: " + orjson.dumps(event) + b"\n\n"


def _events(reply: Reply) -> Iterator[Json]:
    used = {"input_tokens": reply.prompt_tokens, "output_tokens": 0}
    yield {"type": "message_start", "message": {**_head(reply), "content": [], "stop_reason": None,
                                                "stop_sequence": None, "usage": used}}
    for i, block in enumerate(_content(reply)):
        field, kind, empty = _PARTS[block["type"]]
        value = block[field]
        yield {"type": "content_block_start", "index": i, "content_block": {**block, field: empty}}
        for part in cut_up(value if isinstance(value, str) else orjson.dumps(value).decode()):
            delta = {"type": kind, "partial_json" if field == "input" else field: part}
            yield {"type": "content_block_delta", "index": i, "delta": delta}
        yield {"type": "content_block_stop", "index": i}
    yield {"type": "message_delta", "delta": _end(reply), "usage": {"output_tokens": reply.completion_tokens}}
    yield {"type": "message_stop"}


_PARTS: dict[str, tuple[str, str, Any]] = {
    "text": ("text", "text_delta", ""), "thinking": ("thinking", "thinking_delta", ""),
    "tool_use": ("input", "input_json_delta", {})}


def refusal(error: Refused) -> Json:
    """An error as Anthropic's clients read it.

    >>> refusal(Refused(529, "too much"))["error"]
    {'type': 'api_error', 'message': 'too much'}
    """
    kind = _KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(error)}}


def with_objects(message: Json) -> Json:
    """An answer whose calls all have objects as arguments, as ``input`` must be one: text that the model gave instead
    stands in it under ``arguments``.

    >>> call = {"id": "c", "function": {"name": "f", "arguments": "{broken"}}
    >>> with_objects({"role": "assistant", "content": "", "tool_calls": [call]})["tool_calls"][0]["function"]
    {'name': 'f', 'arguments': {'arguments': '{broken'}}
    """
    calls = [{**call, "function": {**call["function"], "arguments": _object(call["function"]["arguments"])}}
             for call in message.get("tool_calls", ())]
    return {**message, "tool_calls": calls} if calls else message


def _object(arguments: Any) -> Json:
    read = read_arguments(arguments)
    return read if isinstance(read, dict) else {"arguments": read}
