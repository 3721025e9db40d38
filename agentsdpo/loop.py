"""The loop: collect -> hint -> store -> learn -> publish, in one process, step by step.

    agentsdpo train CONFIG.toml

Staleness is a real quantity here: the collector serves the version ``staleness`` publishes behind the learner, and
rows are drawn from a store that also holds older ones. A stopped run goes on where it stopped (``--resume``) and
ends with the weights of one that was never stopped.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from agentsdpo import console
from agentsdpo.assemble import TASKS_PER_SEED, Run, assemble
from agentsdpo.collect.metrics import collect_metrics
from agentsdpo.config import RunConfig
from agentsdpo.errors import EngineError, LearnError
from agentsdpo.evaluate import evaluate
from agentsdpo.publish.registry import behaviour_version
from agentsdpo.track import MetricsWriter
from agentsdpo.types import Episode


def train(config: RunConfig, *, out: Path | str, resume: bool = False, mode: str = "auto") -> Run:
    """Run the whole loop of one configuration and return its parts as they stand at the end.

    Args:
        config: resolved settings; written into ``out``.
        out: run folder.
        resume: go on with the run in ``out``.
        mode: terminal display, ``auto``, ``plain`` or ``none``.

    Raises:
        RunError: ``out`` holds another run.
        LearnError: loss or gradient is not finite; the last checkpoint is kept.
        EngineError: no episode of a step could be scored.
        KeyboardInterrupt: stopped; everything finished is on disk, this step's episodes included.
    """
    run = assemble(config, out, resume=resume)
    folder = run.folder
    if resume and any(folder.checkpoint.glob("step-*")):
        run.restore()
    else:
        run.begin()
    with (MetricsWriter(folder.metrics, resume_step=run.step if resume else None) as metrics,
          console.training(config.steps, config.name, mode=mode) as view):
        if run.step == 0:
            evaluate(run, metrics, view, final=True)
        while run.step < config.steps:
            episodes = collect(run)
            row = learn(run, episodes)
            metrics.write("step", run.step, row)
            view.step({"step": run.step, **row})
            last = run.step == config.steps
            if last or run.step % config.eval.every == 0:
                evaluate(run, metrics, view, final=last)
    folder.finish()
    return run


def collect(run: Run) -> list[Episode]:
    """Play this step's fresh tasks with the behaviour policy and store the episodes with their hints.

    What an earlier life of the run stored already is taken from the store. After an interrupt, what was finished is
    stored before the interrupt goes on.
    """
    config = run.config
    first = config.seed * TASKS_PER_SEED + run.step * config.episodes_per_step
    wanted = range(first, first + config.episodes_per_step)
    missing = run.missing(wanted)
    run.load_policy(behaviour_version(run.version, staleness=config.staleness))
    try:
        episodes = run.collector.collect("train", missing, seed=config.seed)
    except KeyboardInterrupt:
        run.keep(run.collector.finished)
        raise
    run.keep(episodes)
    if episodes and all(e.grade is None for e in episodes):
        raise EngineError(f"none of {len(episodes)} episodes of step {run.step + 1} could be scored: "
                          f"{episodes[0].metadata.get('error', 'no reason was recorded')}",
                          fix="mend the engine or the environment, then go on with --resume")
    return episodes if len(missing) == len(wanted) else run.stored(wanted)


def learn(run: Run, episodes: list[Episode]) -> dict[str, Any]:
    """Draw rows, take one optimiser step, publish and save; an interrupt waits until all of it is done.

    Returns:
        This step's line of ``metrics.jsonl``.
    """
    config, began = run.config, time.monotonic()
    with uninterrupted():
        run.sampler.refresh(only={e.episode_id for e in episodes})
        drawn = run.sampler.sample(config.learn.batch, run.version)
        if not drawn:
            raise LearnError(f"no row can be drawn at step {run.step + 1}: {run.sampler.explain(run.version)}",
                             fix="raise learn.max_staleness above the staleness of collection, or collect more a step")
        report = run.learner.step(run.rows(drawn), run.version)
        for key, more in zip(run.totals, counts(episodes), strict=True):
            run.totals[key] += more
        if run.step % config.publish.every == 0 or run.step == config.steps:
            run.publish()
        row = {**collect_metrics(episodes), **run.hinter.metrics(), **run.sampler.metrics(), **report.metrics,
               **run.totals, "version": run.version, "learn/rows": report.n_trained, "learn/tokens": report.n_tokens,
               "learn/step_s": time.monotonic() - began}
        if run.step % config.checkpoint_every == 0 or run.step == config.steps:
            run.checkpoint()
    return row


def counts(episodes: list[Episode]) -> tuple[int, int, int]:
    """Episodes, tool calls and sampled tokens of some episodes."""
    return (len(episodes), sum(e.metadata.get("calls", 0) for e in episodes),
            sum(b.n_sampled for e in episodes for b in e.branches))


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C until the block is done: learner, registry and checkpoint never part ways."""
    held: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(number)

    try:
        before = signal.signal(signal.SIGINT, hold)
    except ValueError:  # not the main thread, which alone is interrupted
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        raise KeyboardInterrupt
