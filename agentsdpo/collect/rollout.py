"""The loop between one agent and one environment. The only loop: scripted agents and models go through it alike.

A bad turn is data: malformed, unknown and surplus calls are answered like any other, every call id exactly once and
in order. A broken machine is not: whatever environment, engine or template raise ends this episode unscored and no
other one. Only what would break every episode alike (:data:`MISUSE`) is raised.
"""

import asyncio
import time
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from agentsdpo.collect.policy import Context, ContextOverflow, Policy, PromptBudget, Releases
from agentsdpo.collect.turns import OPEN_CALL, check_call, printable, read_turn, refusal, unique_ids, visible
from agentsdpo.errors import (
    ConfigError,
    EnvError,
    ModelError,
    RowError,
    TokenizerMismatch,
    TrainForbidden,
    TruncatedSampling,
)
from agentsdpo.replay.journal import Journal, JournalError
from agentsdpo.types import (
    Branch,
    Budget,
    Env,
    Json,
    ModelTurn,
    Outcome,
    StopReason,
    Task,
    ToolCall,
    ToolResult,
    ToolSpec,
)

T = TypeVar("T")
MAX_UNUSABLE = 3
"""Turns in a row without anything usable after which an episode ends with ``parse_error``."""
MISUSE = (ConfigError, ModelError, TokenizerMismatch, TrainForbidden, TruncatedSampling, JournalError)
"""Faults of the set-up or the disk, not of one episode: they are raised as they are."""
NUDGE = "That turn held neither a tool call nor an answer. Call a tool, or answer in plain text."


@dataclass
class Rollout:
    """What one episode left behind, before grading.

    Attributes:
        stop_reason: why it ended. error: the fault's text when it is ``engine_error``.
        branches: tokens, empty for scripted agents.
        messages: the whole conversation, OpenAI shape.
        outcome: what the grader may see, None when unscored.
        answer: the final text answer, None when there was none.
        counts: totals for the metrics: turns, calls, valid_calls, mutating_calls, mutating_ok, repeats, truncated,
            completion_tokens, prompt_tokens.
        wall_s: seconds from reset to the end.
        tools: what the agent could call; () when the environment never began.
    """

    stop_reason: StopReason
    branches: tuple[Branch, ...]
    messages: tuple[Json, ...]
    outcome: Outcome | None
    answer: str | None
    counts: dict[str, int]
    wall_s: float
    error: str = ""
    tools: tuple[ToolSpec, ...] = ()

    @classmethod
    def never_began(cls, error: str) -> "Rollout":
        """An episode whose environment or policy could not even be made."""
        return cls(StopReason.ENGINE_ERROR, (), (), None, None, _counts(), 0.0, error)


def _counts() -> dict[str, int]:
    return dict.fromkeys(("turns", "calls", "valid_calls", "mutating_calls", "mutating_ok", "repeats", "truncated",
                          "completion_tokens", "prompt_tokens"), 0)


@dataclass
class _Run:
    """The running episode: context, counters, budget."""

    env: Env
    ctx: Context
    budget: Budget
    began: float
    tools: dict[str, ToolSpec]
    counts: dict[str, int] = field(default_factory=_counts)
    ids: set[str] = field(default_factory=set)
    unusable: int = 0
    answer: str | None = None
    last: tuple[str, Any] | None = None
    journal: Journal | None = None

    def record(self) -> None:
        """Have what happened since the last time on disk before anything else happens."""
        if self.journal is not None:
            self.journal.step(self.ctx.builder.grown(), self.ctx.messages)

    def left_s(self) -> float | None:
        """Seconds of wall time left, None when unlimited."""
        return None if self.budget.wall_s is None else self.budget.wall_s - (time.monotonic() - self.began)

    def left(self, limit: str, used: str) -> int | None:
        """What is left of a counted budget, None when unlimited."""
        value = getattr(self.budget, limit)
        return None if value is None else max(0, value - self.counts[used])


async def run_episode(env: Env, policy: Policy, task: Task, *, seed: int, episode_id: str,
                      budget: Budget | None = None, journal: Journal | None = None) -> Rollout:
    """Play one episode to its end.

    Args:
        env: a fresh environment; this episode is its only one.
        policy: takes the turns.
        task: what to do; its rubric is not touched here.
        seed: of the environment and of sampling.
        episode_id: unique in the run.
        budget: limits; None takes the task's.
        journal: where each call and each turn's tool results are written before the episode goes on.

    Returns:
        What happened, with ``outcome`` None when environment, engine or template broke.

    Raises:
        ConfigError, ModelError, TokenizerMismatch, TrainForbidden, TruncatedSampling, JournalError: see :data:`MISUSE`.
    """
    began = time.monotonic()
    ctx = Context(episode_id=episode_id, seed=seed, messages=[])
    run = _Run(env, ctx, budget or task.budget, began, {}, journal=journal)
    outcome, error = None, ""
    try:
        ctx.messages = list(await env.reset(task, seed=seed, episode_id=episode_id))
        run.tools = {tool.name: tool for tool in env.tools}
        stop = await _loop(run, policy)
        outcome = await settled(env.outcome(run.answer))
    except MISUSE:
        raise
    except Exception as fault:  # noqa: BLE001 - anybody's code: its bugs cost this episode, not its neighbours
        stop, error = StopReason.ENGINE_ERROR, describe(fault)
    finally:
        if isinstance(policy, Releases):
            policy.release(ctx)
    run.counts["prompt_tokens"], branches = ctx.prompt_tokens, ()
    try:
        run.record()
        branches = ctx.builder.finish()
    except RowError as fault:  # the engine answered with what no store takes
        stop, error, outcome = StopReason.ENGINE_ERROR, error or describe(fault), None
    return Rollout(stop_reason=stop, branches=branches, messages=tuple(ctx.messages), outcome=outcome,
                   answer=run.answer, counts=run.counts, wall_s=time.monotonic() - began, error=error,
                   tools=tuple(run.tools.values()))


async def settled(value: Awaitable[T] | T) -> T:
    """What an environment returned, waited for where it is a coroutine."""
    return await value if isinstance(value, Awaitable) else value


def describe(fault: Exception) -> str:
    """A fault in one line of storable text.

    >>> describe(KeyError("total"))
    "KeyError: 'total'"
    """
    return printable(f"{type(fault).__name__}: {fault}")


async def _loop(run: _Run, policy: Policy) -> StopReason:
    """Turn after turn until something ends the episode."""
    while True:
        spent = _spent(run)
        if spent is not None:
            return spent
        run.ctx.tokens_left = run.left("completion_tokens", "completion_tokens")
        left = run.budget.prompt_tokens
        run.ctx.prompt_left = None if left is None else left - run.ctx.prompt_tokens
        try:
            async with asyncio.timeout(run.left_s()):
                turn = await policy.act(run.ctx, run.env.tools)
        except ContextOverflow:
            return StopReason.CONTEXT_OVERFLOW
        except PromptBudget:
            return StopReason.MAX_PROMPT_TOKENS
        except TimeoutError:
            return StopReason.ROLLOUT_TIMEOUT
        ended = await _take(run, turn)
        run.ctx.turn += 1
        if ended is not None:
            return ended


def _spent(run: _Run) -> StopReason | None:
    """The budget that is exhausted, None while the episode may go on."""
    left_s = run.left_s()
    if run.left("turns", "turns") == 0:
        return StopReason.MAX_TURNS
    if run.left("tool_calls", "calls") == 0:
        return StopReason.MAX_TOOL_CALLS
    if run.left("completion_tokens", "completion_tokens") == 0:
        return StopReason.MAX_SAMPLED_TOKENS
    if left_s is not None and left_s <= 0:
        return StopReason.ROLLOUT_TIMEOUT
    return None


async def _take(run: _Run, turn: ModelTurn) -> StopReason | None:
    """Record one turn and answer its calls; a stop reason when it ended the episode."""
    said = visible(turn.text)
    if OPEN_CALL in said and not turn.calls:
        turn = read_turn(turn.text, run.ctx.turn, turn.completion)
    run.counts["turns"] += 1
    if turn.completion is not None:
        run.counts["completion_tokens"] += len(turn.completion.token_ids)
        run.counts["truncated"] += turn.completion.finish_reason == "length"
    calls, now = unique_ids(turn.calls, run.ctx.turn, run.ids)
    run.ctx.messages.append(_assistant(turn, calls))
    run.record()
    if not calls and said:
        run.answer = said
        return StopReason.COMPLETED
    owed = _owed(turn, now)
    run.unusable = run.unusable + 1 if len(owed) == len(calls) else 0
    results = await _answer(run, calls, owed)
    run.ctx.messages += [{"role": "tool", "tool_call_id": r.call_id, "content": r.content} for r in results]
    run.record()
    if run.env.done():
        return StopReason.COMPLETED
    if run.unusable >= MAX_UNUSABLE:
        return StopReason.PARSE_ERROR
    if not calls:
        run.ctx.messages.append({"role": "user", "content": NUDGE})
    return None


def _assistant(turn: ModelTurn, calls: list[ToolCall]) -> Json:
    """The turn as a message: the text before its calls, and the calls."""
    message: Json = {"role": "assistant", "content": turn.text.split(OPEN_CALL, 1)[0].rstrip() if calls else turn.text}
    if calls:
        message["tool_calls"] = [call.openai() for call in calls]
    return message


def _owed(turn: ModelTurn, now: Mapping[str, list[str]]) -> dict[str, ToolResult]:
    """Answers to unreadable calls, under the ids their calls carry now."""
    queue = {old: list(ids) for old, ids in now.items()}
    owed = {}
    for result in turn.malformed:
        if queue.get(result.call_id):
            call_id = queue[result.call_id].pop(0)
            owed[call_id] = result.model_copy(update={"call_id": call_id})
    return owed


async def _answer(run: _Run, calls: list[ToolCall], owed: dict[str, ToolResult]) -> list[ToolResult]:
    """One result per call, in order: unreadable, refused, over the budget, or from the environment."""
    answers, fit = dict(owed), []
    room = run.left("tool_calls", "calls")
    limit = len(calls) if run.budget.calls_per_turn is None else run.budget.calls_per_turn
    limit = limit if room is None else min(limit, room)
    for i, call in enumerate(calls):
        if i >= limit:
            answers[call.id] = refusal(call.id, "budget", f"only {limit} calls were left to this turn")
        elif call.id not in answers:
            problem = check_call(call, run.tools)
            if problem is not None:
                answers[call.id] = problem
            else:
                fit.append(call)
    for result in await _execute(run, fit):
        answers[result.call_id] = result
    results = [answers[call.id] for call in calls]
    _count(run, calls, results)
    return results


async def _execute(run: _Run, calls: list[ToolCall]) -> list[ToolResult]:
    """Have the environment answer; calls cut by the clock are answered ``timeout``.

    Raises:
        EnvError: the environment did not answer every id once and in order.
    """
    if not calls:
        return []
    allowed = sum(run.tools[call.name].timeout_s for call in calls)
    left_s = run.left_s()
    try:
        async with asyncio.timeout(allowed if left_s is None else min(allowed, max(left_s, 0.0))):
            results = await run.env.call(tuple(calls))
    except TimeoutError:
        return [refusal(call.id, "timeout", "the tool took too long") for call in calls]
    if [r.call_id for r in results] != [call.id for call in calls]:
        raise EnvError(f"environment {run.env.env_id} answered ids {[r.call_id for r in results]} to calls "
                       f"{[call.id for call in calls]}", fix="return one result per call, in the order given")
    return [result.model_copy(update={"content": printable(result.content)}) for result in results]


def _count(run: _Run, calls: list[ToolCall], results: list[ToolResult]) -> None:
    """Totals for the metrics: valid calls reached the environment; a repeat equals the call before it."""
    for call, result in zip(calls, results, strict=True):
        valid = result.error_kind not in ("bad_arguments", "unknown_tool", "budget")
        mutating = valid and run.tools[call.name].mutates
        run.counts["calls"] += result.error_kind != "budget"
        run.counts["valid_calls"] += valid
        run.counts["mutating_calls"] += mutating
        run.counts["mutating_ok"] += mutating and not result.is_error
        run.counts["repeats"] += run.last == (call.name, call.arguments)
        run.last = (call.name, call.arguments)
