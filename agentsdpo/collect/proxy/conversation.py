"""One conversation: where a request goes on, what its prompt is in tokens, and the journal that holds the answer
before anybody else does."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from agentsdpo.chat import ChatFormat
from agentsdpo.collect.branch import ForkReason
from agentsdpo.collect.proxy.feedback import item, said_next
from agentsdpo.collect.proxy.history import after, fork_reason, rewritten, shared
from agentsdpo.collect.proxy.line import Line, Sampled
from agentsdpo.replay.journal import Growth, Journal
from agentsdpo.types import Branch, Json, Sampling, TokenKind, ToolSpec


def edited(line: Line, messages: Sequence[Json]) -> list[Json]:
    """The item of an answer that came back with other words; [] when none did."""
    at = rewritten(line.messages, messages)
    if at is None or at not in line.turns:
        return []
    words = messages[at]["content"]
    same = words.strip() == line.messages[at]["content"].strip()  # its calls alone are others
    return [] if same else [item("edit", words, turn=line.turns[at])]


def _fork(parent: Line | None, ids: Sequence[int], reason: ForkReason) -> Json:
    """Where and why a prompt leaves another branch; {} where there is none."""
    return {} if parent is None else {"parent_branch_id": parent.branch_id, "fork_at": parent.common(ids),
                                      "fork_reason": reason}


@dataclass(frozen=True)
class Point:
    """A place in a branch that a request may go on from: the start of a call, or the end of one."""

    line: Line
    at: int
    answered: bool


@dataclass(frozen=True)
class Late:
    """What a request says about an answer of a conversation that had ended before it.

    Attributes:
        digest: of the history up to that answer. name, attempt: of its conversation. items: what is said.
    """

    digest: bytes
    name: str
    attempt: int
    items: list[Json]


@dataclass
class Prompt:
    """One call that is about to be made; nothing of it is in the branch before :meth:`Conversation.record`.

    Attributes:
        conversation: which. line: branch that it goes on in; None where it opens one.
        fork: of a new branch. ids: the whole prompt.
        parts: what is new at the end of ``line``, or the whole prompt of a new branch, by kind.
        messages: of the request; None where it sent text or ids. chain: their digests. tools: of the request.
        text: of the prompt, where it was text. turn: number of this call in the conversation.
        feedback: what the request says about answers before it. late: the same of an earlier conversation. asked: when.
    """

    conversation: "Conversation"
    line: Line | None
    fork: Json
    ids: list[int]
    parts: list[tuple[Sequence[int], TokenKind]]
    messages: list[Json] | None
    chain: list[bytes]
    tools: tuple[ToolSpec, ...] = ()
    text: str | None = None
    turn: int = 0
    feedback: list[Json] = field(default_factory=list)
    late: Late | None = None
    asked: datetime = field(default_factory=lambda: datetime.now(UTC))


@dataclass
class Conversation:
    """All branches of one conversation, from its first request to its end.

    Attributes:
        name: as the client knows it. episode_id, attempt: as the store will.
        journal: open from the first answer on.
        about: fields of the episode that do not change.
        feedback: what was said about its answers so far.
        faults: calls that got no answer, by what went wrong.
        used: clock of the last request. flying: requests under way.
        broken: its journal failed; it must end before it can go on. ending: it is being written to the store.
    """

    name: str
    episode_id: str
    attempt: int
    chat: ChatFormat
    about: Json
    journal: Journal | None = None
    lines: list[Line] = field(default_factory=list)
    points: dict[bytes, Point] = field(default_factory=dict)
    messages: list[Json] = field(default_factory=list)
    tools: tuple[ToolSpec, ...] = ()
    feedback: list[Json] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=dict)
    used: float = field(default_factory=time.monotonic)
    flying: int = 0
    broken: bool = False
    ending: bool = False
    turns: int = 0
    last: Line | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    # ------------------------------------------------------------------------------------------------- finding

    def find(self, chain: Sequence[bytes], messages: Sequence[Json]) -> tuple[Point, int] | None:
        """The longest recorded history that these messages begin with, and how many of them it is."""
        for n in range(len(messages), 0, -1):
            point = self.points.get(chain[n])
            if point is None or point.line.ended:
                continue
            news = messages[n:]
            if not news and not point.answered:
                return point, n
            if news and point.answered and all(message["role"] != "assistant" for message in news):
                return point, n
        return None

    # -------------------------------------------------------------------------------------------------- prompts

    def chat_prompt(self, messages: list[Json], tools: tuple[ToolSpec, ...], chain: list[bytes]) -> Prompt:
        """The prompt of a chat request: recorded tokens and what is new, or rendered from nothing where the history is
        new or was rewritten."""
        found = self.find(chain, messages)
        if found is None:
            ids = self.chat.open(messages, tools)
            prompt = self._whole(ids, self._why(messages, tools, chain), messages, tools, chain)
            prompt.feedback = edited(self.last, messages) if self.last else []
            return prompt
        point, n = found
        feedback = said_next(point.line.turns.get(n - 1), messages[n:])
        parts = self._news(point, messages[n:]) if point.answered else []
        new = [token for ids, _ in parts for token in ids]
        base = point.line.ids[:point.at]
        if point.answered and point.at == len(point.line.ids) and not point.line.busy:
            return Prompt(self, point.line, {}, base + new, parts, messages, chain, tools, feedback=feedback)
        prompt = self._whole(base + new, "retry", messages, tools, chain, parent=point.line)
        prompt.feedback = feedback
        return prompt

    def _news(self, point: Point, news: Sequence[Json]) -> list[tuple[Sequence[int], TokenKind]]:
        """Template tokens between the recorded answer and the next one."""
        kind = TokenKind.TOOL if any(message["role"] == "tool" for message in news) else TokenKind.CONTEXT
        closed = point.line.ids[point.at - 1] == self.chat.eos_id
        end: list[tuple[Sequence[int], TokenKind]] = [] if closed else [([self.chat.eos_id], TokenKind.FORCED)]
        return [*end, (self.chat.extend(news), kind)]

    def _why(self, messages: Sequence[Json], tools: Sequence[ToolSpec], chain: Sequence[bytes]) -> ForkReason:
        if self.last is None:
            return "template_rewrite"
        if self.last.ended and shared(self.last.messages, messages) == len(self.last.messages):
            return "retokenised"
        return fork_reason(self.last.messages, messages, same_tools=self.last.tools == chain[0])

    def _whole(self, ids: list[int], reason: ForkReason, messages: list[Json] | None, tools: tuple[ToolSpec, ...],
               chain: list[bytes], *, parent: Line | None = None, text: str | None = None) -> Prompt:
        """A prompt that opens a branch, all of it context."""
        fork = _fork(parent or self.last, ids, reason)
        return Prompt(self, None, fork, ids, [(ids, TokenKind.CONTEXT)], messages, chain, tools, text)

    def text_prompt(self, prompt: str | list[int]) -> Prompt:
        """The prompt of a completions request, text or ids: an extension of a branch where it begins with that."""
        line = self.begun(prompt)
        if line is None:
            ids = self.chat.encode(prompt) if isinstance(prompt, str) else list(prompt)
            rewritten = isinstance(prompt, str) and self.last is not None and self.last.text is not None
            return self._whole(ids, "retokenised" if rewritten else "template_rewrite", None, (), [],
                               text=prompt if isinstance(prompt, str) else self.chat.decode(ids))
        held = line.text or ""
        new = self.chat.encode(prompt[len(held):]) if isinstance(prompt, str) else list(prompt[len(line.ids):])
        text = prompt if isinstance(prompt, str) else self.chat.decode(prompt)
        return Prompt(self, line, {}, line.ids + new, [(new, TokenKind.CONTEXT)], None, [], text=text)

    def begun(self, prompt: str | list[int]) -> Line | None:
        """The branch that a text or ids go on from."""
        for line in reversed(self.lines):
            if line.text is None or line.busy or line.ended:
                continue
            held = line.text if isinstance(prompt, str) else line.ids
            if len(prompt) > len(held) and prompt[:len(held)] == held:
                return line
        return None

    # ------------------------------------------------------------------------------------------------ recording

    def record(self, prompt: Prompt, sampled: Sampled, sampling: Sampling, answer: Json | None) -> Growth:
        """Put prompt and answer into the branch; returns what the journal must hold before the answer goes out.

        Args:
            prompt: as :meth:`chat_prompt` or :meth:`text_prompt` made it.
            sampled: the engine's answer. sampling: how it was drawn.
            answer: the message that the client will be told; None where it gets text.
        """
        line = prompt.line
        if line is None:
            line = Line(len(self.lines), prompt.fork or self._late_fork(prompt))
            self.lines.append(line)
        for ids, kind in prompt.parts:
            line.context(ids, kind)
        start = len(line.ids)
        line.sampled(sampled, sampling, call_id=f"b{line.branch_id}t{prompt.turn}", turn=prompt.turn,
                     asked=prompt.asked)
        line.ended = not sampled.completion.token_ids and bool(sampled.text)
        if prompt.messages is not None and answer is not None:
            self._remember(line, prompt, answer, start)
        elif prompt.text is not None:
            line.text = prompt.text + self.chat.decode(sampled.completion.token_ids)
        self.last = line
        return line.grown()

    def _late_fork(self, prompt: Prompt) -> Json:
        """Where a branch leaves another that was not there yet when it was asked for; {} for the first."""
        messages = prompt.messages
        reason = "template_rewrite" if messages is None else self._why(messages, prompt.tools, prompt.chain)
        return _fork(self.last, prompt.ids, reason)

    def _remember(self, line: Line, prompt: Prompt, answer: Json, start: int) -> None:
        """Where later requests may go on."""
        assert prompt.messages is not None
        line.turns[len(prompt.messages)] = prompt.turn
        line.messages, line.tools = [*prompt.messages, answer], prompt.chain[0]
        self.messages, self.tools = line.messages, prompt.tools
        self.points[prompt.chain[-1]] = Point(line, start, answered=False)
        self.points[after(prompt.chain[-1], answer)] = Point(line, len(line.ids), answered=True)

    def ends(self) -> list[tuple[bytes, int]]:
        """The last answer of each branch, as the digest of the history up to it, and its turn."""
        return [(digest, point.line.turns[max(point.line.turns)]) for digest, point in self.points.items()
                if point.answered and point.at == len(point.line.ids)]

    def branches(self) -> tuple[Branch, ...]:
        """All branches as they stand."""
        return tuple(line.branch() for line in self.lines)
