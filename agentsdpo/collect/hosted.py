"""Models behind somebody's API: judges, hint writers, user simulators, agents. Every call goes through here.

One retry layer (tenacity: exponential back-off with jitter), a limit on calls in flight, a limit on money, every
token and dollar counted, and answers kept on disk by content, so that a run that is done again asks only for what it
does not have. Keys are named by their environment variable; they are in no record, no cache and no error.
"""

import asyncio
import hashlib
import json
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import Field, ValidationError, field_validator
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt

from agentsdpo.collect import provider
from agentsdpo.collect.provider import Answer, ProviderError, Transient
from agentsdpo.errors import ConfigError
from agentsdpo.files import write_text
from agentsdpo.settings import Settings
from agentsdpo.types import Frozen, Json, ToolSpec, Usage

_PATIENCE_S = 600.0
"""Longest wait that a provider's Retry-After is granted, seconds."""
_OURS = frozenset({"model", "messages", "tools", "api_key", "api_base", "timeout", "num_retries", "max_retries",
                   "stream", "n", "temperature", "max_tokens", "headers", "extra_headers"})
"""Settings with a field of their own, or that may carry a key."""


class HostedConfig(Settings):
    """A hosted model and what it may cost. Holds no secret, so it may be written into any record."""

    model: str = Field(description="provider/name, as litellm writes it; openai/NAME for any compatible server")
    api_base: str | None = Field(default=None, description="address of the server; None is the provider's own")
    api_key_env: str | None = Field(default=None, description="environment variable that holds the key; None is the "
                                                              "provider's usual one, or no key with an api_base")
    temperature: float | None = Field(default=None, ge=0, le=2, description="None is the provider's own")
    max_tokens: int | None = Field(default=None, ge=1, description="of one answer; None is the provider's own")
    timeout_s: float = Field(default=600.0, gt=0, description="seconds for one attempt")
    retries: int = Field(default=10, ge=0, description="attempts after the first")
    backoff_s: float = Field(default=5.0, ge=0, description="wait before retry n: this * 2^(n-1) + U(0, this) seconds")
    concurrency: int = Field(default=8, ge=1, description="requests in flight")
    max_cost_usd: float | None = Field(default=None, gt=0, description="no request begins once this much is spent")
    usd_per_mtok_in: float | None = Field(default=None, ge=0, description="price; None is litellm's own list")
    usd_per_mtok_out: float | None = Field(default=None, ge=0, description="price; None is litellm's own list")
    cache: Path | None = Field(default=None, description="folder of answers, by content; None keeps none")
    extra: Json = Field(default={}, description="further arguments of the request: reasoning_effort, top_p, seed, ...")

    @field_validator("api_base")
    @classmethod
    def _no_login(cls, value: str | None) -> str | None:
        if value is not None and "@" in value.partition("://")[2].partition("/")[0]:
            raise ValueError("api_base holds a login; put the key into a variable and name it in api_key_env")
        return value

    @field_validator("extra")
    @classmethod
    def _not_ours(cls, value: Json) -> Json:
        taken = sorted(name for name in value if name in _OURS or "key" in name.lower() or name.lower() == "token")
        if taken:
            raise ValueError(f"extra holds {', '.join(taken)}: it has a field of its own, or is a secret")
        return value


class SpendLimit(ConfigError):
    """The money that was allowed is spent: the run stops where it is and goes on when more is allowed."""


@dataclass
class Spent:
    """Totals since the client was made; cached answers cost nothing and are counted apart.

    Attributes:
        calls: answers that were paid for. cached: answers from disk. retries: attempts that failed and were repeated.
        failed: calls without an answer in the end.
        prompt_tokens, completion_tokens: as the provider counts them.
        cost_usd: dollars. unpriced: calls whose price nobody knows, not in ``cost_usd``.
    """

    calls: int = 0
    cached: int = 0
    retries: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    unpriced: int = 0

    def as_json(self) -> Json:
        """All of it by name."""
        return asdict(self)


class Reply(Frozen):
    """One answer. ``calls`` are raw: ``{"id", "name", "arguments"}`` with arguments as the model wrote them."""

    text: str
    calls: tuple[Json, ...] = ()
    usage: Usage = Usage()
    cached: bool = False


class HostedModel:
    """A client of one hosted model, for as many callers as like.

    >>> config = HostedConfig(model="openai/judge-1", api_base="http://127.0.0.1:9/v1", retries=0, max_cost_usd=2)
    >>> HostedModel(config).spent.cost_usd
    0.0
    """

    def __init__(self, config: HostedConfig) -> None:
        self.config, self.spent = config, Spent()
        self._slots: asyncio.Semaphore | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._checked = False

    @property
    def name(self) -> str:
        """The model, as litellm writes it."""
        return self.config.model

    async def ask(self, messages: Sequence[Json], *, tools: Sequence[ToolSpec] = (), salt: str = "",
                  max_tokens: int | None = None, identity: Json | None = None) -> Reply:
        """Ask, from the cache where the same was asked before.

        Args:
            messages: OpenAI shape.
            tools: the model may call.
            salt: tells apart calls that are to be answered anew although they are equal: attempts, retries.
            max_tokens: of this answer; the smaller of it and the configured one holds.
            identity: what the answer is kept under in place of the messages, where those hold something random.

        Raises:
            ProviderError: no usable answer after all retries, or the request is refused.
            ContextOverflow: the messages do not fit into the model's window.
            SpendLimit: ``max_cost_usd`` is spent.
            ConfigError: wrong key, no such model, unsupported settings.
        """
        body = self._body(messages, tools, max_tokens)
        place = self._place(body if identity is None else {**body, "messages": identity}, salt)
        kept = _cached(place)
        if kept is not None:
            self.spent.cached += 1
            return kept
        self._check()
        try:
            answer, retries = await self._answer(body)
        except ProviderError:
            self.spent.failed += 1
            raise
        reply = Reply(text=answer.text, calls=answer.calls, usage=self._charge(answer, retries))
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_text(place, reply.model_dump_json())
        return reply

    async def aclose(self) -> None:
        """Close the connections of this event loop; the client may be used again."""
        await provider.close()

    def _body(self, messages: Sequence[Json], tools: Sequence[ToolSpec], max_tokens: int | None) -> Json:
        config, limits = self.config, [n for n in (self.config.max_tokens, max_tokens) if n is not None]
        body: Json = {"model": config.model, "messages": list(messages), **config.extra}
        optional = {"api_base": config.api_base, "temperature": config.temperature,
                    "max_tokens": min(limits, default=None), "tools": [tool.openai() for tool in tools] or None}
        return body | {name: value for name, value in optional.items() if value is not None}

    def _place(self, body: Json, salt: str) -> Path | None:
        """Where the answer is kept: named by everything that decides it."""
        if self.config.cache is None:
            return None
        text = json.dumps([body, salt], sort_keys=True, ensure_ascii=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return self.config.cache / digest[:2] / f"{digest}.json"

    def _check(self) -> None:
        """Refuse to begin what cannot work or is not paid for."""
        config = self.config
        if not self._checked:
            provider.known(config.model, own_key=config.api_base is None and config.api_key_env is None)
            if config.api_key_env is not None and not os.environ.get(config.api_key_env):
                raise ConfigError(f"model {config.model}: variable {config.api_key_env} is not set",
                                  fix="export the key under this name, or correct api_key_env")
            if config.max_cost_usd is not None and self._prices() is None and not provider.priced(config.model):
                raise ConfigError(f"max_cost_usd is {config.max_cost_usd} but nobody knows what {config.model} costs",
                                  fix="set usd_per_mtok_in and usd_per_mtok_out")
            self._checked = True
        if config.max_cost_usd is not None and self.spent.cost_usd >= config.max_cost_usd:
            raise SpendLimit(f"model {config.model} has cost {self.spent.cost_usd:.4f} USD and max_cost_usd is "
                             f"{config.max_cost_usd}", fix="raise max_cost_usd and resume: answers so far are kept")

    def _prices(self) -> tuple[float, float] | None:
        """Dollars per token in and out as configured; None leaves it to litellm's list."""
        prices = self.config.usd_per_mtok_in, self.config.usd_per_mtok_out
        return None if prices == (None, None) else ((prices[0] or 0.0) / 1e6, (prices[1] or 0.0) / 1e6)

    async def _answer(self, body: Json) -> tuple[Answer, int]:
        """Try until there is an answer; waits hold no slot."""
        key, retries = self._key(), -1
        attempts = AsyncRetrying(stop=stop_after_attempt(self.config.retries + 1), wait=self._wait, reraise=True,
                                 retry=retry_if_exception_type(Transient))
        async for attempt in attempts:
            with attempt:
                retries += 1
                self.spent.retries += retries > 0
                async with self._slot():
                    self._check()
                    return await provider.request(body, key=key, timeout_s=self.config.timeout_s), retries
        raise AssertionError("tenacity ends by an answer or by raising")

    def _key(self) -> str | None:
        """The named key; a server of one's own gets a blank, never the key of the provider it imitates."""
        if self.config.api_key_env is not None:
            return os.environ[self.config.api_key_env]
        return None if self.config.api_base is None else "none"

    def _wait(self, state: RetryCallState) -> float:
        fault = state.outcome.exception() if state.outcome else None
        asked = min(fault.retry_after_s, _PATIENCE_S) if isinstance(fault, Transient) else 0.0
        backoff = self.config.backoff_s * 2 ** (state.attempt_number - 1)
        return max(asked, backoff) + random.uniform(0, self.config.backoff_s)

    def _slot(self) -> asyncio.Semaphore:
        """The limit on requests in flight; each event loop has its own."""
        loop = asyncio.get_running_loop()
        if self._slots is None or self._loop is not loop:
            self._slots, self._loop = asyncio.Semaphore(self.config.concurrency), loop
        return self._slots

    def _charge(self, answer: Answer, retries: int) -> Usage:
        """Count what an answer cost."""
        prices = self._prices()
        cost = answer.cost_usd if prices is None else (
            answer.prompt_tokens * prices[0] + answer.completion_tokens * prices[1])
        spent = self.spent
        spent.calls, spent.unpriced = spent.calls + 1, spent.unpriced + (cost is None)
        spent.prompt_tokens += answer.prompt_tokens
        spent.completion_tokens += answer.completion_tokens
        spent.cost_usd += cost or 0.0
        return Usage(prompt_tokens=answer.prompt_tokens, completion_tokens=answer.completion_tokens, retries=retries,
                     finish_reason=answer.finish_reason, working_s=answer.wall_s, cost_usd=cost or 0.0)


def _cached(place: Path | None) -> Reply | None:
    """The answer kept at a place; one that cannot be read is asked for again and replaced."""
    if place is None or not place.is_file():
        return None
    try:
        return Reply.model_validate_json(place.read_bytes()).model_copy(update={"cached": True})
    except ValidationError:
        return None
