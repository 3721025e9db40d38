"""Task sets and graders that break on demand."""

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from agentsdpo.benchmarks.apex import agents as agents_module
from agentsdpo.benchmarks.apex import start as start_module
from agentsdpo.benchmarks.apex.config import BenchConfig
from agentsdpo.benchmarks.apex.runner import Bench
from agentsdpo.benchmarks.apex.start import start
from agentsdpo.benchmarks.apex.taskset import tasks_sha256
from agentsdpo.errors import EngineError, EnvError
from agentsdpo.types import (
    Criterion,
    CriterionResult,
    Grade,
    Json,
    ModelTurn,
    Outcome,
    Task,
    ToolCall,
    ToolResult,
    ToolSpec,
)

ADD = ToolSpec(name="add", description="Add to the sum.", parameters={
    "type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]})


class SumEnv:
    """Holds one number; ``broken`` calls raise, counted over all environments of a set."""

    env_id = "sum"
    tools = (ADD,)

    def __init__(self, world: "SumTasks") -> None:
        self._world, self.sum, self.closed = world, 0, False

    async def reset(self, task: Task, *, seed: int, episode_id: str) -> list[Json]:
        assert task.rubric == (), "the rubric reached the environment"
        return [{"role": "system", "content": "Add."}, {"role": "user", "content": task.prompt}]

    async def call(self, calls: tuple[ToolCall, ...]) -> list[ToolResult]:
        await asyncio.sleep(0)
        self._world.calls += 1
        if self._world.calls in self._world.break_at:
            raise EnvError("the machine is gone", fix="try again")
        self.sum += sum(call.arguments["n"] for call in calls if isinstance(call.arguments, dict))
        return [ToolResult(call_id=call.id, content=f"sum {self.sum}", state_hash=str(self.sum)) for call in calls]

    def done(self) -> bool:
        return False

    def snapshot(self) -> bytes:
        return json.dumps(self.sum).encode()

    def restore(self, data: bytes) -> None:
        self.sum = json.loads(data)

    def outcome(self, answer: str | None) -> Outcome:
        return Outcome(answer=answer, initial=b"0", final=self.snapshot())

    async def close(self) -> None:
        self._world.closed += 1


class SumGrader:
    """Two criteria: the answer, and the state; ``judge_breaks`` verdicts are errors."""

    def __init__(self, world: "SumTasks") -> None:
        self._world = world

    async def grade(self, task: Task, outcome: Outcome) -> Grade:
        self._world.graded += 1
        if self._world.graded in self._world.judge_breaks:
            return Grade.of([CriterionResult(id="answer", status="error", score=None, rationale="no verdict"),
                             CriterionResult(id="state", score=1.0)])
        return Grade.of([
            CriterionResult(id="answer", score=float(outcome.answer == task.metadata["sum"]), rationale="as told"),
            CriterionResult(id="state", score=float(outcome.final == task.metadata["sum"].encode()))], feedback="x")

    def judged_by(self) -> Json:
        return {"model": self._world.judge, "prompt_sha256": "ab" * 32}


class SumTasks:
    """``count`` tasks: add 1 until the sum is 3, then say it."""

    name, version = "sums", "1"

    def __init__(self, count: int = 4, *, worlds: int = 2, prompt: str = "Make 3.") -> None:
        rubric = (Criterion(id="answer", text="The answer is the sum.", primary=True),
                  Criterion(id="state", text="The sum is 3.", weight=3.0))
        self.tasks: Sequence[Task] = tuple(
            Task(task_id=f"sum-{i}", world_id=f"w{i % worlds}", domain="Law" if i % 2 else "Consulting", prompt=prompt,
                 rubric=rubric, metadata={"sum": "3"}) for i in range(count))
        self.sha256 = tasks_sha256(self.tasks)
        self.calls = self.graded = self.closed = 0
        self.break_at: set[int] = set()
        self.judge_breaks: set[int] = set()
        self.judge: str | None = None

    def env(self, task: Task) -> SumEnv:
        return SumEnv(self)

    def grader(self, task: Task) -> SumGrader:
        return SumGrader(self)

    def agents(self) -> dict[str, Callable[[Task, int], Any]]:
        return {"oracle": lambda task, seed: Adder(), "sloppy": lambda task, seed: Adder(says=f"sum {seed % 5}"),
                "halfway": lambda task, seed: Adder(right=bool(seed % 2))}


class Adder:
    """Adds 1 three times, then says 3 (or something else)."""

    def __init__(self, *, right: bool = True, says: str = "3") -> None:
        self._says = says if right else "4"

    async def act(self, ctx: Any, tools: tuple[ToolSpec, ...]) -> ModelTurn:
        if ctx.turn < 3:
            return ModelTurn(text="", calls=(ToolCall(id=f"c{ctx.turn}", name="add", arguments={"n": 1}),))
        return ModelTurn(text=self._says)


class Provider:
    """Fails the given calls of the engine, counted over the run."""

    def __init__(self, fails: set[int]) -> None:
        self.fails, self.calls = fails, 0

    async def act(self, ctx: Any, tools: tuple[ToolSpec, ...]) -> ModelTurn:
        self.calls += 1
        if self.calls in self.fails:
            raise EngineError("the provider is gone", fix="try again")
        return await Adder().act(ctx, tools)


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> SumTasks:
    """A set of four tasks that every configuration opens, whatever its suite."""
    world = SumTasks()
    monkeypatch.setattr(start_module, "open_suite", lambda config: world)
    from agentsdpo.benchmarks.apex import doctor, grading

    monkeypatch.setattr(grading, "open_suite", lambda config: world)
    monkeypatch.setattr(doctor, "open_suite", lambda config: world)
    return world


def make(out: Path, model: str = "oracle", **settings: Any) -> Bench:
    """A run of the small set."""
    return start(BenchConfig(model=model, **{"attempts": 2, "retries": 0, **settings}), out)


__all__ = ["Adder", "Provider", "SumTasks", "agents_module", "make", "sums"]
