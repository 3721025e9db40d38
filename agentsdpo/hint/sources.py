"""Where hints come from. Each source reads one episode and says what it knows about it, or nothing.

Rationales of a grader are for the audit and never become part of a hint.
"""

from collections.abc import Iterator
from typing import Protocol

from agentsdpo.calls import call_line
from agentsdpo.collect.turns import failed
from agentsdpo.errors import ConfigError
from agentsdpo.hint.config import HintConfig
from agentsdpo.types import Episode, Hint, Suite, Task

FAILED, GOLD, DEMO = "These calls failed, avoid them:", "The right answer:", "An expert did this task like this:"
SOLVED, SIMILAR = "A colleague solved this task like this:", "A colleague solved a similar task like this:"
MISSED = "Another attempt at this task succeeded. What it did and you did not:"
VAIN = "What you did and a successful attempt did not:"
QUOTING = (FAILED, GOLD, DEMO, SOLVED, SIMILAR, MISSED, VAIN)
"""Headings of hints, or of parts of them, that quote calls and answers."""
JOINT = "\n\n"
"""Between what several sources say in one hint."""


class Source(Protocol):
    """Writes hints."""

    def see(self, episode: Episode) -> None:
        """An episode exists; sources that learn from others remember it."""
        ...

    async def write(self, episode: Episode) -> Hint | None:
        """The hint of one episode that may be trained on; None when there is nothing to say."""
        ...

    async def close(self) -> None:
        """Let go of what belongs to this event loop."""
        ...


class Alone:
    """A source that goes by nothing but the episode."""

    def see(self, episode: Episode) -> None:
        """Nothing is remembered."""

    async def close(self) -> None:
        """Nothing is held."""


class Criteria(Alone):
    """The grader's own words on this attempt; level and scope were the grader's when it wrote them.

    Args:
        author: the grader's name or the judge's model id.

    >>> import asyncio
    >>> from agentsdpo.types import Grade, StopReason
    >>> episode = Episode(episode_id="e", task_id="t", env_id="desk", branches=(), stop_reason=StopReason.COMPLETED,
    ...                   grade=Grade.of([], feedback="For tax work: unit k_usd."))
    >>> asyncio.run(Criteria("desk grader").write(episode)).text
    'For tax work: unit k_usd.'
    """

    def __init__(self, author: str) -> None:
        self.author = author

    async def write(self, episode: Episode) -> Hint | None:
        """The feedback of the grade."""
        text = episode.grade.feedback.strip() if episode.grade else ""
        return Hint(text=text, source="criteria", author=self.author) if text else None


class Feedback(Alone):
    """What the environment itself complained about: each different error a tool answered with, and the call it met.

    What counts as an error: :func:`agentsdpo.collect.turns.failed`.
    """

    def __init__(self, config: HintConfig) -> None:
        self.config = config

    async def write(self, episode: Episode) -> Hint | None:
        """The errors, oldest first, as far as they fit."""
        lines = [f"- {said} answered: {answer}" for said, answer in calls_of(episode) if failed(answer)]
        if not lines:
            return None
        text = fitted([FAILED, *dict.fromkeys(lines)], self.config.max_chars)
        return Hint(text=text, source="feedback", author=episode.env_id) if text else None


class Expert(Alone):
    """What an expert knows about the task, whatever came of the attempt: the right answer, or a demonstration.

    Args:
        suite: has ``gold(task)`` or ``demo(task)``, which return a text; "" when there is none.
        kind: ``gold`` or ``demo``.
        config: the longest text.
    """

    def __init__(self, suite: Suite, kind: str, config: HintConfig) -> None:
        self.suite, self.kind, self.config = suite, kind, config

    async def write(self, episode: Episode) -> Hint | None:
        """Answer-bearing by definition; None when the episode does not say which task of the suite it is of."""
        task = task_of(episode, self.suite)
        text = getattr(self.suite, self.kind)(task).strip() if task else ""
        if not text:
            return None
        head = GOLD if self.kind == "gold" else DEMO
        text = fitted([head, *text.splitlines()], self.config.max_chars)
        return Hint(text=text, source="gold" if self.kind == "gold" else "demo", author=f"{self.suite.name} expert",
                    answer_bearing=True) if text else None


def task_of(episode: Episode, suite: Suite) -> Task | None:
    """The task of a suite that an episode is of; None when it does not say, or the suite has another task there."""
    split, index = episode.metadata.get("split"), episode.metadata.get("index")
    if not isinstance(split, str) or not isinstance(index, int):
        return None
    try:
        task = suite.task(split, index)
    except ConfigError:  # the suite has no such split: the episode is of another one
        return None
    return task if task.task_id == episode.task_id else None


def calls_of(episode: Episode) -> Iterator[tuple[str, str]]:
    """Every tool call of an episode as text, with the answer it got."""
    said: dict[str, str] = {}
    for message in episode.messages:
        for call in message.get("tool_calls") or ():
            said[call["id"]] = call_line(**call["function"])
        if message["role"] == "tool":
            yield said.get(message.get("tool_call_id", ""), "a call"), str(message["content"])


def fitted(lines: list[str], limit: int) -> str:
    """Whole lines under a heading, as many as ``limit`` characters hold; what is left out is said.

    Of a first line that is too long by itself the beginning is kept; "" where not even that has room, since a heading
    alone says nothing.

    >>> fitted(["one:", "two", "three hundred"], 14)
    'one:\\ntwo\\n[...]'
    >>> fitted(["one:", "three hundred"], 16), fitted(["one:", "three hundred"], 10)
    ('one:\\nthree [...]', '')
    """
    text = "\n".join(lines)
    while len(text) > limit and len(lines) > 2:
        lines = lines[:-1]
        text = "\n".join([*lines, "[...]"])
    if len(text) <= limit:
        return text
    heading, first = lines[:2]
    room = limit - len(f"{heading}\n[...]")
    return f"{heading}\n{first[:room]}[...]" if room > 0 else ""
