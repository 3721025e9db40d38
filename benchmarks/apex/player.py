"""Playing one episode and grading one outcome, under the rules of a run; nothing is written but the episode's log."""

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from agentsdpo.benchmarks.apex.agents import Agent
from agentsdpo.benchmarks.apex.config import BenchConfig
from agentsdpo.benchmarks.apex.records import Attempt, graded, played
from agentsdpo.benchmarks.apex.taskset import TaskSet
from agentsdpo.collect.compaction import compactor
from agentsdpo.collect.episode_log import EpisodeLog
from agentsdpo.collect.policy import mix
from agentsdpo.collect.rollout import MISUSE, Rollout, ask_grader, describe, run_episode
from agentsdpo.types import Closes, Env, Grade, Grader, Outcome, Task

T = TypeVar("T")


class Player:
    """One agent on the tasks of one set. May serve all attempts of a run at once."""

    def __init__(self, config: BenchConfig, taskset: TaskSet, agent: Agent) -> None:
        self.config, self.taskset, self.agent = config, taskset, agent
        self._graders: dict[str, Grader] = {}

    async def episode(self, task: Task, seed: int, name: str, log: EpisodeLog | None = None) -> Rollout:
        """Play one episode, from where its log ends; whatever breaks leaves it unscored.

        Args:
            task: the environment is given it without its rubric.
            seed: of the agent. name: id of the episode.
            log: where it is written, and read again.
        """
        try:
            env, policy = self.taskset.env(task), self.agent.policy(task, seed)
        except MISUSE:
            raise
        except Exception as fault:  # noqa: BLE001 - it is recorded on the attempt
            return Rollout.never_began(describe(fault))
        rules, bare = self.config.rules(), task.model_copy(update={"rubric": ()})
        try:
            return await run_episode(
                env, policy, bare, seed=seed, episode_id=name, budget=self.config.budget_of(task), log=log,
                compaction=compactor(rules.compaction), final_turn=rules.final_turn, announce=self.config.announce,
                output=rules.output)
        finally:
            await _close(env)

    async def grade(self, task: Task, outcome: Outcome | None) -> tuple[Grade | None, str]:
        """The grade, or what happened where the machinery that makes it broke."""
        if outcome is None:
            return None, ""
        try:
            if task.task_id not in self._graders:
                self._graders[task.task_id] = self.taskset.grader(task)
        except MISUSE:
            raise
        except Exception as fault:  # noqa: BLE001 - it is recorded on the attempt
            return None, describe(fault)
        grade, error = await ask_grader(self._graders[task.task_id], task, outcome)
        wrong = [r for r in (grade.results if grade else ()) if r.score is not None and not 0.0 <= r.score <= 1.0]
        return (None, f"ValueError: {wrong[0].id} has score {wrong[0].score}, not 0 to 1") if wrong else (grade, error)

    async def once(self, task: Task, number: int = 0) -> Attempt:
        """Play and grade one attempt of which nothing is kept."""
        seed = mix(self.config.seed, task.task_id, number)
        run = await self.episode(task, seed, f"{self.agent.name}/{task.task_id}/{number}")
        attempt = played(task, number, seed, run, version=self.agent.version())
        return graded(attempt, task, *await self.grade(task, run.outcome)) if run.outcome else attempt

    async def all_once(self, tasks: Sequence[Task]) -> list[Attempt]:
        """:meth:`once` for each of these tasks, as many at a time as the run may have in flight."""
        try:
            return await together([self.once(task) for task in tasks], self.config.concurrency)
        finally:
            await self.close()

    async def close(self) -> None:
        """Let go of connections of this event loop: those of the judge, and of the agent."""
        if isinstance(self.taskset, Closes):
            await self.taskset.close()
        if self.agent.close is not None:
            await self.agent.close()


async def together(jobs: Sequence[Coroutine[Any, Any, T]], at_once: int) -> list[T]:
    """Results of all jobs, in order; the first exception stops the others and is raised as itself."""
    gate = asyncio.Semaphore(at_once)

    async def one(job: Coroutine[Any, Any, T]) -> T:
        async with gate:
            return await job

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(job)) for job in jobs]
    except ExceptionGroup as faults:
        for job in jobs:
            job.close()
        raise faults.exceptions[0] from None
    return [task.result() for task in tasks]


async def _close(env: Env) -> None:
    """Let go of an environment; that it cannot is worth a word, not the attempt."""
    try:
        if isinstance(env, Closes):
            await env.close()
    except Exception as fault:  # noqa: BLE001 - somebody else's environment, after all that counts has happened
        logging.getLogger(__name__).warning("environment %s did not close: %s", env.env_id, describe(fault))
