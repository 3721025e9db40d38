"""Putting a run together from its configuration: model, engine, suite, store, learner, registry."""

import hashlib
import importlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentsdpo.chat import ChatFormat
from agentsdpo.collect.collector import Collector
from agentsdpo.collect.inprocess import InProcessEngine
from agentsdpo.config import SEED_MODEL, RunConfig
from agentsdpo.envs.desk import PRESETS, DeskSuite
from agentsdpo.envs.desk.seed import seed_path
from agentsdpo.errors import ConfigError, HintError
from agentsdpo.hint.render import render_teacher
from agentsdpo.hint.sources import CriteriaSource
from agentsdpo.learn.checkpoint import load_checkpoint, save_checkpoint
from agentsdpo.learn.learner import Learner
from agentsdpo.learn.load import load_chat, load_model
from agentsdpo.learn.rows import TrainRow
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.replay.rows import Row
from agentsdpo.replay.sampler import Sampler
from agentsdpo.replay.store import ReplayStore
from agentsdpo.runfolder import RunFolder, open_run
from agentsdpo.types import Episode, Suite

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
    sampler: Sampler
    learner: Learner
    registry: PolicyRegistry
    version: int = 0
    totals: dict[str, int] = field(default_factory=lambda: {"episodes": 0, "env_steps": 0, "tokens": 0})

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.learner.step_count

    def begin(self) -> None:
        """Publish version 0 and save the state before the first step."""
        if self.registry.latest() is None:
            self.publish()
        else:  # an earlier life of the run was killed before its first checkpoint
            self.registry.rewind(0)
        self.checkpoint()

    def publish(self) -> None:
        """Make the learner's weights the next policy version, known to registry and store."""
        self.version = self.registry.publish(self.learner.model.state_dict(), learner_step=self.step)
        about = self.registry.manifest(self.version)
        self.store.record_policy(self.version, {
            "weights_id": about.weights_id, "tokenizer_sha256": about.tokenizer_sha256,
            "chat_template_sha256": about.chat_template_sha256, "vocab_size": self.engine.vocab_size})

    def missing(self, indices: Iterable[int]) -> list[int]:
        """Training tasks of this run that are not in the store yet: an earlier life may have played some."""
        have = {key.episode_id for key in self.store.snapshot().keys()}  # noqa: SIM118 - a snapshot is no dict
        return [index for index in indices if self._id(index) not in have]

    def keep(self, episodes: list[Episode]) -> None:
        """Give fresh episodes their hints and store those that began."""
        played = [e for e in episodes if e.branches]  # none: the engine broke before the first token
        hinted = [e.model_copy(update={"hint": self.hinter.hint(e)}) for e in played]
        self.store.append(hinted)

    def stored(self, indices: Iterable[int]) -> list[Episode]:
        """Training episodes as the store has them."""
        snapshot = self.store.snapshot()
        return [snapshot.episode(self._id(index)) for index in indices]

    def _id(self, index: int) -> str:
        return self.collector.episode_id("train", index, 0, self.config.seed)

    def load_policy(self, version: int) -> None:
        """Serve one version of the registry."""
        if self.engine.version != version:
            self.engine.load_weights(self.registry.load(version), version)

    def rows(self, drawn: list[Row]) -> list[TrainRow]:
        """Store rows as the learner takes them; a hint that cannot be rendered leaves the row without one."""
        return [TrainRow(branch=row.branch, hint_ids=self._hint_ids(row), episode_id=row.key.episode_id,
                         train_allowed=row.train_allowed, tokenizer_sha256=row.tokenizer_sha256,
                         chat_template_sha256=self.chat.template_sha256) for row in drawn]

    def _hint_ids(self, row: Row) -> tuple[int, ...] | None:
        if row.hint is None:
            return None
        try:
            window = self.learner.model.config.max_position_embeddings
            return render_teacher(self.chat, row.hint, row.branch.token_ids, window=window).hint_ids
        except HintError:
            return None  # counted by the learner as refused/no_hint

    def checkpoint(self) -> None:
        """Save all that the next step depends on, then let go of versions nobody can ask for again."""
        state = {"sampler": self.sampler.state_dict(), "totals": self.totals}
        save_checkpoint(self.folder.checkpoint, self.learner, version=self.version, sampler=state)
        self.registry.prune(self.config.publish.keep, staleness=self.config.staleness)

    def restore(self) -> None:
        """Continue from the newest checkpoint: versions published after it are published again."""
        saved = load_checkpoint(self.folder.checkpoint, self.learner)
        self.sampler.load_state_dict(saved.sampler["sampler"])
        self.totals, self.version = saved.sampler["totals"], saved.version
        self.registry.rewind(saved.version)


def run_id(config: RunConfig) -> str:
    """Name and settings in one word: two runs of the same settings make the same episode ids, others never do.

    >>> run_id(RunConfig(steps=5)) == run_id(RunConfig(steps=9)) != run_id(RunConfig(seed=1))
    True
    """
    text = json.dumps(config.model_dump(mode="json", exclude={"steps"}), sort_keys=True)
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


def assemble(config: RunConfig, out: Path | str, *, resume: bool = False) -> Run:
    """Build every part of a run and its folder; nothing is sampled or trained yet.

    Whatever can be wrong with the request is found before the folder is made.

    Raises:
        ModelError, TokenizerMismatch, ConfigError, RunError, StoreError: see the parts.
    """
    path = seed_path() if config.model == SEED_MODEL else config.model
    chat, suite = load_chat(path), make_suite(config)
    student, behaviour = load_model(path, chat), load_model(path, chat)
    for split in ("train", *config.eval.splits, *config.eval.final_splits):
        suite.task(split, 0)
    learner = Learner(student, config.learn)
    engine = InProcessEngine(behaviour, chat.eos_id, max_slots=config.collect.concurrency,
                             window=config.collect.window)
    collector = Collector.of_engine(suite, engine, chat, config.collect, run_id=run_id(config), model_id=config.model)
    folder = open_run(out, config, resume=resume)
    store = ReplayStore.open(folder.replay)
    registry = PolicyRegistry(folder.policies, base_model=config.model, tokenizer_sha256=chat.tokenizer_sha256,
                              chat_template_sha256=chat.template_sha256)
    sampler = Sampler(store, config.replay, seed=config.seed, tokenizer_sha256=chat.tokenizer_sha256,
                      max_staleness=config.learn.max_staleness)
    return Run(config=config, folder=folder, chat=chat, suite=suite, engine=engine, collector=collector,
               hinter=CriteriaSource(config.hint, author=f"{suite.name} grader"), store=store, sampler=sampler,
               learner=learner, registry=registry)


def evaluator(run: Run, *, greedy: bool) -> Collector:
    """A collector that plays without feedback, hints or permission to train."""
    config: Any = run.config.collect.model_copy(update={"temperature": 0.0} if greedy else {})
    return Collector.of_engine(run.suite, run.engine, run.chat, config, evaluate=True)
