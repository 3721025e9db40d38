"""Rate limiter: how often branches are used on average, samples per insert, kept within bounds from both sides.

    error = samples_per_insert * inserts - samples

is how many samples the inserts so far still allow. The learner samples n when ``size >= min_size`` and
``error - n >= min_diff``; a collector inserts n when ``size < min_size`` or ``error + samples_per_insert * n <=
max_diff`` (Reverb's rule, arXiv:2102.04736, with batches on both sides). The learner enforces its side and publishes
its counters in its pin; collectors read them there and pause.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from agentsdpo.errors import ConfigError
from agentsdpo.replay.store import ReplayStore
from agentsdpo.replay.upkeep.pinned import standing
from agentsdpo.types import Json


@dataclass(frozen=True)
class Limit:
    """Bounds of the error. No state in which both sides wait exists: :meth:`__post_init__` refuses bounds too tight.

    Args:
        samples_per_insert: mean uses of an insert to aim for; above 0.
        min_size: inserts there must be before anything is sampled; 1 or more.
        min_diff: least error that sampling may leave.
        max_diff: greatest error that inserting may leave.
        batch: samples taken at once.
        inserted: inserts made at once.

    Raises:
        ConfigError: the bounds leave less room than one batch and one insert together need.

    >>> Limit.around(4.0, min_size=10, error_buffer=40.0, batch=32)
    Limit(samples_per_insert=4.0, min_size=10, min_diff=0.0, max_diff=80.0, batch=32, inserted=1)
    >>> Limit.around(4.0, min_size=10, error_buffer=2.0)
    Traceback (most recent call last):
    agentsdpo.errors.ConfigError: the limiter's bounds 38 and 42 are 4 apart, ...; raise error_buffer to 4 or more
    """

    samples_per_insert: float
    min_size: int
    min_diff: float
    max_diff: float
    batch: int = 1
    inserted: int = 1

    @classmethod
    def around(cls, samples_per_insert: float, *, min_size: int, error_buffer: float, batch: int = 1,
               inserted: int = 1) -> "Limit":
        """Bounds ``error_buffer`` to both sides of the error at which sampling begins. Raises as the class."""
        middle = min_size * samples_per_insert
        return cls(samples_per_insert, min_size, middle - error_buffer, middle + error_buffer, batch, inserted)

    def __post_init__(self) -> None:
        if self.samples_per_insert <= 0 or min(self.min_size, self.batch, self.inserted) < 1:
            raise ConfigError(f"the limiter was given samples_per_insert {self.samples_per_insert:g}, min_size "
                              f"{self.min_size}, batch {self.batch}, inserted {self.inserted}",
                              fix="the first must be above 0, the others 1 or more")
        room = self.max_diff - self.min_diff
        need = max(2 * max(1.0, self.samples_per_insert), self.batch + self.samples_per_insert * self.inserted)
        if room < need:
            raise ConfigError(f"the limiter's bounds {self.min_diff:g} and {self.max_diff:g} are {room:g} apart, "
                              f"a batch of {self.batch} and {self.inserted} inserts need {need:g}",
                              fix=f"raise error_buffer to {need / 2:g} or more")


@dataclass
class RateLimiter:
    """Counters of one learner, all that the two questions depend on. JSON through :meth:`state_dict`.

    >>> limiter = RateLimiter(Limit.around(2.0, min_size=1, error_buffer=2.0))
    >>> limiter.may_sample(1)
    False
    >>> limiter.insert(1)
    >>> limiter.may_sample(1), limiter.may_insert(1)
    (True, True)
    """

    limit: Limit
    inserts: int = 0
    samples: int = 0
    size: int = 0

    @property
    def error(self) -> float:
        """Samples the inserts so far still allow."""
        return self.limit.samples_per_insert * self.inserts - self.samples

    def may_sample(self, n: int) -> bool:
        """Whether the learner may take ``n`` more."""
        return self.size >= self.limit.min_size and self.error - n >= self.limit.min_diff

    def may_insert(self, n: int) -> bool:
        """Whether a collector may add ``n`` more."""
        return (self.size < self.limit.min_size
                or self.error + self.limit.samples_per_insert * n <= self.limit.max_diff)

    def insert(self, n: int) -> None:
        """Count ``n`` units that joined."""
        self.inserts, self.size = self.inserts + n, self.size + n

    def sample(self, n: int) -> None:
        """Count ``n`` units that were drawn."""
        self.samples += n

    def resize(self, size: int) -> None:
        """Say how many units there are now that some were evicted; what they were used for stays counted."""
        self.size = size

    def state_dict(self) -> Json:
        """Limit and counters, for the learner's checkpoint and its pin."""
        return {"limit": asdict(self.limit), "inserts": self.inserts, "samples": self.samples, "size": self.size}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "RateLimiter":
        """The inverse of :meth:`state_dict`."""
        return cls(Limit(**state["limit"]), state["inserts"], state["samples"], state["size"])


def published(store: ReplayStore) -> list[Json]:
    """What learners say in their pins: the ``limiter`` of every pin that has not lapsed. Raises as :func:`standing`."""
    return [pin.state["limiter"] for pin in standing(store) if "limiter" in pin.state]


def may_collect(states: Iterable[Mapping[str, Any]], n: int, *, pending: int = 0) -> bool:
    """Whether a collector may add ``n`` units, going by what the learners publish.

    Args:
        states: :meth:`RateLimiter.state_dict` of the learners, from :func:`published`; a lapsed pin never blocks.
        n: units about to be added.
        pending: units added since, which no learner has counted yet.

    Returns:
        True when every learner that publishes a limiter has room; without learners always.
    """
    limiters = [RateLimiter.of(state) for state in states]
    for limiter in limiters:
        limiter.insert(pending)
    return all(limiter.may_insert(n) for limiter in limiters)
