"""A collector as a program: plays episode after episode with the newest policy and appends them to a store.

    agentsdpo collect CONFIG.toml --store URI --policies DIR [--engine URL] [--episodes N] [--number K --of N]

It follows the registry's ``LATEST``: new weights are taken between two tokens, in the middle of episodes, with every
cached key and value dropped, and the spans of each call say which version sampled what. Every step is journaled. It
keeps no state of its own: which episodes are its next ones follows from its number and from what the store holds, so
that one that was killed is started again with the same command; what its journals hold is salvaged first, and episodes
that had not ended are played anew under the same id.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from agentsdpo.collect.collector import Collector
from agentsdpo.collect.policy import mix
from agentsdpo.config import RunConfig
from agentsdpo.errors import ConfigError, CorruptionError, EngineError, RegistryError, StoreError
from agentsdpo.programs.flow import Learnt, episodes_in, learners
from agentsdpo.publish.bucket import open_registry
from agentsdpo.publish.manifest import Manifest
from agentsdpo.publish.registry import PolicyRegistry, behaviour_version
from agentsdpo.replay.spool import Spool
from agentsdpo.replay.store import ReplayStore
from agentsdpo.replay.upkeep.recover import recover
from agentsdpo.suites import TASKS_PER_SEED, run_id
from agentsdpo.types import Episode, Json

POLL_S = 0.25
"""Seconds between two looks at registry and pins."""
STRIDE = 1_000
"""Collectors whose tasks do not meet; those with numbers that far apart play the same tasks with other seeds."""
TRIES = 3
"""Times an episode is begun that ends unscored, before it is left out."""
MAX_REST_S = 30.0
"""Longest pause after episodes that broke one after the other: the engine or a tool server is down."""
SERVER_WAIT_S = 120.0
"""Seconds a server may take to be there."""
TOLD_S = 10.0
"""Seconds between two lines of progress."""


@dataclass
class Collecting:
    """One collector's stream of episodes.

    Args:
        config: sampling, budgets, seed, staleness on purpose.
        store: appended to.
        registry: followed.
        collector: plays; its engine takes the weights where it has a ``load_weights``.
        number, of: which collector this is, from 0, and how many there are.
        episodes: how many to play in all lives together; None is no end.
        say: told of progress, one line at a time.

    Attributes:
        stored: episodes appended in this life. version: policy version served now, -1 before the first.
    """

    config: RunConfig
    store: ReplayStore
    registry: PolicyRegistry
    engine: Any
    collector: Collector
    spool: Spool
    number: int = 0
    of: int = 1
    episodes: int | None = None
    say: Callable[[str], None] = lambda text: None
    stored: int = 0
    left_out: int = 0
    version: int = -1
    paused: bool = False
    _learners: list[Learnt] = field(default_factory=list)
    _in_store: int = 0
    _again: deque[int] = field(default_factory=deque)
    _tries: Counter[int] = field(default_factory=Counter)
    _broken: int = 0

    # ----------------------------------------------------------------------------------------------- which episodes

    def place(self, nth: int) -> tuple[int, int]:
        """Task and seed of this collector's ``nth`` episode. No two collectors of a run share both."""
        lap, own = divmod(nth, TASKS_PER_SEED // STRIDE)
        index = self.config.seed * TASKS_PER_SEED + own * STRIDE + self.number % STRIDE
        return index, mix(self.config.seed, "collector", self.number, lap)

    def episode_id(self, nth: int) -> str:
        """Id of this collector's ``nth`` episode, the same in every life."""
        index, seed = self.place(nth)
        return self.collector.episode_id("train", index, 0, seed)

    def _order(self) -> Iterator[int]:
        """Its episodes that the store does not hold from their first turn to their last, in order."""
        view = self.store.snapshot()
        status = {key.episode_id: row.status for key, row in view.rows.items()}
        for nth in count() if self.episodes is None else range(self.episodes):
            own = self.episode_id(nth)
            if own not in status or (status[own] == "salvaged" and not _ended(view.episode(own))):
                yield nth

    # -------------------------------------------------------------------------------------------------- following

    async def follow(self) -> None:
        """Take new weights and the learner's word whenever there are some, for ever.

        Where these cannot be read, episodes in flight go on as before; the pause until the next look grows.
        """
        pause = POLL_S
        while True:
            try:
                await self.look()
                pause = POLL_S
            except CorruptionError:
                raise
            except StoreError as error:
                pause = min(2 * pause, MAX_REST_S)
                self.say(f"the next look is in {pause:g} s: {error}")
            await asyncio.sleep(pause)

    async def look(self) -> None:
        """One look at registry, pins and store."""
        await self._take_policy()
        self._learners, self._in_store = await asyncio.to_thread(
            lambda: (learners(self.store), episodes_in(self.store.snapshot())))

    async def _take_policy(self) -> None:
        wanted = await asyncio.to_thread(self._wanted)
        if wanted is None or wanted == self.version:
            return
        try:
            about = await asyncio.to_thread(self._record, wanted)
            if hasattr(self.engine, "load_weights"):
                self.engine.load_weights(await asyncio.to_thread(self.registry.load, wanted), wanted)
            elif about.kind == "adapter":
                self.engine.use(f"{self.engine.facts.base}@v{wanted}")
        except (RegistryError, CorruptionError):
            if wanted in await asyncio.to_thread(self.registry.versions):
                raise
            return  # pruned in the meantime: there is a newer one to take at the next look
        self.version = wanted

    def _wanted(self) -> int | None:
        """The version to serve: as far behind the latest as is wanted; of a server, what the publisher gave it.

        Where the publisher had nothing to do, the server was started with the version it calls its own.
        """
        if hasattr(self.engine, "load_weights"):
            return held_behind(self.registry, self.config.staleness)
        given = self.registry.served(self.engine.url).version
        return given if given is not None else self.engine.version if self.engine.version >= 0 else None

    def _record(self, version: int) -> Manifest:
        """Tell the store what the version is, before anything is stored that it sampled; its manifest."""
        about = self.registry.manifest(version)
        self.store.record_policy(version, {
            "weights_id": about.weights_id, "tokenizer_sha256": about.tokenizer_sha256,
            "chat_template_sha256": about.chat_template_sha256, "vocab_size": self.engine.vocab_size})
        return about

    def may_begin(self, in_flight: int) -> bool:
        """Whether one more episode may begin; the other collectors are taken to have as many in flight."""
        return all(one.may_begin(self._in_store, in_flight=in_flight * self.of) for one in self._learners)

    # ---------------------------------------------------------------------------------------------------- playing

    async def run(self) -> None:
        """Play until all episodes are stored, or for ever.

        Raises:
            EngineError: none of the last episodes could be scored, each tried several times.
            ConfigError, ModelError, TruncatedSampling, JournalError: see :meth:`Collector.collect`.
        """
        told = float("-inf")
        while self.version < 0:
            await self.look()
            if self.version < 0:
                if time.monotonic() - told > TOLD_S:
                    told = time.monotonic()
                    self.say(f"waiting for the first policy version in {self.registry.root}")
                await asyncio.sleep(POLL_S)
        follower = asyncio.create_task(self.follow())
        try:
            await self._stream(follower)
        finally:
            follower.cancel()

    async def _stream(self, follower: asyncio.Task[None]) -> None:
        order, running, told = self._order(), dict[asyncio.Task[Episode], int](), time.monotonic()
        more = True
        try:
            while more or running or self._again:
                more = self._begin(order, running) if more or self._again else more
                await asyncio.wait([*running, follower], timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED)
                if follower.done():
                    follower.result()
                await self._take(running)
                if time.monotonic() - told > TOLD_S:
                    told = time.monotonic()
                    self.say(self.words(len(running)))
        finally:
            for task in running:
                task.cancel()
            ended = [task for task in running if task.done() and not task.cancelled() and task.exception() is None]
            self.keep([task.result() for task in ended])
            await asyncio.gather(*running, return_exceptions=True)

    def _begin(self, order: Iterator[int], running: dict[asyncio.Task[Episode], int]) -> bool:
        """Begin as many episodes as may begin now; False when there is none left that was not begun once."""
        self.paused = False
        while len(running) < self.config.collect.concurrency:
            if not self.may_begin(len(running)):
                self.paused = True
                return True
            nth = self._again.popleft() if self._again else next(order, None)
            if nth is None:
                return False
            index, seed = self.place(nth)
            running[asyncio.create_task(self.collector.collect_one("train", index, seed=seed))] = nth
        return True

    async def _take(self, running: dict[asyncio.Task[Episode], int]) -> None:
        """Store what has ended; what broke is tried again, after a rest that grows with every one that breaks."""
        ended = {task: running.pop(task) for task in list(running) if task.done()}
        if not ended:
            return
        episodes = [task.result() for task in ended]
        await asyncio.shield(asyncio.create_task(asyncio.to_thread(self.keep, episodes)))
        broken = [(nth, e) for nth, e in zip(ended.values(), episodes, strict=True) if e.grade is None]
        self._broken = self._broken + len(broken) if len(broken) == len(episodes) else 0
        for nth, episode in broken:
            self._try_again(nth, episode)
        if self._broken:
            await asyncio.sleep(min(POLL_S * 2 ** min(self._broken, 10), MAX_REST_S))

    def _try_again(self, nth: int, episode: Episode) -> None:
        why = episode.metadata.get("error", "no reason was recorded")
        self._tries[nth] += 1
        if self._tries[nth] < TRIES:
            self._again.append(nth)
            self.say(f"episode {nth} could not be scored and will be played again: {why}")
            return
        self.left_out += 1
        self.say(f"episode {nth} is left out, it could not be scored {TRIES} times: {why}")
        if not self.stored and self.left_out > self.config.collect.concurrency:
            raise EngineError(f"none of the first {self.left_out} episodes could be scored: {why}",
                              fix="mend the engine or the environment, then start the collector again")

    def keep(self, episodes: list[Episode]) -> None:
        """Append what was scored; the journals have done their work."""
        scored = [e for e in episodes if e.branches and e.grade is not None]
        self.store.append(scored)
        self.spool.seal(e.episode_id for e in episodes)
        self.stored += len(scored)
        self._in_store += len(scored)

    def words(self, in_flight: int) -> str:
        """Where it stands, in one line."""
        wait = "; waiting, the learner is behind" if self.paused else ""
        return f"{self.stored} episodes stored, {in_flight} in flight, policy version {self.version}{wait}"


def held_behind(registry: PolicyRegistry, staleness: int) -> int | None:
    """The version a collector serves: ``staleness`` publishes behind the latest, but none that was given up.

    A version whose parent is not the one before it came of a roll-back: those in between were given up.

    >>> import numpy as np, tempfile
    >>> registry = PolicyRegistry(tempfile.mkdtemp())
    >>> held_behind(registry, 2) is None
    True
    >>> for parent in (None, 0, 1, 0):
    ...     version = registry.publish({"w": np.zeros(1, np.float32)}, learner_step=0, parent=parent)
    >>> held_behind(registry, 0), held_behind(registry, 2)
    (3, 3)
    """
    latest = registry.latest()
    if latest is None:
        return None
    oldest = behaviour_version(latest, staleness=staleness)
    for version in range(latest, oldest, -1):
        if registry.manifest(version).parent != version - 1:
            return version
    return oldest


def _ended(episode: Episode) -> bool:
    """Whether a salvaged episode had come to its end and was graded when its collector was killed."""
    return bool(episode.metadata.get("salvaged", {}).get("finished")) and episode.grade is not None


def check_ungrouped(config: RunConfig) -> None:
    """Refuse groups of attempts. Raises ConfigError."""
    if config.group > 1:
        raise ConfigError(f"group is {config.group}, but collectors that are programs of their own play each task once",
                          fix="collect and learn in one process with `agentsdpo train`, or set group = 1")


def assemble_collector(config: RunConfig, uri: str, policies: str, *, engine: str = "inprocess", number: int = 0,
                       of: int = 1, episodes: int | None = None,
                       say: Callable[[str], None] = lambda text: None) -> Collecting:
    """Build a collector; the store is made if there is none, and what this machine's dead collectors left is salvaged.

    Args:
        config: of the run.
        uri: folder of a replay store or ``s3://bucket/prefix``.
        policies: the policy registry, a folder or ``s3://bucket/prefix``.
        engine: ``inprocess``, or the URL of an inference server.
        number, of, episodes, say: see :class:`Collecting`.

    Raises:
        ModelError, ConfigError, TokenizerMismatch, StoreError: see the parts.
    """
    from agentsdpo.assemble import check_request

    check_ungrouped(config)
    path, chat, suite = check_request(config)
    served = make_engine(engine, config, path, chat)
    store = ReplayStore.open(uri)
    spool = Spool(store, config.replay.durability, config.replay.spool)
    recover(store, spool=spool.folder)
    collector = Collector.of_engine(suite, served, chat, config.collect, run_id=run_id(config), model_id=config.model,
                                    spool=spool)
    return Collecting(config, store, open_registry(policies), served, collector, spool, number=number, of=of,
                      episodes=episodes, say=say)


def make_engine(name: str, config: RunConfig, path: Any, chat: Any) -> Any:
    """The engine of a collector or an evaluator: ``inprocess``, or a server's URL."""
    if name == "inprocess":
        from agentsdpo.assemble import inprocess_engine

        return inprocess_engine(config.collect, path, chat)
    from transformers import AutoConfig

    from agentsdpo.collect.vllm import VllmEngine

    vocab_size = AutoConfig.from_pretrained(path).get_text_config().vocab_size
    return VllmEngine(name, eos_ids=(chat.eos_id,), vocab_size=vocab_size, wait_s=SERVER_WAIT_S)


def collect(config: RunConfig, uri: str, policies: str, **more: Any) -> Json:
    """Collect until all episodes are stored, or until interrupted; arguments as of :func:`assemble_collector`.

    Returns:
        ``store``, ``episodes`` stored in this life, ``left_out``, ``version``.

    Raises:
        KeyboardInterrupt: interrupted; what had ended is in the store, what had not in the journals.
    """
    program = assemble_collector(config, uri, policies, **more)
    try:
        asyncio.run(program.run())
    finally:
        program.store.close()
    return {"store": program.store.storage.uri, "episodes": program.stored, "left_out": program.left_out,
            "version": program.version}
