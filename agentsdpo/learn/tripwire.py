"""The tripwire: watches a run, restrains it at a soft alarm, says where to go back to at a hard one. No torch.

::

    wire.learnt(step, row)                      the line of metrics.jsonl of every optimiser step
    decision = wire.judge(step, version, probe) once per step; a probe at a cadence, and when the decision asks for one
    if decision.good: ...restore it, publish it as version n...; wire.rolled_back(step, n)

Soft: for 20 steps nothing is published, the teacher stands still, the learning rate is halved and rows may be one
version old at most. Hard: back to the newest probe that was within 0.9 of the best and had 20 quiet steps after it;
learning rate and staleness bound stay halved. A hard alarm after three roll-backs goes back too and ends the run.
Rules: :mod:`agentsdpo.learn.alarms`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pydantic import Field

from agentsdpo.errors import LearnError
from agentsdpo.learn.alarms import (
    BEHAVIOUR,
    MEMORY,
    RECENT,
    Alarm,
    Level,
    Probe,
    behaviour_alarms,
    gained,
    newest,
    probe_alarms,
    update_alarms,
)
from agentsdpo.settings import Settings
from agentsdpo.types import Json

QUIET = 20
"""Steps without alarm that make a probed version a good one, and that a soft alarm lasts."""
KEPT = 3
"""Good versions that can be gone back to."""
MAX_ROLLBACKS = 3


class TripwireConfig(Settings):
    """Whether a run is watched, and how often it is probed.

    >>> TripwireConfig().every
    10
    """

    on: bool = Field(default=True, description="whether alarms hold the run back and roll it back")
    every: int = Field(default=10, ge=1, le=100_000, description=(
        "optimiser steps between two probes: eval.episodes of the first of eval.splits; an evaluation is one too"))


@dataclass(frozen=True)
class Point:
    """A probed state a run can go back to: its step and policy version, its score, and how agents acted."""

    step: int
    version: int
    score: float
    collected: dict[str, float]
    probed: dict[str, float]


@dataclass(frozen=True)
class Decision:
    """What was decided at one step, with its evidence.

    ``wants_probe``: nothing was decided yet; play a probe and judge again. ``good``: the state to go back to, hard
    alarms alone. ``last``: that was one time too many, stop after it. ``keep``: this state may turn out good, save it.
    """

    step: int
    level: Level
    alarms: tuple[Alarm, ...] = ()
    probe: Probe | None = None
    wants_probe: bool = False
    good: Point | None = None
    last: bool = False
    keep: bool = False

    def evidence(self) -> Json:
        """Every alarm by name, with the value seen, the limit and the level."""
        return {alarm.name: {"value": alarm.value, "limit": alarm.limit, "level": alarm.level} for alarm in self.alarms}


@dataclass
class State:
    """All the tripwire remembers, as plain JSON values."""

    judged: int = -1
    rows: list[dict[str, float]] = field(default_factory=list)
    start: dict[str, float] = field(default_factory=dict)
    first: Probe | None = None
    best: Probe | None = None
    probe: Probe | None = None
    low: int = 0
    until: int = -1
    points: list[Point] = field(default_factory=list)
    good: Point | None = None
    rollbacks: int = 0
    floor: int = 0
    abandoned: list[list[int]] = field(default_factory=list)


_WATCHED = ("collect/episodes", *BEHAVIOUR, "learn/grad_norm", "learn/ess_frac", "learn/hijack/max",
            "learn/entropy/student", "learn/gap/abs")


class Tripwire:
    """One run's watch. Its whole state is JSON: a resumed run decides what it would have decided."""

    def __init__(self) -> None:
        self.state = State()

    # -------------------------------------------------------------------------------------------------- being told

    def learnt(self, row: Mapping[str, Any]) -> None:
        """Take in the ``step`` row of ``metrics.jsonl`` of a step that was just taken."""
        own, known = self.state, {key: float(row[key]) for key in _WATCHED if row.get(key) is not None}
        own.rows = [*own.rows, known][-(MEMORY + RECENT):]
        if "entropy" not in own.start and len(own.rows) == RECENT:
            own.start = {"entropy": sum(r["learn/entropy/student"] for r in own.rows) / RECENT,
                         "gap": sum(r["learn/gap/abs"] for r in own.rows) / RECENT}

    def judge(self, step: int, version: int, probe: Probe | None, *, asked: bool = False,
              broken: bool = False, now: int | None = None) -> Decision:
        """Decide about the state after ``step`` steps, once.

        Args:
            step: optimiser steps done.
            version: newest policy version.
            probe: of this very state; None when none was played.
            asked: a probe was asked for and played, whatever came of it.
            broken: the next step could not be taken: its loss or gradient is not finite.
            now: steps done by now, where a probe is heard of late: a soft alarm lasts from there.
        """
        alarms = self._alarms(probe, broken)
        if alarms and probe is None and not (asked or broken or self.withheld(step)):
            return Decision(step, "soft", tuple(alarms), wants_probe=True)
        own = self.state
        own.judged = step
        low = probe is not None and self._low(probe)
        own.low = own.low + 1 if low else (0 if probe else own.low)
        keep = self._remember(step, version, probe, alarms, low)
        if (low and own.low >= 2) or any(alarm.level == "hard" for alarm in alarms):
            return Decision(step, "hard", tuple(alarms), probe, good=self._way_back(step),
                            last=own.rollbacks >= MAX_ROLLBACKS)
        if alarms:
            own.until = (step if now is None else now) + QUIET
        return Decision(step, "soft" if alarms else "clear", tuple(alarms), probe, keep=keep)

    def rolled_back(self, to: Point, *, step: int, gone: int, version: int) -> None:
        """The run went back: ``to`` stands again as ``version``; those after ``to.version`` up to ``gone`` are void."""
        own = self.state
        own.rollbacks, own.low, own.until, own.rows = own.rollbacks + 1, 0, -1, []
        own.good = replace(to, version=version)
        own.points = [*(point for point in own.points if point.step < to.step), own.good]
        own.abandoned.append([to.version + 1, gone])
        own.judged, own.floor, own.probe = step, version, None

    # ------------------------------------------------------------------------------------------------- being asked

    @property
    def spent(self) -> bool:
        """Whether it went back once more than a run may: there is no going on."""
        return self.state.rollbacks > MAX_ROLLBACKS

    def withheld(self, step: int) -> bool:
        """Whether a soft alarm is in force after ``step`` steps: publish nothing, hold the teacher."""
        return step < self.state.until

    def lr_factor(self, step: int) -> float:
        """Factor on the learning rate: a half per roll-back, and a half while a soft alarm is in force."""
        return 0.5 ** (self.state.rollbacks + self.withheld(step))

    def staleness(self, bound: int | None, step: int) -> int | None:
        """The staleness bound as it stands: halved per roll-back, 1 while a soft alarm is in force, never raised.

        >>> Tripwire().staleness(8, 0)
        8
        """
        if self.withheld(step):
            return 1 if bound is None else min(bound, 1)
        return bound if not bound else max(1, bound >> self.state.rollbacks)

    def metrics(self, step: int) -> dict[str, float]:
        """Numbers for the step's line: gain since the first probe, measures in force, roll-backs so far."""
        own = self.state
        found = {"tripwire/restrained": float(self.withheld(step)), "tripwire/rollbacks": float(own.rollbacks)}
        if own.first and own.probe:
            found["eval/zero_shot_delta"] = own.probe.score - own.first.score
        return found

    def steps_kept(self) -> set[int]:
        """Steps whose checkpoints must stay."""
        return {point.step for point in self.state.points}

    def state_dict(self) -> Json:
        """Everything, for the learner's checkpoint."""
        return asdict(self.state)

    def load_state_dict(self, saved: Json) -> None:
        """Continue from :meth:`state_dict`."""
        probes = {name: Probe(**saved[name]) if saved[name] else None for name in ("first", "best", "probe")}
        points = [Point(**point) for point in saved["points"]]
        good = Point(**saved["good"]) if saved["good"] else None
        self.state = State(**{**saved, **probes, "points": points, "good": good})

    # ---------------------------------------------------------------------------------------------------- deciding

    def _alarms(self, probe: Probe | None, broken: bool) -> list[Alarm]:
        """Every rule that sounds now: score, behaviour, then the updates."""
        own = self.state
        found = [Alarm("update/not_finite", 1.0, 0.0, "hard")] if broken else []
        if probe and own.best and own.first:
            found += probe_alarms(probe, own.best, own.first)
        if own.good:
            found += behaviour_alarms(probe.behaviour, own.good.probed, "probe") if probe else []
            found += behaviour_alarms(newest(own.rows), own.good.collected, "collect")
        seen = probe or own.probe
        gain = bool(seen and own.best and own.first and gained(seen, own.best, own.first))
        return found + (update_alarms(own.rows, own.start) if own.start and not gain else [])

    def _low(self, probe: Probe) -> bool:
        own = self.state
        return bool(own.best and own.first and probe_alarms(probe, own.best, own.first))

    def _remember(self, step: int, version: int, probe: Probe | None, alarms: list[Alarm], low: bool) -> bool:
        """Keep what a probe says; whether this state may be gone back to one day."""
        own = self.state
        if alarms:  # a state within 20 steps of an alarm is not a good one, but for the one nothing was learnt in yet
            own.points = [point for point in own.points if point.step <= step - QUIET or point.step == 0]
        if probe is None:
            return False
        own.first, own.probe = own.first or probe, probe
        own.best = probe if own.best is None or probe.score > own.best.score else own.best
        if low:
            return False
        collected = newest(own.rows) or (own.good.collected if own.good else {})
        own.good = Point(step, version, probe.score, collected, probe.behaviour)
        if alarms or self.withheld(step) or probe.score < 0.9 * own.best.score:
            return False
        own.points.append(own.good)
        quiet = [point for point in own.points if point.step <= step - QUIET]
        own.points = [*quiet[-KEPT:], *own.points[len(quiet):]]
        return True

    def _way_back(self, step: int) -> Point:
        """The newest good point; the best of those there are if none is within 0.9 of the best probe."""
        own = self.state
        if not own.points or own.best is None:
            raise LearnError(f"step {step} went wrong before there was a state to go back to",
                             fix="look at metrics.jsonl, and start anew with a lower learn.lr")
        near = [point for point in own.points if point.score >= 0.9 * own.best.score]
        return near[-1] if near else max(own.points, key=lambda point: point.score)
