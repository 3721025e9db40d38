"""The loop between one agent and one environment. The only loop: scripted agents and models go through it alike.

A bad turn is data: malformed, unknown and surplus calls are answered like any other, every call id exactly once and
in order. A broken machine is not: whatever environment, engine or template raise ends this episode unscored and no
other one. Only what would break every episode alike (:data:`MISUSE`) is raised.

What happens is written down before anybody acts on it: a turn before its calls are made, their results before the next
turn is asked for. With a log the episode can be killed at any instant and goes on from there.
"""

import asyncio
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from agentsdpo.collect import answers, events
from agentsdpo.collect.answers import OutputLimit
from agentsdpo.collect.budget import announcement, left, spent
from agentsdpo.collect.compaction import Compactor
from agentsdpo.collect.episode_log import EpisodeLog, LogError
from agentsdpo.collect.events import Event
from agentsdpo.collect.policy import Context, ContextOverflow, Policy, PromptBudget, Releases
from agentsdpo.collect.progress import MAX_UNUSABLE, NUDGE, Heard, Progress, with_time, zero_counts
from agentsdpo.collect.resume import Resume, check_start
from agentsdpo.collect.turns import printable
from agentsdpo.collect.waiting import settled
from agentsdpo.errors import (
    ConfigError,
    EnvError,
    ModelError,
    RowError,
    TokenizerMismatch,
    TrainForbidden,
    TruncatedSampling,
)
from agentsdpo.replay.journal import Growth, Journal, JournalError
from agentsdpo.types import Branch, Budget, Env, Json, Outcome, StopReason, Task, ToolResult, ToolSpec

__all__ = ["MAX_UNUSABLE", "MISUSE", "NUDGE", "Rollout", "describe", "run_episode"]

MISUSE = (ConfigError, ModelError, TokenizerMismatch, TrainForbidden, TruncatedSampling, JournalError, LogError)
"""Faults of the set-up or the disk, not of one episode: they are raised as they are."""


@dataclass
class Rollout:
    """What one episode left behind, before grading.

    Attributes:
        stop_reason: why it ended. error, fault: what broke when it is ``engine_error``.
        branches: tokens, empty for scripted agents.
        messages: the whole conversation, OpenAI shape; compaction leaves none out.
        outcome: what the grader may see, None when unscored.
        answer: the final text answer, None when there was none.
        counts: totals: turns, calls, valid_calls, calls_refused, tool_errors, mutating_calls, mutating_ok, repeats,
            longest_repeat (the longest run of one call that changed nothing), truncated, completion_tokens,
            prompt_tokens, compactions, retries, final_turn (1 when a spent budget left a turn for the answer).
        wall_s: seconds the episode took, time between a crash and the resume left out.
        working_s: seconds of model calls that succeeded and of tools.
        cost_usd: of all model calls, as far as the policy said.
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
    fault: Exception | None = None
    working_s: float = 0.0
    cost_usd: float = 0.0

    @classmethod
    def never_began(cls, error: str) -> "Rollout":
        """An episode whose environment or policy could not even be made."""
        return cls(StopReason.ENGINE_ERROR, (), (), None, None, zero_counts(), 0.0, error)


async def run_episode(env: Env, policy: Policy, task: Task, *, seed: int, episode_id: str,
                      budget: Budget | None = None, journal: Journal | None = None, log: EpisodeLog | None = None,
                      compaction: Compactor | None = None, final_turn: bool = False, announce: str = "off",
                      output: OutputLimit | None = None) -> Rollout:
    """Play one episode to its end, or from where its log ends.

    Args:
        env: a fresh environment; this episode is its only one.
        policy: takes the turns.
        task: what to do; its rubric is not touched here.
        seed: of the environment and of sampling.
        episode_id: unique in the run.
        budget: limits; None takes the task's.
        journal: of a replay store, where each turn and its results are written before the episode goes on.
        log: events and checkpoints in a folder; one that holds some already resumes that very episode.
        compaction: what cuts a history down that is about to fill the window; None: nothing.
        final_turn: a limit that runs out leaves exactly one more turn, for the answer.
        announce: when the agent is told its budget: ``off``, ``start``, or ``every_5`` and the like, in turns.
        output: how much of a tool's result is shown; None is :class:`OutputLimit`'s default.

    Returns:
        What happened, with ``outcome`` None when environment, engine or template broke.

    Raises:
        ConfigError, ModelError, TokenizerMismatch, TrainForbidden, TruncatedSampling, JournalError, LogError: see
            :data:`MISUSE`.
    """
    run = Progress(Context(episode_id=episode_id, seed=seed, messages=[]), budget or task.budget)
    loop = _Loop(env, policy, run, journal, log, compaction, final_turn, announce, output or OutputLimit())
    outcome, fault = None, None
    try:
        await loop.begin(task)
        while run.stop is None:
            await loop.turn()
        outcome = await loop.end()
    except MISUSE:
        raise
    except Exception as error:  # noqa: BLE001 - anybody's code: its bugs cost this episode, not its neighbours
        fault = error.with_traceback(None)
        loop.broke(describe(error))
    finally:
        if isinstance(policy, Releases):
            policy.release(run.ctx)
        if log is not None:
            log.close()
    branches: tuple[Branch, ...] = ()
    try:
        branches = run.ctx.builder.finish()
    except RowError as error:  # the engine answered with what no store takes
        fault, outcome = fault or error, None
    return Rollout(
        stop_reason=run.stop if run.stop and fault is None else StopReason.ENGINE_ERROR, branches=branches,
        messages=tuple(run.history), outcome=outcome, answer=run.answer, counts=run.counts, wall_s=run.clock.wall,
        error=describe(fault) if fault else "", tools=tuple(run.tools.values()), fault=fault,
        working_s=run.clock.working, cost_usd=run.cost_usd)


def describe(fault: Exception) -> str:
    """A fault in one line of storable text.

    >>> describe(KeyError("total"))
    "KeyError: 'total'"
    """
    return printable(f"{type(fault).__name__}: {fault}")


@dataclass
class _Loop:
    """The running episode: who takes part, and where things are written down."""

    env: Env
    policy: Policy
    run: Progress
    journal: Journal | None
    log: EpisodeLog | None
    compaction: Compactor | None
    final_turn: bool
    announce: str
    output: OutputLimit
    kept_at: int = 0

    # ------------------------------------------------------------------------------------------ begin and end

    async def begin(self, task: Task) -> None:
        """Reset the environment, and go through what the log says has happened."""
        run, held = self.run, self.log.open() if self.log is not None else []
        messages = list(await self.env.reset(task, seed=run.ctx.seed, episode_id=run.ctx.episode_id))
        run.opened(messages, self.env.tools)
        if self.log is None:
            return
        about = self._about(task)
        if not held:
            self._write(("start", {**about, "messages": messages}))
            return
        check_start(held[0], about, events.plain(messages))
        await Resume(self.log, run, self.env, self.policy, self.output).replay()
        self.kept_at = run.ctx.turn
        self._journal(run.ctx.builder.grown())
        if run.stop is None and run.pending is None and run.ctx.turn:
            self._settle()

    def _about(self, task: Task) -> Json:
        """What a log must agree on to be of this episode."""
        run = self.run
        rules = {"final_turn": self.final_turn, "announce": self.announce, "output": self.output.model_dump(),
                 "compaction": type(self.compaction).__name__ if self.compaction else None}
        about = {"episode_id": run.ctx.episode_id, "task_id": task.task_id, "task_sha256": events.task_sha256(task),
                 "env_id": self.env.env_id, "seed": run.ctx.seed, "budget": run.budget.model_dump(), "rules": rules,
                 "tools": [tool.model_dump() for tool in run.tools.values()]}
        return events.plain(about)

    async def end(self) -> Outcome:
        """What the grader may see; the log says what it looked like."""
        run = self.run
        outcome = await settled(self.env.outcome(run.answer))
        sha256 = hashlib.sha256(outcome.final).hexdigest()
        if self.log is not None:
            before = next((e for e in self.log.events if e["type"] == "final"), None)
            if before is None:
                self._write(*await self._checkpoint(), ("final", {
                    "stop_reason": str(run.stop), "answer": run.answer, "counts": run.counts, "final_sha256": sha256}))
            elif before["final_sha256"] != sha256:
                raise EnvError(f"after the restart the final state has sha256 {sha256[:12]}, before it "
                               f"{before['final_sha256'][:12]}", fix="play the episode again")
        return outcome

    def broke(self, error: str) -> None:
        """Note a fault in the log; whoever resumes tries again from the event before it."""
        if self.log is not None and self.log.is_open:
            self._write(("error", {"error": error}))

    # ------------------------------------------------------------------------------------------------- turns

    async def turn(self) -> None:
        """One turn: ask, write down, answer, write down; or less, when the episode ends."""
        run = self.run
        if run.pending is None:
            if not await self._ready():
                return
            heard = await self._ask()
            if heard is None:
                return
            self._write(("model_call", events.heard_json(run.ctx.turn, heard)) if self.log else None)
            run.took(heard)
            self._journal(heard.growth)
        if run.pending is not None:
            results = await self._answers(run.pending)
            if self.log is not None:
                await self._write_results(self.log, results)
            run.answered(results)
            self._journal(())
            self._settle()

    async def _write_results(self, log: EpisodeLog, results: Sequence[ToolResult]) -> None:
        """All results of a turn in one write, with a checkpoint when one is due.

        What the clock cut off cannot be repeated, so a checkpoint always follows it.
        """
        due = self.run.ctx.turn - self.kept_at >= log.every or any(r.error_kind == "timeout" for r in results)
        more = await self._checkpoint() if due else []
        state = next((r.state_hash for r in reversed(results) if r.state_hash), None)
        self._write(*(("tool_result", events.result_json(r)) for r in results), *more, state_hash=state)

    def _settle(self) -> None:
        """After the results of a turn: has the agent handed in, or given up?"""
        run = self.run
        if self.env.done():
            run.stop = run.asked or StopReason.COMPLETED
        elif run.stop is None and run.unusable >= MAX_UNUSABLE:
            run.stop = StopReason.PARSE_ERROR

    async def _ready(self) -> bool:
        """Whether the agent may take another turn; it is told what it must know, and its history cut down."""
        run = self.run
        if run.asked is None:
            reason = spent(run.budget, run.counts, run.clock)
            if reason is not None:
                return self._spend(reason)
            told = announcement(self.announce, run.ctx.turn, run.budget, run.counts, run.clock)
            if told is not None and run.may_be_told():
                self._write(("budget", {"told": told}))
                run.told(told)
        if self.compaction is None or run.compacted_at == run.ctx.turn:
            return True
        try:
            async with asyncio.timeout(run.left_s(working=False)) as clock:
                await self._compact(self.compaction)
        except TimeoutError:
            if not clock.expired():
                raise
            return self._spend(StopReason.ROLLOUT_TIMEOUT)
        return True

    async def _compact(self, compaction: Compactor) -> None:
        """Have the history cut down if it is too long."""
        run, began = self.run, time.monotonic()
        change = await compaction.compact(run, self.policy)
        if change is not None:
            usage = change.usage and with_time(change.usage, time.monotonic() - began)
            change = replace(change, growth=self._grown(), usage=usage)
            self._write(("compaction", events.compaction_json(change)) if self.log else None)
            run.compacted(change)
            self._journal(change.growth)

    def _spend(self, reason: StopReason) -> bool:
        """A limit ran out: ask for the answer if that is due, else end; whether the agent may take a turn."""
        if self.final_turn and self.run.asked is None:
            self._write(("budget", {"spent": str(reason)}))
            self.run.asked_to_end(reason)
            return True
        self.run.stop = self.run.asked or reason
        return False

    async def _ask(self) -> Heard | None:
        """The agent's next turn; None when something else came of it."""
        run, began = self.run, time.monotonic()
        free = run.asked is not None
        run.ctx.tokens_left = None if free else left(run.budget, "completion_tokens", run.counts["completion_tokens"])
        run.ctx.prompt_left = None if free else left(run.budget, "prompt_tokens", run.counts["prompt_tokens"])
        try:
            async with asyncio.timeout(run.left_s(working=False)) as clock:
                turn = await self.policy.act(run.ctx, tuple(run.tools.values()))
        except ContextOverflow:
            run.stop = run.asked or StopReason.CONTEXT_OVERFLOW
        except PromptBudget:
            self._spend(StopReason.MAX_PROMPT_TOKENS)
        except TimeoutError:
            if not clock.expired():
                raise
            self._spend(StopReason.ROLLOUT_TIMEOUT)
        else:
            return run.hear(turn, time.monotonic() - began, self._grown())
        return None

    async def _answers(self, heard: Heard) -> list[ToolResult]:
        """One result per call, in order."""
        known, fit = answers.sort_out(self.run, heard.calls, heard.owed)
        for result in await answers.execute(self.env, self.run, fit, self.output):
            known[result.call_id] = result
        return [known[call.id] for call in heard.calls]

    # ----------------------------------------------------------------------------------------------- records

    async def _checkpoint(self) -> list[Event]:
        """Keep the environment as it is now; the event that says so belongs behind what led here."""
        turn = self.run.ctx.turn
        if self.log is None or self.kept_at == turn:
            return []
        snapshot = await settled(self.env.snapshot())
        self.kept_at = turn
        return [("checkpoint", self.log.keep(turn, snapshot))]

    def _grown(self) -> Sequence[Growth]:
        """What the token record grew by, if anybody wants to know."""
        return self.run.ctx.builder.grown() if self.log or self.journal else ()

    def _write(self, *entries: Event | None, state_hash: str | None = None) -> None:
        """Put events into the log, if there is one."""
        if self.log is not None:
            self.log.write([e for e in entries if e], self.run.clock, state_hash or self.run.state_hash)

    def _journal(self, grown: Sequence[Growth]) -> None:
        """Put what happened into the store's journal, if there is one."""
        if self.journal is not None:
            self.journal.step(grown, self.run.history)
