"""A counter world: three tools, a target to reach, and a grader who looks at the total."""

import json
import random
from typing import Any

import pytest

from agentsdpo.calls import write_call
from agentsdpo.errors import EnvError
from agentsdpo.types import (
    Budget,
    Completion,
    CriterionResult,
    Grade,
    Json,
    ModelTurn,
    Outcome,
    Sampling,
    Task,
    ToolCall,
    ToolResult,
    ToolSpec,
    VersionSpan,
)

_N = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0}}, "required": ["n"],
      "additionalProperties": False}
TOOLS = (ToolSpec(name="add", description="Add to the total.", parameters=_N, timeout_s=5.0),
         ToolSpec(name="get", description="Read the total.", parameters={"type": "object"}, mutates=False),
         ToolSpec(name="submit", description="Finish.", parameters={"type": "object"}))


class CounterEnv:
    """Counts; ``broken`` raises on reset, ``shuffle`` answers in the wrong order, ``slow_s`` sleeps first."""

    env_id, tools = "counter", TOOLS

    def __init__(self, broken: bool = False, shuffle: bool = False, slow_s: float = 0.0) -> None:
        self.broken, self.shuffle, self.slow_s = broken, shuffle, slow_s
        self.total, self._done, self.log = 0, False, []

    async def reset(self, task: Task, *, seed: int, episode_id: str) -> list[Json]:
        if self.broken:
            raise EnvError("no host", fix="start one")
        return [{"role": "system", "content": "You count. Use the tools."}, {"role": "user", "content": task.prompt}]

    async def call(self, calls: tuple[ToolCall, ...]) -> list[ToolResult]:
        if self.slow_s:
            import asyncio
            await asyncio.sleep(self.slow_s)
        results = [self._one(call) for call in calls]
        return results[::-1] if self.shuffle else results

    def _one(self, call: ToolCall) -> ToolResult:
        assert isinstance(call.arguments, dict)
        self.log.append(call.name)
        if call.name == "add":
            self.total += call.arguments["n"]
        self._done = self._done or call.name == "submit"
        return ToolResult(call_id=call.id, content=f"total {self.total}")

    def done(self) -> bool:
        return self._done

    def snapshot(self) -> bytes:
        return json.dumps(self.total).encode()

    def restore(self, data: bytes) -> None:
        self.total = json.loads(data)

    def outcome(self, answer: str | None) -> Outcome:
        return Outcome(answer=answer, initial=b"0", final=self.snapshot())


class CounterGrader:
    async def grade(self, task: Task, outcome: Outcome) -> Grade:
        hit = float(json.loads(outcome.final) == task.metadata["target"])
        return Grade.of([CriterionResult(id="total", score=hit, feedback="" if hit else "wrong total")],
                        feedback=f"the total must be {task.metadata['target']}")


class CounterSuite:
    name = "counter"

    def __init__(self, **env: Any) -> None:
        self._env = env

    def task(self, split: str, index: int) -> Task:
        return Task(task_id=f"{split}-{index}", prompt=f"Bring the total to {index}.", metadata={"target": index},
                    budget=Budget(turns=6), train_allowed=split == "train")

    def env(self) -> CounterEnv:
        return CounterEnv(**self._env)

    def grader(self) -> CounterGrader:
        return CounterGrader()


class Script:
    """Plays given turns, then finishes with text; an exception in the list is raised."""

    def __init__(self, *turns: ModelTurn | Exception | str) -> None:
        self.turns = list(turns)

    async def act(self, ctx: Any, tools: tuple[ToolSpec, ...]) -> ModelTurn:
        turn = self.turns.pop(0) if self.turns else "done"
        if isinstance(turn, Exception):
            raise turn
        return ModelTurn(text=turn) if isinstance(turn, str) else turn


class TextEngine:
    """Engine that says given texts: log-prob -1 everywhere; texts ending in ``...`` are cut by max_tokens."""

    name, records_kept, version = "text", False, 3
    context_window, vocab_size = 4000, 1000

    def __init__(self, chat: Any, *texts: str) -> None:
        self.chat, self.texts, self.eos_ids = chat, list(texts), (chat.eos_id,)
        self.prompts: list[list[int]] = []
        self.samplings: list[Sampling] = []
        self.released: list[str] = []

    async def complete(self, prompt_ids: Any, sampling: Sampling, *, session: str) -> Completion:
        self.prompts.append(list(prompt_ids))
        self.samplings.append(sampling)
        text = self.texts.pop(0)
        cut = text.endswith("...")
        ids = self.chat.encode(text.removesuffix("...")) + ([] if cut else [self.chat.eos_id])
        return Completion(token_ids=tuple(ids), logprobs=(-1.0,) * len(ids),
                          versions=(VersionSpan(version=3, start=0, end=len(ids)),),
                          finish_reason="length" if cut else "stop")

    def release(self, session: str) -> None:
        self.released.append(session)


class SeededEngine:
    """Engine whose completions follow from the seed of the call alone: calls good and bad, and summaries when asked."""

    name, records_kept, version = "seeded", False, 3
    context_window, vocab_size = 4000, 1000

    def __init__(self, chat: Any, summary: str = "The total is known.") -> None:
        self.chat, self.summary, self.eos_ids = chat, summary, (chat.eos_id,)
        self.calls = 0

    async def complete(self, prompt_ids: Any, sampling: Sampling, *, session: str) -> Completion:
        self.calls += 1
        rng = random.Random(sampling.seed)
        text = rng.choice([write_call("add", {"n": rng.randrange(9)}), write_call("get", {}),
                           write_call("note_add", {"key": rng.choice("abc"), "text": str(rng.randrange(99))}),
                           "so " + write_call("get", {}) + write_call("add", {"n": "x"}), '<tool_call>{"name": "a'])
        if "Write a summary" in self.chat.decode(prompt_ids[-120:]):
            text = self.summary
        ids = self.chat.encode(text) + ([] if text.endswith('"a') else [self.chat.eos_id])
        return Completion(token_ids=tuple(ids), logprobs=tuple(-rng.random() for _ in ids),
                          versions=(VersionSpan(version=3, start=0, end=len(ids)),),
                          finish_reason="stop" if ids[-1] == self.chat.eos_id else "length")

    def release(self, session: str) -> None:
        pass


class NotingEnv(CounterEnv):
    """Counts, and keeps notes."""

    tools = (*TOOLS, ToolSpec(name="note_add", description="Keep a note.", parameters={"type": "object"}),
             ToolSpec(name="note_get", description="Read a note.", parameters={"type": "object"}, mutates=False))


class World:
    """What the tests of this room share, in one fixture."""

    env, suite, script, text_engine = CounterEnv, CounterSuite, Script, TextEngine
    seeded_engine, noting_env = SeededEngine, NotingEnv

    @staticmethod
    def task(**budget: Any) -> Task:
        return Task(task_id="t", prompt="Count to 3.", metadata={"target": 3}, budget=Budget(**budget))

    @staticmethod
    def turn(*calls: tuple[str, Any], ids: list[str] | None = None) -> ModelTurn:
        ids = ids or [f"id{i}" for i in range(len(calls))]
        made = [ToolCall(id=i, name=name, arguments=args) for i, (name, args) in zip(ids, calls, strict=True)]
        return ModelTurn(text="", calls=tuple(made))

    write = staticmethod(write_call)


@pytest.fixture
def world() -> World:
    return World()
