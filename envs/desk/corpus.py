"""Training text of the seed model: noisy-oracle episodes under rules that are redrawn for every episode.

The model may learn to read a hint and to use the tools; it cannot learn a rule, because none lasts.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from agentsdpo.calls import write_call
from agentsdpo.chat import ChatFormat
from agentsdpo.envs.desk import text
from agentsdpo.envs.desk.agents import ScriptedAgent, guess
from agentsdpo.envs.desk.env import DeskEnv
from agentsdpo.envs.desk.firm import hint
from agentsdpo.envs.desk.suite import DeskSuite
from agentsdpo.envs.desk.tools import TOOLS
from agentsdpo.types import Task, ToolCall

Mix = tuple[tuple[float, str, str, tuple[int, ...], int], ...]
"""Share of episodes, preset, family, n, distractor rows of a sheet."""

MIXES: tuple[Mix, ...] = (
    ((0.60, "desk-mini", "lookup", (1,), 1), (0.12, "desk-mini", "lookup", (2, 3, 4), 1),
     (0.14, "desk", "lookup", (1, 2), 3), (0.05, "desk-mini", "correct", (1, 2), 1),
     (0.03, "desk-mini", "reconcile", (1,), 1), (0.03, "desk-mini", "rollup", (2, 3), 1),
     (0.03, "desk-mini", "close", (1,), 1)),
    ((0.44, "desk-mini", "lookup", (1,), 0), (0.10, "desk-mini", "lookup", (1,), 1),
     (0.20, "desk-mini", "lookup", (2, 3, 4), 0), (0.12, "desk", "lookup", (1, 2), 3),
     (0.05, "desk-mini", "correct", (1, 2), 0), (0.03, "desk-mini", "reconcile", (1,), 0),
     (0.03, "desk-mini", "rollup", (2, 3), 0), (0.03, "desk-mini", "close", (1,), 0)),
)
"""One mix a stage of training."""

HINTED, PARTIAL = 0.6, 1 / 3
"""Share of episodes with a hint; share of those that state only some slots."""


@dataclass(frozen=True)
class Trace:
    """One episode as text; ``spans`` are the characters that carry loss; ``unstated`` slots must be guessed."""

    text: str
    spans: tuple[tuple[int, int], ...]
    unstated: int
    hinted: bool


class Frame:
    """The template's own text around the parts that vary, rendered once."""

    def __init__(self, chat: ChatFormat) -> None:
        open_ids = chat.open([{"role": "system", "content": text.SYSTEM}, {"role": "user", "content": "PROMPT"}], TOOLS)
        self.head, self.tail = chat.decode(open_ids).split("PROMPT")
        self.before, self.after = chat.decode(chat.extend([{"role": "tool", "content": "RESULT"}])).split("RESULT")
        self.hint_before, self.hint_after = chat.decode(chat.hint("HINT")).split("HINT")
        self.end = chat.tokenizer.eos_token


def trace(frame: Frame, task: Task, rng: random.Random, *, stated: list[str] | None = None, epsilon: float = 0.0,
          words: Callable[[Task, dict[str, str]], str] | None = None) -> Trace:
    """One noisy-oracle episode with random rules; slips stand in the text but carry no loss.

    Args:
        frame: the template's text.
        task: what is asked.
        rng: source of the rules and of the slips.
        stated: slots the hint states; none gives an un-hinted episode; all when None.
        epsilon: chance of a slip before each call.
        words: another hint, which states all rules in its own way.
    """
    rules = guess(task.metadata["preset"], rng)
    agent = ScriptedAgent(task, rules, epsilon=epsilon, seed=rng.getrandbits(32))
    told = words(task, rules) if words else hint(task.metadata["kinds"][0], rules, stated)
    out = frame.hint_before + told + frame.hint_after if told else ""
    out += frame.head + task.prompt + frame.tail
    env, spans, observation = DeskEnv(), [], None
    env.start(task)
    while not env.done():
        name, arguments = agent.step(observation)
        observation = env.apply(ToolCall(id="c", name=name, arguments=arguments)).content
        said = write_call(name, arguments) + frame.end
        if not agent.slipped:
            spans.append((len(out), len(out) + len(said)))
        out += said + (frame.before + observation + frame.after if not env.done() else "")
    return Trace(out, tuple(spans), len(rules) - len(rules if stated is None else stated), bool(told))


def traces(frame: Frame, seed: int, mix: Mix = MIXES[0]) -> Iterator[Trace]:
    """An endless, seeded stream of a mix."""
    rng = random.Random(seed)
    for task in tasks(mix, seed, rng):
        slots = list(guess(task.metadata["preset"], rng))
        stated = None if rng.random() > PARTIAL else rng.sample(slots, rng.randint(1, len(slots) - 1))
        epsilon = rng.choice((0.0, 0.05, 0.2))
        yield trace(frame, task, rng, stated=stated if rng.random() < HINTED else [], epsilon=epsilon)


def tasks(mix: Mix, seed: int, rng: random.Random) -> Iterator[Task]:
    """An endless stream of a mix's tasks, no two of one seed alike; ``rng`` says which and of what year."""
    suites = [DeskSuite(preset, families=(family,), n=n, rows=rows) for _, preset, family, n, rows in mix]
    for index in count(seed * 10_000_000):
        yield any_year(rng.choices(suites, [share for share, *_ in mix])[0].task("train", index), rng)


def any_year(task: Task, rng: random.Random) -> Task:
    """The task in any of the nine years: which years are held out is a matter of learning, not of reading digits."""
    meta: dict[str, Any] = {**task.metadata, "period": f"{task.metadata['period'][:3]}{rng.randint(1, 9)}"}
    return task.model_copy(update={"metadata": meta, "prompt": task.prompt.replace(task.metadata["period"],
                                                                                  meta["period"])})


def encode(tokenizer: Any, batch: list[Trace]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids int32[T] and loss mask bool[T] of each trace, in one call of the fast tokenizer."""
    rows = []
    encoded = tokenizer.backend_tokenizer.encode_batch([t.text for t in batch], add_special_tokens=False)
    for item, row in zip(batch, encoded, strict=True):
        chars = np.zeros(len(item.text), bool)
        for start, end in item.spans:
            chars[start:end] = True
        starts = np.array([start for start, _ in row.offsets])
        rows.append((np.array(row.ids, np.int32), chars[starts]))
    return rows
