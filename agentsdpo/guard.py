"""The tripwire's hands: probe, hold back, go back. What it decides stands in ``learn/tripwire.py``."""

from collections.abc import Iterator
from contextlib import contextmanager

from agentsdpo.assemble import Run
from agentsdpo.errors import LearnError, NotFinite
from agentsdpo.evaluate import play, probes
from agentsdpo.learn.alarms import Probe
from agentsdpo.learn.checkpoint import folder_of
from agentsdpo.learn.tripwire import MAX_ROLLBACKS, Decision, Point
from agentsdpo.learning import NEW_RUN, Learning
from agentsdpo.publish.registry import behaviour_version
from agentsdpo.show.console import View
from agentsdpo.signals import uninterrupted
from agentsdpo.track import MetricsWriter
from agentsdpo.types import Json


def guard(run: Run, evaluations: list[Json], metrics: MetricsWriter, view: View, *, broken: bool = False) -> None:
    """Judge the state of a run once, after its evaluations, and do what was decided.

    Args:
        run: between two steps.
        evaluations: lines of this step; the one of the probed split is the probe.
        metrics: every alarm is written there with its evidence.
        view: told of it as well.
        broken: the next step could not be taken, since its loss or gradient is not finite.

    Raises:
        LearnError: a hard alarm after three roll-backs; the last good policy was published all the same.
    """
    wire = run.tripwire
    if not run.config.tripwire.on or (wire.state.judged >= run.step and not broken):
        return
    found = _probe(run, evaluations)
    decision = wire.judge(run.step, run.version, found, broken=broken)
    if decision.wants_probe:
        played = play(run, probes(run.config), metrics, view)
        decision = wire.judge(run.step, run.version, _probe(run, played), asked=True)
    with uninterrupted():
        act(run, decision, metrics, view, broken=broken)


def _probe(run: Run, rows: list[Json]) -> Probe | None:
    """The probe among the lines of one step."""
    wanted = [one[:2] for one in probes(run.config)]
    return next((Probe.of(row) for row in rows if (row["split"], row["decoding"]) in wanted), None)


@contextmanager
def going_back(run: Run, metrics: MetricsWriter, view: View) -> Iterator[None]:
    """One step; if its loss or gradient is not finite, the run goes back, and the step counts as taken."""
    try:
        yield
    except NotFinite as error:
        if not run.config.tripwire.on:
            raise
        view.note(str(error))
        guard(run, [], metrics, view, broken=True)


def act(run: Learning, decision: Decision, metrics: MetricsWriter, view: View, *, broken: bool = False) -> None:
    """Carry a decision out and write it down.

    Raises:
        LearnError: a hard alarm after three roll-backs.
    """
    about: Json = {"action": "publish nothing, hold the teacher, half the lr, staleness 1 at most, for 20 steps"}
    if decision.good is not None:
        about = _roll_back(run, decision.good, steps=run.step + broken)
    elif decision.level == "clear" and decision.probe is not None and not run.tripwire.withheld(run.step):
        behind = decision.step < run.step  # heard of late
        run.together.probed(decision.probe.score, folder_of(run.folder.checkpoint, decision.step) if behind else None)
    if decision.keep:
        run.checkpoint()
    if decision.level == "clear":
        return
    seen = ", ".join(f"{alarm.name} {alarm.value:.3g} (limit {alarm.limit:.3g})" for alarm in decision.alarms)
    view.note(f"{decision.level} alarm at step {decision.step}: {seen}; {about['action']}")
    _write(run, metrics, decision, about)
    if decision.last:
        raise LearnError(f"step {decision.step} sounded a hard alarm after {MAX_ROLLBACKS} roll-backs ({seen}); "
                         f"the newest policy version, {run.version}, is the last good one",
                         fix=NEW_RUN)


def _roll_back(run: Learning, point: Point, *, steps: int) -> Json:
    """Go back, remember it in a checkpoint, and only then hide branches: a resumed run finds the store as it was."""
    gone = run.version
    go_back(run, point, steps=steps)
    run.tripwire.rolled_back(point, step=run.step, gone=gone, version=run.version)
    run.checkpoint()
    return {"action": f"back to step {point.step}, version {point.version}, published as version {run.version}",
            "good_step": point.step, "good_version": point.version, "tombstoned": run.tombstone()}


def go_back(run: Learning, point: Point, *, steps: int) -> None:
    """Weights, optimiser, clipper, teacher and generators of a good state, published under a new number.

    The count of steps goes on: the tasks of the steps given up are not played again.
    """
    run.together.load(folder_of(run.folder.checkpoint, point.step))
    run.together.count(steps)
    run.publish(parent=point.version)


def _write(run: Learning, metrics: MetricsWriter, decision: Decision, more: Json) -> None:
    """One line per step, not again after a resume."""
    if any(row["kind"] == "tripwire" and row["step"] == decision.step for row in metrics.rows):
        return
    metrics.write("tripwire", decision.step, {**run.totals, "version": run.version, "level": decision.level,
                                              "alarms": decision.evidence(), **more})


def collecting_version(run: Run) -> int:
    """The version episodes are played with: ``staleness`` publishes behind, or less while the bound on it is lower.

    After a roll-back never one that was given up, so that the distance grows anew from 0, as at the start of a run.
    """
    bound = run.tripwire.staleness(run.config.learn.max_staleness, run.step)
    behind = run.config.staleness if bound is None else min(run.config.staleness, bound)
    return max(behaviour_version(run.version, staleness=behind), run.tripwire.state.floor)
