"""Bringing a policy version onto running servers: what all ways of doing it share.

A pusher takes a version of a registry and some servers, and leaves each of them serving either that version, checked,
or what it served before; never paused. Pushing again what is there already changes nothing, so that a pusher that was
killed is simply started again. ``push_full.py`` replaces weights, ``push_adapter.py`` loads adapters beside each other,
``nccl.py`` sends tensors without a disk.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Protocol

from agentsdpo.errors import AgentSdpoError, PushError
from agentsdpo.publish.control import ServerGone, VllmControl
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.types import Json

BOUND = 0.02
"""Largest mean absolute difference of log-probs between server and registry, nats."""
PROBED = 16
"""Tokens a probe samples."""

Connect = Callable[[str], VllmControl]
"""Opens a server by its address."""


class Mismatch(PushError):
    """A server's log-probs are not those of the version it was given: no server should be given it."""


class Scorer(Protocol):
    """The registry's own opinion of a version, from its weights and transformers."""

    @property
    def prompt(self) -> Sequence[int]:
        """The ids every probe begins with: a few hundred, so that they fill blocks of the prefix cache."""
        ...

    def load(self, version: int) -> None:
        """Score with this version from now on.

        Raises:
            RegistryError, CorruptionError, ModelError: it is not there, damaged, or not the whole model.
        """
        ...

    def logps(self, ids: Sequence[int], n: int) -> Sequence[float]:
        """Log-probs of the last ``n`` ids, each after all before it, nats."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What became of one server.

    ``ok``: it serves the version. ``changed``: it did not before. ``parity_nats``: mean absolute difference of
    log-probs. ``pause_s``: how long generation stood still. ``error``: why it is not ok, and what it serves instead.
    """

    url: str
    ok: bool
    changed: bool = False
    parity_nats: float | None = None
    pause_s: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class PushReport:
    """What became of one version; ``name`` is the model that requests ask for, None for the servers' own."""

    version: int
    kind: str
    servers: tuple[Outcome, ...]
    name: str | None = None

    @property
    def ok(self) -> bool:
        """Whether every server serves it."""
        return all(server.ok for server in self.servers)

    def as_json(self) -> Json:
        """For a line of JSON."""
        return {**asdict(self), "ok": self.ok}


class Pusher(Protocol):
    """A way of bringing versions onto servers."""

    def serves(self, registry: PolicyRegistry, version: int, url: str) -> bool:
        """Whether a server says that it serves a version already; cheap, nothing is probed.

        Raises:
            ServerGone: it does not answer.
        """
        ...

    def push(self, registry: PolicyRegistry, version: int, servers: Sequence[str]) -> PushReport:
        """Bring a version onto servers, one after the other.

        A server's failure is in the report. When a version turns out not to be what the registry holds, the servers
        after that are left alone.

        Raises:
            RegistryError, CorruptionError, PushError: the version cannot be pushed this way; no server was touched.
        """
        ...


def parity(server: VllmControl, scorer: Scorer, model: str, bound: float) -> float:
    """Sample a few tokens and hold the server's log-probs against the registry's.

    Args:
        model: name to ask the server for.
        bound: nats.

    Returns:
        Mean absolute difference, nats.

    Raises:
        Mismatch: it is above the bound, or no number.
    """
    ids, told = server.sample(model, scorer.prompt, PROBED)
    nats = mean_difference(told, scorer.logps([*scorer.prompt, *ids], len(ids)))
    if not nats <= bound:
        raise Mismatch(f"log-probs of {model!r} on {server.url} differ from the registry's by {nats:.3g} nats in the "
                       f"mean, more than {bound:g}", fix="compare base model, dtype and --logprobs-mode of the server")
    return nats


def mean_difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Mean absolute difference of two lists of the same length.

    >>> mean_difference([0.0, -1.0], [0.5, -1.0])
    0.25
    """
    return fmean(abs(a - b) for a, b in zip(one, other, strict=True))


class Round:
    """One version's way over several servers: collects outcomes, stops at the first mismatch."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.gone: set[str] = set()
        self._bad: str | None = None

    def visit(self, servers: Sequence[str], act: Callable[[str], Outcome]) -> None:
        """Do something with each server; what goes wrong with one is its outcome."""
        for url in servers:
            if self._bad:
                self.outcomes.append(Outcome(url, ok=False, error=f"left alone: {self._bad}"))
                continue
            try:
                self.outcomes.append(act(url))
            except AgentSdpoError as error:
                self.outcomes.append(Outcome(url, ok=False, error=str(error)))
                self.gone |= {url} if isinstance(error, ServerGone) else set()
                self._bad = f"the version did not pass on {url}" if isinstance(error, Mismatch) else None
