"""The loop between one agent and one environment. The only loop: scripted agents and models go through it alike.

A bad turn is data: malformed, unknown and surplus calls are answered like any other, every call id exactly once and
in order. A broken machine is not: whatever environment, engine or template raise ends this episode unscored and no
other one. Only what would break every episode alike (:data:`MISUSE`) is raised.

With a log an episode can be killed at any instant and goes on from there.
"""

import math
from dataclasses import dataclass

from agentsdpo.collect.answers import OutputLimit
from agentsdpo.collect.compaction import Compactor
from agentsdpo.collect.episode_log import EpisodeLog, LogError
from agentsdpo.collect.policy import Context, Policy, Releases
from agentsdpo.collect.progress import MAX_UNUSABLE, NUDGE, Progress, zero_counts
from agentsdpo.collect.running import Running
from agentsdpo.errors import ConfigError, ModelError, RowError, TokenizerMismatch, TrainForbidden, TruncatedSampling
from agentsdpo.replay.journal import Journal, JournalError
from agentsdpo.types import Branch, Budget, Env, Grade, Grader, Json, Outcome, StopReason, Task, ToolSpec, printable

__all__ = ["MAX_UNUSABLE", "MISUSE", "NUDGE", "Rollout", "ask_grader", "describe", "run_episode"]

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
    loop = Running(env, policy, run, journal, log, compaction, final_turn, announce, output or OutputLimit())
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


async def ask_grader(grader: Grader, task: Task, outcome: Outcome) -> tuple[Grade | None, str]:
    """The grade, or what happened where the machinery that makes it broke or gave none: unscored, never zero.

    Raises:
        ConfigError, ModelError and the others of :data:`MISUSE`.
    """
    try:
        grade = await grader.grade(task, outcome)
        if not isinstance(grade, Grade):
            raise TypeError(f"{type(grader).__name__} gave {type(grade).__name__}, not a Grade")
        if grade.mean is not None and not math.isfinite(grade.mean):
            raise ValueError(f"{type(grader).__name__} gave the mean score {grade.mean}")
        return grade, ""
    except MISUSE:
        raise
    except Exception as fault:  # noqa: BLE001 - anybody's code, as above
        return None, describe(fault)


def describe(fault: Exception) -> str:
    """A fault in one line of storable text.

    >>> describe(KeyError("total"))
    "KeyError: 'total'"
    """
    return printable(f"{type(fault).__name__}: {fault}")
