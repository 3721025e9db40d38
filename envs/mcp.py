"""Any MCP server's tools as an environment, over the official SDK (extra ``mcp``): a child process or an address.

A tool that fails is an observation; a server that died is an :class:`~agentsdpo.errors.EnvError`. What a server knows
cannot be read out, so a snapshot holds the calls: a local server is put back by making them again on a fresh one, which
must answer the same.
"""

import asyncio
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from agentsdpo.envs.config import McpServer
from agentsdpo.envs.office import FINAL
from agentsdpo.errors import ConfigError, EnvError
from agentsdpo.types import ErrorKind, Json, Outcome, Task, ToolCall, ToolResult, ToolSpec

MOST_CHARS = 1_000_000
"""Characters of one answer that go on; profiles cut further."""
_TOLD = 300
"""Characters of what is wrong with a tool's answer that the agent is told."""
_CLOSED, _LATE = -32000, (-32001, 408)
"""Codes with which the SDK says that the connection is gone, and that an answer took too long."""


class McpSession:
    """A connection to one server. It is opened and closed by a task of its own, as the SDK wants it.

    Raises:
        EnvError: the server cannot be started or reached, or does not speak the protocol.
    """

    def __init__(self, server: McpServer) -> None:
        self.server, self.specs = server, tuple[ToolSpec, ...]()
        self._session: Any = None
        self._child: Any = None
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connect, greet, list the tools."""
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stop.clear()
        self._task = asyncio.create_task(self._live(ready))
        await asyncio.wait({ready, self._task}, return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            fault = self._task.exception()
            ready.cancel()
            raise self._dead(fault if isinstance(fault, Exception) else None)

    async def _live(self, ready: "asyncio.Future[None]") -> None:
        from mcp import ClientSession

        async with AsyncExitStack() as stack:
            incoming, outgoing = await stack.enter_async_context(self._streams())
            session = await stack.enter_async_context(ClientSession(incoming, outgoing))
            async with asyncio.timeout(self.server.timeout_s):
                await session.initialize()
                self.specs = tuple([_spec(tool, self.server.timeout_s) async for tool in _listed(session)])
            self._session = session
            ready.set_result(None)
            await self._stop.wait()

    @asynccontextmanager
    async def _streams(self) -> AsyncIterator[tuple[Any, Any]]:
        """What a session reads and writes."""
        server = self.server
        if server.command:
            from agentsdpo.envs.mcp_stdio import child

            async with child(server.command, server.args, server.env, server.cwd) as started:
                self._child = started
                yield started.incoming, started.outgoing
            return
        from httpx2 import AsyncClient, Timeout
        from mcp.client.streamable_http import streamable_http_client

        from agentsdpo.envs.mcp_stdio import MOST_MESSAGE

        token = os.environ.get(server.token_env) if server.token_env else None
        if server.token_env and not token:
            raise ConfigError(f"variable {server.token_env} is not set", fix="export the token, or correct token_env")
        headers = {"Authorization": f"Bearer {token}"} if token else None
        patience = Timeout(server.timeout_s, read=None)  # the session itself limits how long an answer may take
        async with AsyncClient(headers=headers, timeout=patience, trust_env=False) as client, \
                streamable_http_client(server.url, http_client=client, max_sse_event_size=MOST_MESSAGE) as streams:
            yield streams[0], streams[1]

    async def call(self, name: str, arguments: Json) -> tuple[str, ErrorKind]:
        """One call: what the tool said, and how it failed if it did.

        Raises:
            EnvError: the server is gone.
        """
        from anyio import BrokenResourceError, ClosedResourceError
        from mcp import MCPError

        if self._session is None or self._task is None or self._task.done():
            raise self._dead(None)
        try:
            result = await self._session.call_tool(name, arguments, read_timeout_seconds=self.server.timeout_s)
        except MCPError as fault:
            if fault.error.code in _LATE:
                return f"Error: no answer within {self.server.timeout_s:g} s", "timeout"
            if fault.error.code == _CLOSED:
                raise self._dead(fault) from None
            return f"Error: {fault.error.message}", "tool"
        except (OSError, BrokenResourceError, ClosedResourceError) as fault:
            raise self._dead(fault) from fault
        except (RuntimeError, ValueError) as fault:  # so the SDK says that an answer breaks the tool's own schema
            return f"Error: the tool's answer cannot be used: {' '.join(str(fault).split())[:_TOLD]}", "tool"
        return shown(result), "tool" if result.is_error else "none"

    async def close(self) -> None:
        """End the session and, where it was started here, the server."""
        self._stop.set()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        self._session, self._task = None, None

    def _dead(self, fault: BaseException | None) -> Exception:
        while isinstance(fault, BaseExceptionGroup):
            fault = fault.exceptions[0]
        if isinstance(fault, ConfigError):
            return fault
        place = self.server.command or self.server.url
        why = [f"{type(fault).__name__}: {fault}" if fault else "", self._child.complaint() if self._child else ""]
        said = "; ".join(part for part in why if part) or "the session is closed"
        return EnvError(f"MCP server {place} is gone: {said}", fix="run it by hand to see what it says")


class McpEnv:
    """The tools of one server and ``final_answer``; one episode.

    Args:
        server: where the tools are.
        system: the system message; none is sent when empty.

    ``tools`` are those the server listed when the episode began, and ``final_answer`` unless it has one itself: either
    ends the episode with its ``answer``.
    """

    env_id = "mcp"

    def __init__(self, server: McpServer, *, system: str = "") -> None:
        self._session, self._system = McpSession(server), system
        self.tools: tuple[ToolSpec, ...] = (FINAL,)
        self._answer: str | None = None
        self._log: list[tuple[ToolCall, ToolResult, str]] = []

    async def reset(self, task: Task, *, seed: int, episode_id: str) -> list[Json]:
        """Connect afresh; system and user message.

        Raises:
            EnvError: the server cannot be started or reached.
        """
        await self._session.close()
        self._answer, self._log = None, []
        await self._session.open()
        specs = self._session.specs
        self.tools = specs if any(spec.name == FINAL.name for spec in specs) else (*specs, FINAL)
        opening = [{"role": "system", "content": self._system}] if self._system else []
        return [*opening, {"role": "user", "content": task.prompt}]

    async def call(self, calls: tuple[ToolCall, ...]) -> list[ToolResult]:
        """Run the calls in order; one result per id.

        Raises:
            EnvError: the server died.
        """
        return [await self._call(call) for call in calls]

    async def _call(self, call: ToolCall) -> ToolResult:
        began = time.monotonic()
        content, kind = await self._answered(call)
        kept = cut(content)
        result = ToolResult(call_id=call.id, content=kept, is_error=kind != "none", error_kind=kind,
                            truncated=(MOST_CHARS, len(content)) if kept != content else None,
                            wall_s=time.monotonic() - began)
        self._log.append((call, result, hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()))
        return result

    async def _answered(self, call: ToolCall) -> tuple[str, ErrorKind]:
        if self._answer is not None:
            return "Error: the final answer was given", "tool"
        if not isinstance(call.arguments, dict):
            return "Error: the arguments are no object", "bad_arguments"
        if call.name == FINAL.name and FINAL in self.tools:
            self._answer = str(call.arguments.get("answer", ""))
            return "final answer taken", "none"
        if call.name not in {spec.name for spec in self._session.specs}:
            return f"Error: no tool {call.name!r}", "unknown_tool"
        said, kind = await self._session.call(call.name, call.arguments)
        if call.name == FINAL.name and kind == "none" and "answer" in call.arguments:
            self._answer = str(call.arguments["answer"])
        return said, kind

    def done(self) -> bool:
        """Whether the final answer was given."""
        return self._answer is not None

    def snapshot(self) -> bytes:
        """The calls so far with a hash of each answer."""
        log = [[call.model_dump(mode="json"), result.model_dump(mode="json") | {"content": ""}, said]
               for call, result, said in self._log]
        return json.dumps({"answer": self._answer, "log": log}, sort_keys=True).encode()

    async def restore(self, data: bytes) -> None:
        """Make the calls of a snapshot again on the server that was just started.

        Raises:
            EnvError: an answer differs, or the server is not one that was started here.
        """
        saved = json.loads(data)
        server = self._session.server
        if saved["log"] and not server.command:
            raise EnvError(f"the state of {server.url} after {len(saved['log'])} calls cannot be put back",
                           fix="play the attempt again from its beginning")
        for number, (call, _, said) in enumerate(saved["log"]):
            await self._call(ToolCall(**call))
            if self._log[-1][2] != said:
                raise EnvError(f"call {number} ({call['name']}) was answered otherwise than before",
                               fix="play the attempt again from its beginning: this server does not repeat itself")

    def outcome(self, answer: str | None) -> Outcome:
        """The answer, and the calls with what was answered; what the server holds is not seen."""
        return Outcome(answer=answer if self._answer is None else self._answer, initial=b"{}", final=b"{}",
                       calls=tuple((call, result) for call, result, _ in self._log))

    async def close(self) -> None:
        """End the session and the server."""
        await self._session.close()


async def _listed(session: Any) -> AsyncIterator[Any]:
    """All tools of a server, page by page."""
    from mcp_types import PaginatedRequestParams

    cursor = None
    while True:
        page = await session.list_tools(params=PaginatedRequestParams(cursor=cursor) if cursor else None)
        for tool in page.tools:
            yield tool
        cursor = page.next_cursor
        if not cursor:
            return


def _spec(tool: Any, timeout_s: float) -> ToolSpec:
    reads = tool.annotations is not None and tool.annotations.read_only_hint is True
    return ToolSpec(name=tool.name, description=tool.description or "", parameters=tool.input_schema,
                    mutates=not reads, timeout_s=timeout_s)


def shown(result: Any) -> str:
    """The text of a result; blocks that are no text are named."""
    said = [_block(block) for block in result.content]
    if not said and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    return "\n".join(said)


def _block(block: Any) -> str:
    if block.type == "text":
        return block.text
    if block.type == "resource":
        text = getattr(block.resource, "text", None)
        return text if text is not None else f"[resource {block.resource.uri}]"
    if block.type == "resource_link":
        return f"[resource {block.uri}]"
    return f"[{block.type} {block.mime_type}, {len(block.data) * 3 // 4} bytes]"


def cut(text: str) -> str:
    """The text, or its first :data:`MOST_CHARS` characters and a note of how many are missing.

    >>> cut("short"), len(cut("x" * 50_000_000))
    ('short', 1000043)
    """
    if len(text) <= MOST_CHARS:
        return text
    return f"{text[:MOST_CHARS]}\n[{len(text) - MOST_CHARS} of {len(text)} characters left out]"
