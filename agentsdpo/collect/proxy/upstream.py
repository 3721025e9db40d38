"""The engine behind the proxy: tokens in, tokens out, over HTTP and never streamed.

What an answer may be trusted with is decided where all of vLLM's answers are read
(:mod:`agentsdpo.collect.vllm.wire`). Here is what only a proxy needs: many models and adapters at once, parameters of
clients, an answer even where there are no ids, and few milliseconds per call.
"""

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import aiohttp
import orjson

from agentsdpo.collect.proxy.line import Sampled
from agentsdpo.collect.proxy.refusals import UpstreamError
from agentsdpo.collect.vllm import retry, wire
from agentsdpo.collect.vllm.server import Handshake, ServerFacts, ask_server, base_url, headers
from agentsdpo.errors import EngineError
from agentsdpo.types import Completion, Json, Sampling, VersionSpan

_ADAPTER = re.compile(r"(.+)@v(\d+)\Z")
_LOOK_S = 10.0


class _Call(NamedTuple):
    """One call; the arguments are those of :meth:`Upstream.sample`, and the clock when it began."""

    ids: list[int]
    sampling: Sampling
    model: str
    salt: str
    extra: Json
    logprobs: int
    call: str
    began: float


class Upstream:
    """One engine.

    Args:
        url: its address. eos_id: ends an answer. vocab_size: ids lie below it; 0 does not check.
        timeout_s: for one answer. retry_s: how long to go on asking an engine that is away.

    Attributes:
        facts: what the server says of itself, once :meth:`open` has asked.
        loaded: names of the models and adapters it has, as of the last :meth:`look`.
        label: of the weights now loaded, None where it does not say.

    Raises:
        ConfigError: the address is none.
    """

    def __init__(self, url: str, *, eos_id: int, timeout_s: float, retry_s: float, vocab_size: int = 0) -> None:
        self.url, self.timeout_s, self.retry_s, self._eos = base_url(url), timeout_s, retry_s, (eos_id,)
        self._vocab = vocab_size
        self.facts: ServerFacts | None = None
        self.loaded: frozenset[str] = frozenset()
        self.label: str | None = None
        self._session: aiohttp.ClientSession | None = None
        self._lost = False
        self._handshake = Handshake(self._shake)

    async def open(self) -> None:
        """Connect and learn what the engine is. Raises EngineError when it cannot be reached, or lists no model."""
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=retry.IDLE_S)
        self._session = aiohttp.ClientSession(connector=connector, headers=headers(None),
                                              cookie_jar=aiohttp.DummyCookieJar())  # no tenant gets another's
        await self._ask()

    async def _ask(self) -> None:
        """Ask the engine what it is, at the start and once it was away: who comes back may be another one.

        Raises EngineError, Passing when it is not there yet.
        """
        facts = await self._handshake()
        self.facts, self.loaded, self.label, self._lost = facts, frozenset(facts.models), facts.label, False

    def _shake(self) -> ServerFacts:
        with retry.Asker(self.url, headers(None)) as ask:
            return ask_server(ask)

    @property
    def known(self) -> ServerFacts:
        """What the server says of itself. Raises EngineError before :meth:`open`."""
        if self.facts is None:
            raise EngineError(f"{self.url} was not asked yet", fix="open the upstream first")
        return self.facts

    async def close(self) -> None:
        """Let go of the connections."""
        if self._session is not None:
            await self._session.close()

    async def look(self) -> None:
        """See which adapters are loaded and which weights; one that is away is asked what it is before it is used."""
        models, label = await asyncio.gather(self._get("/v1/models"), self._weights())
        self._lost = self._lost or models is None
        if models:
            self.loaded = frozenset(str(model.get("id")) for model in models.get("data") or ())
        self.label = label or self.label

    def newest(self, stem: str) -> str:
        """The newest adapter ``STEM@vN`` that is loaded, the engine's own model where there is none."""
        found = [(int(match[2]), name) for name in self.loaded if (match := _ADAPTER.match(name)) and match[1] == stem]
        return max(found)[1] if found else self.known.base

    async def _weights(self) -> str | None:
        found = (await self._get("/weight_info") or {}).get("weight_version")
        return None if found is None else str(found)

    async def _get(self, path: str) -> Json | None:
        """A small JSON answer; None where there is none."""
        assert self._session is not None
        try:
            async with self._session.get(self.url + path, timeout=aiohttp.ClientTimeout(total=_LOOK_S)) as answer:
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
            done = [token for part in parts for token in part.completion.token_ids]
            rest = sampling.model_copy(update={"max_tokens": left, "seed": (sampling.seed + len(done)) % 2**63})
            ask = _Call([*ids, *done], rest, model, salt, extra, logprobs, f"{call}-{len(parts)}", began)
            part = await self._attempts(ask)
            left -= len(part.completion.token_ids)
            whole = _joined([*parts, part])
            if part.completion.finish_reason != "abort":
                return whole
            if left < 1:
                return replace(whole, completion=whole.completion.model_copy(update={"finish_reason": "length"}))
            parts.append(part)

    async def _attempts(self, ask: _Call) -> Sampled:
        """Ask until there is an answer; only calls that gave no token are made again."""
        try:
            return await retry.patiently(self.retry_s, lambda number: self._once(
                ask._replace(call=f"{ask.call}-{number}")))
        except retry.Passing as error:
            raise UpstreamError(503 if error.lost or error.wait_s else 502, f"the engine gave no answer: {error.what}",
                                code="engine_away", fix="send the request again later", retry_after_s=5.0) from error
        except retry.Refused as error:
            status = error.status if error.status in (400, 404, 413, 422) else 502
            raise UpstreamError(status, f"the engine refused the call: {error.what}", code="engine_refused") from error
        except EngineError as error:
            raise UpstreamError(502, f"the engine's answer cannot be used: {error.what}", code="engine_answer",
                                fix=error.fix) from error

    async def _once(self, ask: _Call) -> Sampled:
        """One attempt."""
        if self._lost:
            await self._ask()
        facts, adapter = self.known, wire.adapter_version(ask.model)
        spans = facts.route == wire.GENERATE or adapter is not None
        before = None if spans else await self._weights()
        make: Callable[..., Json] = wire.generate_body if facts.route == wire.GENERATE else wire.completions_body
        body = make(ask.ids, ask.sampling, model=ask.model, request_id=ask.call, salt=ask.salt, stop_ids=self._eos,
                    logprobs=ask.logprobs, seeded=facts.seeded)
        (body["sampling_params"] if facts.route == wire.GENERATE else body).update(ask.extra)
        answer = await self._post(facts.route, body, ask.began)
        around = None if spans else (wire.label_version(before), wire.label_version(await self._weights()))
        try:
            done = wire.read_answer(answer, facts.route, kind=facts.kind, vocab_size=self._vocab, adapter=adapter,
                                    around=around)
        except EngineError:
            text = _text(answer)
            if text is None:
                raise
            empty = Completion(token_ids=(), logprobs=(), versions=(), logprob_kind="none", untrusted="no_token_ids")
            return Sampled(empty, ask.model, text)
        if done.finish_reason == "abort" and not done.token_ids:
            raise retry.Passing(f"{self.url} aborted the call before its first token")
        return Sampled(done, ask.model, None, _top(answer) if ask.logprobs else ())

    async def _post(self, path: str, body: Json, began: float) -> Any:
        """JSON of one answer.

        Raises:
            Passing, Refused: it came to nothing. UpstreamError: 504, the time is over.
        """
        assert self._session is not None
        left = max(0.001, self.timeout_s - (time.monotonic() - began))
        try:
            async with self._session.post(self.url + path, data=orjson.dumps(body), headers=retry.JSON,
                                          timeout=aiohttp.ClientTimeout(total=left, sock_connect=10)) as answer:
                data = await answer.read()
        except aiohttp.ConnectionTimeoutError as error:
            self._lost = True
            raise retry.Passing(f"{self.url} cannot be reached", lost=True) from error
        except TimeoutError as error:
            raise UpstreamError(504, f"the engine took longer than {self.timeout_s:g} s", code="timeout",
                                fix="ask for fewer tokens, or have the operator raise timeout_s") from error
        except (aiohttp.ClientError, OSError) as error:
            self._lost = True
            raise retry.Passing(f"{self.url} broke off or cannot be reached ({type(error).__name__})", lost=True) \
                from error
        return retry.decoded(self.url + path, answer.status, data, answer.headers.get("retry-after", ""))


def _text(answer: Any) -> str | None:
    """The text of an answer without ids, None where it has none either."""
    try:
        text = answer["choices"][0]["text"]
    except (KeyError, IndexError, TypeError):
        return None
    return text if isinstance(text, str) else None


def _top(answer: Any) -> tuple[tuple[tuple[int, float], ...], ...]:
    """Alternatives per token, where the route gives them by id."""
    entries = (answer["choices"][0].get("logprobs") or {}).get("content") or ()
    return tuple(tuple((int(one["token_id"]), float(one["logprob"])) for one in entry.get("top_logprobs") or ()
                       if "token_id" in one) for entry in entries)


def _joined(parts: Sequence[Sampled]) -> Sampled:
    """Parts that each went on where the one before was cut off, as one."""
    if len(parts) == 1:
        return parts[0]
    top = tuple(one for part in parts for one in part.top)
    return Sampled(wire.joined([part.completion for part in parts]), parts[-1].model, None, top)


def cut(sampled: Sampled, n: int) -> Sampled:
    """The first ``n`` tokens of what was sampled, as if the engine had stopped there."""
    done = sampled.completion
    spans = [VersionSpan(version=s.version, start=s.start, end=min(s.end, n)) for s in done.versions if s.start < n]
    logps = done.logprobs[:n] if len(done.logprobs) == len(done.token_ids) else done.logprobs
    completion = done.model_copy(update={
        "token_ids": done.token_ids[:n], "logprobs": logps, "versions": tuple(spans), "finish_reason": "stop",
        "kept": done.kept[:n] if done.kept is not None else None})
    return Sampled(completion, sampled.model, sampled.text, sampled.top[:n])
