"""What the learner turns over, with a collector beside it (``loop.py``) or alone on a store (``offline.py``)."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from agentsdpo.chat import ChatFormat
from agentsdpo.config import RunConfig
from agentsdpo.errors import ConfigError, LearnError, NothingToLearn, RunError, RunOver
from agentsdpo.hint.audit import hint_metrics
from agentsdpo.hint.render import Placed, place
from agentsdpo.learn.checkpoint import versions_kept
from agentsdpo.learn.diagnostics import MISMATCH
from agentsdpo.learn.learner import Learner, StepReport
from agentsdpo.learn.rows import TrainRow
from agentsdpo.learn.together import Together
from agentsdpo.learn.trackers import tracking
from agentsdpo.learn.tripwire import MAX_ROLLBACKS, Tripwire
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.replay.ids import Key
from agentsdpo.replay.rows import Row
from agentsdpo.replay.sampling.sampler import Sampler
from agentsdpo.replay.store import ReplayStore
from agentsdpo.replay.upkeep.maintain import evict
from agentsdpo.runfolder import RunFolder
from agentsdpo.track import MetricsWriter
from agentsdpo.types import Branch, Episode, Json

REDRAWS = 16
"""Draws without a single hint before a step is given up."""
MAX_SKIPPED = 8
"""Steps in a row with nothing to train on after which a run stops: then it is not chance."""
NEW_RUN = "start a new run with a lower learn.lr or learn.max_staleness, or with preset robust"
"""What to do about a run whose roll-backs are spent."""


@dataclass(kw_only=True)
class Learning:
    """Learner, store and registry of one run.

    ``version`` is the learner's policy version: of the newest publish;
    ``skipped`` counts the steps in a row, up to now, that had nothing to train on; ``totals`` what was collected."""

    config: RunConfig
    folder: RunFolder
    chat: ChatFormat
    store: ReplayStore
    sampler: Sampler
    learner: Learner
    registry: PolicyRegistry
    tripwire: Tripwire = field(default_factory=Tripwire)
    version: int = 0
    skipped: int = 0
    totals: dict[str, int] = field(default_factory=lambda: {"episodes": 0, "env_steps": 0, "tokens": 0})

    @property
    def together(self) -> Together:
        """The learner with those of the run's other processes: all that changes or gathers weights goes through it."""
        return Together(self.learner)

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.learner.step_count

    @property
    def ends(self) -> bool:
        """Whether the last step was taken."""
        return self.step >= self.config.steps

    @property
    def ahead(self) -> bool:
        """Whether a step was learnt from since the newest version was published."""
        return self.registry.manifest(self.version).learner_step < self.step - self.skipped

    def restore_or_begin(self) -> None:
        """Continue from the newest checkpoint; without one, publish the first version and save the state before step 1.

        Versions published after the checkpoint are published again.

        Raises:
            LearnError: no checkpoint can be read. ConfigError, RunError, RunOver: see :meth:`load_state`.
        """
        if any(self.folder.checkpoint.glob("step-*")):
            saved = self.together.load(self.folder.checkpoint)
            self.version = saved.version
            self.load_state(saved.sampler)  # may refuse, and then nothing was deleted
            self.registry.rewind(saved.version)
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
        self.together.save(self.folder.checkpoint, version=self.version, sampler=self.state(),
                           keep=config.checkpoint_keep, keep_every=config.checkpoint_keep_every,
                           spare=self.tripwire.steps_kept() | {step for step, _ in self.awaited()})
        spare = {old for version in versions_kept(self.folder.checkpoint, 2)  # should the newest turn out damaged
                 for old in range(version - config.staleness, version + 1)}
        self.registry.prune(config.publish.keep, staleness=config.staleness,
                            spare=spare | {version for _, version in self.awaited()})

    def awaited(self) -> list[tuple[int, int]]:
        """Steps and versions that are being evaluated elsewhere: checkpoint and weights must stay."""
        return []

    def tombstone(self) -> int:
        """Hide what versions given up in a roll-back sampled from all later draws; how many branches are hidden anew.

        One entry in the store's own log: nothing is deleted, and ``replay unevict`` shows them again.
        """
        void = self.tripwire.state.abandoned
        rows = self.store.snapshot().rows.items() if void else ()
        keys = [key for key, row in rows if any(low <= row.version_max <= high for low, high in void)]
        reason = f"rolled back: policy versions {', '.join(f'{low} to {high}' for low, high in void)} were given up"
        return len(evict(self.store, keys, reason=reason).keys) if keys else 0

    def state(self) -> Json:
        """What a checkpoint holds besides the learner."""
        return {"store": self.store.about["store_id"], "sampler": self.sampler.state_dict(),
                "tripwire": self.tripwire.state_dict(), "skipped": self.skipped}

    def load_state(self, saved: Json) -> None:
        """Put :meth:`state` back.

        Raises:
            ConfigError: the run was begun by another verb. RunError: it is of a run on another store. RunOver: the
                tripwire has ended it.
        """
        begun, now = _verb(saved), _verb(self.state())
        if begun != now:
            raise ConfigError(f"{self.folder.path} was begun by `agentsdpo {begun}`, resuming asks for `{now}`",
                              fix="go on by the verb that began it, or start a new run")
        if saved["store"] != self.store.about["store_id"]:
            raise RunError(f"{self.folder.path} learnt from store {saved['store']}, {self.store.storage.uri} is "
                           f"{self.store.about['store_id']}", fix="go on with the store and verb it was started with")
        self.sampler.load_state_dict(saved["sampler"])
        self.tripwire.load_state_dict(saved["tripwire"])
        self.skipped = saved["skipped"]
        if self.tripwire.spent:
            raise RunOver(f"{self.folder.path} sounded a hard alarm after {MAX_ROLLBACKS} roll-backs; policy version "
                          f"{self.version} is its last good one", fix=NEW_RUN)

    def count(self, episodes: Sequence[Episode]) -> None:
        """Add fresh episodes, their tool calls and sampled tokens to the totals."""
        more = {"episodes": len(episodes), "env_steps": sum(e.metadata.get("calls", 0) for e in episodes),
                "tokens": sum(b.n_sampled for e in episodes for b in e.branches)}
        self.totals = {key: value + more[key] for key, value in self.totals.items()}

    def publish(self, *, parent: int | None = None) -> None:
        """Make the learner's weights the next policy version: of an adapter the factors alone, once there is a base."""
        low_rank = self.config.learn.adapter.rank and self.config.publish.kind != "full"
        base = self.registry.base() if low_rank else None
        trained = self.together.adapter() if base is not None else None
        if base is None or trained is None:
            self.version = self.registry.publish(self.together.policy(), learner_step=self.step, parent=parent)
        else:
            self.version = self.registry.publish_adapter(*trained, base=base, learner_step=self.step, parent=parent)
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

        A mix with a policy gradient of grades learns from rows without a hint as well.

        Raises:
            LearnError: nothing is eligible, or nothing eligible has a hint.
        """
        for _ in range(REDRAWS):
            drawn = self.draw()
            if any(row.hint or self.config.learn.mix != "pure" for row in drawn):
                return drawn
        raise self.unhinted()

    def unhinted(self) -> LearnError:
        """The error of a step for which no row with a hint can be drawn."""
        return LearnError(f"no row with a hint can be drawn at step {self.step + 1}: "
                          f"{self.sampler.explain(self.version)}",
                          fix="start a run with a larger learn.max_staleness or episodes_per_step, or with hint.scope "
                              "'all'")

    def rows(self, drawn: Row, weight: float = 1.0, draw: int = 0) -> list[TrainRow]:
        """A store row as the learner takes it; ``weight`` makes up for an uneven draw, ``draw`` counts earlier ones."""
        told = self.chat.marks_calls or self.config.learn.tool_weight != 1.0  # the latter asks for what it cannot have
        return train_rows(self.chat, drawn, tool=told, weight=weight, draw=draw, bare=self.config.learn.mix != "pure")


def update(run: Learning) -> Json:
    """Draw rows, take one optimiser step and publish; a batch with nothing to train on is skipped and counted.

    Returns:
        Numbers of the step, as ``metrics.jsonl`` takes them; without ``learn/loss`` when it was skipped.

    Raises:
        LearnError: no row with a hint can be drawn, or :data:`MAX_SKIPPED` batches in a row had nothing to train on.
        NotFinite: loss or gradient is not; nothing was updated.
    """
    began = time.monotonic()
    drawn = run.hinted()
    about = {**hint_metrics(run.chat, drawn), **run.sampler.metrics()}
    run.together.restrain(lr_factor=run.tripwire.lr_factor(run.step), hold_teacher=run.tripwire.withheld(run.step))
    seen = Counter[Key]()
    pairs: list[tuple[TrainRow, Row]] = []
    for one, weight in zip(drawn, run.sampler.weights, strict=True):
        pairs += [(row, one) for row in run.rows(one, float(weight), seen[one.key])]
        seen[one.key] += 1
    ahead = run.ahead
    try:
        report = run.together.step([row for row, _ in pairs], run.version)
    except NothingToLearn as error:
        about |= skip(run, error)
        if run.ahead:
            about |= publish_due(run)
    else:
        run.skipped = 0
        about |= {**report.metrics, "learn/rows": report.n_trained, "learn/tokens": report.n_tokens}
        for key in MISMATCH if ahead else ():  # between two publishes the weights differ, and no engine is to blame
            about.pop(key, None)
        remember(run, {id(row): one for row, one in pairs}, report)
        about |= publish_due(run)
    return {**about, "version": run.version, "learn/step_s": time.monotonic() - began}


def remember(run: Learning, drawn: Mapping[int, Row], report: StepReport) -> None:
    """Tell prioritised replay how far teacher and student are apart on each row; ``drawn`` by identity of its row.

    A branch that was refused is drawn no sooner than the one that has least to teach: left at the priority of what was
    never drawn, such branches would fill ever more of the batches. One without a hint, in a mix, stands there as well:
    it has no gap, and a priority of 0 would never be drawn again and shrink the importance weights of all others.
    """
    if run.config.replay.strategy == "prioritised":
        found: dict[Key, float] = {}
        for row, gap in report.gaps:  # of several rows of one branch the widest counts
            if row.hint_ids:
                key = drawn[id(row)].key
                found[key] = max(found.get(key, 0.0), gap)
        if found:
            least = min(found.values())
            run.sampler.update_priorities({one.key: least for one in drawn.values()} | found)


def _verb(state: Json) -> str:
    """What saves a state of these keys."""
    return "train --async` or `learn --follow" if "owed" in state else "train" if "totals" in state else "learn"


def publish_due(run: Learning) -> Json:
    """Publish the learner's weights where it is time for it and no alarm holds them back."""
    began = time.monotonic()
    if (run.step % run.config.publish.every == 0 or run.ends) and not run.tripwire.withheld(run.step):
        run.publish()
    return {"publish/lag_s": time.monotonic() - began}


def skip(run: Learning, error: NothingToLearn) -> Json:
    """Count a step as taken that had nothing to train on.

    Raises:
        LearnError: too many in a row, unless of this one the grades were all alike: nothing is wrong with those, and
            fresh ones may differ.
    """
    run.skipped += 1
    if run.skipped >= MAX_SKIPPED and error.reason != "alike":
        raise LearnError(f"{run.skipped} steps in a row had nothing to train on; the last: {error.what}",
                         fix=error.fix) from error
    run.together.count(run.step + 1)
    return {f"learn/skipped/{error.reason}": 1.0, "learn/rows": 0, "learn/tokens": 0}


@contextmanager
def recording(run: Learning, *, resume: bool) -> Iterator[MetricsWriter]:
    """``metrics.jsonl`` from where the run stands, and the trackers that are told of it.

    A summary that is there is of an earlier end, which is none any more.
    """
    config = run.config
    (run.folder.path / "summary.json").unlink(missing_ok=True)
    with (tracking(config.track, name=config.name, folder=run.folder.path,
                   settings=config.model_dump(mode="json")) as tell,
          MetricsWriter(run.folder.metrics, resume_step=run.step if resume else None, mirror=tell) as metrics):
        yield metrics


def train_rows(chat: ChatFormat, drawn: Row, *, tool: bool = False, weight: float = 1.0, draw: int = 0,
               bare: bool = False) -> list[TrainRow]:
    """A store row as a learner takes it: once, and once more for every turn with a hint of its own.

    Args:
        chat: of the model that learns.
        drawn: as read.
        tool: mark the tokens of tool calls.
        weight: on all of its tokens.
        draw: how often the step had drawn it before.
        bare: turns that no hint speaks of are a row as well, for a mix that learns from their grade.
    """
    marks = tool_tokens(chat, drawn.branch) if tool else None
    placed = place(chat, drawn.hint, drawn.branch) if drawn.hint else []
    rows: list[tuple[Placed | None, frozenset[int] | None]] = [(hint, hint.turns) for hint in placed] or [(None, None)]
    rest = frozenset(call.turn for call in drawn.branch.calls).difference(*(hint.turns for hint in placed))
    if bare and placed and rest:
        rows.append((None, rest))
    return [TrainRow(branch=drawn.branch, hint_ids=hint.ids if hint else None, hint_at=hint.at if hint else 0,
                     turns=turns, draw=draw, episode_id=f"{drawn.key.episode_id}/{drawn.key.attempt}",
                     train_allowed=drawn.train_allowed, tokenizer_sha256=drawn.tokenizer_sha256,
                     chat_template_sha256=drawn.chat_template_sha256, score=drawn.reward,
                     group=drawn.group_id or drawn.key.episode_id,
                     source=drawn.hint.source if drawn.hint and turns is not rest else "", tool=marks, weight=weight)
            for hint, turns in rows]


def tool_tokens(chat: ChatFormat, branch: Branch) -> np.ndarray:
    """Which tokens of a branch belong to the agent's own tool calls, bool[T]."""
    found = np.zeros(len(branch.token_ids), dtype=bool)
    for call in branch.calls:
        found[call.start:call.end] = chat.in_calls(branch.token_ids[call.start:call.end].tolist())
    return found
