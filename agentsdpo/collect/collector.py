"""Running many episodes at once, grading them, and stamping what a learner must know about them."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from agentsdpo.chat import ChatFormat
from agentsdpo.collect.compaction import compactor
from agentsdpo.collect.config import CollectConfig
from agentsdpo.collect.engine import Engine
from agentsdpo.collect.policy import EnginePolicy, Policy, mix
from agentsdpo.collect.rollout import MISUSE, Rollout, ask_grader, describe, run_episode
from agentsdpo.collect.waiting import waited
from agentsdpo.replay.ids import derived_uuid, uuid7
from agentsdpo.types import Closes, Env, Episode, Frozen, Grade, Json, StopReason, Suite, Task

if TYPE_CHECKING:
    from agentsdpo.replay.spool import Spool

PolicyFactory = Callable[[Task, int], Policy]
"""Makes the policy of one episode from its task and seed."""


class Stamp(Frozen):
    """Where episodes come from: the same for a whole run."""

    run_id: str = ""
    model_id: str = ""
    tokenizer_sha256: str = ""
    chat_template_sha256: str = ""
    vocab_size: int = 0
    engine: str = ""

    @classmethod
    def of(cls, engine: Engine, chat: ChatFormat, *, run_id: str = "", model_id: str = "") -> "Stamp":
        """Hashes of the chat format and names of the engine."""
        return cls(run_id=run_id, model_id=model_id, tokenizer_sha256=chat.tokenizer_sha256,
                   chat_template_sha256=chat.template_sha256, vocab_size=engine.vocab_size, engine=engine.name)


class Collector:
    """Collects graded episodes of one suite.

    Args:
        suite: tasks, environments and grader.
        policy: makes the policy of each episode.
        config: concurrency and budgets.
        stamp: provenance written into every episode.
        evaluate: no feedback is attached, and no episode may be trained on.
        spool: where episodes that may be trained on are journaled while they run; None: nowhere. Whoever appends what
            was collected tells it so (:meth:`agentsdpo.replay.spool.Spool.seal`).

    Attributes:
        finished: episodes of the running or last :meth:`collect`, in the order they ended; after an interrupt they
            are here.
    """

    def __init__(self, suite: Suite, policy: PolicyFactory, config: CollectConfig, *, stamp: Stamp | None = None,
                 evaluate: bool = False, spool: "Spool | None" = None) -> None:
        self.suite, self.policy, self.config = suite, policy, config
        self.stamp, self.evaluate, self.spool = stamp or Stamp(), evaluate, spool
        self.finished: list[Episode] = []
        self._grader, self._compaction = suite.grader(), compactor(config.compaction)

    @classmethod
    def of_engine(cls, suite: Suite, engine: Engine, chat: ChatFormat, config: CollectConfig, *, run_id: str = "",
                  model_id: str = "", evaluate: bool = False, spool: "Spool | None" = None) -> "Collector":
        """A collector whose agent is a model served by an engine.

        Raises:
            TruncatedSampling: see :class:`agentsdpo.collect.policy.EnginePolicy`.
        """
        policy = EnginePolicy(engine, chat, config, training=not evaluate)
        stamp = Stamp.of(engine, chat, run_id=run_id, model_id=model_id)
        return cls(suite, lambda task, seed: policy, config, stamp=stamp, evaluate=evaluate, spool=spool)

    def collect(self, split: str, indices: Sequence[int], *, seed: int = 0, attempts: Sequence[int] | None = None,
                group_size: int | None = None) -> list[Episode]:
        """Play the tasks, one episode per index; an index that repeats is attempted again with another seed.

        Works inside a running event loop too (a notebook), by borrowing a thread for its own loop.

        Args:
            split: split of the suite.
            indices: tasks.
            seed: with split, index and attempt it fixes every draw.
            attempts: number of the attempt at each index, for who plays some of a group; counted from 0 otherwise.
            group_size: attempts at each task in all; as often as its index is here otherwise.

        Returns:
            Episodes in the order of ``indices``, unscored ones (``grade`` None) included.

        Raises:
            KeyboardInterrupt: interrupted; :attr:`finished` holds what was done.
            ConfigError, ModelError, TruncatedSampling: the set-up is wrong, so that no episode could go well; also
                whatever the suite raises instead of a task. Every other fault unscores its own episode.
            JournalError: the spool's disk is full or failing.
        """
        return waited(self.collect_async(split, indices, seed=seed, attempts=attempts, group_size=group_size))

    async def collect_async(self, split: str, indices: Sequence[int], *, seed: int = 0,
                            attempts: Sequence[int] | None = None, group_size: int | None = None) -> list[Episode]:
        """:meth:`collect` for callers with a loop of their own."""
        self.finished = []
        gate = asyncio.Semaphore(self.config.concurrency)
        sizes, numbers, jobs = Counter(indices), attempts or _count_up(indices), []
        try:
            async with asyncio.TaskGroup() as group:
                for index, attempt in zip(indices, numbers, strict=True):
                    job = self._one(gate, split, index, attempt=attempt, group_size=group_size or sizes[index],
                                    seed=seed)
                    jobs.append(group.create_task(job))
        except ExceptionGroup as faults:
            raise faults.exceptions[0] from None  # the first one cancelled the others: it is the reason, as itself
        return [job.result() for job in jobs]

    async def _one(self, gate: asyncio.Semaphore, split: str, index: int, *, attempt: int, group_size: int,
                   seed: int) -> Episode:
        async with gate:
            episode = await self.collect_one(split, index, attempt=attempt, group_size=group_size, seed=seed)
            self.finished.append(episode)
            return episode

    async def collect_one(self, split: str, index: int, *, attempt: int = 0, group_size: int = 1,
                          seed: int = 0) -> Episode:
        """Play and grade a single episode; arguments and faults as in :meth:`collect`."""
        task = self.suite.task(split, index)
        own = mix(seed, split, index, attempt)
        place = {"episode_id": self.episode_id(split, index, attempt, seed), "attempt": attempt,
                 "group_size": group_size, "group_id": f"{self.stamp.run_id}/{split}/{index}/{seed}",
                 "task_id": task.task_id, "train_allowed": task.train_allowed and not self.evaluate,
                 "metadata": {"split": split, "index": index, "seed": own}, **self.stamp.model_dump()}
        try:
            env, policy = self.suite.env(), self.policy(task, own)
        except MISUSE:
            raise
        except Exception as fault:  # noqa: BLE001 - it is recorded on the episode
            run = Rollout.never_began(describe(fault))
            return self._episode(run, *await self._judge(task, run), {**place, "env_id": ""})
        return await self._play(task, env, policy, {**place, "env_id": env.env_id})

    async def _play(self, task: Task, env: Env, policy: Policy, place: Json) -> Episode:
        """Play and grade one episode, under its journal; whatever cuts it off leaves the journal to recovery."""
        journal = self.spool.begin(place) if self.spool is not None and place["train_allowed"] else None
        try:
            run = await run_episode(env, policy, task, seed=place["metadata"]["seed"], journal=journal,
                                    episode_id=place["episode_id"], budget=self.config.budget(task.budget),
                                    compaction=self._compaction, final_turn=self.config.final_turn,
                                    announce=self.config.announce)
            episode = self._episode(run, *await self._judge(task, run), place)
            if journal is not None:
                ended = {"stop_reason", "grade", "metadata", "tools"}
                journal.step(about=episode.model_dump(mode="json", include=ended))
        except BaseException:
            if journal is not None:
                journal.close()
            raise
        finally:
            left_open = await _close(env)
        metadata = {**episode.metadata, "left_open": left_open}
        return episode.model_copy(update={"metadata": metadata}) if left_open else episode

    async def _judge(self, task: Task, run: Rollout) -> tuple[Grade | None, str]:
        """The grade and, when the machinery that makes it broke, what happened: unscored, never zero."""
        return (None, run.error) if run.outcome is None else await ask_grader(self._grader, task, run.outcome)

    def episode_id(self, split: str, index: int, attempt: int, seed: int) -> str:
        """Id of one episode: derived from the run and its place in it, so that a run can be repeated and resumed to
        the bit; random when the run has no id."""
        run = self.stamp.run_id
        return derived_uuid(run, split, index, attempt, seed) if run else uuid7()

    def _episode(self, run: Rollout, grade: Grade | None, fault: str, place: Json) -> Episode:
        metadata: Json = {**run.counts, "wall_s": round(run.wall_s, 6), "working_s": round(run.working_s, 6),
                          **place["metadata"]}
        metadata |= {**({"error": fault} if fault else {}), **({} if run.answer is None else {"answer": run.answer})}
        stop = run.stop_reason if grade is not None else StopReason.ENGINE_ERROR
        return Episode(**{**place, "metadata": metadata}, branches=run.branches, stop_reason=stop,
                       grade=without_feedback(grade) if self.evaluate else grade, messages=run.messages,
                       tools=tuple(tool.openai() for tool in run.tools))


def _count_up(indices: Sequence[int]) -> list[int]:
    """How often each index came before.

    >>> _count_up([3, 5, 3])
    [0, 0, 1]
    """
    seen = Counter[int]()
    numbers = []
    for index in indices:
        numbers.append(seen[index])
        seen[index] += 1
    return numbers


async def _close(env: Env) -> str:
    """Let an environment go of what it holds; what went wrong, which is no reason to lose a graded episode."""
    try:
        if isinstance(env, Closes):
            await env.close()
    except Exception as fault:  # noqa: BLE001 - it is recorded on the episode
        return describe(fault)
    return ""


def without_feedback(grade: Grade | None) -> Grade | None:
    """The grade with scores alone.

    >>> without_feedback(Grade(results=(), mean=1.0, passed=True, feedback="put it elsewhere")).feedback
    ''
    """
    if grade is None:
        return None
    results = tuple(result.model_copy(update={"feedback": ""}) for result in grade.results)
    return grade.model_copy(update={"results": results, "feedback": ""})
