"""The border to litellm: one request, one answer or one fault that says whether another try is worth it.

litellm is loaded on the first request, since that takes seconds, and told to stay at home: its price list is the one
it ships with, no ``.env`` file is read, nothing is reported to anybody, and its own retries are off.
"""

import os
import time
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

from agentsdpo.collect.policy import ContextOverflow
from agentsdpo.errors import ConfigError, EngineError
from agentsdpo.types import Json, printable

_LONGEST = 400
"""Characters of a provider's message that go into an error."""


class ProviderError(EngineError):
    """A hosted model gave no usable answer: the attempt is unscored and may be retried, never a zero."""


class Transient(ProviderError):
    """A fault that may be gone at the next try: rate limit, time-out, server error, an answer that is none.

    ``retry_after_s`` is how long the provider asks to wait, 0 when it does not say.
    """

    retry_after_s: float = 0.0


@dataclass(frozen=True)
class Answer:
    """What came back: text, raw tool calls ``{"id", "name", "arguments"}``, counts, seconds of the request."""

    text: str
    calls: tuple[Json, ...]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float | None
    wall_s: float


@cache
def library() -> ModuleType:
    """litellm, loaded once and without its side effects; takes seconds the first time."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # otherwise the import downloads a price list
    os.environ["LITELLM_MODE"] = "PRODUCTION"  # otherwise the import reads .env of the current folder
    import litellm

    setattr(litellm, "telemetry", False)  # noqa: B010 - a name of its own making, unknown to type checkers
    litellm.suppress_debug_info = True
    litellm.disable_aiohttp_transport = True  # sessions of aiohttp outlive the loop that made them
    return litellm


def known(model: str, *, own_key: bool) -> None:
    """Refuse a model whose provider litellm cannot tell, or whose key is missing.

    Args:
        own_key: whether the key is the one in the provider's usual variable.

    Raises:
        ConfigError: there is no such provider, or no such variable.
    """
    litellm = library()
    try:
        litellm.get_llm_provider(model)
    except litellm.BadRequestError:
        raise ConfigError(f"litellm knows no provider for model {model!r}",
                          fix="write provider/model, as in openai/NAME for any server that speaks the OpenAI API") \
            from None
    missing = litellm.validate_environment(model)["missing_keys"] if own_key else []
    if missing:
        raise ConfigError(f"model {model}: there is no key in {', '.join(missing)}",
                          fix="export it, name another variable in api_key_env, or set api_base to your own server")


def priced(model: str) -> bool:
    """Whether litellm's own list has a price for the model."""
    litellm = library()
    try:
        return bool(litellm.get_model_info(model)["input_cost_per_token"])
    except litellm.ModelNotMappedError:
        return False


async def request(body: Json, *, key: str | None, timeout_s: float) -> Answer:
    """Ask once.

    Args:
        body: arguments of ``litellm.acompletion``: model, messages, tools, sampling.
        key: of the provider; None leaves it to litellm, which reads the provider's own variable.
        timeout_s: seconds for the whole answer.

    Raises:
        Transient: worth another try.
        ContextOverflow: the messages do not fit into the model's window.
        ConfigError: no try will ever work: wrong key, no such model, no credit, unsupported settings.
        ProviderError: this request is refused, others may work.
    """
    litellm = library()
    began = time.monotonic()
    try:
        response = await litellm.acompletion(**body, api_key=key, timeout=timeout_s, num_retries=0, max_retries=0,
                                             stream=False)
        return _read(response, body["model"], time.monotonic() - began)
    except ProviderError:
        raise
    except Exception as fault:  # noqa: BLE001 - litellm and each provider's own client raise whatever they like
        raise _classified(fault, body["model"], key) from None  # the original may quote headers, keys among them


async def close() -> None:
    """Close litellm's connections of this event loop."""
    if library.cache_info().currsize:
        await library().close_litellm_async_clients()


def _read(response: Any, model: str, wall_s: float) -> Answer:
    """The first choice of a response; a lone surrogate in it, as half an emoji is, could not be kept or sent on."""
    if not getattr(response, "choices", None):
        raise Transient(f"model {model}: the answer has no choices")
    choice = response.choices[0]
    calls = tuple({"id": printable(call.id or ""), "name": printable(call.function.name or ""),
                   "arguments": printable(call.function.arguments or "")} for call in choice.message.tool_calls or ())
    usage = getattr(response, "usage", None)
    return Answer(text=printable(choice.message.content or ""), calls=calls, finish_reason=choice.finish_reason or "",
                  prompt_tokens=getattr(usage, "prompt_tokens", 0) or 0,
                  completion_tokens=getattr(usage, "completion_tokens", 0) or 0,
                  cost_usd=response._hidden_params.get("response_cost"), wall_s=wall_s)


def _classified(fault: Exception, model: str, key: str | None) -> Exception:
    """The fault as one of ours, by litellm's class for it, its status and the provider's own word for it."""
    litellm = library()
    what = f"model {model}: {type(fault).__name__}: {scrub(str(fault), key)}"
    status, body = getattr(fault, "status_code", None), getattr(fault, "body", None)
    words = {body.get("code"), body.get("type")} if isinstance(body, dict) else set()
    if isinstance(fault, litellm.ContextWindowExceededError) or "context_length_exceeded" in words:
        return ContextOverflow(what, fix="compact the context, or use a model with a larger window")
    if status in (401, 403):
        return ConfigError(what, fix="check the key in the variable that api_key_env names")
    if "insufficient_quota" in words:
        return ConfigError(what, fix="the account has no credit left: waiting does not help")
    if status == 404:
        return ConfigError(what, fix="check model and api_base")
    if isinstance(fault, litellm.UnsupportedParamsError):
        return ConfigError(what, fix="leave out the settings that this model does not take")
    if status in (400, 413, 422):
        return ProviderError(what, fix="the provider refuses this request, so it is not sent again")
    transient = Transient(what)
    transient.retry_after_s = _retry_after(fault)
    return transient


def _retry_after(fault: Exception) -> float:
    """Seconds from the Retry-After header; 0 when absent or a date."""
    headers = getattr(fault, "litellm_response_headers", None) or {}
    text = str(headers.get("retry-after", ""))
    return float(text) if text.isdecimal() else 0.0


def scrub(text: str, key: str | None = None) -> str:
    """A provider's message without keys, short and on one line.

    >>> scrub("Incorrect API key provided: sk-abcdefghijklmnopqrstuv.\\nTry again.")
    'Incorrect API key provided: [openai_key]. Try again.'
    >>> scrub("bad key hunter2hunter2", "hunter2hunter2")
    'bad key [key]'
    """
    from agentsdpo.replay.formats.secret_rules import RULES, spans

    if key:
        text = text.replace(key, "[key]")
    for start, end, name, _ in sorted(spans(RULES, text), reverse=True):
        text = f"{text[:start]}[{name}]{text[end:]}"
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
