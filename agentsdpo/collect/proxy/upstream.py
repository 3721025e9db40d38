"""The engine behind the proxy: tokens in, tokens out, over HTTP and never streamed.

``/inference/v1/generate`` is asked first, as it alone says which weights sampled which token. Where the server has it
switched off, ``/v1/completions`` with token ids takes its place, and the weights are asked for before and after.
"""

import asyncio
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import aiohttp
from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from agentsdpo.collect.proxy.line import Sampled
from agentsdpo.collect.proxy.reading import joined, read_choice, span_of
from agentsdpo.collect.proxy.refusals import UpstreamError
from agentsdpo.types import Json, Sampling

GENERATE, COMPLETIONS = "/inference/v1/generate", "/v1/completions"
_KINDS = {"processed_logprobs": "processed", "raw_logprobs": "raw"}
_ADAPTER = re.compile(r"(.+)@v(\d+)\Z")
MOST_CONNECTIONS = 0
"""Connections to the engine at once; 0 is no limit, as the proxy limits requests itself."""


class Away(Exception):
    """The engine did not take the call, or broke before it answered: worth asking again."""

    def __init__(self, what: str, status: int = 502) -> None:
        super().__init__(what)
        self.what, self.status = what, status


class _Ask(NamedTuple):
    """One call; the arguments are those of :meth:`Upstream.sample`, and the clock when it began."""

    ids: list[int]
    sampling: Sampling
    model: str
    salt: str
    extra: Json
    logprobs: int
    call: str
    began: float

    def body(self, route: str) -> Json:
        """The request of a route; every parameter is explicit, so that no default of the engine is in force."""
        drawn: Json = {**self.sampling.model_dump(), "top_k": self.sampling.top_k or -1, "logprobs": self.logprobs,
                       **self.extra}
        named: Json = {"model": self.model, "cache_salt": self.salt, "request_id": self.call}
        if route == GENERATE:
            return {**named, "token_ids": self.ids, "sampling_params": drawn, "stream": False}
        return {**named, "prompt": self.ids, **drawn, "return_token_ids": True, "skip_special_tokens": False}


class Upstream:
    """One engine.

    Args:
        url: its address.
        timeout_s: for one answer. retry_s: how long to go on asking an engine that is away.

    Attributes:
        model: name of its own model. window: longest prompt plus completion. kind: of its log-probs.
        loaded: names of the models and adapters it has, as of the last :meth:`look`.
        label: of the weights now loaded, None where it does not say.
    """

    def __init__(self, url: str, *, timeout_s: float, retry_s: float) -> None:
        self.url, self.timeout_s, self.retry_s = url.rstrip("/"), timeout_s, retry_s
        self.model, self.window, self.kind = "", 0, "unknown"
        self.loaded: frozenset[str] = frozenset()
        self.label: str | None = None
        self.route = GENERATE
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        """Connect and learn what the engine is.

        Raises:
            UpstreamError: it cannot be reached, or lists no model.
        """
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=MOST_CONNECTIONS))
        models = (await self._get("/v1/models") or {}).get("data") or []
        own = [model for model in models if not model.get("parent")]
        if not own:
            raise UpstreamError(502, f"{self.url} is not reachable, or has no model",
                                fix="start the engine first, or mend the address")
        self.model, self.window = own[0]["id"], int(own[0].get("max_model_len") or 0)
        about = await self._get("/server_info?config_format=json") or {}
        mode = _find(about, "logprobs_mode")
        self.kind = _KINDS.get(str(mode).rpartition(".")[2].lower(), "unknown")
        await self.look()

    async def close(self) -> None:
        """Let go of the connections."""
        if self._session is not None:
            await self._session.close()

    async def look(self) -> None:
        """See which adapters are loaded and which weights; an engine that is away changes nothing."""
        models, weights = await asyncio.gather(self._get("/v1/models"), self._get("/weight_info"))
        if models is not None:
            self.loaded = frozenset(str(model.get("id")) for model in models.get("data") or ())
        if weights is not None:
            self.label = None if _find(weights, "weight_version") is None else str(_find(weights, "weight_version"))

    def newest(self, stem: str) -> str:
        """The newest adapter ``STEM@vN`` that is loaded, the engine's own model where there is none."""
        found = [(int(match[2]), name) for name in self.loaded if (match := _ADAPTER.match(name)) and match[1] == stem]
        return max(found)[1] if found else self.model

    async def _get(self, path: str) -> Json | None:
        """A small JSON answer; None where there is none."""
        assert self._session is not None
        try:
            async with self._session.get(self.url + path, timeout=aiohttp.ClientTimeout(total=10)) as answer:
                found = await answer.json(content_type=None) if answer.status == 200 else None
                return found if isinstance(found, dict) else None
        except (aiohttp.ClientError, TimeoutError, ValueError, OSError):
            return None

    # ------------------------------------------------------------------------------------------------- sampling

    async def sample(self, ids: Sequence[int], sampling: Sampling, *, model: str, salt: str, call: str, extra: Json,
                     logprobs: int = 0) -> Sampled:
        """One completion; an engine that is away is waited for, and one cut off by a publisher is gone on with.

        Args:
            ids: the whole prompt. sampling: how to draw.
            model: model or adapter. salt: of the prefix cache; no two tenants share one.
            call: identity of the call, for the engine's log; every attempt gets a number behind it.
            extra: more sampling parameters. logprobs: alternatives per token.

        Raises:
            UpstreamError: no answer that can be passed on: 400, 404 (no such adapter), 502, 503 or 504.
        """
        began, parts, left = time.monotonic(), list[Sampled](), sampling.max_tokens
        while True:
            prompt = [*ids, *(token for part in parts for token in part.completion.token_ids)]
            ask = _Ask(prompt, sampling.model_copy(update={"max_tokens": left}), model, salt, extra, logprobs,
                       f"{call}-{len(parts)}", began)
            part = await self._attempts(ask)
            left -= len(part.completion.token_ids)
            parts.append(part)
            if part.completion.finish_reason != "abort" or left < 1 or self._late(began):
                return joined(parts)

    async def _attempts(self, ask: "_Ask") -> Sampled:
        """Ask until there is an answer; only calls that gave no token are made again."""
        number = 0
        try:
            async for attempt in AsyncRetrying(
                    retry=retry_if_exception_type(Away), wait=wait_random_exponential(multiplier=0.2, max=2.0),
                    stop=lambda state: time.monotonic() - ask.began >= self.retry_s, reraise=True):
                with attempt:
                    number += 1
                    return await self._once(ask._replace(call=f"{ask.call}-{number}"))
        except Away as error:
            raise UpstreamError(error.status, f"the engine gave no answer: {error.what}", code="engine_away",
                                fix="send the request again later", retry_after_s=5.0) from error
        raise AssertionError("tenacity returned without an answer")  # pragma: no cover

    def _late(self, began: float) -> bool:
        return time.monotonic() - began >= self.timeout_s

    async def _once(self, ask: "_Ask") -> Sampled:
        """One attempt."""
        route = self.route
        before = None if route == GENERATE else await self._weights()
        status, answer = await self._post(route, ask.body(route), ask.began)
        if status in (403, 404, 405) and route == GENERATE and not _names_model(answer):
            self.route = COMPLETIONS
            raise Away(f"it has no {GENERATE}")
        if status in (429, 500, 502, 503):
            raise Away(f"status {status}: {_message(answer)}", 503 if status in (429, 503) else 502)
        if status != 200:
            raise UpstreamError(status if status in (400, 404, 413, 422) else 502,
                                f"the engine refused the call with status {status}: {_message(answer)}",
                                code="engine_refused")
        version = _adapter_version(ask.model)
        if version is None and route == COMPLETIONS:
            version = span_of(before) if before == await self._weights() else -1
        try:
            return read_choice(answer, kind=self.kind, version=version, model=ask.model)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise UpstreamError(502, f"the engine's answer cannot be read ({type(error).__name__}: {error})",
                                code="engine_answer") from error

    async def _weights(self) -> str | None:
        found = _find(await self._get("/weight_info") or {}, "weight_version")
        return None if found is None else str(found)

    async def _post(self, path: str, body: Json, began: float) -> tuple[int, Any]:
        """Status and JSON of one request, None where the answer is no JSON."""
        assert self._session is not None
        left = max(0.001, self.timeout_s - (time.monotonic() - began))
        try:
            async with self._session.post(self.url + path, json=body,
                                          timeout=aiohttp.ClientTimeout(total=left, sock_connect=10)) as answer:
                raw = await answer.read()
                try:
                    return answer.status, await answer.json(content_type=None)
                except ValueError:
                    if answer.status == 200:
                        raise Away(f"{len(raw)} bytes that are no JSON") from None
                    return answer.status, None
        except aiohttp.ConnectionTimeoutError as error:
            raise Away("it cannot be reached", 503) from error
        except TimeoutError as error:
            raise UpstreamError(504, f"the engine took longer than {self.timeout_s:g} s", code="timeout",
                                fix="ask for fewer tokens, or raise timeout_s") from error
        except aiohttp.ClientConnectorError as error:
            raise Away("it cannot be reached", 503) from error
        except (aiohttp.ClientError, OSError) as error:
            raise Away(f"the connection broke ({type(error).__name__})") from error


def _adapter_version(model: str) -> int | None:
    """The policy version in an adapter's name, None for another name.

    >>> _adapter_version("pol-acme@v12"), _adapter_version("Qwen/Qwen3-4B")
    (12, None)
    """
    match = _ADAPTER.match(model)
    return int(match[2]) if match else None


def _names_model(answer: Any) -> bool:
    """Whether a refusal is about the model's name, not about the route."""
    text = _message(answer).lower()
    return "model" in text and "does not exist" in text or "lora" in text


def _message(answer: Any) -> str:
    """The engine's own words for a fault, cut short."""
    said = answer.get("error", answer) if isinstance(answer, dict) else None
    said = said.get("message", said.get("detail", "")) if isinstance(said, dict) else said
    return str(said or "no reason given")[:300]


def _find(value: Any, name: str) -> Any:
    """The first field of this name anywhere in a JSON value."""
    if isinstance(value, dict):
        if name in value:
            return value[name]
        value = list(value.values())
    found = (_find(inner, name) for inner in value) if isinstance(value, list) else ()
    return next((one for one in found if one is not None), None)
