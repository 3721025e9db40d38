"""Putting a run together from its configuration: model, engine, suite, store, learner, registry."""

import hashlib
import importlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from agentsdpo.chat import ChatFormat
from agentsdpo.collect.collector import Collector
from agentsdpo.collect.inprocess import InProcessEngine
from agentsdpo.config import SEED_MODEL, RunConfig
from agentsdpo.envs.desk import PRESETS, DeskSuite
from agentsdpo.envs.desk.seed import seed_path
from agentsdpo.errors import ConfigError, RunError, StoreError
from agentsdpo.hint.render import hint_ids
from agentsdpo.hint.sources import CriteriaSource
from agentsdpo.learn.checkpoint import load_checkpoint, save_checkpoint
from agentsdpo.learn.learner import Learner
from agentsdpo.learn.load import load_chat, load_model
from agentsdpo.learn.rows import TrainRow
from agentsdpo.learn.tripwire import Tripwire, TripwireConfig
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.replay.rows import Row
from agentsdpo.replay.sampling.index import SideIndex
from agentsdpo.replay.sampling.sampler import Sampler
from agentsdpo.replay.spool import Spool
from agentsdpo.replay.store import ReplayStore
from agentsdpo.replay.upkeep.maintain import evict
from agentsdpo.replay.upkeep.recover import recover
from agentsdpo.runfolder import RunFolder, open_run
from agentsdpo.types import Branch, Episode, Suite

TASKS_PER_SEED = 10_000_000
"""Training tasks of two seeds never meet."""


@dataclass
class Run:
    """Everything a loop turns over. ``version`` is the learner's policy version: that of the newest publish."""

    config: RunConfig
    folder: RunFolder
    chat: ChatFormat
    suite: Suite
    engine: InProcessEngine
    collector: Collector
    hinter: CriteriaSource
    store: ReplayStore
    spool: Spool
    sampler: Sampler
    learner: Learner
    registry: PolicyRegistry
    tripwire: Tripwire = field(default_factory=Tripwire)
    version: int = 0
    totals: dict[str, int] = field(default_factory=lambda: {"episodes": 0, "env_steps": 0, "tokens": 0})

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.learner.step_count

    def restore_or_begin(self) -> None:
        """Continue from the newest checkpoint; without one, publish version 0 and save the state before the first step.

        Versions published after the checkpoint are published again.
        """
        if any(self.folder.checkpoint.glob("step-*")):
            saved = load_checkpoint(self.folder.checkpoint, self.learner)
            self.sampler.load_state_dict(saved.sampler["sampler"])
            self.totals, self.version = saved.sampler["totals"], saved.version
            self.tripwire.load_state_dict(saved.sampler["tripwire"])
            self.registry.rewind(saved.version)
            self.tombstone()
            return
        if self.registry.latest() is None:
            self.publish()
        else:  # an earlier life of the run was killed before its first checkpoint
            self.registry.rewind(0)
            self._record(0)
        self.checkpoint()

    def checkpoint(self) -> None:
        """Save all that the next step depends on, then let go of versions nobody can ask for again."""
        state = {"sampler": self.sampler.state_dict(), "totals": self.totals, "tripwire": self.tripwire.state_dict()}
        save_checkpoint(self.folder.checkpoint, self.learner, version=self.version, sampler=state,
                        spare=self.tripwire.steps_kept())
        self.registry.prune(self.config.publish.keep, staleness=self.config.staleness)

    def publish(self, *, parent: int | None = None) -> None:
        """Make the learner's weights the next policy version, known to registry and store."""
        self.version = self.registry.publish(self.learner.policy(), learner_step=self.step, parent=parent)
        self._record(self.version)

    def _record(self, version: int) -> None:
        about = self.registry.manifest(version)
        try:
            self.store.record_policy(version, {
                "weights_id": about.weights_id, "tokenizer_sha256": about.tokenizer_sha256,
                "chat_template_sha256": about.chat_template_sha256, "vocab_size": self.engine.vocab_size})
        except StoreError as error:
            raise RunError(f"policy version {version} came out differently than before the run was stopped ({error})",
                           fix="resume on the same machine with the same number of threads, or start a new run"
                           ) from error

    def count(self, episodes: list[Episode]) -> None:
        """Add fresh episodes, their tool calls and sampled tokens to the totals."""
        more = {"episodes": len(episodes), "env_steps": sum(e.metadata.get("calls", 0) for e in episodes),
                "tokens": sum(b.n_sampled for e in episodes for b in e.branches)}
        self.totals = {key: value + more[key] for key, value in self.totals.items()}

    def draw(self) -> list[Row]:
        """One batch, within the staleness bound as it stands; the sampler's own one is part of what it is, so lent."""
        own = self.sampler.max_staleness
        self.sampler.max_staleness = self.tripwire.staleness(own, self.step)
        try:
            return self.sampler.sample(self.config.learn.batch, self.version)
        finally:
            self.sampler.max_staleness = own

    def tombstone(self) -> int:
        """Hide what versions given up in a roll-back sampled from all later draws; how many branches are hidden anew.

        One entry in the store's own log: nothing is deleted, and ``replay unevict`` shows them again.
        """
        void = self.tripwire.state.abandoned
        rows = self.store.snapshot().rows.items() if void else ()
        keys = [key for key, row in rows if any(low <= row.version_max <= high for low, high in void)]
        reason = f"rolled back: policy versions {', '.join(f'{low} to {high}' for low, high in void)} were given up"
        return len(evict(self.store, keys, reason=reason).keys) if keys else 0

    def stored(self, indices: Iterable[int]) -> dict[int, Episode]:
        """Whole training episodes the store has already, by task: an earlier life of the run may have played some."""
        snapshot = self.store.snapshot()
        have = {key.episode_id for key, row in snapshot.rows.items() if row.status != "salvaged"}
        ids = {index: self.collector.episode_id("train", index, 0, self.config.seed) for index in indices}
        return {index: snapshot.episode(own) for index, own in ids.items() if own in have}

    def keep(self, episodes: list[Episode]) -> list[Episode]:
        """Give fresh episodes their hints and store those that were scored; returns these."""
        scored = [e for e in episodes if e.branches and e.grade is not None]
        hinted = [e.model_copy(update={"hint": self.hinter.hint(e)}) for e in scored]
        self.store.append(hinted)
        self.spool.seal(e.episode_id for e in episodes)
        return hinted

    def load_policy(self, version: int) -> None:
        """Serve one version of the registry, with an empty cache: what is played depends on the version alone."""
        self.engine.load_weights(self.registry.load(version), version)

    def rows(self, drawn: list[Row]) -> list[TrainRow]:
        """Store rows as the learner takes them."""
        told = self.chat.marks_calls or self.config.learn.tool_weight != 1.0  # the latter asks for what it cannot have
        return [TrainRow(branch=row.branch, hint_ids=hint_ids(self.chat, row.hint) if row.hint else None,
                         episode_id=row.key.episode_id, train_allowed=row.train_allowed,
                         tokenizer_sha256=row.tokenizer_sha256, chat_template_sha256=row.chat_template_sha256,
                         score=row.reward, group=row.group_id, source=row.hint.source if row.hint else "",
                         tool=tool_tokens(self.chat, row.branch) if told else None) for row in drawn]


def tool_tokens(chat: ChatFormat, branch: Branch) -> np.ndarray:
    """Which tokens of a branch belong to the agent's own tool calls, bool[T]."""
    found = np.zeros(len(branch.token_ids), dtype=bool)
    for call in branch.calls:
        found[call.start:call.end] = chat.in_calls(branch.token_ids[call.start:call.end].tolist())
    return found


def run_id(config: RunConfig) -> str:
    """Name and settings in one word: two runs of the same settings make the same episode ids, others never do.

    >>> run_id(RunConfig(steps=5)) == run_id(RunConfig(steps=9)) != run_id(RunConfig(seed=1))
    True
    """
    unnamed = {"steps", "replay"} | ({"tripwire"} if config.tripwire == TripwireConfig() else set())
    settings = config.model_dump(mode="json", exclude=unnamed) | {"replay": config.replay.identity()}
    text = json.dumps(settings, sort_keys=True)
    return f"{config.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def make_suite(config: RunConfig) -> Suite:
    """The suite a configuration names: a preset of the desk world, or ``package.module:factory`` of the user's own.

    Raises:
        ConfigError: no such preset, module or factory.
    """
    name = config.suite
    if name in PRESETS:
        world = config.desk
        return DeskSuite(name, firm_seed=world.firm_seed, families=world.families, n=world.n, rows=world.rows,
                         distractors=world.distractors, fault_rate=world.fault_rate,
                         feedback_level=config.hint.level, hint_scope=config.hint.scope)
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(f"suite is {name!r}: {error}",
                          fix=f"use {' or '.join(PRESETS)}, or package.module:factory without arguments") from error


def check_request(config: RunConfig) -> tuple[Path | str, ChatFormat, Suite]:
    """Model path, chat format and suite of a configuration: all that can be asked for wrongly.

    Raises:
        ModelError, ConfigError: no such model, template, suite or split; an advantage that would be 0 everywhere.
    """
    if config.learn.mix != "pure" and config.learn.advantage == "grpo":
        raise ConfigError("learn.advantage is 'grpo' but a run plays every task once: alone in its group, each episode "
                          "has advantage 0", fix="set learn.advantage = \"reinforce\"")
    path = seed_path() if config.model == SEED_MODEL else config.model
    chat, suite = load_chat(path), make_suite(config)
    for split in ("train", *config.eval.splits, *config.eval.final_splits):
        suite.task(split, 0)
    return path, chat, suite


def assemble(config: RunConfig, out: Path | str, *, resume: bool = False) -> Run:
    """Build every part of a run and its folder; nothing is sampled or trained yet.

    Whatever can be wrong with the request is found before the folder is made.

    Raises:
        ModelError, TokenizerMismatch, ConfigError, RunError, StoreError: see the parts.
    """
    path, chat, suite = check_request(config)
    student, behaviour = load_model(path, chat), load_model(path, chat)
    learner = Learner(student, config.learn)
    engine = InProcessEngine(behaviour, chat.eos_id, max_slots=config.collect.concurrency,
                             window=config.collect.window)
    collector = Collector.of_engine(suite, engine, chat, config.collect, run_id=run_id(config), model_id=config.model)
    folder = open_run(out, config, resume=resume)
    store = ReplayStore.open(folder.replay)
    collector.spool = Spool(store, config.replay.durability, config.replay.spool)
    if resume:
        recover(store, spool=collector.spool.folder)
    registry = PolicyRegistry(folder.policies, base_model=config.model, tokenizer_sha256=chat.tokenizer_sha256,
                              chat_template_sha256=chat.template_sha256)
    sampler = Sampler(store, config.replay, seed=config.seed, tokenizer_sha256=chat.tokenizer_sha256,
                      max_staleness=config.learn.max_staleness, chat_template_sha256=chat.template_sha256,
                      index=SideIndex(folder.uses, store.about["store_id"]))
    return Run(config=config, folder=folder, chat=chat, suite=suite, engine=engine, collector=collector,
               hinter=CriteriaSource(config.hint, author=f"{suite.name} grader"), store=store, spool=collector.spool,
               sampler=sampler, learner=learner, registry=registry)


def evaluator(run: Run, *, greedy: bool) -> Collector:
    """A collector that plays without feedback, hints or permission to train."""
    config: Any = run.config.collect.model_copy(update={"temperature": 0.0} if greedy else {})
    return Collector.of_engine(run.suite, run.engine, run.chat, config, evaluate=True)
