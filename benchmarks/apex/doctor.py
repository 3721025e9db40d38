"""Is a benchmark sound? Agents that do nothing must pass nothing, the oracle everything, and twice must be the same."""

import asyncio
from collections.abc import Iterator, Sequence

from agentsdpo.benchmarks.apex.agents import NULLS, Agent, scripted
from agentsdpo.benchmarks.apex.config import BenchConfig
from agentsdpo.benchmarks.apex.player import Player
from agentsdpo.benchmarks.apex.records import Attempt
from agentsdpo.benchmarks.apex.start import judge_of
from agentsdpo.benchmarks.apex.suites import open_suite
from agentsdpo.benchmarks.apex.taskset import TaskSet
from agentsdpo.collect.waiting import settled
from agentsdpo.types import Closes, Frozen, Task

CHEATS = ("scattergun",)
"""Agents of task sets that meet criteria without doing the work."""
EVALUATION_ONLY = ("mercor/apex-agents", "apex-agents")
"""Beginnings of names whose licence forbids training."""
FIRST = 5
"""Tasks that are looked at where all would say no more."""


class Check(Frozen):
    """One line of the doctor's report."""

    name: str
    ok: bool
    detail: str


def examine(config: BenchConfig) -> list[Check]:
    """All checks on the tasks of a configuration; with a judge each null agent costs a call per criterion.

    Raises:
        ConfigError, FormatError: the task set cannot be opened.
    """
    return list(_checks(config, open_suite(config)))


def _checks(config: BenchConfig, taskset: TaskSet) -> Iterator[Check]:
    yield Check(name="tasks", ok=True, detail=f"{len(taskset.tasks)} tasks of {taskset.name}@{taskset.version}, each "
                                              "with a rubric and an id of its own")
    yield _licence(taskset)
    yield asyncio.run(_hidden(config, taskset))
    judge = judge_of(taskset)
    agents = scripted(taskset)
    for name in (*NULLS, *CHEATS):
        if name in agents:
            records = _played(config, taskset, agents[name], taskset.tasks)
            yield _rate(f"null agent {name}", records, 0, "canary held" if judge.get("model") else "")
    if "oracle" in agents:
        yield _rate("oracle", _played(config, taskset, agents["oracle"], taskset.tasks), len(taskset.tasks))
    yield _determinism(config, taskset, agents.get("random") or agents["echo"])


def _played(config: BenchConfig, taskset: TaskSet, agent: Agent, tasks: Sequence[Task]) -> list[Attempt]:
    return asyncio.run(Player(config, taskset, agent).all_once(tasks))


def _rate(name: str, records: Sequence[Attempt], wanted: int, more: str = "") -> Check:
    """Whether exactly so many passed; an attempt that could not be scored says nothing, and so is not fine."""
    passes, lost = sum(bool(r.passed) for r in records), [r for r in records if not r.scored]
    detail = f"{passes} of {len(records)} tasks passed, {wanted} should" + (f"; {more}" if more else "")
    if lost:
        detail += f"; {len(lost)} could not be scored: {lost[0].outcome} {lost[0].message[:200]}"
    return Check(name=name, ok=passes == wanted and not lost, detail=detail)


def _licence(taskset: TaskSet) -> Check:
    """Tasks that must not be trained on say so."""
    allowed = [task.task_id for task in taskset.tasks if task.train_allowed]
    forbidden = taskset.name.startswith(EVALUATION_ONLY)
    detail = f"{len(allowed)} of {len(taskset.tasks)} tasks may be trained on"
    if forbidden and allowed:
        detail += f"; the licence of {taskset.name} forbids it, the first is {allowed[0]}"
    return Check(name="licence stamp", ok=not (forbidden and allowed), detail=detail)


async def _hidden(config: BenchConfig, taskset: TaskSet) -> Check:
    """No criterion stands in what an agent or an environment is given."""
    shown = []
    for task in taskset.tasks[:FIRST]:
        env = taskset.env(task)
        try:
            opening = await settled(env.reset(task.model_copy(update={"rubric": ()}), seed=0, episode_id="doctor"))
            given = f"{opening} {[tool.openai() for tool in env.tools]}"
            shown += [f"{task.task_id}/{c.id}" for c in task.rubric if c.text and c.text in given]
        finally:
            if isinstance(env, Closes):
                await env.close()
    detail = f"the openings of {min(FIRST, len(taskset.tasks))} tasks quote no criterion"
    if shown:
        detail = f"{len(shown)} criteria are quoted to the agent, the first is {shown[0]}"
    return Check(name="rubric hidden", ok=not shown, detail=detail)


def _determinism(config: BenchConfig, taskset: TaskSet, agent: Agent) -> Check:
    """The same agent with the same seed does and leaves the same."""
    tasks = taskset.tasks[:FIRST]
    first, second = ([(r.episode_sha256, r.score) for r in _played(config, taskset, agent, tasks)] for _ in range(2))
    unlike = [task.task_id for task, a, b in zip(tasks, first, second, strict=True) if a != b]
    detail = f"{len(tasks)} tasks played twice by {agent.name}: " + (f"{unlike[0]} differs" if unlike else "the same")
    return Check(name="determinism", ok=not unlike, detail=detail)
