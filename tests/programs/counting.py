"""A world that counts and an engine that speaks from a script, for tests and for the processes they kill.

    python counting.py STORE POLICIES EPISODES [NUMBER OF]        a collector that can be killed
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from agentsdpo.calls import write_call
from agentsdpo.collect.collector import Collector
from agentsdpo.config import RunConfig, from_mapping
from agentsdpo.errors import EngineError
from agentsdpo.learn.load import load_chat
from agentsdpo.programs.collecting import Collecting
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.replay.spool import Spool
from agentsdpo.replay.store import ReplayStore
from agentsdpo.replay.upkeep.recover import recover
from agentsdpo.types import (
    Budget,
    Completion,
    CriterionResult,
    Grade,
    Json,
    Outcome,
    Sampling,
    Task,
    ToolCall,
    ToolResult,
    ToolSpec,
    VersionSpan,
)

TOOLS = (ToolSpec(name="add", description="Add.", parameters={"type": "object"}),)


class Env:
    """Counts calls; each takes ``slow_s``."""

    env_id, tools = "counter", TOOLS

    def __init__(self, slow_s: float) -> None:
        self.slow_s, self.total = slow_s, 0

    async def reset(self, task: Task, *, seed: int, episode_id: str) -> list[Json]:
        return [{"role": "user", "content": task.prompt}]

    async def call(self, calls: tuple[ToolCall, ...]) -> list[ToolResult]:
        await asyncio.sleep(self.slow_s)
        self.total += len(calls)
        return [ToolResult(call_id=call.id, content=f"total {self.total}") for call in calls]

    def done(self) -> bool:
        return self.total >= 3

    def snapshot(self) -> bytes:
        return json.dumps(self.total).encode()

    def restore(self, data: bytes) -> None:
        self.total = json.loads(data)

    def outcome(self, answer: str | None) -> Outcome:
        return Outcome(answer=answer, initial=b"0", final=self.snapshot())


class Suite:
    """Tasks to count to three; ``silent`` ones leave the grader without words."""

    name = "counting"

    def __init__(self, slow_s: float = 0.01, silent: bool = False) -> None:
        self.slow_s, self.silent = slow_s, silent

    def task(self, split: str, index: int) -> Task:
        return Task(task_id=f"{split}-{index}", prompt=f"Count, {index}.", budget=Budget(turns=6),
                    train_allowed=split == "train")

    def env(self) -> Env:
        return Env(self.slow_s)

    def grader(self) -> "Suite":
        return self

    async def grade(self, task: Task, outcome: Outcome) -> Grade:
        feedback = "" if self.silent else "count to three, not further"
        return Grade.of([CriterionResult(id="total", score=1.0)], feedback=feedback)


class Engine:
    """Says one call per turn, a token at a time; a version that comes in between shows in the spans."""

    name, records_kept, context_window, vocab_size = "scripted", False, 4000, 5000

    def __init__(self, chat: Any, token_s: float = 0.0) -> None:
        self.chat, self.token_s, self.version, self.broken = chat, token_s, 0, 0
        self.eos_ids = (chat.eos_id,)
        self.ids = [*chat.encode(write_call("add", {})), chat.eos_id]

    def load_weights(self, state: Any, version: int) -> None:
        self.version = version

    async def complete(self, prompt_ids: Any, sampling: Sampling, *, session: str) -> Completion:
        if self.broken:
            self.broken -= 1
            raise EngineError("connection refused", fix="start the server")
        versions: list[int] = []
        for _ in self.ids:
            versions.append(self.version)
            await asyncio.sleep(self.token_s)
        edges = [0, *[i for i in range(1, len(versions)) if versions[i] != versions[i - 1]], len(versions)]
        spans = tuple(VersionSpan(version=versions[a], start=a, end=b)
                      for a, b in zip(edges[:-1], edges[1:], strict=True))
        return Completion(token_ids=tuple(self.ids), logprobs=(-1.0,) * len(self.ids), versions=spans,
                          finish_reason="stop")

    def release(self, session: str) -> None:
        return None


def config(*sets: str) -> RunConfig:
    return from_mapping({"name": "counting"}, ["collect.concurrency=4", "collect.window=1500", *sets])


def collecting(store: Path, policies: Path, run: RunConfig, suite: Any = None, **more: Any) -> Collecting:
    """A collector over this world; ``token_s`` is the engine's."""
    from agentsdpo.envs.desk.seed import seed_path

    chat = load_chat(seed_path())
    engine, opened = Engine(chat, more.pop("token_s", 0.0)), ReplayStore.open(store)
    spool = Spool(opened, run.replay.durability)
    recover(opened, spool=spool.folder)
    player = Collector.of_engine(suite or Suite(), engine, chat, run.collect, run_id="counting", spool=spool)
    return Collecting(run, opened, PolicyRegistry(policies), engine, player, spool, **more)


if __name__ == "__main__":
    at, registry, wanted, number, of = sys.argv[1], sys.argv[2], *map(int, [*sys.argv[3:], "0", "1"][:3])
    asyncio.run(collecting(Path(at), Path(registry), config(), episodes=wanted, number=number, of=of).run())
