"""How collectors and learner keep pace without knowing of each other: what the learner says in its pin.

The learner counts units that joined and units that were drawn (:mod:`agentsdpo.replay.sampling.limiter`) and renews its
pin after every step. A collector adds what the learner cannot have counted yet, its own episodes in flight included,
and begins a new one only where the sum leaves room. Both sides:

    learner    waits while   samples + batch > samples_per_insert * inserts
    collector  waits while   samples_per_insert * (inserts + pending + 1) - samples > ahead * batch

The second line is a bound on staleness: what begins now is drawn first ``ahead`` steps from now at the latest.
"""

from dataclasses import dataclass

from agentsdpo.config import RunConfig
from agentsdpo.replay.sampling.limiter import Limit, RateLimiter, may_collect
from agentsdpo.replay.snapshot import Snapshot
from agentsdpo.replay.store import ReplayStore
from agentsdpo.replay.upkeep.pinned import standing
from agentsdpo.types import Json

LEARNER, HINTS = "learner", "hints"
"""Names of the pins."""
TTL_S = 900.0
"""Seconds after its last word in which a program that died still counts."""
UNBOUNDED = 8
"""Steps collectors may be ahead where nothing bounds staleness."""
FREE = 1e18
"""``max_diff`` of a learner that no collector waits for."""


def limit(config: RunConfig) -> Limit:
    """Bounds of a run.

    >>> limit(RunConfig())
    Limit(samples_per_insert=1.0, min_size=32, min_diff=0.0, max_diff=256.0, batch=32, inserted=1)
    """
    flow, batch = config.flow, config.learn.batch
    per_insert = flow.samples_per_insert or batch / config.episodes_per_step
    bound = UNBOUNDED if config.learn.max_staleness is None else config.learn.max_staleness * config.publish.every
    ahead = max(2, bound) if flow.ahead is None else flow.ahead
    size = max(config.episodes_per_step, 1)
    room = max(ahead * batch, 2 * per_insert, batch + per_insert) if ahead else FREE
    return Limit(per_insert, size, 0.0, float(room), batch)


def episodes_in(view: Snapshot) -> int:
    """Distinct episodes of a snapshot."""
    return len({(key.episode_id, key.attempt) for key in view.rows})


@dataclass(frozen=True)
class Learnt:
    """What a learner says of itself in its pin.

    Attributes:
        limiter: its counters; None while it starves, when nobody shall wait for it.
        episodes: in the store when it looked.
        undecided: of these, those that the hint writer has not looked at.
        version: its policy version.
    """

    limiter: RateLimiter | None
    episodes: int
    undecided: int
    version: int

    def as_json(self) -> Json:
        """As a pin holds it."""
        held = {"limiter": self.limiter.state_dict()} if self.limiter else {}
        return {**held, "episodes": self.episodes, "undecided": self.undecided, "version": self.version}

    def may_begin(self, episodes: int, *, in_flight: int) -> bool:
        """Whether a collector may begin one more episode.

        Args:
            episodes: in the store now.
            in_flight: begun by all collectors and not in the store yet.
        """
        if self.limiter is None:
            return True
        pending = max(0, episodes - self.episodes) + self.undecided + in_flight
        return may_collect([self.limiter.state_dict()], 1, pending=pending)


def learners(store: ReplayStore) -> list[Learnt]:
    """What learners say that have been heard of lately; without one nobody waits."""
    said = [pin.state for pin in standing(store) if pin.reader == LEARNER]
    return [Learnt(RateLimiter.of(one["limiter"]) if "limiter" in one else None, one["episodes"], one["undecided"],
                   one["version"]) for one in said]


def looked_at(store: ReplayStore) -> int | None:
    """Episodes that the hint writer has looked at; None where there is no hint writer."""
    return next((pin.state["episodes"] for pin in standing(store) if pin.reader == HINTS), None)
