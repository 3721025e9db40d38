"""A local MCP server as a child process: JSON-RPC lines over its standard input and output.

The SDK's own transport searches everything received so far again for every 64 KiB that arrive, which takes minutes for
an answer of 50 MB; this one looks at each byte once and knows a largest message. The server gets a group of its own
and an environment without the keys of whoever started it; the group is killed when the session ends.
"""

import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import IO, Any

import anyio
from mcp.client.stdio import get_default_environment
from mcp.shared.message import SessionMessage
from mcp_types import jsonrpc_message_adapter

MOST_MESSAGE = 256 << 20
"""Bytes of one message; a longer one ends the session."""
_GRACE_S = 2.0
"""Seconds a server has to leave by itself once its input is closed."""
_TOLD = 2_000
"""Bytes of what a server wrote to its standard error that go into an error."""


class Child:
    """A running server: streams for a ``ClientSession``, and what it said on standard error."""

    def __init__(self, process: asyncio.subprocess.Process, errors: IO[bytes]) -> None:
        self._process, self._errors, self._last = process, errors, ""
        self._received, self.incoming = anyio.create_memory_object_stream[SessionMessage | Exception](0)
        self.outgoing, self._sent = anyio.create_memory_object_stream[SessionMessage](0)

    def complaint(self) -> str:
        """The end of its standard error on one line, and how it ended; as it was when it was stopped."""
        if self._errors.closed:
            return self._last
        end = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, end - _TOLD))
        said = " ".join(self._errors.read().decode("utf-8", "replace").split())
        code = self._process.returncode
        return "; ".join(part for part in (f"exit status {code}" if code is not None else "", said) if part)

    async def read(self) -> None:
        """Pass on what the server says, until it ends."""
        assert self._process.stdout is not None
        async with self._received:
            while line := await self._line(self._process.stdout):
                try:
                    message: Any = SessionMessage(jsonrpc_message_adapter.validate_json(line, by_name=False))
                except ValueError as fault:  # for the session to report
                    message = fault
                try:
                    await self._received.send(message)
                except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                    return

    async def _line(self, stdout: asyncio.StreamReader) -> bytes:
        """The next line; nothing at the end, and after a message that is too long."""
        try:
            return await stdout.readline()
        except ValueError:
            return b""

    async def write(self) -> None:
        """Pass on what the session says, until either ends."""
        assert self._process.stdin is not None
        with suppress(OSError):
            async with self._sent:
                async for message in self._sent:
                    text = message.message.model_dump_json(by_alias=True, exclude_unset=True)
                    self._process.stdin.write(text.encode() + b"\n")
                    await self._process.stdin.drain()
        await self._received.aclose()

    async def stop(self) -> None:
        """Close its input, wait a little, then kill the whole group."""
        stdin = self._process.stdin
        assert stdin is not None
        with suppress(OSError):
            stdin.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(_GRACE_S):
                await self._process.wait()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        self._last = self.complaint()
        for stream in (self._received, self.incoming, self.outgoing, self._sent):
            await stream.aclose()


@asynccontextmanager
async def child(command: str, args: Sequence[str], env: Mapping[str, str], cwd: str | None) -> AsyncIterator[Child]:
    """Start a server and stop it at the end.

    Raises:
        OSError: it cannot be started.
    """
    with tempfile.TemporaryFile() as errors:
        process = await asyncio.create_subprocess_exec(
            command, *args, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=errors, cwd=cwd,
            env={**get_default_environment(), **env}, start_new_session=True, limit=MOST_MESSAGE)
        started = Child(process, errors)
        tasks = [asyncio.create_task(work) for work in (started.read(), started.write())]
        try:
            yield started
        finally:
            await asyncio.shield(started.stop())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
