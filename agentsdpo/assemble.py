"""Putting a run together from its configuration: model, engine, suite, store, learner, registry."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentsdpo.chat import ChatFormat
from agentsdpo.collect.collector import Collector
from agentsdpo.collect.config import CollectConfig
from agentsdpo.collect.inprocess import InProcessEngine
from agentsdpo.config import RunConfig
from agentsdpo.errors import ConfigError, RunError, StoreError
from agentsdpo.hint.hinter import Hinter, make_hinter
from agentsdpo.learn.learner import Learner
from agentsdpo.learn.load import load_chat, load_model, pick_device
from agentsdpo.learn.parallel import Ranks
from agentsdpo.learn.trackers import check_trackers
from agentsdpo.learning import Learning
from agentsdpo.publish.bucket import MirroredRegistry
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.replay.sampling.index import SideIndex
from agentsdpo.replay.sampling.limiter import RateLimiter
from agentsdpo.replay.sampling.sampler import Sampler
from agentsdpo.replay.snapshot import Snapshot
from agentsdpo.replay.spool import Spool
from agentsdpo.replay.store import ReplayStore
from agentsdpo.replay.upkeep.recover import recover
from agentsdpo.runfolder import RunFolder, open_run
from agentsdpo.suites import TASKS_PER_SEED as TASKS_PER_SEED  # callers find these among the parts of a run
from agentsdpo.suites import make_suite as make_suite
from agentsdpo.suites import model_path as model_path
from agentsdpo.suites import run_id as run_id
from agentsdpo.types import Episode, Json, Suite


@dataclass(kw_only=True)
class Run(Learning):
    """Everything a loop turns over: a learner with its own store, and who fills that."""

    suite: Suite
    engine: InProcessEngine
    collector: Collector
    hinter: Hinter
    spool: Spool

    def state(self) -> Json:
        """What a checkpoint holds besides the learner."""
        return {**super().state(), "totals": self.totals}

    def load_state(self, saved: Json) -> None:
        """Put :meth:`state` back, hide again what a roll-back before it had hidden, and remember what was played."""
        super().load_state(saved)
        self.totals = saved["totals"]
        self.tombstone()
        view = self.store.snapshot()
        self.hinter.remember(view.gather(oldest_first(view)))

    def announce(self) -> None:
        """Tell the store, which then takes no episode of this version that cannot be."""
        about = self.registry.manifest(self.version)
        try:
            self.store.record_policy(self.version, {
                "weights_id": about.weights_id, "tokenizer_sha256": about.tokenizer_sha256,
                "chat_template_sha256": about.chat_template_sha256, "vocab_size": self.engine.vocab_size})
        except StoreError as error:
            raise RunError(f"policy version {self.version} came out differently than before the run was stopped "
                           f"({error})", fix="resume on the same machine with the same number of threads, or start a "
                           "new run") from error

    def stored(self, wanted: Iterable[tuple[int, int]]) -> dict[tuple[int, int], Episode]:
        """Whole training episodes the store has already, by task and attempt: an earlier life of the run may have
        played some."""
        snapshot = self.store.snapshot()
        have = {key.episode_id for key, row in snapshot.rows.items() if row.status != "salvaged"}
        ids = {(index, attempt): self.collector.episode_id("train", index, attempt, self.config.seed)
               for index, attempt in wanted}
        return {place: snapshot.episode(own) for place, own in ids.items() if own in have}

    def keep(self, episodes: list[Episode]) -> list[Episode]:
        """Give fresh episodes their hints and store those that were scored; returns these."""
        scored = [e for e in episodes if e.branches and e.grade is not None]
        hints = self.hinter.hints(scored)
        hinted = [e.model_copy(update={"hint": hint}) for e, hint in zip(scored, hints, strict=True)]
        self.store.append(hinted)
        self.spool.seal(e.episode_id for e in episodes)
        return hinted

    def load_policy(self, version: int) -> None:
        """Serve one version of the registry, with an empty cache: what is played depends on the version alone."""
        self.engine.load_weights(self.registry.load(version), version)


def oldest_first(view: Snapshot) -> list[tuple[str, int]]:
    """Episodes and attempts of a store in the order they came in; one whose log was folded lists them by name."""
    rows = sorted(view.rows.values(), key=lambda row: row.ts_us)
    return list(dict.fromkeys((row.key.episode_id, row.key.attempt) for row in rows))


def make_learner(config: RunConfig, ranks: Ranks | None = None) -> Learner:
    """The learner of one process, from the model that the configuration names; on a GPU where there is one."""
    ranks, path = ranks or Ranks(device=pick_device()), model_path(config)
    model = load_model(path, load_chat(path), dtype=config.learn.dtype)
    return Learner(model, config.learn, ranks=ranks, device=ranks.device)


def inprocess_engine(config: CollectConfig, path: Path | str, chat: ChatFormat) -> InProcessEngine:
    """A model that plays in this process, in float32 on ``collect.device``.

    Raises:
        ModelError, ConfigError: no such model or device, or a window that it does not have.
    """
    return InProcessEngine(load_model(path, chat, device=pick_device(config.device)), chat.eos_id,
                           max_slots=config.concurrency, window=config.window)


def check_request(config: RunConfig) -> tuple[Path | str, ChatFormat, Suite]:
    """Model path, chat format and suite of a configuration: all that can be asked for wrongly.

    Raises:
        ModelError, ConfigError: no such model, template, suite or split; an advantage that would be 0 everywhere.
    """
    need_groups(config)
    check_trackers(config.track)
    path = model_path(config)
    chat, suite = load_chat(path), make_suite(config)
    for split in ("train", *config.eval.splits, *config.eval.final_splits):
        suite.task(split, 0)
    return path, chat, suite


def need_groups(config: RunConfig) -> None:
    """Refuse an advantage within groups that would be 0 everywhere. Raises ConfigError."""
    if config.learn.mix == "pure" or config.learn.advantage != "grpo":
        return
    if config.group == 1:
        raise ConfigError("learn.advantage is 'grpo' with group 1: alone in its group, each episode has advantage 0",
                          fix="set group to 4 or more, or learn.advantage = \"reinforce\"")
    if config.replay.unit != "group":
        raise ConfigError(f"learn.advantage is 'grpo' with replay.unit {config.replay.unit!r}: episodes of one group "
                          "would be drawn in different steps", fix="set replay.unit = \"group\"; learn.batch then "
                                                                   "counts groups")


def assemble(config: RunConfig, out: Path | str, *, resume: bool = False, ranks: Ranks | None = None) -> Run:
    """Build every part of a run and its folder; nothing is sampled or trained yet.

    Whatever can be wrong with the request is found before the folder is made.

    Raises:
        ModelError, TokenizerMismatch, ConfigError, RunError, StoreError: see the parts.
    """
    path, chat, suite = check_request(config)
    learner = make_learner(config, ranks)
    engine = inprocess_engine(config.collect, path, chat)
    collector = Collector.of_engine(suite, engine, chat, config.collect, run_id=run_id(config), model_id=config.model)
    folder = open_run(out, config, resume=resume)
    store = ReplayStore.open(folder.replay)
    collector.spool = Spool(store, config.replay.durability, config.replay.spool)
    if resume:
        recover(store, spool=collector.spool.folder)
    registry = make_registry(config, folder, chat)
    sampler = make_sampler(config, store, chat, index=SideIndex(folder.uses, store.about["store_id"]))
    return Run(config=config, folder=folder, chat=chat, suite=suite, engine=engine, collector=collector,
               hinter=make_hinter(config.hint, suite), store=store, spool=collector.spool,
               sampler=sampler, learner=learner, registry=registry)


def make_registry(config: RunConfig, folder: RunFolder, chat: ChatFormat, *, first: int = 0) -> PolicyRegistry:
    """Where a run publishes: its own folder, and the bucket that is a copy of it if one is named.

    Args:
        first: number of the first version.
    """
    about: Any = {"base_model": config.model, "tokenizer_sha256": chat.tokenizer_sha256,
                  "chat_template_sha256": chat.template_sha256, "first": first}
    if config.publish.mirror:
        return MirroredRegistry(folder.policies, config.publish.mirror, **about)
    return PolicyRegistry(folder.policies, **about)


def make_sampler(config: RunConfig, store: ReplayStore, chat: ChatFormat, *, index: SideIndex | None = None,
                 limiter: RateLimiter | None = None) -> Sampler:
    """The learner's position in a store."""
    return Sampler(store, config.replay, seed=config.seed, tokenizer_sha256=chat.tokenizer_sha256,
                   max_staleness=config.learn.max_staleness, chat_template_sha256=chat.template_sha256, index=index,
                   limiter=limiter)


def evaluator(run: Run, *, greedy: bool) -> Collector:
    """A collector that plays without feedback, hints or permission to train."""
    config: Any = run.config.collect.model_copy(update={"temperature": 0.0} if greedy else {})
    return Collector.of_engine(run.suite, run.engine, run.chat, config, evaluate=True)
