"""Training text of long episodes: each is cut by compaction where a collector would cut it, one row a branch.

The shipped seed model has read no episode of more than four clients and none that was cut. These have up to 48; a
branch begins as the collector's ``notes`` manager begins one: system, task, one answer that lists all notes, and the
last turns. The agent notes each figure before it files it, so that it can tell later what is left to do. House rules
are redrawn for every episode, as in :mod:`agentsdpo.envs.desk.corpus`, so no rule can be learned here either.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from agentsdpo.benchmarks.horizon.study import CONFIG
from agentsdpo.calls import write_call
from agentsdpo.chat import ChatFormat
from agentsdpo.collect.compaction import NOTE_READ, NOTE_WRITE
from agentsdpo.envs.desk.agents import ScriptedAgent, guess
from agentsdpo.envs.desk.corpus import HINTED, PARTIAL, Frame, Trace, any_year
from agentsdpo.envs.desk.env import DeskEnv
from agentsdpo.envs.desk.firm import hint
from agentsdpo.envs.desk.suite import DeskSuite
from agentsdpo.types import Task, ToolCall

LIMIT, KEEP = CONFIG.compaction.compact_at * CONFIG.window, CONFIG.compaction.keep_turns
"""Tokens that a prompt may have; newest turns that stay at most."""
SHORT, LONG = (1, 2, 4), ((0.4, (8,)), (1 / 3, (16,)), (4 / 15, (32, 48)))
"""Clients of short episodes; share of long ones, clients."""
DRILLS, DRILLED = 0.5, 16
"""Share of episodes after which a :func:`drill` follows; reads of one."""
BRANCHES = 3
"""Of an episode with more branches the first, the last and one between them are kept: the others are like that one."""


@dataclass
class Cut:
    """The text of one episode as it grows, branch by branch."""

    frame: Frame
    chat: ChatFormat
    prompt: str
    hint: str
    unstated: int
    branches: list[Trace] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.opening = self.frame.head + self.prompt + self.frame.tail
        self.notes, self.listing = dict[str, str](), ""
        self.turns, self.spans = list[tuple[str, int]](), list[tuple[int, int]]()

    def add(self, call: ToolCall, answer: str | None, slipped: bool) -> None:
        """One turn; its tokens carry loss unless it was a slip. ``answer`` is None where the episode ends with it."""
        self._make_room()
        said = write_call(call.name, call.arguments) + self.frame.end
        start = len(self._text())
        self.end = start + len(said)
        if not slipped:
            self.spans.append((start, self.end))
        turn = said + (self.frame.before + answer + self.frame.after if answer is not None else "")
        self.turns.append((turn, len(self.chat.encode(turn))))
        if call.name == NOTE_WRITE and isinstance(call.arguments, dict):
            self.notes[call.arguments["key"]] = call.arguments["text"]

    def _text(self) -> str:
        return self.hint + self.opening + self.listing + "".join(turn for turn, _ in self.turns)

    def _fits(self, kept: list[tuple[str, int]]) -> bool:
        """Whether a prompt leaves enough room; the hint is the teacher's and takes none of the agent's."""
        least = len(self.chat.encode(self.opening + self.listing))
        return least + sum(size for _, size in kept) <= LIMIT

    def listed(self) -> str:
        """All notes, oldest first, as if the agent had just read them."""
        lines = "\n".join(f"{key} {text}" for key, text in self.notes.items())
        asked = write_call(NOTE_READ, {"key": ""}) + self.frame.end
        return asked + self.frame.before + lines + self.frame.after if lines else ""

    def _make_room(self) -> None:
        if self._fits(self.turns):
            return
        self.close()
        self.listing = self.listed()
        kept = range(min(KEEP, len(self.turns) - 1), 0, -1)
        self.turns = self.turns[-next((keep for keep in kept if self._fits(self.turns[-keep:])), 1):]

    def close(self) -> None:
        """The branch is complete; an answer that only the next one reads is no part of it."""
        self.branches.append(Trace(self._text()[:self.end], tuple(self.spans), 0 if self.branches else self.unstated,
                                   bool(self.hint)))
        self.spans = []


def cut_trace(chat: ChatFormat, frame: Frame, task: Task, rng: random.Random, *, stated: list[str] | None = None,
              epsilon: float = 0.0) -> list[Trace]:
    """The branches of one noisy-oracle episode under random rules; arguments as in :func:`corpus.trace`."""
    rules = guess(task.metadata["preset"], rng)
    agent = ScriptedAgent(task, rules, epsilon=epsilon, seed=rng.getrandbits(32), notes=True)
    words = hint(task.metadata["kinds"][0], rules, stated)
    env, observation = DeskEnv(), None
    env.start(task)
    cut = Cut(frame, chat, task.prompt, frame.hint_before + words + frame.hint_after if words else "",
              len(rules) - len(rules if stated is None else stated))
    while not env.done():
        name, arguments = agent.step(observation)
        call = ToolCall(id="c", name=name, arguments=arguments)
        observation = env.apply(call).content
        cut.add(call, None if env.done() else observation, agent.slipped)
    cut.close()
    return cut.branches


def drill(chat: ChatFormat, frame: Frame, task: Task, rng: random.Random, reading: float = 0.5) -> Trace:
    """Who is next? Asked to read or to list instead of to report, the agent goes on where its notes end.

    In an episode that question comes once in 150 tokens, and in a first branch a model can answer it by counting turns,
    which a cut undoes: 1.7 nats a token were left there after 1,200 steps without drills.

    Args:
        chat: of the model. frame: of the template. task: of whom.
        rng: of the hint, the place, and all else.
        reading: chance that it is asked to read; a list says the same in a tenth of the tokens.
    """
    clients, env, source = task.metadata["clients"], DeskEnv(), guess(task.metadata["preset"], rng)["source"]
    told, reads, place = rng.random() < HINTED, rng.random() < reading, rng.randrange(len(clients))
    words = hint(task.metadata["kinds"][0], {"source": source}, None if told else [])
    env.start(task)
    cut = Cut(frame, chat, task.prompt.replace("Report", "Read" if reads else "List", 1),
              frame.hint_before + words + frame.hint_after if words else "", int(reads and not told))
    cut.notes = {client: str(rng.randrange(100, 1000)) for client in clients[:place]}
    cut.listing = cut.listed()
    left = clients[place:]
    asked = ([("file_read", {"path": f"{source}/{client}"}) for client in left[:DRILLED]] if reads
             else [(NOTE_WRITE, {"key": "left", "text": " ".join(left)})])
    for name, arguments in asked:
        call = ToolCall(id="c", name=name, arguments=arguments)
        cut.add(call, env.apply(call).content, slipped=False)
    cut.close()
    return cut.branches[0]


def drills(chat: ChatFormat, seed: int, lengths: tuple[int, ...], reading: float) -> Iterator[Trace]:
    """An endless, seeded stream of drills, for tasks of so many clients."""
    rng, frame, index = random.Random(seed), Frame(chat), 0
    suites = [DeskSuite(n=(n,)) for n in lengths]
    while True:
        task = any_year(rng.choice(suites).task("train", seed * 10_000_000 + index), rng)
        yield drill(chat, frame, task, rng, reading)
        index += 1


def cut_traces(chat: ChatFormat, seed: int, short: float = 0.25) -> Iterator[Trace]:
    """An endless, seeded stream of branches, and of drills after some; ``short`` is the share of short episodes.

    Long ones hardly teach to read a hint: after the first client its rules stand in the history.
    """
    rng, index, frame = random.Random(seed), 0, Frame(chat)
    suites = [DeskSuite(n=n) for n in (SHORT, *(n for _, n in LONG))]
    shares = [short, *((1 - short) * share for share, _ in LONG)]
    while True:
        suite = rng.choices(suites, shares)[0]
        task = any_year(suite.task("train", seed * 10_000_000 + index), rng)
        slots = list(guess(suite.preset, rng))
        stated = None if rng.random() > PARTIAL else rng.sample(slots, rng.randint(1, len(slots) - 1))
        branches = cut_trace(chat, frame, task, rng, stated=stated if rng.random() < HINTED else [],
                             epsilon=rng.choice((0.0, 0.05, 0.2)))
        if len(branches) > BRANCHES:
            branches = [branches[0], rng.choice(branches[1:-1]), branches[-1]]
        yield from branches
        if rng.random() < DRILLS:
            yield drill(chat, frame, task, rng)
        index += 1


def tell(frame: Frame, task: Task, rng: random.Random) -> Trace:
    """Whom does the hint want told? Asked to tell instead of to report, the agent does that and no more."""
    kind, rules = task.metadata["kinds"][0], guess(task.metadata["preset"], rng)
    opening = (frame.hint_before + hint(kind, rules) + frame.hint_after + frame.head
               + task.prompt.replace("Report", "Tell", 1) + frame.tail)
    call = ToolCall(id="c", name="mail_send", arguments={"to": rules["notify"], "text": f"{kind} filed"})
    said = write_call(call.name, call.arguments) + frame.end
    return Trace(opening + said, ((len(opening), len(opening + said)),), 0, True)


def recalled(chat: ChatFormat, seed: int) -> Iterator[Trace]:
    """An endless, seeded stream of :func:`cut_traces`, four times :func:`tell` after each."""
    rng, frame, suite, index = random.Random(seed), Frame(chat), DeskSuite(n=SHORT), 0
    for branch in cut_traces(chat, seed):
        yield branch
        for _ in range(4):
            yield tell(frame, any_year(suite.task("train", seed * 10_000_000 + index), rng), rng)
            index += 1
