"""Tools of real MCP servers: a child process, and the gateway of a container of archipelago's interface."""

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from agentsdpo.collect.rollout import run_episode
from agentsdpo.envs import mcp
from agentsdpo.envs.archipelago import ArchipelagoEnv
from agentsdpo.envs.archives import Entry, unzip
from agentsdpo.envs.config import ContainerConfig, McpServer
from agentsdpo.envs.mcp import McpEnv
from agentsdpo.errors import ConfigError, EnvError
from agentsdpo.types import ModelTurn, StopReason, Task, ToolCall, ToolResult, ToolSpec

SERVER, ODD = (str(Path(__file__).with_name(f"{name}_server.py")) for name in ("tool", "odd"))
TASK = Task(task_id="t", prompt="What was revenue?")
WORLD = {"filesystem/q3.txt": Entry.of(b"revenue 512"), ".apps_data/mail/1.eml": Entry.of(b"Subject: hi\n\nyes")}


def local(**more: Any) -> McpEnv:
    return McpEnv(McpServer(command=sys.executable, args=(SERVER, "stdio"), **more))


def container(mode: str = "fine", **more: Any) -> ArchipelagoEnv:
    return ArchipelagoEnv(WORLD, ContainerConfig(
        start=(sys.executable, SERVER, "start", mode), stop=(sys.executable, SERVER, "stop", "{url}"),
        apps={"files": {"transport": "stdio", "command": "x"}}, startup_s=60.0, **more))


async def use(env: McpEnv, name: str, **arguments: Any) -> ToolResult:
    (result,) = await env.call((ToolCall(id="c", name=name, arguments=arguments),))
    return result


def within(env: McpEnv, work: Callable[[], Awaitable[Any]]) -> Any:
    """Do some work in one event loop, and close the environment whatever happens."""
    async def run() -> Any:
        try:
            return await work()
        finally:
            await env.close()
    return asyncio.run(run())


def children() -> set[int]:
    """Processes that this one has started and that still live."""
    found = set()
    for place in Path("/proc").iterdir():
        if place.name.isdecimal():
            try:
                fields = (place / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == os.getpid() and fields[0] != "Z":
                found.add(int(place.name))
    return found


def test_the_tools_of_a_child_process() -> None:
    env, before = local(timeout_s=30.0), children()

    async def work() -> None:
        messages = await env.reset(TASK, seed=0, episode_id="e")
        assert messages == [{"role": "user", "content": "What was revenue?"}]
        specs = {spec.name: spec for spec in env.tools}
        assert not specs["filesystem_server_read_file"].mutates
        assert specs["filesystem_server_write_file"].mutates
        assert specs["filesystem_server_write_file"].parameters["required"] == ["path", "content"]
        assert "final_answer" in specs
        assert (await use(env, "filesystem_server_write_file", path="a", content="5")).content == "1 files"
        assert (await use(env, "filesystem_server_read_file", path="a")).content == "5"
        assert (await use(env, "picture")).content == "see\n[image image/png, 3 bytes]"
        missing = await use(env, "filesystem_server_read_file", path="none")
        assert (missing.is_error, missing.error_kind) == (True, "tool"), "a tool's fault is an observation"
        assert (await use(env, "nope")).error_kind == "unknown_tool"
        assert (await use(env, "filesystem_server_read_file")).error_kind == "tool"
        huge = await use(env, "big", n=50_000_000)
        assert huge.truncated == (mcp.MOST_CHARS, 50_000_000)
        assert huge.content.endswith("\n[49000000 of 50000000 characters left out]")
        assert not env.done()
        assert (await use(env, "final_answer", answer="512")).content == "final answer taken"
        assert env.done()
        assert (await use(env, "clock")).is_error
        outcome = env.outcome("other")
        assert outcome.answer == "512"
        assert [call.name for call, _ in outcome.calls][-2:] == ["final_answer", "clock"]
        assert outcome.calls[-2][1].content == "final answer taken", "a grader reads what was answered"
        assert len(env.snapshot()) < 10_000, "a snapshot does not hold it"

    within(env, work)
    assert children() <= before, "the server is gone with the episode"


def test_a_server_that_dies_leaves_the_attempt_unscored() -> None:
    class Agent:
        async def act(self, ctx: Any, tools: tuple[ToolSpec, ...]) -> ModelTurn:
            return ModelTurn(text="", calls=(ToolCall(id="c", name="die", arguments={}),))

    env = local(timeout_s=30.0)
    run: Any = within(env, lambda: run_episode(env, Agent(), TASK, seed=0, episode_id="e"))
    assert (run.stop_reason, run.outcome) == (StopReason.ENGINE_ERROR, None)
    assert run.error.startswith("EnvError: MCP server")
    assert "out of paper" in run.error


class Once:
    """Makes one call, then says so."""

    def __init__(self, name: str, **arguments: Any) -> None:
        self._call = ToolCall(id="c", name=name, arguments=arguments)

    async def act(self, ctx: Any, tools: tuple[ToolSpec, ...]) -> ModelTurn:
        return ModelTurn(text="I am done.") if ctx.turn else ModelTurn(text="", calls=(self._call,))


def odd(name: str, **arguments: Any) -> Any:
    """An episode of one call on a server that breaks its own promises."""
    env = McpEnv(McpServer(command=sys.executable, args=(ODD,), timeout_s=30.0))
    return within(env, lambda: run_episode(env, Once(name, **arguments), TASK, seed=0, episode_id="e"))


@pytest.mark.parametrize(("name", "words"), [
    ("unstructured", "Error: the tool's answer cannot be used: Tool unstructured has an output schema"),
    ("half", "Error: the tool's answer cannot be used: "), ("named", "done"), ("nowhere", "done")])
def test_what_is_wrong_with_a_tool_is_told_to_the_agent(name: str, words: str) -> None:
    """Raised, it would leave every attempt that uses the tool unscored for good."""
    run = odd(name, x="Zoë")
    assert (run.stop_reason, run.error) == (StopReason.COMPLETED, "")
    assert run.messages[2]["content"].startswith(words)


def test_a_final_answer_of_the_servers_own_is_the_answer() -> None:
    run = odd("final_answer", answer="512")
    assert (run.stop_reason, run.counts["turns"], run.outcome.answer) == (StopReason.COMPLETED, 1, "512")


@pytest.mark.slow
def test_a_slow_tool_and_one_more_after_it() -> None:
    env = local(timeout_s=20.0)

    async def work() -> None:
        await env.reset(TASK, seed=0, episode_id="e")
        env._session.server = env._session.server.model_copy(update={"timeout_s": 0.3})
        late = await use(env, "slow", s=60)
        assert (late.error_kind, late.content) == ("timeout", "Error: no answer within 0.3 s")
        env._session.server = env._session.server.model_copy(update={"timeout_s": 20.0})
        assert (await use(env, "filesystem_server_write_file", path="a", content="")).content == "1 files"

    within(env, work)


@pytest.mark.slow
def test_a_local_server_is_put_back_by_its_calls() -> None:
    env, again = local(), local()

    async def play() -> tuple[bytes, bytes]:
        await env.reset(TASK, seed=0, episode_id="e")
        await use(env, "filesystem_server_write_file", path="a", content="5")
        early = env.snapshot()
        await use(env, "clock")
        return early, env.snapshot()

    early, late = within(env, play)

    async def restore() -> None:
        await again.reset(TASK, seed=0, episode_id="e")
        await again.restore(early)
        assert again.snapshot() != late
        assert (await use(again, "filesystem_server_read_file", path="a")).content == "5"
        await again.reset(TASK, seed=0, episode_id="e")
        with pytest.raises(EnvError, match=r"call 1 \(clock\) was answered otherwise than before"):
            await again.restore(late)

    within(again, restore)


@pytest.mark.parametrize(("server", "words"), [
    (McpServer(command="/no/such/program"), "FileNotFoundError"),
    (McpServer(command=sys.executable, args=("-c", "raise SystemExit('no paper')"), timeout_s=20), "no paper"),
    (McpServer(url="http://127.0.0.1:9/mcp/", timeout_s=5), "gone"),
])
def test_servers_that_never_answer(server: McpServer, words: str) -> None:
    env = McpEnv(server)
    with pytest.raises(EnvError, match=words):
        within(env, lambda: env.reset(TASK, seed=0, episode_id="e"))


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    bad: dict[str, Any]
    for bad in ({}, {"command": "a", "url": "http://b"}, {"command": "a", "timeout_s": 0}):
        with pytest.raises(ValidationError):
            McpServer(**bad)
    env = McpEnv(McpServer(url="http://127.0.0.1:9/mcp/", token_env="NO_SUCH_TOKEN"))
    with pytest.raises(ConfigError, match="variable NO_SUCH_TOKEN is not set"):
        within(env, lambda: env.reset(TASK, seed=0, episode_id="e"))


# ----------------------------------------------------------------------------------------------------- the container


def test_an_episode_in_a_container() -> None:
    env, again = container(), container()

    async def work() -> bytes:
        opening = await env.reset(TASK, seed=0, episode_id="e")
        assert [message["role"] for message in opening] == ["system", "user"]
        assert (await use(env, "filesystem_server_read_file", path="q3.txt")).content == "revenue 512"
        await use(env, "filesystem_server_write_file", path="memo.md", content="512")
        huge = await use(env, "big", n=3_000_000)
        assert huge.truncated == (mcp.MOST_CHARS, 3_000_000), "more than one event of the SDK may hold by itself"
        kept = await env.snapshot()
        await use(env, "final_answer", answer="512")
        outcome = await env.outcome(None)
        assert outcome.answer == "512"
        assert set(unzip(outcome.initial, "i")) == set(WORLD)
        assert unzip(outcome.final, "f")["filesystem/memo.md"].load() == b"512"
        return kept

    kept = within(env, work)

    async def restore() -> None:
        await again.reset(TASK, seed=0, episode_id="e")
        await again.restore(kept)
        assert (await use(again, "filesystem_server_read_file", path="memo.md")).content == "512"
        await use(again, "filesystem_server_delete_file", path="q3.txt")
        gone = await again.snapshot()
        await again.reset(TASK, seed=0, episode_id="e")
        with pytest.raises(EnvError, match=r"the snapshot cannot be put back: 1 files differ, .*q3.txt"):
            await again.restore(gone)

    within(again, restore)


@pytest.mark.parametrize(("env", "words"), [
    (container("stale"), r"the container is not fresh: 1 files differ, the first is 'filesystem/of-yesterday.txt'"),
    pytest.param(ArchipelagoEnv(WORLD, ContainerConfig(
        start=(sys.executable, SERVER, "start", "sick"), stop=(sys.executable, SERVER, "stop", "{url}"),
        startup_s=15.0)), "answered 503", marks=pytest.mark.slow),
    (ArchipelagoEnv(WORLD, ContainerConfig(start=("/no/such/docker",))), "cannot be started"),
    (ArchipelagoEnv(WORLD, ContainerConfig(start=("echo", "hello"))), "printed no address but 'hello'"),
    (ArchipelagoEnv(WORLD, ContainerConfig(start=("sh", "-c", "echo no >&2; exit 4"))), "ended with 4: no"),
    (ArchipelagoEnv(WORLD, ContainerConfig(start=("echo", "http://127.0.0.1:9"), startup_s=0.2)), "does not answer"),
    (ArchipelagoEnv(WORLD, ContainerConfig(start=("sh", "-c", "sleep 10 & echo http://127.0.0.1:9"), timeout_s=0.5)),
     "has not ended in 0.5 s; run it by hand"),
], ids=["stale", "sick", "no program", "no address", "failing", "nobody there", "for ever"])
def test_containers_that_cannot_be_used(env: ArchipelagoEnv, words: str) -> None:
    with pytest.raises(EnvError, match=words):
        within(env, lambda: env.reset(TASK, seed=0, episode_id="e"))


@pytest.mark.slow
def test_a_snapshot_that_is_none() -> None:
    env = container("broken")

    async def work() -> None:
        await env.reset(TASK, seed=0, episode_id="e")
        with pytest.raises(EnvError, match="is no tar archive"):
            await env.outcome("x")

    within(env, work)
