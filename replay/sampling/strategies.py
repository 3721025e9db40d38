"""In which order units are drawn. Each strategy is a function of seed, number of the draw and what is remembered.

Two families. *Passes* go through the eligible units, every unit once per pass: ``uniform`` by a seeded hash, ``fifo``
oldest arrival first, ``newest`` latest arrival first; new units join the pass that runs. *Independent* draws may take a
unit again: ``uniform_iid`` every eligible unit with equal probability, ``prioritised`` with

    P(i) = p_i^alpha / sum_j p_j^alpha,   p_i = priority_i * decay^uses_i,   weight_i = (N P(i))^-beta / max_j

(prioritised experience replay, arXiv:1511.05952, sections 3.3 and 3.4): a batch of n divides the mass into n equal
strata and draws once in each; the maximum is taken over all N eligible units. Both may prefer fresh units: then P(i) is
multiplied by ``staleness_weight ** staleness_i``, which the importance weights do not undo.
"""

import hashlib
from typing import Protocol

import numpy as np

from agentsdpo.replay.config import ReplayConfig
from agentsdpo.replay.sampling.eligible import Units

_FLOOR = 1e-12
"""Least priority that counts, as a share of the greatest: no unit is ever out of reach."""


def uniform(seed: int, t: int) -> float:
    """The random number of draw ``t`` in [0, 1): no state, so any process can compute any of them.

    >>> uniform(0, 7) == uniform(0, 7) != uniform(1, 7)
    True
    """
    digest = hashlib.blake2b(f"{seed}/draw/{t}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


class Strategy(Protocol):
    """Chooses units and remembers their use."""

    number: int
    """Passes begun, 0 for independent draws."""

    def join(self, names: list[str], first: int) -> None:
        """New units, the first of which has this number."""
        ...

    def draw(self, units: Units, eligible: np.ndarray, stale: np.ndarray, n: int,
             t: int) -> tuple[list[int], np.ndarray]:
        """Up to ``n`` of the units where ``eligible`` (bool[U]) holds, as draws t, t+1, ..., and float64[n] weights.

        ``stale`` is the staleness of each unit in policy versions, int64[U].
        """
        ...


def strategy_for(config: ReplayConfig, seed: int, number: int = 0) -> Strategy:
    """The strategy of a configuration; ``number`` is the pass it is in."""
    if config.strategy in ("uniform", "fifo", "newest"):
        return Passes(config, seed, number)
    return Independent(config, seed)


class Passes:
    """Every eligible unit once per pass; a draw that reaches the end of a pass goes on in the next one."""

    def __init__(self, config: ReplayConfig, seed: int, number: int) -> None:
        self._strategy, self._seed, self.number = config.strategy, seed, number
        self._order = np.zeros(0, np.uint64)

    def join(self, names: list[str], first: int) -> None:
        """See :meth:`Strategy.join`."""
        self._order = np.concatenate([self._order, self._ranks(names, first)])

    def draw(self, units: Units, eligible: np.ndarray, stale: np.ndarray, n: int,
             t: int) -> tuple[list[int], np.ndarray]:
        """See :meth:`Strategy.draw`; no unit twice."""
        memory, chosen, eligible = units.memory, list[int](), eligible.copy()
        while len(chosen) < n and eligible.any():
            left = np.flatnonzero(eligible & (memory.last_pass < self.number))
            if not len(left):
                self._next_pass(units)
                continue
            ranks = self._order[left]
            count = min(n - len(chosen), len(left))
            nearest = np.argpartition(ranks, count - 1)[:count]
            pick = left[nearest[np.argsort(ranks[nearest])]]
            memory.last_pass[pick] = self.number
            memory.last_draw[pick] = t + len(chosen) + np.arange(count)
            memory.uses[pick] += 1
            eligible[pick] = False
            chosen += pick.tolist()
        return chosen, np.ones(len(chosen))

    def _next_pass(self, units: Units) -> None:
        self.number += 1
        if self._strategy == "uniform":
            self._order = self._ranks(units.names, 0)

    def _ranks(self, names: list[str], first: int) -> np.ndarray:
        """uint64[len(names)]: place of units within this pass, lowest first; ``first`` is the number of the first."""
        if self._strategy == "uniform":
            head = f"{self._seed}/{self.number}/"
            hashes = [hashlib.blake2b((head + name).encode(), digest_size=8).digest() for name in names]
            return np.frombuffer(b"".join(hashes), ">u8").astype(np.uint64)
        arrival = np.arange(first, first + len(names), dtype=np.uint64)
        return arrival if self._strategy == "fifo" else np.uint64(2**63) - arrival


class Independent:
    """Draws that do not know of each other, but for ``max_uses`` and ``cooldown``."""

    number = 0

    def __init__(self, config: ReplayConfig, seed: int) -> None:
        self._config, self._seed = config, seed

    def join(self, names: list[str], first: int) -> None:
        """See :meth:`Strategy.join`; nothing is kept here."""

    def draw(self, units: Units, eligible: np.ndarray, stale: np.ndarray, n: int,
             t: int) -> tuple[list[int], np.ndarray]:
        """See :meth:`Strategy.draw`."""
        order, memory, chosen, config = units.by_key, units.memory, list[int](), self._config
        preference = np.where(eligible, self.preference(units), 0.0)[order]
        weights = self._weights(preference, t)
        mass = preference * config.staleness_weight ** stale[order].astype(np.float64)
        edges = np.cumsum(mass)
        for k in range(n):
            if not len(edges) or edges[-1] <= 0:
                break
            u = uniform(self._seed, t + k)
            stratum = (k + u) / n if config.strategy == "prioritised" else u
            at = int(np.searchsorted(edges, min(stratum * edges[-1], np.nextafter(edges[-1], 0)), side="right"))
            unit = int(order[at])
            chosen.append(at)
            memory.uses[unit] += 1
            memory.last_draw[unit] = t + k
            if config.cooldown or (config.max_uses and memory.uses[unit] >= config.max_uses):
                mass[at] = 0.0
                edges = np.cumsum(mass)
        return order[chosen].tolist(), weights[chosen]

    def preference(self, units: Units) -> np.ndarray:
        """float64[U]: probability of each unit but for the common factor and its staleness."""
        if self._config.strategy == "uniform_iid":
            return np.ones(len(units))
        memory = units.memory
        priority = memory.priority * self._config.decay ** memory.uses
        return np.maximum(priority, priority.max(initial=0.0) * _FLOOR or 1.0) ** self._config.alpha

    def _weights(self, mass: np.ndarray, t: int) -> np.ndarray:
        """float64[U]: importance weights in (0, 1] that undo the preference, as far as beta of draw ``t`` says."""
        if self._config.strategy == "uniform_iid" or not (mass > 0).any():
            return np.ones(len(mass))
        done = min(t / self._config.beta_draws, 1.0) if self._config.beta_draws else 0.0
        beta = self._config.beta + (1.0 - self._config.beta) * done
        least = mass[mass > 0].min()
        return np.where(mass > 0, mass / least, 1.0) ** -beta
