"""The loop: collect -> hint -> store -> learn -> publish, in one process, step by step.

    agentsdpo train CONFIG.toml

Staleness is a real quantity here: the collector serves the version ``staleness`` publishes behind the learner, and
rows are drawn from a store that also holds older ones. The tripwire watches: see ``watch.py``. A killed run goes on
from its last checkpoint (``--resume``) and ends with the weights of one that was never killed; stopped inside a
collection, it plays the rest in smaller batches, so that log-probs may differ in their last bits.
"""

import time
from pathlib import Path
from typing import Any

from agentsdpo import console
from agentsdpo.assemble import TASKS_PER_SEED, Run, assemble
from agentsdpo.collect.metrics import collect_metrics
from agentsdpo.config import RunConfig
from agentsdpo.errors import EngineError, LearnError
from agentsdpo.evaluate import evaluate
from agentsdpo.hint.audit import hint_metrics
from agentsdpo.replay.rows import Row
from agentsdpo.signals import uninterrupted
from agentsdpo.track import MetricsWriter
from agentsdpo.types import Episode
from agentsdpo.watch import collecting_version, going_back, watch


def train(config: RunConfig, *, out: Path | str, resume: bool = False, mode: str = "auto") -> Run:
    """Run the whole loop of one configuration and return its parts as they stand at the end.

    Args:
        config: resolved settings; written into ``out``.
        out: run folder.
        resume: go on with the run in ``out``.
        mode: terminal display, ``auto``, ``plain`` or ``none``.

    Raises:
        RunError: ``out`` holds another run.
        LearnError: the tripwire's last roll-back was spent, or (it is off) a step is not finite.
        EngineError: no episode of a step could be scored.
        KeyboardInterrupt: stopped; everything finished is on disk, this step's episodes included.
    """
    run = assemble(config, out, resume=resume)
    try:
        turn_over(run, resume=resume, mode=mode)
        run.folder.finish()
    finally:
        run.folder.release()
    return run


def turn_over(run: Run, *, resume: bool, mode: str) -> None:
    """The loop itself, from where the run stands to its last step."""
    config = run.config
    run.restore_or_begin()
    with (MetricsWriter(run.folder.metrics, resume_step=run.step if resume else None) as metrics,
          console.training(config.steps, config.name, mode=mode) as view):
        while True:
            watch(run, evaluate(run, metrics, view), metrics, view)
            if run.step >= config.steps:
                break
            episodes = collect(run)
            with uninterrupted(), going_back(run, metrics, view):
                row = learn(run, episodes)
                metrics.write("step", run.step, row)
                if run.step % config.checkpoint_every == 0 or run.step == config.steps:
                    run.checkpoint()
                view.step({"step": run.step, **row})


def collect(run: Run) -> list[Episode]:
    """Play this step's fresh tasks with the behaviour policy and store the episodes with their hints.

    What an earlier life of the run stored already is taken from the store. After an interrupt or a fault, what was
    finished is stored before it goes on. Unscored episodes are left out: nobody knows what they would have been.
    """
    config = run.config
    first = config.seed * TASKS_PER_SEED + run.step * config.episodes_per_step
    wanted = range(first, first + config.episodes_per_step)
    stored = run.stored(wanted)
    missing = [index for index in wanted if index not in stored]
    run.load_policy(collecting_version(run))
    try:
        played = run.collector.collect("train", missing, seed=config.seed)
    except BaseException:
        with uninterrupted():
            run.keep(run.collector.finished)
        raise
    with uninterrupted():
        fresh = run.keep(played)
    if not stored and not fresh:
        raise EngineError(f"none of {len(played)} episodes of step {run.step + 1} could be scored: "
                          f"{played[0].metadata.get('error', 'no reason was recorded')}",
                          fix="mend the engine or the environment, then go on with --resume")
    return [*stored.values(), *fresh]


def learn(run: Run, episodes: list[Episode]) -> dict[str, Any]:
    """Draw rows, take one optimiser step and publish.

    Returns:
        This step's line of ``metrics.jsonl``.

    Raises:
        LearnError: nothing can be drawn or trained on, or the step is not finite; nothing was updated.
    """
    config, wire, began = run.config, run.tripwire, time.monotonic()
    run.sampler.refresh(only={e.episode_id for e in episodes})
    drawn = draw(run)
    run.learner.restrain(lr_factor=wire.lr_factor(run.step), hold_teacher=wire.withheld(run.step))
    report = run.learner.step(run.rows(drawn), run.version)
    run.count(episodes)
    updated = time.monotonic()
    if (run.step % config.publish.every == 0 or run.step == config.steps) and not wire.withheld(run.step):
        run.publish()
    row = {**collect_metrics(episodes), **run.hinter.metrics(), **hint_metrics(run.chat, drawn), **report.metrics,
           **run.sampler.metrics(), **wire.metrics(run.step), **run.totals, "version": run.version,
           "learn/rows": report.n_trained, "learn/tokens": report.n_tokens,
           "publish/lag_s": time.monotonic() - updated, "learn/step_s": time.monotonic() - began}
    wire.learnt(row)
    return row


def draw(run: Run) -> list[Row]:
    """Branches of one step; draws again while none of them has a hint (an attempt that failed nothing may have none).

    Raises:
        LearnError: nothing is eligible, or nothing eligible has a hint.
    """
    for _ in range(_REDRAWS):
        drawn = run.draw()
        if any(row.hint for row in drawn):
            return drawn
    raise LearnError(f"no row with a hint can be drawn at step {run.step + 1}: {run.sampler.explain(run.version)}",
                     fix="start a run with a larger learn.max_staleness or episodes_per_step, or with hint.scope 'all'")


_REDRAWS = 16
