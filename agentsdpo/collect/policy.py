"""Who acts: the Policy protocol, the context a policy sees, and the policy that speaks through an engine.

Tokens are the record. :class:`EnginePolicy` renders the opening once; every later prompt is the previous ids, the
sampled ids, and the template's tokens around what the environment answered. Nothing is ever rendered again.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from agentsdpo.chat import ChatFormat
from agentsdpo.collect.branch import BranchBuilder, ForkReason
from agentsdpo.collect.config import CollectConfig
from agentsdpo.collect.engine import Engine
from agentsdpo.collect.turns import read_turn
from agentsdpo.errors import AgentSdpoError, TruncatedSampling
from agentsdpo.types import Json, ModelTurn, TokenKind, ToolSpec


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
        fork_reason: why the history was replaced; read when the next prompt no longer extends the last.
        builder: branches so far; stays empty for scripted agents.
        prompt_tokens: sum of the lengths of all prompts sent.
    """

    episode_id: str
    seed: int
    messages: list[Json]
    turn: int = 0
    tokens_left: int | None = None
    prompt_left: int | None = None
    fork_reason: ForkReason = "template_rewrite"
    builder: BranchBuilder = field(default_factory=BranchBuilder)
    prompt_tokens: int = 0


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


class EnginePolicy:
    """Plays through an engine and records every token. Stateless between episodes; one may serve all of them.

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
        self._window = min(config.window, engine.context_window)

    async def act(self, ctx: Context, tools: tuple[ToolSpec, ...]) -> ModelTurn:
        """Extend the prompt, sample one completion, record it, parse it."""
        self._extend(ctx, tools)
        builder, room = ctx.builder, self._window - len(ctx.builder.ids)
        if room < 1:
            raise ContextOverflow(f"the prompt of turn {ctx.turn} has {len(builder.ids)} tokens, the window is "
                                  f"{self._window}", fix="enlarge collect.window or compact the context")
        if ctx.prompt_left is not None and len(builder.ids) > ctx.prompt_left:
            raise PromptBudget(f"the prompt of turn {ctx.turn} has {len(builder.ids)} tokens, the budget has "
                               f"{ctx.prompt_left} left", fix="raise the budget's prompt_tokens")
        limit = room if ctx.tokens_left is None else min(room, ctx.tokens_left)
        sampling = self.config.sampling(seed=mix(ctx.seed, "turn", ctx.turn), max_tokens=limit)
        ctx.prompt_tokens += len(builder.ids)
        completion = await self.engine.complete(builder.ids, sampling, session=self._session(ctx))
        opened = self.chat.decode(builder.ids[-3:]).rstrip().endswith("<think>")
        builder.completion(completion, sampling, turn=ctx.turn)
        text = ("<think>\n" if opened else "") + self.chat.strip_end(completion.token_ids)
        return read_turn(text, ctx.turn, completion)

    def release(self, ctx: Context) -> None:
        """The episode is over; the engine may reuse its cache."""
        self.engine.release(self._session(ctx))

    def _session(self, ctx: Context) -> str:
        return f"{ctx.episode_id}/{ctx.builder.branch_id}"

    def _extend(self, ctx: Context, tools: tuple[ToolSpec, ...]) -> None:
        """Append what happened since the last call; open a new branch when the history is not an extension."""
        builder, names = ctx.builder, tuple(tool.name for tool in tools)
        seen = len(builder.rendered)
        if not builder.ids:
            builder.context(self.chat.open(ctx.messages, tools), TokenKind.CONTEXT)
        elif builder.tools != names or ctx.messages[:seen] != builder.rendered:
            self.engine.release(self._session(ctx))
            builder.fork(self.chat.open(ctx.messages, tools),
                         "template_rewrite" if builder.tools != names else ctx.fork_reason)
        else:
            if builder.ids[-1] != self.chat.eos_id:
                builder.context([self.chat.eos_id], TokenKind.FORCED)
            news = ctx.messages[seen + 1:]  # the first unseen message is the agent's own turn: already tokens
            kind = TokenKind.TOOL if any(m["role"] == "tool" for m in news) else TokenKind.CONTEXT
            builder.context(self.chat.extend(news), kind)
        builder.rendered, builder.tools = list(ctx.messages), names
