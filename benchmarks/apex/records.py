"""One line of ``attempts.jsonl`` or ``failures.jsonl``: what became of one attempt at one task."""

import hashlib
import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from agentsdpo.benchmarks.apex.statistics import TaskScores
from agentsdpo.benchmarks.apex.taskset import canonical, task_sha256
from agentsdpo.collect.provider import ProviderError
from agentsdpo.collect.rollout import Rollout
from agentsdpo.errors import EngineError
from agentsdpo.types import Frozen, Grade, Json, Outcome, StopReason, Task

OUTCOMES = {
    StopReason.COMPLETED: "completed", StopReason.MAX_TURNS: "budget_turns", StopReason.MAX_TOOL_CALLS: "budget_calls",
    StopReason.MAX_SAMPLED_TOKENS: "budget_tokens", StopReason.MAX_PROMPT_TOKENS: "budget_tokens",
    StopReason.ROLLOUT_TIMEOUT: "budget_time", StopReason.MAX_REPEAT: "budget_repeat",
    StopReason.CONTEXT_OVERFLOW: "context_overflow", StopReason.PARSE_ERROR: "agent_error",
    StopReason.ENGINE_ERROR: "env_error",
}
"""What an attempt is called by why its episode ended."""
UNSCORED = ("env_error", "judge_error", "provider_error", "cancelled")
"""Outcomes that are neither pass nor fail."""
PROVIDER_FAULTS = (EngineError, ProviderError)
"""With what an engine or a provider gives up."""


COUNTED = ("turns", "calls_refused", "tool_errors", "longest_repeat", "compactions", "prompt_tokens",
           "completion_tokens")
"""Totals of an episode that an attempt has under the same name."""


class Attempt(Frozen):
    """One attempt. ``passed``, ``score`` and ``criteria`` are None where it could not be scored.

    Attributes:
        seed: of sampling. grading: which grading of the run this is, from 0.
        cost_usd: of the agent. judge_tokens, judge_usd: of the grade, canary and repeated questions included.
        outcome: see :data:`OUTCOMES` and :data:`UNSCORED`.
        score: weighted mean over criteria. criteria: 1 met, 0 not met, by id.
        episode_sha256: of all that the agent did and left behind, without clocks; equal after kill and resume.
        prompt_sha256: of the opening messages and the tools.
        error_class, message: of the fault, in ``failures.jsonl``. ended: how the episode itself ended, where only its
            grade is missing.
    """

    task_id: str
    world_id: str | None = None
    domain: str = ""
    attempt: int
    seed: int = 0
    grading: int = 0
    outcome: str
    scored: bool
    passed: bool | None = None
    score: float | None = None
    criteria: dict[str, float] | None = None
    turns: int = 0
    tool_calls: int = 0
    calls_refused: int = 0
    tool_errors: int = 0
    longest_repeat: int = 0
    compactions: int = 0
    branches: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    wall_s: float = 0.0
    working_s: float = 0.0
    cost_usd: float = 0.0
    judge_tokens: int = 0
    judge_usd: float = 0.0
    policy_version: int = -1
    task_sha256: str = ""
    episode_sha256: str = ""
    prompt_sha256: str = ""
    error_class: str = ""
    message: str = ""
    ended: str = ""

    @property
    def place(self) -> tuple[str, int]:
        """Task and number of the attempt."""
        return self.task_id, self.attempt


def weighted_score(task: Task, grade: Grade) -> float:
    """``sum(weight * score) / sum(weight)`` over criteria; weights that add up to nothing count alike.

    >>> from agentsdpo.types import Criterion, CriterionResult
    >>> task = Task(task_id="t", prompt="", rubric=(Criterion(id="a", text="", weight=3), Criterion(id="b", text="")))
    >>> weighted_score(task, Grade.of([CriterionResult(id="a", score=1), CriterionResult(id="b", score=0)]))
    0.75
    """
    weights = {criterion.id: criterion.weight for criterion in task.rubric}
    pairs = [(weights.get(result.id, 1.0), result.score or 0.0) for result in grade.results]
    total = sum(weight for weight, _ in pairs)
    if total <= 0:
        return sum(score for _, score in pairs) / len(pairs)
    return sum(weight * score for weight, score in pairs) / total


def graded(attempt: Attempt, task: Task, grade: Grade | None, error: str = "") -> Attempt:
    """The attempt with its grade; unscored as ``judge_error`` when there is none or a criterion could not be judged."""
    attempt = attempt.model_copy(update=_judging(grade))
    if grade is None or grade.mean is None or not grade.results:
        return attempt.model_copy(update={
            "outcome": "judge_error", "ended": attempt.ended or attempt.outcome, "scored": False, "passed": None,
            "score": None, "criteria": None, "error_class": (error or "criterion").partition(":")[0],
            "message": error or _unjudged(grade)})
    return attempt.model_copy(update={
        "outcome": attempt.ended or attempt.outcome, "ended": "", "error_class": "", "message": "", "scored": True,
        "passed": grade.passed, "score": weighted_score(task, grade),
        "criteria": {result.id: float(result.score or 0.0) for result in grade.results}})


def _judging(grade: Grade | None) -> Json:
    """What the judge of a grade took, kept answers when they were made; one canary vouches for all verdicts."""
    judges = [result.judge for result in (grade.results if grade else ()) if result.judge]
    used = [one for one in (*(judge.get("usage") for judge in judges), *(j.get("canary") for j in judges[:1])) if one]
    return {"judge_tokens": sum(one["prompt_tokens"] + one["completion_tokens"] for one in used),
            "judge_usd": round(sum(one["cost_usd"] for one in used), 6)}


def _unjudged(grade: Grade | None) -> str:
    """Which criteria have no score, and why."""
    lost = [f"{r.id}: {r.status}: {r.rationale[:200]}" for r in (grade.results if grade else ()) if r.score is None]
    return "; ".join(lost) or "the grade is empty"


def played(task: Task, attempt: int, seed: int, run: Rollout, *, version: int) -> Attempt:
    """What an episode says about itself, before grading; unscored when it broke."""
    counts, outcome = run.counts, OUTCOMES[run.stop_reason]
    if run.outcome is None:
        outcome = "provider_error" if isinstance(run.fault, PROVIDER_FAULTS) else "env_error"
    same: dict[str, Any] = {name: counts[name] for name in COUNTED}
    return Attempt(
        task_id=task.task_id, world_id=task.world_id, domain=task.domain, attempt=attempt, seed=seed, outcome=outcome,
        scored=False, tool_calls=counts["calls"], **same, branches=len(run.branches), wall_s=round(run.wall_s, 4),
        working_s=round(run.working_s, 4), cost_usd=run.cost_usd, policy_version=version,
        task_sha256=task_sha256(task), episode_sha256=episode_sha256(task, seed, run), prompt_sha256=prompt_sha256(run),
        error_class=run.error.partition(":")[0], message=run.error)


def episode_sha256(task: Task, seed: int, run: Rollout) -> str:
    """Hash of what happened: messages, sampled ids, answer and final state; no clock, no log-prob (which may round)."""
    branches = [[hashlib.sha256(part.tobytes()).hexdigest() for part in (b.token_ids, b.token_kind)]
                for b in run.branches]
    final = hashlib.sha256(run.outcome.final).hexdigest() if run.outcome else None
    return hashlib.sha256(canonical({
        "task": task_sha256(task), "seed": seed, "messages": list(run.messages), "branches": branches,
        "stop": str(run.stop_reason), "answer": run.answer, "final": final})).hexdigest()


def prompt_sha256(run: Rollout) -> str:
    """Hash of the opening messages and the tools an agent was given; empty when it never began."""
    opening = opening_of(run.messages)
    if not opening:
        return ""
    return hashlib.sha256(canonical([opening, [tool.openai() for tool in run.tools]])).hexdigest()


def opening_of(messages: Sequence[Json]) -> list[Json]:
    """The messages before the agent's first.

    >>> opening_of([{"role": "system"}, {"role": "user"}, {"role": "assistant"}, {"role": "user"}])
    [{'role': 'system'}, {'role': 'user'}]
    """
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    return list(messages[:first])


def in_order(attempt: Attempt) -> list[tuple[int, str]]:
    """Key that sorts by task id as people do, 2 before 10, then by attempt.

    >>> in_order(Attempt(task_id="t-2", attempt=1, outcome="completed", scored=True)) < in_order(
    ...     Attempt(task_id="t-10", attempt=0, outcome="completed", scored=True))
    True
    """
    parts = re.split(r"([0-9]{1,18})", attempt.task_id)
    key = [(int(part), "") if part.isascii() and part.isdigit() else (-1, part) for part in parts]
    return [*key, (-2, attempt.task_id), (attempt.attempt, "")]


def by_task(attempts: Sequence[Attempt]) -> list[TaskScores]:
    """Counts per task, in order of task id."""
    found = []
    for name, group in groupby(sorted(attempts, key=in_order), key=lambda a: a.task_id):
        of_task = list(group)
        scored = [a for a in of_task if a.scored]
        found.append(TaskScores(name, of_task[0].world_id, of_task[0].domain, len(scored),
                                sum(bool(a.passed) for a in scored), sum(a.score or 0.0 for a in scored),
                                len(of_task) - len(scored)))
    return found


def outcome_calls(outcome: Outcome) -> list[Json]:
    """The calls a grader saw, as JSON."""
    return [{"call": call.model_dump(mode="json"), "result": result.model_dump(mode="json")}
            for call, result in outcome.calls]
