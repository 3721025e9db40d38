"""The loop: collect -> hint -> store -> learn -> publish, in one process, step by step.

    agentsdpo train CONFIG.toml

Staleness is a real quantity here: the collector serves the version ``staleness`` publishes behind the learner, and
rows are drawn from a store that also holds older ones. The tripwire watches: see ``guard.py``. A killed run goes on
from its last checkpoint (``--resume``) and ends with the weights of one that was never killed; stopped inside a
collection, it plays the rest in smaller batches, so that log-probs may differ in their last bits.
"""

from pathlib import Path
from typing import Any

from agentsdpo.assemble import TASKS_PER_SEED, Run, assemble, make_learner
from agentsdpo.collect.metrics import collect_metrics
from agentsdpo.config import RunConfig
from agentsdpo.errors import EngineError
from agentsdpo.evaluate import evaluate
from agentsdpo.guard import collecting_version, going_back, guard
from agentsdpo.learn.parallel import join_ranks
from agentsdpo.learn.together import obey
from agentsdpo.learning import recording, update
from agentsdpo.lift import require_lift
from agentsdpo.show import console
from agentsdpo.signals import uninterrupted
from agentsdpo.types import Episode


def train(config: RunConfig, *, out: Path | str, resume: bool = False, mode: str = "auto") -> Run:
    """Run the whole loop of one configuration and return its parts as they stand at the end.

    Args:
        config: resolved settings; written into ``out``.
        out: run folder.
        resume: go on with the run in ``out``.
        mode: terminal display, ``auto``, ``plain`` or ``none``.

    Raises:
        RunError: ``out`` holds another run. HintError: hints do not help as much as ``hint.min_lift`` asks for.
        LearnError: the tripwire's last roll-back was spent, or (it is off) a step is not finite.
        EngineError: no episode of a step could be scored.
        KeyboardInterrupt: stopped; everything finished is on disk, this step's episodes included.
    """
    ranks = join_ranks(config.learn.parallel)
    if not resume and not ranks.rank:
        require_lift(config)
    if ranks.rank:  # one of several processes of the learner: the first one runs the loop
        obey(make_learner(config, ranks))
    run = assemble(config, out, resume=resume, ranks=ranks)
    try:
        with run.together.led():
            turn_over(run, resume=resume, mode=mode)
        run.folder.finish()
    finally:
        run.folder.release()
    return run


def turn_over(run: Run, *, resume: bool, mode: str) -> None:
    """The loop itself, from where the run stands to its last step."""
    config = run.config
    run.restore_or_begin()
    with (recording(run, resume=resume) as metrics,
          console.training(config.steps, config.name, mode=mode) as view):
        while True:
            guard(run, evaluate(run, metrics, view), metrics, view)
            if run.ends:
                break
            episodes = collect(run)
            with uninterrupted(), going_back(run, metrics, view):
                row = learn(run, episodes)
                metrics.write("step", run.step, row)
                if run.step % config.checkpoint_every == 0 or run.ends:
                    run.checkpoint()
                view.step({"step": run.step, **row})


def collect(run: Run) -> list[Episode]:
    """Play this step's fresh tasks with the behaviour policy, ``group`` times each, and store the episodes with hints.

    What an earlier life of the run stored already is taken from the store. After an interrupt or a fault, what was
    finished is stored before it goes on. Unscored episodes are left out: nobody knows what they would have been.
    """
    config = run.config
    tasks = config.episodes_per_step // config.group
    first = config.seed * TASKS_PER_SEED + run.step * tasks
    wanted = [(index, attempt) for index in range(first, first + tasks) for attempt in range(config.group)]
    stored = run.stored(wanted)
    missing = [place for place in wanted if place not in stored]
    run.load_policy(collecting_version(run))
    try:
        played = run.collector.collect("train", [index for index, _ in missing], seed=config.seed,
                                       attempts=[attempt for _, attempt in missing], group_size=config.group)
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
        LearnError: nothing can be drawn or trained on. NotFinite: loss or gradient is not; nothing was updated.
    """
    run.sampler.refresh(only={e.episode_id for e in episodes})
    row = update(run)
    run.count(episodes)
    row = {**collect_metrics(episodes), **run.hinter.metrics(), **row, **run.tripwire.metrics(run.step), **run.totals}
    if "learn/loss" in row:  # not skipped
        run.tripwire.learnt(row)
    return row
