"""The proxy over HTTP: who may ask, how much, and the way of one call from the request to the record to the answer."""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import orjson
from aiohttp import web
from aiohttp.abc import AbstractAccessLogger

from agentsdpo.collect.proxy import anthropic
from agentsdpo.collect.proxy.access import Caller, Keys, Rates, check_origin
from agentsdpo.collect.proxy.config import ProxyConfig
from agentsdpo.collect.proxy.feedback import read_feedback
from agentsdpo.collect.proxy.house import House
from agentsdpo.collect.proxy.refusals import Refused
from agentsdpo.collect.proxy.shapes import Asked, Reply, read_chat, read_completion
from agentsdpo.types import Json

HEADER = "x-agentsdpo-conversation"
"""Request header that names a conversation; every answer carries it."""
LONGEST_NAME = 200
SWEEP_S = 1.0
log = logging.getLogger("agentsdpo.proxy")
CALLER = web.RequestKey("caller", Caller)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Proxy:
    """The HTTP server around a :class:`~agentsdpo.collect.proxy.house.House`.

    Args:
        house: rooms, engine and chat format. keys: who may ask. config: limits.
    """

    def __init__(self, house: House, keys: Keys, config: ProxyConfig) -> None:
        self.house, self.keys, self.config = house, keys, config
        self._rates = Rates(per_minute=config.rate_per_minute, burst=config.burst)
        self._flying = 0
        self._runner: web.AppRunner | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.port = 0

    def app(self) -> web.Application:
        """Routes: the same below ``/c/<conversation>/``, for clients that can only be given a base address."""
        app = web.Application(client_max_size=self.config.body_bytes, middlewares=[self._guard])
        app.router.add_get("/health", self._health)
        for base in ("", "/c/{conversation}"):
            app.router.add_get(f"{base}/v1/models", self._models)
            app.router.add_get(f"{base}/v1/models/{{model}}", self._model)
            app.router.add_post(f"{base}/v1/chat/completions", self._chat)
            app.router.add_post(f"{base}/v1/completions", self._completions)
            app.router.add_post(f"{base}/v1/messages", self._messages)
            app.router.add_post(f"{base}/v1/messages/count_tokens", self._count_tokens)
            app.router.add_post(f"{base}/v1/feedback", self._feedback)
            app.router.add_post(f"{base}/v1/close", self._close)
        return app

    async def start(self, host: str, port: int) -> None:
        """Recover what an earlier proxy left, connect to the engine, listen; ``port`` 0 takes a free one.

        Raises:
            StoreError, EngineError, OSError: see the parts.
        """
        await self.house.open()
        self._runner = web.AppRunner(self.app(), access_log=log, access_log_class=_Log, handle_signals=False,
                                     shutdown_timeout=10.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        await site.start()
        self.port = self._runner.addresses[0][1]
        self._tasks = [asyncio.create_task(self._every(SWEEP_S, self.house.sweep)),
                       asyncio.create_task(self._every(self.config.poll_s, self.house.upstream.look))]

    async def stop(self) -> None:
        """Take no more requests, wait for those under way, end every conversation."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._runner is not None:
            await self._runner.cleanup()
        await self.house.close()

    @staticmethod
    async def _every(seconds: float, work: Callable[[], Awaitable[Any]]) -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                await work()
            except Exception:  # one bad round must not be the last one
                log.exception("%s failed, and is tried again", work.__name__)

    # --------------------------------------------------------------------------------------------------- guards

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Errors in the shape of the API that was asked."""
        try:
            check_origin(request.headers.get("Origin"), len(self.keys))
            if request.path != "/health":
                request[CALLER] = self.keys.caller(request.headers)
                self._admit(request[CALLER])
            return await handler(request)
        except Refused as error:
            return _told(request, error)
        except web.HTTPException as error:
            return _told(request, Refused(error.status, _REASONS.get(error.status, error.reason)))
        except Exception:
            log.exception("%s %s failed", request.method, request.rel_url.raw_path)
            return _told(request, Refused(500, "the proxy failed; its log says where"))

    def _admit(self, caller: Caller) -> None:
        wait = self._rates.take(caller.name)
        if wait:
            raise Refused(429, "too many requests with this key", code="rate_limit_exceeded", retry_after_s=wait,
                          fix=f"send at most {self.config.rate_per_minute:g} a minute")

    async def _body(self, request: web.Request) -> Json:
        """The request's JSON object.

        Raises:
            Refused: 400 for anything else, 408 for a client that is too slow, 413 for too many bytes.
        """
        if (request.content_length or 0) > self.config.body_bytes:
            raise self._too_long()
        try:
            async with asyncio.timeout(self.config.body_s):
                raw = await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise self._too_long() from None
        except TimeoutError:
            raise Refused(408, f"the request did not arrive within {self.config.body_s:g} s") from None
        except (web.RequestPayloadError, ConnectionError):  # no gzip that says it is, or a client that left
            raise Refused(400, "the body cannot be read to its end", fix="send it whole, and in the encoding that "
                          "Content-Encoding names", code="bad_body") from None
        try:
            body = orjson.loads(raw)  # lone surrogates, which are no text, are errors to it
        except ValueError:
            raise Refused(400, "the body is not JSON", fix="send one JSON object in UTF-8", code="bad_json") from None
        if not isinstance(body, dict):
            raise Refused(400, "the body is no JSON object", code="bad_json")
        return body

    def _too_long(self) -> Refused:
        return Refused(413, f"the body has more than {self.config.body_bytes} bytes", code="too_long",
                       fix="send less, or have the operator raise body_bytes")

    @staticmethod
    def _name(request: web.Request, body: Json | None = None) -> str | None:
        """The conversation a request names, by body, address or header: a body alone can hold the id of an answer."""
        found = (body or {}).get("conversation") or request.match_info.get("conversation") or request.headers.get(
            HEADER)
        if found is None:
            return None
        if not isinstance(found, str) or not 0 < len(found) <= LONGEST_NAME or not found.isprintable():
            raise Refused(400, f"the name of a conversation has 1 to {LONGEST_NAME} printable characters",
                          param="conversation")
        return found

    # ---------------------------------------------------------------------------------------------------- routes

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        return await self._call(request, lambda: read_chat(body, self.config.max_tokens), Reply.whole, _openai_stream)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        return await self._call(request, lambda: read_completion(body, self.config.max_tokens), Reply.whole,
                                _openai_stream)

    async def _messages(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        return await self._call(request, lambda: anthropic.read_message(body, self.config.max_tokens), anthropic.whole,
                                lambda reply, _: anthropic.stream(reply))

    async def _count_tokens(self, request: web.Request) -> web.Response:
        asked = anthropic.read_message(await self._body(request), self.config.max_tokens)
        return web.json_response({"input_tokens": self.house.count(asked)})

    async def _call(self, request: web.Request, read: Callable[[], Asked], whole: Callable[[Reply], Json],
                    stream: Callable[[Reply, Asked], Iterator[bytes]]) -> web.StreamResponse:
        """One call: the record is on disk before the first byte of the answer."""
        if self._flying >= self.config.in_flight:
            raise Refused(429, f"{self._flying} requests are under way", code="overloaded", retry_after_s=1)
        asked = read()
        self._flying += 1
        try:
            room = await self.house.room(request[CALLER].tenant)
            name, reply = await self.house.call(room, self._name(request), asked)
        finally:
            self._flying -= 1
        if not asked.stream:
            return web.Response(body=orjson.dumps(whole(reply)), content_type="application/json",
                                headers={HEADER: name})
        return await self._stream(request, stream(reply, asked), name)

    async def _stream(self, request: web.Request, pieces: Iterator[bytes], name: str) -> web.StreamResponse:
        """The whole answer in pieces, as server-sent events; a client that leaves loses nothing but its pieces."""
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache",
                                             HEADER: name})
        try:
            await answer.prepare(request)
            for piece in pieces:
                await answer.write(piece)
            await answer.write_eof()
        except ConnectionError:
            log.info("a client left in the middle of a stream; the answer is recorded")
        return answer

    async def _feedback(self, request: web.Request) -> web.Response:
        body = await self._body(request)
        name = self._name(request, body)
        if name is None:
            raise Refused(400, "no conversation is named", param="conversation", fix="give its id")
        name, attempt, turn = _by_answer(name)
        items = read_feedback({"turn": turn, **body} if turn is not None else body)
        room = await self.house.room(request[CALLER].tenant)
        state = await room.say(name, items, attempt)
        return web.json_response({"conversation": name, "state": state, "items": len(items)})

    async def _close(self, request: web.Request) -> web.Response:
        name = self._name(request, await self._body(request))
        if name is None:
            raise Refused(400, "no conversation is named", param="conversation", fix="give its id")
        room = await self.house.room(request[CALLER].tenant)
        conversation = room.open.get(_by_answer(name)[0])
        if conversation is not None and conversation.flying:
            raise Refused(409, "an answer is under way in this conversation", code="busy", retry_after_s=1)
        return web.json_response({"conversation": name, "ended": await room.end([_by_answer(name)[0]])})

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._about(request[CALLER])]})

    async def _model(self, request: web.Request) -> web.Response:
        return web.json_response({**self._about(request[CALLER]), "id": request.match_info["model"]})

    def _about(self, caller: Caller) -> Json:
        """The one model there is for a caller, and what serves it now."""
        house = self.house
        return {"id": house.name, "object": "model", "created": 0, "owned_by": "agentsdpo",
                "max_model_len": house.window, "serving": house.serving(caller.tenant)}

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})


class _Log(AbstractAccessLogger):
    """One line of log a request, once its answer is sent, without a word of what was said."""

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        """Write it; ``time`` in seconds."""
        caller = request.get(CALLER)
        self.logger.info("%s %s %s %d %.0f ms", caller.name if caller else "-", request.method,
                         request.rel_url.raw_path, response.status, 1000 * time)  # escaped: one line stays one line


def _openai_stream(reply: Reply, asked: Asked) -> Iterator[bytes]:
    return reply.stream(usage=asked.usage)


def _told(request: web.Request, error: Refused) -> web.Response:
    """An error as the clients of an address read it."""
    body = anthropic.refusal(error) if "/v1/messages" in request.path else error.body()
    return web.json_response(body, status=error.status, headers=error.headers)


_REASONS = {404: "there is no such address here", 405: "this address takes another method"}


def _by_answer(name: str) -> tuple[str, int | None, int | None]:
    """A conversation, an attempt at it and a turn from the id of an answer; other names are conversations.

    Ids of earlier releases name no attempt.

    >>> _by_answer("chatcmpl-abc.0-4"), _by_answer("chatcmpl-abc.4"), _by_answer("abc")
    (('abc', 0, 4), ('abc', None, 4), ('abc', None, None))
    """
    found = re.fullmatch(r"(?:chatcmpl-|cmpl-|msg_)(.*)\.(?:(\d+)-)?(\d+)", name, re.ASCII)
    if found is None:
        return name, None, None
    conversation, attempt, turn = found.groups()
    return conversation, None if attempt is None else int(attempt), int(turn)
