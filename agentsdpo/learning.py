"""What the learner turns over, with a collector beside it (``loop.py``) or alone on a store (``offline.py``)."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from agentsdpo.chat import ChatFormat
from agentsdpo.config import RunConfig
from agentsdpo.errors import LearnError, RunError
from agentsdpo.hint.audit import hint_metrics
from agentsdpo.hint.render import hint_ids
from agentsdpo.learn.checkpoint import load_checkpoint, save_checkpoint, versions_kept
from agentsdpo.learn.learner import Learner
from agentsdpo.learn.rows import TrainRow
from agentsdpo.learn.trackers import tracking
from agentsdpo.learn.tripwire import Tripwire
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.replay.rows import Row
from agentsdpo.replay.sampling.sampler import Sampler
from agentsdpo.replay.store import ReplayStore
from agentsdpo.runfolder import RunFolder
from agentsdpo.track import MetricsWriter
from agentsdpo.types import Branch, Json

REDRAWS = 16
"""Draws without a single hint before a step is given up."""


@dataclass(kw_only=True)
class Learning:
    """Learner, store and registry of one run. ``version`` is the learner's policy version: of the newest publish."""

    config: RunConfig
    folder: RunFolder
    chat: ChatFormat
    store: ReplayStore
    sampler: Sampler
    learner: Learner
    registry: PolicyRegistry
    tripwire: Tripwire = field(default_factory=Tripwire)
    version: int = 0

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.learner.step_count

    @property
    def ends(self) -> bool:
        """Whether the last step was taken."""
        return self.step >= self.config.steps

    def restore_or_begin(self) -> None:
        """Continue from the newest checkpoint; without one, publish the first version and save the state before step 1.

        Versions published after the checkpoint are published again.

        Raises:
            LearnError: no checkpoint can be read. RunError: they are of a run on another store.
        """
        if any(self.folder.checkpoint.glob("step-*")):
            saved = load_checkpoint(self.folder.checkpoint, self.learner)
            self.version = saved.version
            self.registry.rewind(saved.version)
            self.load_state(saved.sampler)
            return
        if self.registry.latest() is None:
            self.publish()
        else:  # an earlier life of the run was killed before its first checkpoint
            self.version = self.registry.versions()[0]
            self.registry.rewind(self.version)
            self.announce()
        self.checkpoint()

    def checkpoint(self) -> None:
        """Save all that the next step depends on, then let go of versions nobody can ask for again."""
        config = self.config
        save_checkpoint(self.folder.checkpoint, self.learner, version=self.version, sampler=self.state(),
                        keep=config.checkpoint_keep, keep_every=config.checkpoint_keep_every,
                        spare=self.tripwire.steps_kept())
        spare = {old for version in versions_kept(self.folder.checkpoint, 2)  # should the newest turn out damaged
                 for old in range(version - config.staleness, version + 1)}
        self.registry.prune(config.publish.keep, staleness=config.staleness, spare=spare)

    def state(self) -> Json:
        """What a checkpoint holds besides the learner."""
        return {"store": self.store.about["store_id"], "sampler": self.sampler.state_dict(),
                "tripwire": self.tripwire.state_dict()}

    def load_state(self, saved: Json) -> None:
        """Put :meth:`state` back.

        Raises:
            RunError: it is of a run on another store.
        """
        if saved["store"] != self.store.about["store_id"]:
            raise RunError(f"{self.folder.path} learnt from store {saved['store']}, {self.store.storage.uri} is "
                           f"{self.store.about['store_id']}", fix="go on with the store and verb it was started with")
        self.sampler.load_state_dict(saved["sampler"])
        self.tripwire.load_state_dict(saved["tripwire"])

    def publish(self, *, parent: int | None = None) -> None:
        """Make the learner's weights the next policy version."""
        self.version = self.registry.publish(self.learner.policy(), learner_step=self.step, parent=parent)
        self.announce()

    def announce(self) -> None:
        """Tell whoever must know that a version was published; the registry is enough for a learner alone."""

    def draw(self) -> list[Row]:
        """One batch, within the staleness bound as it stands; the sampler's own one is part of what it is, so lent."""
        own = self.sampler.max_staleness
        self.sampler.max_staleness = self.tripwire.staleness(own, self.step)
        try:
            return self.sampler.sample(self.config.learn.batch, self.version)
        finally:
            self.sampler.max_staleness = own

    def hinted(self) -> list[Row]:
        """A batch with a hint in it; draws again while there is none (an attempt that failed nothing may have none).

        Raises:
            LearnError: nothing is eligible, or nothing eligible has a hint.
        """
        for _ in range(REDRAWS):
            drawn = self.draw()
            if any(row.hint for row in drawn):
                return drawn
        raise self.unhinted()

    def unhinted(self) -> LearnError:
        """The error of a step for which no row with a hint can be drawn."""
        return LearnError(f"no row with a hint can be drawn at step {self.step + 1}: "
                          f"{self.sampler.explain(self.version)}",
                          fix="start a run with a larger learn.max_staleness or episodes_per_step, or with hint.scope "
                              "'all'")

    def rows(self, drawn: list[Row]) -> list[TrainRow]:
        """Store rows as the learner takes them."""
        told = self.chat.marks_calls or self.config.learn.tool_weight != 1.0  # the latter asks for what it cannot have
        return [TrainRow(branch=row.branch, hint_ids=hint_ids(self.chat, row.hint) if row.hint else None,
                         episode_id=row.key.episode_id, train_allowed=row.train_allowed,
                         tokenizer_sha256=row.tokenizer_sha256, chat_template_sha256=row.chat_template_sha256,
                         score=row.reward, group=row.group_id, source=row.hint.source if row.hint else "",
                         tool=tool_tokens(self.chat, row.branch) if told else None) for row in drawn]


def update(run: Learning) -> Json:
    """Draw rows, take one optimiser step and publish.

    Returns:
        Numbers of the step, as ``metrics.jsonl`` takes them.

    Raises:
        LearnError: nothing can be drawn or trained on, or the step is not finite; nothing was updated.
    """
    config, wire, began = run.config, run.tripwire, time.monotonic()
    drawn = run.hinted()
    run.learner.restrain(lr_factor=wire.lr_factor(run.step), hold_teacher=wire.withheld(run.step))
    report = run.learner.step(run.rows(drawn), run.version)
    updated = time.monotonic()
    if (run.step % config.publish.every == 0 or run.ends) and not wire.withheld(run.step):
        run.publish()
    return {**hint_metrics(run.chat, drawn), **report.metrics, **run.sampler.metrics(), "version": run.version,
            "learn/rows": report.n_trained, "learn/tokens": report.n_tokens,
            "publish/lag_s": time.monotonic() - updated, "learn/step_s": time.monotonic() - began}


@contextmanager
def recording(run: Learning, *, resume: bool) -> Iterator[MetricsWriter]:
    """``metrics.jsonl`` from where the run stands, and the trackers that are told of it."""
    config = run.config
    with (tracking(config.track, name=config.name, folder=run.folder.path,
                   settings=config.model_dump(mode="json")) as tell,
          MetricsWriter(run.folder.metrics, resume_step=run.step if resume else None, mirror=tell) as metrics):
        yield metrics


def tool_tokens(chat: ChatFormat, branch: Branch) -> np.ndarray:
    """Which tokens of a branch belong to the agent's own tool calls, bool[T]."""
    found = np.zeros(len(branch.token_ids), dtype=bool)
    for call in branch.calls:
        found[call.start:call.end] = chat.in_calls(branch.token_ids[call.start:call.end].tolist())
    return found
