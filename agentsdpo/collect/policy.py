"""Who acts: the Policy protocol, the context a policy sees, and the policy that speaks through an engine.

Tokens are the record. :class:`EnginePolicy` renders the opening once; every later prompt is the previous ids, the
sampled ids, and the template's tokens around what the environment answered. Nothing is ever rendered again.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple, Protocol, runtime_checkable

from agentsdpo.chat import ChatFormat
from agentsdpo.collect.branch import BranchBuilder, ForkReason
from agentsdpo.collect.config import CollectConfig
from agentsdpo.collect.engine import Engine
from agentsdpo.collect.turns import OPEN_CALL, read_turn, visible
from agentsdpo.errors import AgentSdpoError, TruncatedSampling
from agentsdpo.types import Completion, Json, ModelTurn, Sampling, TokenKind, ToolSpec, Usage


def mix(*parts: int | str) -> int:
    """A seed in [0, 2**63) from any parts, the same on every machine.

    >>> mix(0, "val", 3) == mix(0, "val", 3) != mix(0, "val", 4)
    True
    """
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@dataclass
class Context:
    """What a policy may see of the running episode, and where it leaves its tokens.

    Attributes:
        episode_id: unique; engines key their caches by it.
        seed: of the episode; token policies derive one seed per turn from it.
        messages: opening, turns and answers so far, OpenAI shape. May be replaced to compact the history.
        turn: index of the turn to be taken, from 0.
        tokens_left: tokens the budget still allows to sample, None when unlimited.
        prompt_left: prompt tokens the budget still allows, None when unlimited.
        fork_reason: set by whoever replaced the history: the next prompt opens a new branch, for this reason.
        builder: branches so far; stays empty for scripted agents.
        prepared: the next prompt, where it was measured before it is sent.
    """

    episode_id: str
    seed: int
    messages: list[Json]
    turn: int = 0
    tokens_left: int | None = None
    prompt_left: int | None = None
    fork_reason: ForkReason | None = None
    builder: BranchBuilder = field(default_factory=BranchBuilder)
    prepared: "Prepared | None" = None


class Prompt(NamedTuple):
    """The next prompt, not recorded yet: all its ids, what it appends to the open branch, or why it opens another."""

    ids: list[int]
    parts: tuple[tuple[list[int], TokenKind], ...]
    fork: ForkReason | None = None


class Prepared(NamedTuple):
    """A prompt and what it was made of, to notice that something was said since."""

    prompt: Prompt
    messages: int
    newest: Json
    tools: tuple[str, ...]
    fork: ForkReason | None


class Summary(NamedTuple):
    """What a policy wrote of its own history; ``accepted`` only if it may stand for what it summarises."""

    text: str
    accepted: bool
    usage: Usage


class ContextOverflow(AgentSdpoError, ValueError):
    """The next prompt and one token would not fit into the engine's window; ends the episode, scored."""


class PromptBudget(AgentSdpoError, ValueError):
    """The next prompt would exceed the episode's budget of prompt tokens; ends the episode, scored."""


class Policy(Protocol):
    """Takes one turn at a time. Scripted agents return no completion; token policies fill ``ctx.builder``."""

    async def act(self, ctx: Context, tools: tuple[ToolSpec, ...]) -> ModelTurn:
        """The next turn.

        Raises:
            EngineError: the engine broke; the episode ends unscored.
            ContextOverflow: the prompt does not fit.
        """
        ...


@runtime_checkable
class Releases(Protocol):
    """A policy that holds something for an episode until told that it is over."""

    def release(self, ctx: Context) -> None:
        """The episode of this context is over."""
        ...


@runtime_checkable
class Remembers(Protocol):
    """A policy with a memory of its own, which has to be told of turns it took before a restart."""

    async def recall(self, ctx: Context, tools: tuple[ToolSpec, ...], turn: ModelTurn) -> None:
        """It took this turn when the context was like this."""
        ...


@runtime_checkable
class Windowed(Protocol):
    """A policy that sees only so much: its history can be compacted."""

    @property
    def window(self) -> int:
        """Longest prompt plus completion, tokens."""
        ...

    def prompt_size(self, ctx: Context, tools: tuple[ToolSpec, ...]) -> int:
        """Tokens of the prompt that the next turn would send."""
        ...


@runtime_checkable
class Summarises(Protocol):
    """A policy that can write a summary of its own history."""

    async def summarise(self, ctx: Context, tools: tuple[ToolSpec, ...], request: str, *, max_tokens: int,
                        accept: Callable[[str], bool]) -> Summary:
        """Ask for a summary at the end of the present history; its tokens are recorded, and train if accepted."""
        ...


class EnginePolicy:
    """Plays through an engine and records every token. Stateless between episodes; one may serve all of them.

    Nothing is recorded before the engine has answered, so that a call that was cut off can be made again.

    Args:
        engine: samples completions.
        chat: the model's chat template as tokens.
        config: sampling and window.
        training: whether the episodes may be trained on.

    Raises:
        TruncatedSampling: training with top-p or top-k on an engine that does not record the kept set.
    """

    def __init__(self, engine: Engine, chat: ChatFormat, config: CollectConfig, *, training: bool = True) -> None:
        self.engine, self.chat, self.config = engine, chat, config
        if training and config.sampling(seed=0, max_tokens=1).truncated and not engine.records_kept:
            raise TruncatedSampling(
                f"engine {engine.name} samples with top_p={config.top_p}, top_k={config.top_k} and records no kept set",
                fix="collect with top_p 1 and top_k 0, or use an engine that returns the sampling mask")

    @property
    def window(self) -> int:
        """Longest prompt plus completion, tokens: the smaller of the setting and the engine's."""
        return min(self.config.window, self.engine.context_window)

    async def act(self, ctx: Context, tools: tuple[ToolSpec, ...]) -> ModelTurn:
        """Extend the prompt, sample one completion, record both, parse it."""
        prompt = self._next(ctx, tools)
        size, room = len(prompt.ids), self.window - len(prompt.ids)
        if room < 1:
            raise ContextOverflow(f"the prompt of turn {ctx.turn} has {size} tokens, the window is "
                                  f"{self.window}", fix="enlarge collect.window or compact the context")
        if ctx.prompt_left is not None and size > ctx.prompt_left:
            raise PromptBudget(f"the prompt of turn {ctx.turn} has {size} tokens, the budget has "
                               f"{ctx.prompt_left} left", fix="raise the budget's prompt_tokens")
        limit = room if ctx.tokens_left is None else min(room, ctx.tokens_left)
        sampling = self.config.sampling(seed=mix(ctx.seed, "turn", ctx.turn), max_tokens=limit)
        asked = datetime.now(UTC)
        completion = await self._complete(ctx, prompt, sampling)
        self._record(ctx, prompt)
        ctx.builder.completion(completion, sampling, turn=ctx.turn, asked=asked)
        ctx.builder.rendered, ctx.builder.tools = list(ctx.messages), _names(tools)
        opened = self.chat.decode(prompt.ids[-3:]).rstrip().endswith("<think>")
        text = ("<think>\n" if opened else "") + self.chat.strip_end(completion.token_ids)
        heard = read_turn(text, ctx.turn, completion, form=self.chat.calls, tools=tools)
        return heard.model_copy(update={"usage": _usage(prompt, completion)})

    async def summarise(self, ctx: Context, tools: tuple[ToolSpec, ...], request: str, *, max_tokens: int,
                        accept: Callable[[str], bool]) -> Summary:
        """Sample a summary at the end of the open branch; see :class:`Summarises`.

        It is accepted when it ended by itself, calls no tool, says something, and ``accept`` likes it; otherwise its
        tokens are recorded without loss. Without room for a request nothing is sampled.
        """
        prompt = self._next(ctx, tools, ({"role": "user", "content": request},))
        room = min(self.window - len(prompt.ids), max_tokens)
        if room < 1 or prompt.fork is not None:
            return Summary("", False, Usage())
        sampling = self.config.sampling(seed=mix(ctx.seed, "summary", ctx.turn), max_tokens=room)
        asked = datetime.now(UTC)
        completion = await self._complete(ctx, prompt, sampling)
        text = visible(self.chat.strip_end(completion.token_ids))
        called = OPEN_CALL in text or self.chat.calls.find(text)
        fine = bool(completion.finish_reason == "stop" and text and not called and accept(text))
        self._record(ctx, prompt)
        ctx.builder.completion(completion, sampling, turn=ctx.turn, masked=not fine, summary=True, asked=asked)
        return Summary(text, fine, _usage(prompt, completion))

    def prompt_size(self, ctx: Context, tools: tuple[ToolSpec, ...]) -> int:
        """Tokens of the next prompt; it is kept until it is sent."""
        prompt = self._next(ctx, tools)
        ctx.prepared = Prepared(prompt, len(ctx.messages), ctx.messages[-1], _names(tools), ctx.fork_reason)
        return len(prompt.ids)

    def release(self, ctx: Context) -> None:
        """The episode is over; the engine may reuse its cache."""
        self.engine.release(f"{ctx.episode_id}/{ctx.builder.branch_id}")

    async def _complete(self, ctx: Context, prompt: Prompt, sampling: Sampling) -> Completion:
        """One call in the session of the branch that the prompt belongs to."""
        branch = ctx.builder.branch_id
        if prompt.fork is not None:
            self.engine.release(f"{ctx.episode_id}/{branch}")
            branch += 1
        session = f"{ctx.episode_id}/{branch}"
        try:
            return await self.engine.complete(prompt.ids, sampling, session=session)
        except BaseException:
            if prompt.fork is not None:  # nothing was recorded, so nobody else will release it
                self.engine.release(session)
            raise

    def _record(self, ctx: Context, prompt: Prompt) -> None:
        """The prompt was sent: put what is new of it into the branches."""
        ctx.prepared = None
        if prompt.fork is not None:
            ctx.builder.fork(prompt.ids, prompt.fork)
        for ids, kind in prompt.parts:
            ctx.builder.context(ids, kind)

    def _next(self, ctx: Context, tools: tuple[ToolSpec, ...], more: Sequence[Json] = ()) -> Prompt:
        """The prompt after what happened since the last call, which opens a new branch when the history is not an
        extension; ``more`` are messages put after it."""
        builder, ready = ctx.builder, ctx.prepared
        if ready and not more and ready.messages == len(ctx.messages) and ready.newest is ctx.messages[-1] \
                and (ready.tools, ready.fork) == (_names(tools), ctx.fork_reason):
            return ready.prompt
        seen = len(builder.rendered)
        if not builder.ids:
            ids = self.chat.open([*ctx.messages, *more], tools)
            return Prompt(ids, ((ids, TokenKind.CONTEXT),))
        rewritten = builder.tools != _names(tools) or ctx.messages[:seen] != builder.rendered
        if ctx.fork_reason or rewritten:
            return Prompt(self.chat.open([*ctx.messages, *more], tools), (), ctx.fork_reason or "template_rewrite")
        # The first unseen message is the agent's own turn, already there as tokens.
        news = [*ctx.messages[seen + 1:], *more]
        kind = TokenKind.TOOL if any(m["role"] == "tool" for m in news) else TokenKind.CONTEXT
        added = self.chat.extend(news)
        closed = () if builder.ids[-1] == self.chat.eos_id else (([self.chat.eos_id], TokenKind.FORCED),)
        parts = (*closed, (added, kind))
        return Prompt([*builder.ids, *(token for ids, _ in parts for token in ids)], parts)


def _names(tools: tuple[ToolSpec, ...]) -> tuple[str, ...]:
    return tuple(tool.name for tool in tools)


def _usage(prompt: Prompt, completion: Completion) -> Usage:
    return Usage(prompt_tokens=len(prompt.ids), completion_tokens=len(completion.token_ids),
                 finish_reason=completion.finish_reason, working_s=completion.working_s)
