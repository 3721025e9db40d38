"""Which faults of a server pass, how long one waits for them, and one HTTP client per event loop."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

import aiohttp
import httpx
import orjson
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_delay,
    wait_random_exponential,
)

from agentsdpo.errors import EngineError
from agentsdpo.types import Json

T = TypeVar("T")
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504, 529})
"""Status codes that say nothing against the request: the server is busy, starting or swapping weights."""
MAX_ANSWER = 256 * 2**20
"""Bytes of one answer, 256 MiB; more is no completion."""
JSON = {"Content-Type": "application/json"}
"""Headers of a request with a body."""
IDLE_S = 4.0
"""Idle connections are closed after this long, before vLLM's server does so (5 s) in the middle of a request."""


class Passing(EngineError):
    """A fault that may be gone in a moment. ``wait_s``: what the server asked to wait. ``lost``: it may have died."""

    def __init__(self, what: str, *, fix: str = "", wait_s: float = 0.0, lost: bool = False) -> None:
        super().__init__(what, fix=fix)
        self.wait_s, self.lost = wait_s, lost


class Refused(EngineError):
    """The server will not answer this request however often it is sent. ``status``: HTTP status, 0 for none."""

    def __init__(self, what: str, *, fix: str = "", status: int = 0) -> None:
        super().__init__(what, fix=fix)
        self.status = status


def patience(seconds: float) -> AsyncRetrying:
    """Retries of whatever raises :class:`Passing`, with growing random waits up to 5 s, for about ``seconds``."""
    grown = wait_random_exponential(multiplier=0.1, max=5.0)

    def wait(state: RetryCallState) -> float:
        fault = state.outcome.exception() if state.outcome else None
        return max(grown(state), min(fault.wait_s, 60.0) if isinstance(fault, Passing) else 0.0)

    return AsyncRetrying(retry=retry_if_exception_type(Passing), wait=wait, stop=stop_after_delay(seconds),
                         reraise=True)


async def patiently(seconds: float, once: Callable[[int], Awaitable[T]]) -> T:
    """Try something, and again for about ``seconds`` while it raises :class:`Passing`; what it raises last is raised.

    Args:
        once: one attempt; given its number, from 1.
    """
    began = time.monotonic()
    try:
        return await once(1)  # nearly all end here, and the machinery of retries takes as long as reading an answer
    except Passing as fault:
        first, number = fault, 0
    async for attempt in patience(max(0.0, seconds - (time.monotonic() - began))):
        with attempt:
            number += 1
            if number == 1:
                raise first
            return await once(number)
    raise first  # not reached: the last fault is raised above


class Line:
    """Connections to one server, opened anew for each event loop and closed when that loop ends.

    Args:
        url: base address. headers: of every request. timeout_s: seconds without a byte after which a call failed.
    """

    def __init__(self, url: str, headers: dict[str, str], timeout_s: float) -> None:
        self.url, self._headers, self._timeout_s = url, headers, timeout_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._session: aiohttp.ClientSession | None = None
        self._holder: AsyncGenerator[aiohttp.ClientSession, None] | None = None

    async def _open(self) -> AsyncGenerator[aiohttp.ClientSession, None]:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=min(10.0, self._timeout_s), sock_read=self._timeout_s)
        # No proxy of the environment (aiohttp's default): a model server is reached directly.
        async with aiohttp.ClientSession(
                headers=self._headers, timeout=timeout, cookie_jar=aiohttp.DummyCookieJar(),
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S)) as session:
            yield session

    async def session(self) -> aiohttp.ClientSession:
        """The session of the running loop. A suspended generator holds it: loops close these when they end."""
        loop = asyncio.get_running_loop()
        if self._session is None or self._loop is not loop:
            self._loop, self._holder = loop, self._open()
            self._session = await anext(self._holder)
        return self._session

    async def send(self, method: str, path: str, body: Json | None = None) -> Any:
        """Send once and decode the answer.

        Raises:
            Passing, Refused: it came to nothing; see the classes.
        """
        session = await self.session()
        data = None if body is None else orjson.dumps(body)
        try:
            async with session.request(method, self.url + path, data=data, headers=JSON if data else None,
                                       allow_redirects=False) as response:
                data = await _read(response)
        except TimeoutError as error:  # those of aiohttp are such, too
            raise Passing(f"{self.url}{path} gave no answer within {self._timeout_s:g} s",
                          fix="raise the engine's timeout_s, or lower the concurrency") from error
        except aiohttp.ClientError as error:
            raise unreachable(self.url, error) from error
        return decoded(self.url + path, response.status, data, response.headers.get("retry-after", ""))


def encrypted(url: str) -> bool:
    """Whether certificates matter: reading them takes a tenth of a second, and plain http has none."""
    return url.startswith("https:")


class Asker:
    """Single questions to one server, for start-up and diagnosis; a context manager.

    Args:
        url: base address, ``http://host:port``. headers, timeout_s: see :class:`Line`.
    """

    def __init__(self, url: str, headers: dict[str, str], timeout_s: float = 30.0) -> None:
        self.url = url
        self._client = httpx.Client(base_url=url, headers=headers, timeout=timeout_s, trust_env=False,
                                    verify=encrypted(url))

    def __enter__(self) -> "Asker":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def send(self, method: str, path: str, body: Json | None = None) -> Any:
        """Send once and decode the answer; raises as :meth:`Line.send` does."""
        try:
            response = self._client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise unreachable(self.url, error) from error
        return decoded(self.url + path, response.status_code, response.content,
                       response.headers.get("retry-after", ""))

    def get(self, path: str) -> Any:
        """What stands there; None where the server has no such endpoint, or will not show it."""
        try:
            return self.send("GET", path)
        except Refused as refusal:
            if refusal.status in (403, 404, 405):
                return None
            raise


REVIVE = "start it with agentsdpo serve, or look into its log"
"""What to do about a server that is not there."""


def unreachable(url: str, error: Exception) -> Passing:
    """The error of a connection that broke, or never was."""
    return Passing(f"{url} broke off or cannot be reached: {type(error).__name__} {error}".rstrip(),
                   fix=f"{REVIVE}; agentsdpo doctor {url} tells more",
                   lost=True)


def decoded(address: str, status: int, data: bytes, retry_after: str) -> Any:
    """The JSON of a whole answer, None for an empty one.

    Raises:
        Passing, Refused: the status is not 200, or this is no JSON.
    """
    if status != 200:
        raise fault(address, status, data, retry_after)
    try:
        return orjson.loads(data) if data else None
    except ValueError:  # NaN, say, which this reader is too strict for
        pass
    try:
        return json.loads(data)
    except ValueError as error:
        raise Passing(f"{address} answered with {data[:80]!r}, which is no JSON",
                      fix="check that this is a vLLM server: agentsdpo doctor URL") from error


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """The body, up to :data:`MAX_ANSWER` bytes."""
    parts, size = [], 0
    async for part in response.content.iter_any():
        parts.append(part)
        size += len(part)
        if size > MAX_ANSWER:
            raise Refused(f"{response.url} answered with more than {MAX_ANSWER // 2**20} MiB",
                          fix="check that this is a vLLM server; a completion is far smaller")
    return b"".join(parts)


def fault(address: str, status: int, data: bytes, retry_after: str = "") -> Passing | Refused:
    """The error of an answer that is none.

    >>> fault("http://h/v1", 503, b"", "2").wait_s
    2.0
    >>> print(fault("http://h/v1", 401, b'{"error": {"message": "who are you"}}'))
    http://h/v1 answered 401: who are you; pass the key the server was started with (VLLM_API_KEY)
    """
    said = message(data)
    what = f"{address} answered {status}{': ' + said if said else ''}"
    if status in PASSING:
        wait_s = float(retry_after) if retry_after.isdecimal() else 0.0
        return Passing(what, fix="lower the concurrency, or look into the server's log", wait_s=wait_s)
    return Refused(what, fix=_FIXES.get(status, "look into the server's log"), status=status)


_FIXES = {400: "send what the server can serve: its window, vocabulary and model are in agentsdpo doctor's report",
          401: "pass the key the server was started with (VLLM_API_KEY)", 413: "send a shorter prompt",
          403: "start the server with agentsdpo serve, which switches the endpoint on",
          404: "serve this model or adapter, or ask for one that is served"}


def message(data: bytes) -> str:
    """What a server says of its fault, in at most 200 characters of one line."""
    try:
        body = json.loads(data)
        told = body.get("error", body.get("detail", body))
        text = told.get("message", told) if isinstance(told, dict) else told
    except (ValueError, AttributeError):
        text = data[:400].decode("utf-8", "replace")
    return " ".join(str(text).split())[:200]
