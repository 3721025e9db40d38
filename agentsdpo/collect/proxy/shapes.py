"""Requests of OpenAI's chat and completions APIs as what is sampled, and answers in their shape. Pure."""

import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from agentsdpo.calls import read_json
from agentsdpo.chat import ChatFormat
from agentsdpo.collect.proxy.history import read_messages, read_tools
from agentsdpo.collect.proxy.line import Sampled
from agentsdpo.collect.proxy.refusals import Refused
from agentsdpo.collect.turns import unique_ids
from agentsdpo.types import Json, Sampling, ToolCall, ToolSpec

PIECE = 48
"""Characters of one piece of a stream that is made from a whole answer."""
_FILTERS = ("min_p", "logit_bias", "bad_words", "allowed_token_ids", "structured_outputs", "response_format")
"""Parameters that cut or bend the distribution in a way that the record cannot repeat."""
_PENALTIES = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class Asked:
    """What a client wants of one call.

    Attributes:
        messages: of a chat; None for text. tools: of a chat. prompt: text or ids; None for a chat.
        sampling: ``max_tokens`` is the client's, or the default. extra: more parameters for the engine.
        reason: why the call cannot be trained on, for the parameters it has; None when it can.
        stop: texts that end an answer. stream, usage: whether to stream, and to send the usage at its end.
        logprobs: None for none, else so many alternatives per token. no_tools: none may be called.
        objects: the client reads arguments of calls as objects alone.
    """

    sampling: Sampling
    messages: list[Json] | None = None
    tools: tuple[ToolSpec, ...] = ()
    prompt: str | list[int] | None = None
    extra: Json = field(default_factory=dict)
    reason: str | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    usage: bool = False
    logprobs: int | None = None
    no_tools: bool = False
    objects: bool = False


def read_chat(body: Json, default_max: int) -> Asked:
    """A request of ``/v1/chat/completions``. Raises Refused with 400 for what cannot be done."""
    top = body.get("top_logprobs") or 0
    return Asked(messages=read_messages(body.get("messages")), tools=read_tools(body.get("tools")),
                 logprobs=_number(top, "top_logprobs", 0, 20, int) if body.get("logprobs") else None,
                 no_tools=body.get("tool_choice") == "none", **read_common(body, default_max))


def read_completion(body: Json, default_max: int) -> Asked:
    """A request of ``/v1/completions``. Raises Refused with 400 for what cannot be done."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    whole = isinstance(prompt, str) or (isinstance(prompt, list)
                                        and all(type(i) is int and 0 <= i < 2**31 for i in prompt))
    if not whole or not prompt:
        raise Refused(400, "prompt is neither a text nor a list of token ids", param="prompt",
                      fix="send one prompt that is not empty; several at once are several requests")
    for name in ("echo", "suffix"):
        if body.get(name):
            raise Refused(400, f"{name} is not supported", param=name)
    count = body.get("logprobs")
    return Asked(prompt=prompt, logprobs=None if count is None else _number(count, "logprobs", 0, 20, int),
                 **read_common(body, default_max))


def read_common(body: Json, default_max: int) -> Json:
    """Fields of :class:`Asked` that chats and completions share. Raises Refused with 400 for what cannot be done."""
    for name in ("n", "best_of"):
        if body.get(name) not in (None, 1):
            raise Refused(400, f"{name} is {body[name]!r}", fix="ask once per answer", param=name)
    most = next((body[n] for n in ("max_completion_tokens", "max_tokens") if body.get(n) is not None), default_max)
    seed = body.get("seed")
    sampling = Sampling(
        temperature=_temperature(body.get("temperature")), top_p=_number(body.get("top_p"), "top_p", 1e-6, 1.0),
        top_k=max(0, _number(body.get("top_k", 0) or 0, "top_k", -1, 1_000_000, int)),
        max_tokens=_number(most, "max_tokens", 1, 10_000_000, int),
        seed=random.getrandbits(31) if seed is None else _number(seed, "seed", 0, 2**63 - 1, int))
    extra, reason = _extra(body)
    stop = body.get("stop") or []
    stop = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list) else (None,)
    if not all(isinstance(text, str) and text for text in stop):
        raise Refused(400, "stop is neither a text nor a list of texts", param="stop")
    options = body.get("stream_options") or {}
    return {"sampling": sampling, "extra": extra, "reason": reason, "stop": stop, "stream": bool(body.get("stream")),
            "usage": isinstance(options, dict) and bool(options.get("include_usage"))}


def _temperature(value: Any) -> float:
    """0, or at least the 0.01 that the engine lifts smaller ones to."""
    number = _number(value, "temperature", 0.0, 100.0)
    return max(number, 0.01) if number else 0.0


def _number(value: Any, name: str, low: float, high: float, kind: type = float) -> Any:
    if value is None:
        return kind(1)
    number = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not number or kind(value) != value:
        raise Refused(400, f"{name} is not a number from {low:g} to {high:g}", param=name)
    return kind(value)


def _extra(body: Json) -> tuple[Json, str | None]:
    """Further parameters for the engine, and why they make the call untrainable."""
    extra = {name: body[name] for name in _FILTERS if body.get(name)}
    plain = extra.pop("response_format", None)
    if isinstance(plain, dict) and plain.get("type") == "json_object":
        extra["structured_outputs"] = {"json_object": True}
    elif isinstance(plain, dict) and plain.get("type") == "json_schema":
        schema = plain.get("json_schema")
        if not isinstance(schema, dict):
            raise Refused(400, "response_format has no json_schema with a schema", param="response_format")
        extra["structured_outputs"] = {"json": schema.get("schema", {})}
    bent = {name: body[name] for name, off in _PENALTIES.items() if body.get(name) not in (None, off)}
    return {**extra, **bent}, "kept_set_missing" if extra else "masked_by_policy" if bent else None


# ---------------------------------------------------------------------------------------------------------- answers


def read_answer(chat: ChatFormat, text: str, turn: int, *, thinking: bool, tools: Sequence[ToolSpec],
                history: Sequence[Json] = ()) -> Json:
    """What the model said as the message a client gets.

    Args:
        text: of the completion, without its end-of-turn token.
        turn: number of the call, for the ids of tool calls.
        thinking: the prompt ended with ``<think>``, so that the text begins inside.
        tools: that may be called; without any, nothing is looked for.
        history: messages before it: ids of calls in there are taken, as turns begin anew with each attempt.
    """
    message: Json = {"role": "assistant", "content": text}
    if thinking or text.lstrip().startswith("<think>") or "</think>" in text:
        thought, closed, rest = text.partition("</think>")
        message = {"role": "assistant", "content": rest.strip() if closed else "",
                   "reasoning_content": thought.replace("<think>", "").strip()}
    content = message["content"]
    found = chat.calls.parse(content, turn, tools)[0] if tools else []
    taken = {call["id"] for said in history for call in said.get("tool_calls", ())}
    named, _ = unique_ids([call for call in found if call.name], turn, taken)
    if named:
        message["content"] = content[:chat.calls.begin(content)].rstrip()
        message["tool_calls"] = [_given(call).openai() for call in named]
    return message


def _given(call: ToolCall) -> ToolCall:
    """The call with what the model gave as arguments: where that is no object, they are the text of the whole call."""
    body = read_json(call.arguments)[0] if isinstance(call.arguments, str) else None
    told = [body[key] for key in ("parameters", "arguments") if key in body] if isinstance(body, dict) else []
    return call.model_copy(update={"arguments": json.dumps(told[0], ensure_ascii=False)}) if told else call


def sendable(message: Json) -> Json:
    """The message as it goes out: arguments are texts, no content is null."""
    out = {**message, "content": message["content"] or None if message.get("tool_calls") else message["content"]}
    if message.get("tool_calls"):
        out["tool_calls"] = [{**call, "function": {**call["function"], "arguments": _as_text(call)}}
                             for call in message["tool_calls"]]
    return out


def _as_text(call: Json) -> str:
    arguments = call["function"]["arguments"]
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def finish_reason(message: Json | None, sampled: Sampled) -> str:
    """``tool_calls``, ``length`` or ``stop``."""
    if message is not None and message.get("tool_calls"):
        return "tool_calls"
    return "length" if sampled.completion.finish_reason == "length" else "stop"


@dataclass(frozen=True)
class Reply:
    """One answer, ready to be sent whole or in pieces.

    Attributes:
        id, model, created: as clients are told. finish: see :func:`finish_reason`.
        prompt_tokens, completion_tokens: counts. message: of a chat; None for text. text: else.
        logprobs: that were asked for. stopped: the text of ``stop`` that ended it, "" where none did.
    """

    id: str
    model: str
    finish: str
    prompt_tokens: int
    completion_tokens: int
    message: Json | None = None
    text: str = ""
    logprobs: Json | None = None
    stopped: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def usage(self) -> Json:
        """Token counts."""
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens,
                "total_tokens": self.prompt_tokens + self.completion_tokens}

    def whole(self) -> Json:
        """The answer as one object."""
        choice: Json = {"index": 0, "finish_reason": self.finish, "logprobs": self.logprobs}
        choice |= {"text": self.text} if self.message is None else {"message": sendable(self.message)}
        return {**self._head("text_completion" if self.message is None else "chat.completion"), "choices": [choice],
                "usage": self.usage}

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def stream(self, *, usage: bool) -> Iterator[bytes]:
        """The answer as the events of a stream."""
        for piece in self._pieces(usage):
            yield b"data: " + orjson.dumps(piece) + b"\n\n"
        yield b"data: [DONE]\n\n"

    def _pieces(self, usage: bool) -> Iterator[Json]:
        kind = "text_completion" if self.message is None else "chat.completion.chunk"
        deltas = [{"text": part} for part in cut_up(self.text)] if self.message is None else \
            [{"delta": delta} for delta in _deltas(sendable(self.message))]
        deltas = deltas or [{"text": ""}]
        for i, delta in enumerate(deltas):
            yield self._piece(kind, delta, self.logprobs if i == 0 else None, None, usage)
        yield self._piece(kind, {"text": ""} if self.message is None else {"delta": {}}, None, self.finish, usage)
        if usage:
            yield {**self._head(kind), "choices": [], "usage": self.usage}

    def _piece(self, kind: str, part: Json, logprobs: Json | None, finish: str | None, usage: bool) -> Json:
        choice = {"index": 0, **part, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head(kind), "choices": [choice], **({"usage": None} if usage else {})}


def _deltas(message: Json) -> Iterator[Json]:
    """A message in pieces: role, thoughts, words, then each call with its arguments."""
    yield {"role": "assistant", "content": ""}
    for part in cut_up(message.get("reasoning_content") or ""):
        yield {"reasoning_content": part}
    for part in cut_up(message["content"] or ""):
        yield {"content": part}
    for i, call in enumerate(message.get("tool_calls", ())):
        function = call["function"]
        yield {"tool_calls": [{"index": i, "id": call["id"], "type": "function",
                               "function": {"name": function["name"], "arguments": ""}}]}
        for part in cut_up(function["arguments"]):
            yield {"tool_calls": [{"index": i, "function": {"arguments": part}}]}


def cut_up(text: str) -> list[str]:
    """A text in pieces of :data:`PIECE` characters."""
    return [text[i:i + PIECE] for i in range(0, len(text), PIECE)]


def chat_logprobs(chat: ChatFormat, sampled: Sampled) -> Json:
    """The log-probs a chat client asked for, per token."""
    done = sampled.completion
    tops = sampled.top or ((),) * len(done.token_ids)
    return {"content": [{**_token(chat, i, logp), "top_logprobs": [_token(chat, *one) for one in top]}
                        for i, logp, top in zip(done.token_ids, done.logprobs, tops, strict=False)]}


def _token(chat: ChatFormat, token: int, logp: float) -> Json:
    text = chat.decode([token])
    return {"token": text, "logprob": logp, "bytes": list(text.encode("utf-8", "replace"))}


def text_logprobs(chat: ChatFormat, sampled: Sampled) -> Json:
    """The log-probs a completions client asked for."""
    done = sampled.completion
    tokens, at, offsets = [chat.decode([i]) for i in done.token_ids], 0, []
    for token in tokens:
        offsets.append(at)
        at += len(token)
    tops = [{chat.decode([i]): logp for i, logp in top} for top in sampled.top]
    return {"tokens": tokens, "token_logprobs": list(done.logprobs), "top_logprobs": tops or None,
            "text_offset": offsets}


def cut_at_stop(chat: ChatFormat, ids: Sequence[int], stop: Sequence[str]) -> tuple[int, str, str] | None:
    """Where the first of these texts ends an answer: tokens to keep, the text before it, which it is; None where none.

    The tokens up to the one that completes the text were sampled before anybody could know what comes behind: cut
    there, they are what a sampler that stops would have given.
    """
    text = chat.decode(ids)
    found = [(text.find(word), word) for word in stop if word in text]
    if not found:
        return None
    at, first = min(found)
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        if any(word in chat.decode(ids[:middle]) for word in stop):
            high = middle
        else:
            low = middle + 1
    return low, text[:at], first
