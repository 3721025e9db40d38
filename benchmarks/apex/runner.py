"""Playing a benchmark: every attempt once, what broke again, what is finished never.

A fault of host, provider, environment or judge leaves an attempt unscored; it is tried again here, ``retries`` times,
and by every ``resume`` after that. It is never written as a zero.
"""

import asyncio
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentsdpo.benchmarks.apex import episode
from agentsdpo.benchmarks.apex.agents import Agent
from agentsdpo.benchmarks.apex.config import BenchConfig
from agentsdpo.benchmarks.apex.player import Player
from agentsdpo.benchmarks.apex.records import Attempt, graded, played
from agentsdpo.benchmarks.apex.runfolder import GRADING_FAULT, BenchFolder, RunNotFound
from agentsdpo.benchmarks.apex.taskset import TaskSet
from agentsdpo.collect.episode_log import EpisodeLog
from agentsdpo.collect.policy import mix
from agentsdpo.errors import FormatError
from agentsdpo.types import Grade, Json, Outcome, Task

PATIENCE = 2
"""Faults of its environment after which an attempt is played from the start instead of resumed."""
Told = Callable[[Attempt, int, int], None]
"""Hears of every attempt that has ended: the attempt, how many are done, how many there are."""


@dataclass
class Job:
    """One attempt to be made.

    Attributes:
        last: what became of it before, unscored. tries: how often it was tried in this process.
        env_faults: how often the environment has broken under it, ever.
    """

    task: Task
    number: int
    last: Attempt | None = None
    tries: int = 0
    env_faults: int = 0


@dataclass
class Bench:
    """One run: what is played, who plays, where it is kept.

    Attributes:
        about: ``run.json``. told: hears of progress. grading: number of the grading that is under way.
    """

    config: BenchConfig
    taskset: TaskSet
    agent: Agent
    folder: BenchFolder
    about: Json
    told: Told = lambda attempt, done, total: None
    grading: int = 0
    _lock: Any = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.player = Player(self.config, self.taskset, self.agent)

    def play(self) -> list[Attempt]:
        """Make every attempt that has no score yet; returns the latest word on each.

        Raises:
            KeyboardInterrupt: stopped; what is finished is kept.
            ConfigError, ModelError: the set-up is wrong, so that no attempt could go well.
        """
        try:
            asyncio.run(self._all(self.pending()))
        except ExceptionGroup as faults:
            raise faults.exceptions[0] from None  # the first one cancelled the others: it is the reason, as itself
        return self.folder.records()

    def pending(self) -> list[Job]:
        """Attempts without a score: first all tasks once, then all of them again."""
        known = {record.place: record for record in self.folder.records()}
        faults = Counter(record.place for record in self.folder.failures() if record.outcome == "env_error")
        places = [(task, number) for number in range(self.config.attempts) for task in self.taskset.tasks]
        jobs = [Job(task, number, known.get((task.task_id, number)), env_faults=faults[task.task_id, number])
                for task, number in places]
        return [job for job in jobs if job.last is None or not job.last.scored]

    async def _all(self, jobs: Sequence[Job]) -> None:
        queue, total = deque(jobs), self.config.attempts * len(self.taskset.tasks)
        done = total - len(queue)

        async def work() -> None:
            nonlocal done
            while queue:
                job = queue.popleft()
                attempt = await self.attempt(job)
                if not attempt.scored and job.tries < self.config.retries:
                    job.tries, job.last = job.tries + 1, attempt
                    job.env_faults += attempt.outcome == "env_error"
                    queue.append(job)  # behind the others: what broke may have mended by then
                    continue
                done += 1
                self.told(attempt, done, total)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.config.concurrency, len(queue))):
                    group.create_task(work())
        finally:
            await self.player.close()

    async def attempt(self, job: Job) -> Attempt:
        """Play and grade one attempt and write it down; where only its grade is missing, only grade it."""
        try:
            attempt, outcome = await asyncio.to_thread(self._ungraded, job) or await self._play(job)
        except asyncio.CancelledError:
            task = job.task
            self.folder.append(Attempt(task_id=task.task_id, world_id=task.world_id, domain=task.domain,
                                       attempt=job.number, outcome="cancelled", scored=False))
            raise
        grade, error = await self.player.grade(job.task, outcome)
        if outcome is not None:
            attempt = graded(attempt, job.task, grade, error)
        await asyncio.to_thread(self._keep, attempt, grade)
        return attempt

    def _ungraded(self, job: Job) -> tuple[Attempt, Outcome] | None:
        """An attempt that was played to its end and lacks its grade alone."""
        if job.last is None or job.last.outcome != GRADING_FAULT:
            return None
        try:
            return job.last, episode.read_outcome(self.folder, job.last)
        except (FormatError, RunNotFound):
            return None

    async def _play(self, job: Job) -> tuple[Attempt, Outcome | None]:
        """One episode from where its log ends, its files written."""
        task, place = job.task, self.folder.episode(job.task.task_id, job.number)
        seed = mix(self.config.seed, task.task_id, job.number)
        if job.env_faults >= PATIENCE:
            await asyncio.to_thread(episode.set_log_aside, place)
        name = f"{self.about['run_id']}/{task.task_id}/{job.number}"
        log = EpisodeLog(place, every=self.config.checkpoint_every)
        run = await self.player.episode(task, seed, name, log)
        attempt = played(task, job.number, seed, run, version=self.agent.version())
        about = episode.About(self.about["agent"], self.config.budget_of(task).model_dump(), self.about["judge"])
        await asyncio.to_thread(episode.write_episode, self.folder, task, attempt, run, about)
        return attempt.model_copy(update={"grading": self.grading}), run.outcome

    def _keep(self, attempt: Attempt, grade: Grade | None) -> None:
        """The grade's file first, then the line that makes the attempt count."""
        with self._lock:
            episode.write_grade(self.folder, attempt, grade)
            self.folder.append(attempt)
