"""The learner as a program beside others: it learns from a store that grows while it does, and never asks for data.

    agentsdpo learn CONFIG.toml --store URI --follow

It waits where the store holds nothing for it, says in its pin how far it is, and publishes. What it needs to have
evaluated it writes into ``due.json`` of its run folder; an evaluator answers in ``evals.jsonl``, whenever it can, and
the answers become lines of ``metrics.jsonl`` and the tripwire's probes. Episodes join once they have a hint; where
grades teach too, those without one join when the hint writer has looked at them, at once where there are no sources.

Killed, it goes on from its newest checkpoint. Collectors do not stop for that, so no version number is ever used again:
the weights of the checkpoint are published under the next one.

The tripwire judges when a probe arrives, about the state that was probed; a roll-back then gives up what was learnt
since. In the synchronous loop every step is judged, and an alarm without a probe has one played at once.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from agentsdpo.assemble import make_learner, make_registry, make_sampler, model_path, need_groups
from agentsdpo.collect.metrics import collect_metrics
from agentsdpo.config import RunConfig
from agentsdpo.errors import NotFinite
from agentsdpo.evaluate import due, probes
from agentsdpo.guard import act
from agentsdpo.learn.alarms import Probe
from agentsdpo.learn.load import load_chat
from agentsdpo.learn.parallel import Ranks, join_ranks
from agentsdpo.learn.together import obey
from agentsdpo.learn.trackers import check_trackers
from agentsdpo.learning import Learning, recording, update
from agentsdpo.programs.flow import LEARNER, TTL_S, Learnt, episodes_in, limit, looked_at
from agentsdpo.programs.owed import Owed, key_of, owed_of, read_answers, write_owed
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.replay.ids import Key
from agentsdpo.replay.sampling.index import SideIndex
from agentsdpo.replay.sampling.limiter import RateLimiter
from agentsdpo.replay.snapshot import Snapshot
from agentsdpo.replay.store import ReplayStore
from agentsdpo.replay.upkeep.pinned import pin, unpin
from agentsdpo.runfolder import open_run
from agentsdpo.show import console
from agentsdpo.show.console import View
from agentsdpo.signals import uninterrupted
from agentsdpo.track import MetricsWriter
from agentsdpo.types import Episode, Json

POLL_S = 0.25
"""Seconds between two looks at a store that did not grow."""
TOLD_S = 10.0
"""Seconds of waiting after which the view says what for."""


@dataclass(kw_only=True)
class Following(Learning):
    """A learner whose store others fill while it learns."""

    owed: list[Owed] = field(default_factory=list)
    _joined: set[str] = field(default_factory=set)
    _bare: dict[str, int | None] = field(default_factory=dict)  # scored: how many episodes there were when it was seen
    _fresh: list[Episode] = field(default_factory=list)

    # ------------------------------------------------------------------------------------------------- coming back

    def restore_or_begin(self) -> None:
        """Continue from the newest checkpoint; without one, publish the first version and save the state before step 1.

        Where later versions were published than the checkpoint knows, its weights are published anew.
        """
        latest = self.registry.latest()
        if any(self.folder.checkpoint.glob("step-*")):
            saved = self.together.load(self.folder.checkpoint)
            self.version = saved.version
            self.load_state(saved.sampler)
            if latest != saved.version:
                self.publish(parent=saved.version)
        else:
            self.publish(parent=None if latest is None else self.registry.versions()[0])
            self.checkpoint()

    def state(self) -> Json:
        """What a checkpoint holds besides the learner."""
        return {**super().state(), "totals": self.totals, "owed": [asdict(one) for one in self.owed]}

    def load_state(self, saved: Json) -> None:
        """Put :meth:`state` back: what was heard since is heard again, what was asked for since is asked for anew."""
        super().load_state(saved)
        self.totals = saved["totals"]
        self._joined = {Key.parse(text).episode_id for text in saved["sampler"]["rows"]}
        self.owed = owed_of(saved["owed"])
        self._give_up()
        write_owed(self.folder, self.owed)
        self.tombstone()

    def awaited(self) -> list[tuple[int, int]]:
        """Steps and versions that are being evaluated elsewhere: checkpoint and weights must stay."""
        return [(one.step, one.version) for one in self.owed]

    # ----------------------------------------------------------------------------------------------------- waiting

    @property
    def limiter(self) -> RateLimiter:
        """Counters of samples and inserts."""
        assert self.sampler.limiter is not None
        return self.sampler.limiter

    @property
    def eligible(self) -> int:
        """Branches that could be drawn now."""
        own = self.sampler.max_staleness
        self.sampler.max_staleness = self.tripwire.staleness(own, self.step)
        try:
            return self.sampler.explain(self.version)["eligible"]
        finally:
            self.sampler.max_staleness = own

    def ready(self) -> bool:
        """Whether a step can be taken."""
        return self.limiter.may_sample(self.config.learn.batch) and self.eligible > 0

    def look(self) -> None:
        """Let what has a hint by now join, or will have none, and say in the pin where this learner is."""
        view = self.store.snapshot()
        episodes, looked = episodes_in(view), looked_at(self.store)
        fit = self._hinted(view, episodes) | self._unhinted(looked)
        if fit - self._joined:
            self.sampler.refresh(only=fit)
            self._take_in(view, fit - self._joined)
        undecided = 0 if looked is None else max(0, episodes - looked)
        starved = not undecided and self.limiter.size >= self.limiter.limit.min_size and not self.eligible
        said = Learnt(None if starved else self.limiter, episodes, undecided, self.version)
        pin(self.store, LEARNER, self.sampler.snapshot, ttl_s=TTL_S, state=said.as_json())

    def _hinted(self, view: Snapshot, episodes: int) -> set[str]:
        """Episodes with a hint, late or from their append; what has joined stays."""
        late = {slot.key.episode_id for slot in view.late.latest if slot.kind == "hint" and slot.key in view.rows}
        known = late | self._joined | self._bare.keys()
        for key in [key for key in view.rows if key.episode_id not in known]:
            (row,) = view.read([key])
            if row.hint:
                late.add(key.episode_id)
            else:
                self._bare[key.episode_id] = None if row.reward is None else episodes
        return late | self._joined

    def _unhinted(self, looked: int | None) -> set[str]:
        """Scored episodes that a mix learns from though no hint came; ``looked``: at how many the hint writer did."""
        if self.config.learn.mix == "pure":
            return set()
        none = not self.config.hint.sources
        return {name for name, seen in self._bare.items() if seen is not None and (none or seen <= (looked or 0))}

    def _take_in(self, view: Snapshot, names: set[str]) -> None:
        """Count episodes that have just joined."""
        self._joined |= names
        fresh = list(view.gather(sorted({(key.episode_id, key.attempt) for key in view.rows
                                         if key.episode_id in names})))
        self.count(fresh)
        self._fresh += fresh

    def words(self) -> str:
        """What it is waiting for."""
        counts = self.sampler.explain(self.version)
        bare = len(self._bare.keys() - self._joined)
        return (f"waiting for episodes: {counts['eligible']} eligible, {bare} without a hint, {self.limiter.inserts} "
                f"joined and {self.limiter.samples} drawn so far")

    # -------------------------------------------------------------------------------------------------- evaluations

    def ask(self, metrics: MetricsWriter) -> None:
        """Have the evaluator play what is due at this step.

        Weights that an alarm holds back are kept beside the registry for that, but for the last time.
        """
        have = {(row["step"], row["split"], row["decoding"]) for row in metrics.rows if row["kind"] == "eval"}
        have |= {(one.step, split, decoding) for one in self.owed for split, decoding, _ in one.wanted}
        wanted = tuple(one for one in due(self.config, self.step) if (self.step, *one[:2]) not in have)
        if not wanted:
            return
        candidate = None
        if self.tripwire.withheld(self.step):
            if not self.ends:
                candidate = self.candidates.publish(self.together.policy(), learner_step=self.step)
        elif self.registry.manifest(self.version).learner_step != self.step:
            self.publish()
        self.owed.append(Owed(self.step, self.version, round(metrics.wall_s, 3), wanted, dict(self.totals), candidate))
        if self.config.tripwire.on:
            self.checkpoint()  # the state that is probed may be gone back to
        write_owed(self.folder, self.owed)

    @property
    def candidates(self) -> PolicyRegistry:
        """Weights to be evaluated that no collector shall see."""
        return PolicyRegistry(self.folder.candidates)

    def hear(self, metrics: MetricsWriter, view: View) -> None:
        """Take in what was evaluated since."""
        for row in read_answers(self.folder) if self.owed else ():
            one = next((one for one in self.owed if key_of(row) in one.keys), None)
            if one is None:  # heard before, or given up by a roll-back
                continue
            values = {**{key: value for key, value in row.items() if key != "step"}, **one.totals}
            if not any(key_of(seen) == key_of(row) for seen in metrics.rows if seen["kind"] == "eval"):
                metrics.write("eval", one.step, values, wall_s=one.wall_s)
            view.evaluation({"step": one.step, **values})
            left = tuple(each for each in one.wanted if each[:2] != (row["split"], row["decoding"]))
            at = self.owed.index(one)
            self.owed[at:at + 1] = [replace(one, wanted=left)] if left else []
            self._judge(one, row, metrics, view)
            write_owed(self.folder, self.owed)
            if one.candidate is not None:
                self.candidates.prune(1, spare={other.candidate for other in self.owed if other.candidate is not None})

    def _judge(self, one: Owed, row: Json, metrics: MetricsWriter, view: View) -> None:
        """Have the tripwire judge a probed state, once: the checkpoint knows of it before ``due.json`` forgets it."""
        asked = [each[:2] for each in probes(self.config)]
        if not self.config.tripwire.on or (row["split"], row["decoding"]) not in asked:
            return
        decision = self.tripwire.judge(one.step, one.version, Probe.of(row), asked=True, now=self.step)
        act(self, decision, metrics, view)
        self._give_up()
        if decision.good is None and not decision.keep:  # else it was saved with what was done
            self.checkpoint()

    def _give_up(self) -> None:
        """Wait no longer for versions that a roll-back has given up."""
        void = self.tripwire.state.abandoned
        self.owed = [one for one in self.owed if not any(low <= one.version <= high for low, high in void)]


# --------------------------------------------------------------------------------------------------------- the steps


def learn_following(config: RunConfig, uri: Path | str, *, out: Path | str, resume: bool = False,
                    mode: str = "auto") -> Json:
    """Learn from a store that others fill, for ``config.steps`` optimiser steps, and wait for the last evaluations.

    Args:
        config: resolved settings.
        uri: folder of a replay store or ``s3://bucket/prefix``; made if there is none.
        out: run folder, for metrics, checkpoints, published versions and what is due.
        resume: go on with the run in ``out``.
        mode: terminal display, ``auto``, ``plain`` or ``none``.

    Returns:
        ``run``, ``store``, ``steps``, ``version``, ``episodes``, ``wall_s``.

    Raises:
        ModelError, ConfigError, RunError, StoreError: see the parts.
        LearnError: the tripwire's last roll-back was spent, or (it is off) a step is not finite.
        KeyboardInterrupt: stopped; all steps are on disk.
    """
    ranks = join_ranks(config.learn.parallel)
    if ranks.rank:
        obey(make_learner(config, ranks))
    run = assemble_following(config, uri, out, resume=resume, ranks=ranks)
    try:
        with run.together.led():
            summary = turn_over(run, resume=resume, mode=mode)
        run.folder.finish()
    finally:
        run.folder.release()
        run.store.close()
    return summary


def turn_over(run: Following, *, resume: bool, mode: str) -> Json:
    """The steps, from where the run stands to its last, and what is still owed after that."""
    config = run.config
    run.restore_or_begin()
    with (recording(run, resume=resume) as metrics, console.training(config.steps, config.name, mode=mode) as view,
          saved_on_interrupt(run)):
        while not run.ends:
            with uninterrupted():
                run.ask(metrics)
                run.hear(metrics, view)
            wait(run, metrics, view)
            with uninterrupted():
                view.step({"step": run.step + 1, **step(run, metrics, view)})
        run.ask(metrics)
        view.stage(f"{config.steps} steps done; waiting for {sum(len(one.wanted) for one in run.owed)} evaluations")
        while run.owed:
            with uninterrupted():
                run.hear(metrics, view)
            time.sleep(POLL_S)
        unpin(run.store, LEARNER)
        return {"run": str(run.folder.path), "store": run.store.storage.uri, "steps": run.step, "version": run.version,
                "episodes": run.totals["episodes"], "wall_s": round(metrics.wall_s, 3)}


def wait(run: Following, metrics: MetricsWriter, view: View) -> None:
    """Until a step can be taken."""
    began = time.monotonic()
    run.look()
    while not run.ready():
        time.sleep(POLL_S)
        with uninterrupted():
            run.hear(metrics, view)
            run.look()
        if time.monotonic() - began > TOLD_S:
            began = time.monotonic()
            view.stage(run.words())


def step(run: Following, metrics: MetricsWriter, view: View) -> Json:
    """One optimiser step, its line and, where it is time, a checkpoint; returns the line.

    A step whose loss or gradient is not finite counts as taken, and the run goes back.
    """
    version = run.version
    try:
        row = update(run)
    except NotFinite as error:
        if not run.config.tripwire.on:
            raise
        view.note(str(error))
        act(run, run.tripwire.judge(run.step, run.version, None, broken=True), metrics, view, broken=True)
        return {"version": version}
    fresh, run._fresh = run._fresh, []
    row = {**collect_metrics(fresh), **row, **run.tripwire.metrics(run.step), **run.totals}
    if "learn/loss" in row:  # not skipped
        run.tripwire.learnt(row)
    metrics.write("step", run.step, row)
    if run.step % run.config.checkpoint_every == 0 or run.ends:
        run.checkpoint()
    return row


@contextmanager
def saved_on_interrupt(run: Following) -> Iterator[None]:
    """Keep the steps since the last checkpoint when the learner is told to stop."""
    try:
        yield
    except KeyboardInterrupt:
        with uninterrupted():
            run.checkpoint()
        raise


def assemble_following(config: RunConfig, uri: Path | str, out: Path | str, *, resume: bool = False,
                       ranks: Ranks | None = None) -> Following:
    """Build the parts and the run folder.

    Raises:
        See :func:`learn_following`.
    """
    need_groups(config)
    check_trackers(config.track)
    chat = load_chat(model_path(config))
    limiter = RateLimiter(limit(config))
    learner = make_learner(config, ranks)
    store = ReplayStore.open(uri)
    newest = max((row.version_max for row in store.snapshot().rows.values()), default=-1)
    folder = open_run(out, config, resume=resume)
    registry = make_registry(config, folder, chat, first=newest + 1)
    sampler = make_sampler(config, store, chat, limiter=limiter, index=SideIndex(folder.uses, store.about["store_id"]))
    joined = {key.episode_id for key in sampler.snapshot.rows}
    return Following(config=config, folder=folder, chat=chat, store=store, sampler=sampler, learner=learner,
                     registry=registry, _joined=joined)
