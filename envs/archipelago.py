"""A world in an archipelago container: files and apps over its HTTP interface, tools over its MCP gateway.

The order is that of the benchmark: world and overlay are put in, the apps are started, the agent works, a snapshot is
taken. A container serves one episode, since it has no way to forget; what stands in it after the files were put in is
compared with them, so that nothing of an earlier episode is ever graded.
"""

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import httpx
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from agentsdpo.envs.archives import MOST_BYTES, Entry, Files, tar_bytes, untar, unzip, zip_bytes
from agentsdpo.envs.config import ContainerConfig, McpServer
from agentsdpo.envs.mcp import McpEnv, McpSession
from agentsdpo.errors import EnvError, FormatError
from agentsdpo.types import Json, Outcome, Task, ToolCall, ToolResult

SUBSYSTEMS = ("filesystem", ".apps_data")
SYSTEM = """\
You work in an office with the apps that your tools give you. Do what the request asks.
When you are done, call final_answer with your answer; files that are asked for must exist by then."""
_EPISODE = ".apps_data/agentsdpo/episode.json"
"""Where answer and calls stand inside a checkpoint."""


class Container:
    """The HTTP interface of one container.

    Raises:
        EnvError: it does not answer, or answers with an error.
    """

    def __init__(self, url: str, config: ContainerConfig) -> None:
        self.url, self._config = url.rstrip("/"), config
        self._client = httpx.AsyncClient(base_url=self.url, timeout=config.timeout_s, trust_env=False)

    async def healthy(self) -> None:
        """Wait until it is up."""
        async for attempt in AsyncRetrying(stop=stop_after_delay(self._config.startup_s), reraise=True,
                                           wait=wait_random_exponential(0.1, max=2.0),
                                           retry=retry_if_exception_type(EnvError)):
            with attempt:
                await self._ask("GET", "/health", timeout=5.0)

    async def populate(self, files: Files) -> int:
        """Put files in; paths begin with ``filesystem/`` or ``.apps_data/``. Returns how many it says it took."""
        taken = 0
        for subsystem in SUBSYSTEMS:
            inside = {path.removeprefix(f"{subsystem}/"): entry for path, entry in files.items()
                      if path.startswith(f"{subsystem}/")}
            if inside:
                said = await self._ask("POST", "/data/populate", params={"subsystem": subsystem}, files={
                    "archive": ("files.tar.gz", tar_bytes(inside), "application/gzip")})
                taken += int(said.json().get("objects_added", 0))
        return taken

    async def apps(self) -> None:
        """Start the apps whose tools the gateway then gives."""
        if self._config.apps:
            await self._ask("POST", "/apps", json={"mcpServers": self._config.apps})

    async def snapshot(self) -> Files:
        """All files of both subsystems."""
        body = {"pre_snapshot_hooks": list(self._config.hooks)}
        data = bytearray()
        try:
            async with self._client.stream("POST", "/data/snapshot", json=body) as response:
                await self._checked(response)
                async for chunk in response.aiter_bytes():
                    data += chunk
                    if len(data) > MOST_BYTES:
                        raise EnvError(f"the snapshot of {self.url} has more than {MOST_BYTES} bytes")
        except httpx.HTTPError as fault:
            raise self._gone(fault) from fault
        try:
            return untar(bytes(data), f"the snapshot of {self.url}")
        except FormatError as fault:
            raise EnvError(str(fault)) from fault

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        try:
            response = await self._client.request(method, path, **more)
        except httpx.HTTPError as fault:
            raise self._gone(fault) from fault
        return await self._checked(response)

    async def _checked(self, response: httpx.Response) -> httpx.Response:
        if response.status_code != 200:
            said = (await response.aread())[:300].decode("utf-8", "replace")
            raise EnvError(f"{response.request.method} {response.request.url} answered {response.status_code}: {said}",
                           fix="look into the container's log")
        return response

    def _gone(self, fault: Exception) -> EnvError:
        return EnvError(f"container {self.url} does not answer: {type(fault).__name__}: {fault}",
                        fix="see whether it runs and its port is the one given")


class ArchipelagoEnv(McpEnv):
    """One container, one episode.

    Args:
        world: files it begins with.
        config: how to come by the container.
        packed: the world as a zip archive, where that is at hand already.
    """

    env_id = "archipelago"

    def __init__(self, world: Files, config: ContainerConfig, *, packed: Callable[[], bytes] | None = None,
                 system: str = SYSTEM) -> None:
        super().__init__(McpServer(url="http://127.0.0.1"), system=system)
        self._world, self._config, self._packed = world, config, packed or (lambda: zip_bytes(world))
        self._container: Container | None = None

    async def reset(self, task: Task, *, seed: int, episode_id: str) -> list[Json]:
        """Start a container, fill it, start its apps, connect to its tools.

        Raises:
            EnvError: any of it fails, or the container is not fresh.
        """
        await self.close()
        container = self._container = Container(await self._start(), self._config)
        await container.healthy()
        await container.populate(self._world)
        await self._same(self._world, "the container is not fresh")
        await container.apps()
        self._session = McpSession(McpServer(url=f"{container.url}/mcp/", timeout_s=self._config.timeout_s))
        return await super().reset(task, seed=seed, episode_id=episode_id)

    async def snapshot(self) -> bytes:  # type: ignore[override]
        """The files of the container, the answer and the calls, as a zip archive."""
        episode = Entry.of(super().snapshot())
        return zip_bytes({**await self._held(), _EPISODE: episode})

    async def restore(self, data: bytes) -> None:
        """Put the files of a snapshot into a container that was just filled.

        Raises:
            EnvError: the container then holds something else, as where the agent had deleted files.
        """
        files = dict(unzip(data, "the snapshot"))
        saved = json.loads(files.pop(_EPISODE).load())
        assert self._container is not None
        await self._container.populate({path: entry for path, entry in files.items()
                                        if _mark(self._world.get(path)) != _mark(entry)})
        await self._same(files, "the snapshot cannot be put back")
        self._answer = saved["answer"]
        self._log = [(ToolCall(**call), ToolResult(**result), said) for call, result, said in saved["log"]]

    async def outcome(self, answer: str | None) -> Outcome:  # type: ignore[override]
        """The answer, the world as it was put in, and a snapshot of what it is now."""
        seen = super().outcome(answer)
        return seen.model_copy(update={"initial": self._packed(), "final": zip_bytes(await self._held())})

    async def close(self) -> None:
        """Disconnect and remove the container."""
        await super().close()
        container, self._container = self._container, None
        if container is not None:
            await container.close()
            if self._config.stop:
                await _run([part.replace("{url}", container.url) for part in self._config.stop], self._config.timeout_s)

    async def _start(self) -> str:
        lines = (await _run(self._config.start, self._config.timeout_s)).split()
        if not lines or not lines[-1].startswith(("http://", "https://")):
            raise EnvError(f"{' '.join(self._config.start)} printed no address but {' '.join(lines)[:200]!r}",
                           fix="let it print the container's address as its last line, as in http://127.0.0.1:8080")
        return lines[-1]

    async def _held(self) -> Files:
        assert self._container is not None
        return await self._container.snapshot()

    async def _same(self, wanted: Mapping[str, Entry], what: str) -> None:
        """Compare what the container holds with what it should hold."""
        held = await self._held()
        differ = sorted(path for path in held.keys() | wanted.keys()
                        if _mark(held.get(path)) != _mark(wanted.get(path)))
        if differ:
            raise EnvError(f"{what}: {len(differ)} files differ, the first is {differ[0]!r}",
                           fix="give every episode a container of its own")


def _mark(entry: Entry | None) -> tuple[int, int] | None:
    return None if entry is None else (entry.size, entry.crc)


async def _run(command: Sequence[str], limit_s: float) -> str:
    """What a command prints.

    Raises:
        EnvError: it cannot be started, fails, or has not ended in so many seconds; it is killed then.
    """
    try:
        process = await asyncio.create_subprocess_exec(*command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                                       stderr=subprocess.PIPE, start_new_session=True)
    except OSError as fault:
        raise EnvError(f"{command[0]} cannot be started: {fault}", fix="give the command's path") from fault
    try:
        async with asyncio.timeout(limit_s):
            said, errors = await process.communicate()
    except BaseException as fault:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(TimeoutError):
            await asyncio.wait_for(process.communicate(), 1.0)  # to the end of its output, which closes it
        if not isinstance(fault, TimeoutError):
            raise
        raise EnvError(f"{' '.join(command)} has not ended in {limit_s:g} s", fix="run it by hand: it must end, and "
                       "what it leaves running must not hold its output") from None
    if process.returncode:
        why = errors[-300:].decode("utf-8", "replace")
        raise EnvError(f"{' '.join(command)} ended with {process.returncode}: {why}", fix="run it by hand")
    return said.decode("utf-8", "replace")
