"""Scripted agents: the scale on which a learned one is read, and the writers of the seed model's training text."""

import random
from abc import ABC, abstractmethod
from typing import Any

from agentsdpo.envs.desk import families, text
from agentsdpo.envs.desk.env import DeskEnv
from agentsdpo.envs.desk.firm import SLOTS, Firm, slots_of
from agentsdpo.envs.desk.grade import rubric
from agentsdpo.envs.desk.tools import SPECS, TOOLS
from agentsdpo.types import ModelTurn, Task, ToolCall, ToolSpec


def guess(preset: str, rng: random.Random) -> dict[str, str]:
    """Rules drawn uniformly: what an agent that was never told has to do."""
    return {slot: rng.choice(SLOTS[slot]) for slot in slots_of(preset)}


class Scripted(ABC):
    """What scripted agents share: each decides by what it has done so far, so after a restart it does that again."""

    @abstractmethod
    async def act(self, ctx: Any, tools: tuple[ToolSpec, ...]) -> ModelTurn:
        """The next turn."""

    async def recall(self, ctx: Any, tools: tuple[ToolSpec, ...], turn: ModelTurn) -> None:
        """It took this turn before a restart."""
        await self.act(ctx, tools)


class ScriptedAgent(Scripted):
    """Follows a plan with the rules it believes; with ``epsilon`` it slips into a needless read and recovers.

    Args:
        task: what to do.
        rules: slot -> option, true or guessed.
        epsilon: chance of a slip before each call, 0 to 1.
        seed: of the slips.
        notes: whether it writes down what is done.

    ``slipped`` tells whether the last step was a slip.
    """

    def __init__(self, task: Task, rules: dict[str, str], *, epsilon: float = 0.0, seed: int = 0,
                 notes: bool = False) -> None:
        self._plan = families.plan(task.metadata, rules, notes=notes)
        self._next: families.Step | None = next(self._plan)
        self._rng, self._epsilon, self.slipped, self._turn = random.Random(seed), epsilon, False, 0
        self._meta = task.metadata

    def step(self, observation: str | None) -> families.Step:
        """The next call, given the answer to the last one (None at the start)."""
        if observation is not None and not self.slipped:
            retry = observation.startswith("error: ") and observation.endswith("try again")
            self._next = self._next if retry else self._plan.send(observation)
        assert self._next is not None
        self.slipped = self._rng.random() < self._epsilon
        return self._slip() if self.slipped else self._next

    def _slip(self) -> families.Step:
        client = self._rng.choice(self._meta["clients"])
        return self._rng.choice([
            ("file_read", {"path": f"{self._rng.choice(text.FOLDERS)}/{client}"}),
            ("file_find", {"text": client}), ("mail_list", {}), ("note_get", {"key": ""}),
            ("file_read", {"path": f"{self._rng.choice(text.SOURCES)}/{client}"}),
        ])

    async def act(self, ctx: Any, tools: tuple[ToolSpec, ...]) -> ModelTurn:
        """One call a turn; reads the last tool message of ``ctx.messages``."""
        name, arguments = self.step(_observation(ctx.messages[-1]))
        self._turn += 1
        return ModelTurn(text="", calls=(ToolCall(id=f"call_{self._turn}_0", name=name, arguments=arguments),))


def _observation(message: dict[str, Any]) -> str | None:
    """What the last tool said, without what the loop may have added about the budget."""
    return message["content"].partition("\n\n[Budget")[0] if message["role"] == "tool" else None


def steps(task: Task, agent: ScriptedAgent) -> list[families.Step]:
    """All calls by which an agent does a task, from its first to its last."""
    env, done, answer = DeskEnv(), list[families.Step](), None
    env.start(task)
    while not env.done():
        done.append(agent.step(answer))
        name, arguments = done[-1]
        answer = env.apply(ToolCall(id="", name=name, arguments=arguments)).content
    return done


def oracle(task: Task, firm: Firm, *, epsilon: float = 0.0, seed: int = 0) -> ScriptedAgent:
    """Knows the rules (of the stranger firm too, where the task is marked so)."""
    firm = firm.stranger(task.metadata["preset"]) if task.metadata.get("stranger") else firm
    return ScriptedAgent(task, firm.rules(task.metadata["kinds"][0], task.metadata["preset"]), epsilon=epsilon,
                         seed=seed)


def guesser(task: Task, *, seed: int) -> ScriptedAgent:
    """Perfect skill, guessed rules: the honest zero-shot ceiling."""
    return ScriptedAgent(task, guess(task.metadata["preset"], random.Random(seed)))


def greedy(task: Task) -> ScriptedAgent:
    """Perfect skill, the first option of every slot for every kind."""
    return ScriptedAgent(task, {slot: SLOTS[slot][0] for slot in slots_of(task.metadata["preset"])})


class RandomAgent(Scripted):
    """Valid calls with random arguments; submits with chance 1/8."""

    def __init__(self, task: Task, *, seed: int) -> None:
        self._rng, self._clients = random.Random(seed), task.metadata["clients"]

    async def act(self, ctx: Any, tools: tuple[ToolSpec, ...]) -> ModelTurn:
        """One random call."""
        spec = SPECS["submit"] if self._rng.random() < 0.125 else self._rng.choice(TOOLS)
        arguments = {key: self._value(key, schema) for key, schema in spec.parameters["properties"].items()}
        return ModelTurn(text="", calls=(ToolCall(id=f"call_{len(ctx.messages)}_0", name=spec.name,
                                                  arguments=arguments),))

    def _value(self, key: str, schema: dict[str, Any]) -> Any:
        if schema["type"] == "integer":
            return self._rng.randint(1, 2)
        if "enum" in schema:
            return self._rng.choice(schema["enum"])
        folder = self._rng.choice((*text.SOURCES, *text.FOLDERS))
        return f"{folder}/{self._rng.choice(self._clients)}" if key == "path" else str(self._rng.randint(0, 999))


class NullAgent:
    """Does no work and says something: nothing at all (``empty``), a ``colon``, the ``opener`` of a line of thought,
    the request again (``echo``), or the ``criteria`` as if they were met."""

    def __init__(self, task: Task, kind: str = "empty") -> None:
        self._text = {"empty": "", "colon": ":", "opener": "Let me think about this step by step.",
                      "echo": task.prompt, "criteria": " ".join(c.text for c in rubric(task.metadata))}[kind]

    async def act(self, ctx: Any, tools: tuple[ToolSpec, ...]) -> ModelTurn:
        """One turn of text, no call."""
        return ModelTurn(text=self._text)


class Scattergun(Scripted):
    """Files in all folders and tells everybody, then submits: meets positive criteria, must fail all the same."""

    def __init__(self, task: Task) -> None:
        meta = task.metadata
        self._steps: list[families.Step] = []
        for client in meta["clients"]:
            self._steps += [("file_read", {"path": f"{source}/{client}"}) for source in text.SOURCES]
        self._meta, self._values, self._planned = meta, [], False

    async def act(self, ctx: Any, tools: tuple[ToolSpec, ...]) -> ModelTurn:
        """Reads every sheet first, then shoots."""
        last = ctx.messages[-1]
        if last["role"] == "tool":
            kind, period = self._meta["kinds"][0], self._meta["period"]
            self._values += [w.split()[2] for w in last["content"].splitlines() if w.startswith(f"{kind} {period} ")]
        if not self._steps and not self._planned:
            self._planned = True
            self._steps = self._shots()
        name, arguments = self._steps.pop(0) if self._steps else ("submit", {"answer": " ".join(self._values)})
        return ModelTurn(text="", calls=(ToolCall(id=f"call_{len(ctx.messages)}_0", name=name, arguments=arguments),))

    def _shots(self) -> list[families.Step]:
        kind, period = self._meta["kinds"][0], self._meta["period"]
        shots: list[families.Step] = [("mail_send", {"to": who, "text": "filed"}) for who in text.PEOPLE]
        for folder in text.FOLDERS:
            for client in self._meta["clients"]:
                shots += [("cell_set", {"path": f"{folder}/{client}", "row": kind, "col": period, "value": v,
                                        "unit": unit}) for v in self._values[:1] for unit in text.UNITS[:1]]
        return shots


