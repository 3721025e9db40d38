"""Draws branches for the learner: filtered, bounded in staleness, repeatable.

A draw depends on seed, state and learner version, on nothing else: no clock, no world size. One process draws; the
others are told the keys (:mod:`~agentsdpo.replay.sampling.placement`). ``eligible.py`` says what may be drawn,
``strategies.py`` in which order.
"""

import hashlib
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from agentsdpo.errors import ConfigError, StoreError
from agentsdpo.replay.canonical import canonical_json
from agentsdpo.replay.config import ReplayConfig
from agentsdpo.replay.ids import Key
from agentsdpo.replay.log import Located
from agentsdpo.replay.rows import Row
from agentsdpo.replay.sampling.eligible import Filters, Units
from agentsdpo.replay.sampling.index import SideIndex, Use
from agentsdpo.replay.sampling.limiter import RateLimiter
from agentsdpo.replay.sampling.strategies import strategy_for
from agentsdpo.replay.snapshot import Snapshot
from agentsdpo.types import Json


class Source(Protocol):
    """What a sampler draws from: a store."""

    def snapshot(self, at: Mapping[str, Sequence] | None = None) -> Snapshot:
        """The rows that are live now, or were at a position in the log."""
        ...


class Sampler:
    """A learner's position in the store; none of it is kept in the store itself.

    Always refused: branches without trainable tokens, not stamped ``train_allowed``, of another tokenizer or chat
    template, without exact behaviour log-probs (a kind before temperature or filters, a truncated call without its
    kept set), of unknown policy version, and those staler than the bound.

    Args:
        store: where to draw from.
        config: strategy, unit, caps and weights.
        seed: of all strategies but ``fifo`` and ``newest``.
        tokenizer_sha256: tokenizer of the learner's model; None accepts all (to look at data, not to train on it).
        chat_template_sha256: likewise its chat template, in which the hint will be rendered.
        max_staleness: a unit is eligible iff learner version - its oldest version <= this; None is no bound.
        where: only branches this filter holds for when they join; see :mod:`agentsdpo.replay.where`.
        limiter: counts what joins and what is drawn, and holds draws back; None draws whenever asked.
        index: told of all uses and priorities, for others to read.

    Attributes:
        weights: float64[K] in (0, 1], the importance weight of each key of the last draw; 1 unless ``prioritised``.

    Raises:
        ConfigError: a negative ``max_staleness``, or ``where`` is no filter.
        CorruptionError, StoreError: as :meth:`ReplayStore.snapshot`.
    """

    def __init__(self, store: Source, config: ReplayConfig, *, seed: int, tokenizer_sha256: str | None,
                 max_staleness: int | None, chat_template_sha256: str | None = None, where: str | None = None,
                 limiter: RateLimiter | None = None, index: SideIndex | None = None) -> None:
        if max_staleness is not None and max_staleness < 0:
            raise ConfigError(f"max_staleness is {max_staleness}", fix="set it to 0 (on-policy) or more, or to None")
        self.store, self.config, self.max_staleness = store, config, max_staleness
        self.limiter, self._index, self._seed = limiter, index, seed
        self._filters = Filters(tokenizer_sha256, chat_template_sha256, where)
        self._draws = self._learner_version = 0
        self._drawn: list[Located] = []
        self.weights = np.ones(0)
        self.snapshot = store.snapshot()
        self._wanted: set[Key] = set()  # keys for which the filter held when they joined
        arrived = _arrivals(self.snapshot.rows.values())
        self._judge(arrived)
        self._restart(arrived, {}, 0)
        if limiter is not None:
            limiter.insert(len(self._units))
        if index is not None:
            index.put([], anew=True)

    # ----------------------------------------------------------------------------------------------- refreshing

    def refresh(self, only: Collection[str] | None = None) -> int:
        """Let what was appended since the last refresh join; returns how many branches did.

        Args:
            only: episode ids that may join now, so that a run repeats itself whatever else the store holds; all by
                default. The others may join at a later refresh.

        Raises:
            CorruptionError, StoreError: as :meth:`ReplayStore.snapshot`.
        """
        self.snapshot = self.store.snapshot()
        live, old = self.snapshot.rows, self._units
        known = {row.key for row in old.rows}
        new = _arrivals(row for key, row in live.items()
                        if key not in known and (only is None or key.episode_id in only))
        before = set(old.names) if self.limiter else set()
        if any(live.get(row.key) is not row for row in old.rows):
            kept = [live[row.key] for row in old.rows if row.key in live]
            self._judge([live[row.key] for row in old.rows if row.key in live and
                         live[row.key].content_sha256 != row.content_sha256])
            self._restart(kept, self._remembered(), self._strategy.number)
        self._judge(new)
        self._join(new, {})
        if self.limiter:
            self.limiter.insert(len(set(self._units.names) - before))
            self.limiter.resize(len(self._units))
        return len(new)

    def _restart(self, rows: list[Located], remembered: Mapping[str, Sequence[float]], number: int) -> None:
        """Start over from these rows, in order of arrival, in pass ``number``."""
        self._units = Units(self._filters, self.config.unit, self.config.group_mode == "closed")
        self._strategy = strategy_for(self.config, self._seed, number)
        self._join(rows, remembered)

    def _judge(self, rows: Iterable[Located]) -> None:
        """Ask the filter about rows that join; what is said of them later changes nothing, or no run could resume."""
        keys = {row.key for row in rows}
        if self._filters.where is not None and keys:
            self._wanted = (self._wanted - keys) | set(self.snapshot.keys(self._filters.where, keys))

    def _join(self, rows: list[Located], remembered: Mapping[str, Sequence[float]]) -> None:
        wanted, first = None if self._filters.where is None else self._wanted, len(self._units)
        self._strategy.join(self._units.join(rows, remembered, self.snapshot.closures, wanted), first)

    def _remembered(self) -> dict[str, list[float]]:
        return {name: self._units.memory.of_unit(i) for i, name in enumerate(self._units.names)}

    # -------------------------------------------------------------------------------------------------- drawing

    def sample(self, n: int, learner_version: int) -> list[Row]:
        """Draw ``n`` units and read their branches; see :meth:`draw` and :meth:`Snapshot.read`."""
        return self.snapshot.read(self.draw(n, learner_version))

    def draw(self, n: int, learner_version: int) -> list[Key]:
        """Keys of ``n`` units; fewer when fewer are eligible, none when none is or the limiter holds the learner back.

        In passes no unit comes twice in one draw. The branches of a unit stand together, keys ascending.
        """
        self._drawn, self.weights, self._learner_version = [], np.ones(0), learner_version
        if self.limiter and not self.limiter.may_sample(n):
            return []
        eligible = self._units.closed & self._fresh(learner_version) & self._unused() & self._rested()
        stale = np.maximum(learner_version - self._units.oldest, 0)
        chosen, weights = self._strategy.draw(self._units, eligible, stale, n, self._draws)
        self._draws += len(chosen)
        if self.limiter:
            self.limiter.sample(len(chosen))
        keys = [self._units.keys(unit) for unit in chosen]
        self.weights = np.repeat(weights, [len(each) for each in keys])
        self._drawn = [self.snapshot.rows[key] for each in keys for key in each]
        self._tell(chosen)
        return [row.key for row in self._drawn]

    def _fresh(self, learner_version: int) -> np.ndarray:
        """bool[U]: units within the staleness bound."""
        if self.max_staleness is None:
            return np.ones(len(self._units), bool)
        return learner_version - self._units.oldest <= self.max_staleness

    def _unused(self) -> np.ndarray:
        """bool[U]: units that may still be drawn."""
        uses = self._units.memory.uses
        return uses < self.config.max_uses if self.config.max_uses else np.ones(len(uses), bool)

    def _rested(self) -> np.ndarray:
        """bool[U]: units whose last draw is long enough ago."""
        last = self._units.memory.last_draw
        return (last < 0) | (last + self.config.cooldown < self._draws)

    def update_priorities(self, priorities: Mapping[Key, float]) -> None:
        """Say how much units deserve to be drawn again; a unit takes the greatest number of its branches.

        Keys that left the store since the draw are passed over.

        Raises:
            ValueError: a priority is negative or not finite.
        """
        bad = next((key for key, value in priorities.items() if not 0 <= value < float("inf")), None)
        if bad is not None:
            raise ValueError(f"the priority of {bad} is {priorities[bad]}; give a finite number, 0 or more")
        found: dict[int, float] = {}
        for key, value in priorities.items():
            if key in self._units.unit_of:
                unit = self._units.unit_of[key]
                found[unit] = max(found.get(unit, 0.0), float(value))
        for unit, value in found.items():
            self._units.memory.priority[unit] = value
        self._tell(list(found))

    def _tell(self, units: Iterable[int]) -> None:
        """Write the uses of some units into the side index, or of all when it was deleted."""
        if self._index is None:
            return
        lost, memory = self._index.lost, self._units.memory
        chosen = range(len(self._units)) if lost else dict.fromkeys(units)
        rows = [(key, Use(int(memory.uses[unit]), int(memory.last_draw[unit]), float(memory.priority[unit])))
                for unit in chosen for key in self._units.keys(unit)]
        self._index.put(rows, anew=lost)

    # ------------------------------------------------------------------------------------------ looking, resuming

    def explain(self, learner_version: int) -> dict[str, int]:
        """How many branches each filter removes, every branch counted at the first filter it fails.

        Keys: ``total``, ``untrainable``, ``not_allowed``, ``tokenizer``, ``template``, ``no_logprob``, ``no_version``,
        ``where``, ``open_group``, ``stale``, ``used_up``, ``resting``, ``eligible``, and ``withheld`` (two versions of
        one key, not part of the total).
        """
        left = np.array([len(members) for members in self._units.members], np.int64)
        counts = {"total": len(self._units.rows), **self._units.refused}
        masks = {"open_group": self._units.closed, "stale": self._fresh(learner_version), "used_up": self._unused(),
                 "resting": self._rested()}
        for name, passed in masks.items():
            counts[name] = int(left[~passed].sum())
            left = np.where(passed, left, 0)
        return {**counts, "eligible": int(left.sum()), "withheld": len(self.snapshot.conflicts)}

    def metrics(self) -> dict[str, float]:
        """Numbers of the last draw: staleness in versions, age in seconds, share of branches wasted by staleness."""
        sizes, refused = np.array([len(members) for members in self._units.members], np.int64), self._units.refused
        wasted = ~self._fresh(self._learner_version) & (self._units.memory.uses == 0)
        metrics = {"replay/evicted_frac": float(sizes[wasted].sum() / max(sizes.sum(), 1)),
                   "replay/refused/count": float(sum(refused.values()))}
        metrics |= {f"replay/refused/{n}": float(refused[n])
                    for n in ("no_logprob", "tokenizer", "template", "not_allowed")}
        if self._drawn:
            stale = np.array([self._learner_version - row.version_min for row in self._drawn], float)
            age = time.time() - np.array([row.ts_us for row in self._drawn]) / 1e6
            span = max(row.version_max for row in self._drawn) - min(row.version_min for row in self._drawn)
            metrics |= {"replay/staleness/mean": float(stale.mean()), "replay/staleness/max": float(stale.max()),
                        "replay/staleness/p95": float(np.percentile(stale, 95)),
                        "replay/age_s/p95": float(np.percentile(age, 95)), "replay/version_span": float(span)}
        return metrics

    def state_dict(self) -> Json:
        """All that the next draws depend on, as JSON for the learner's checkpoint."""
        return {"v": 2, "config": self._config_sha(), "pass": self._strategy.number, "draws": self._draws,
                "snapshot": {writer: list(at) for writer, at in self.snapshot.vector.items()},
                "rows": [str(row.key) for row in self._units.rows], "units": self._remembered(),
                "limiter": self.limiter.state_dict() if self.limiter else None,
                "wanted": sorted(map(str, self._wanted))}

    def load_state_dict(self, state: Json) -> None:
        """Continue where :meth:`state_dict` was taken: the same draws follow, though the store has grown since.

        Raises:
            ConfigError: the state belongs to another release, configuration, seed, staleness bound, filter, limiter,
                tokenizer or template.
            StoreError: the store's log is not the one the state was taken on.
        """
        if state["v"] != 2 or state["config"] != self._config_sha():
            raise ConfigError(f"the sampler state (version {state['v']}) was taken with configuration "
                              f"{state['config'][:12]}, this is version 2 with {self._config_sha()[:12]}",
                              fix="resume with the replay settings, seed, staleness bound, filter, limiter, tokenizer "
                                  "and template of the run, or start a new run on the same store")
        self.snapshot = self.store.snapshot(at=state["snapshot"])
        keys = [Key.parse(text) for text in state["rows"]]
        missing = [key for key in keys if key not in self.snapshot.rows]
        if missing:
            raise StoreError(f"branch {missing[0]} of the sampler state is not in the store",
                             fix="resume on the store the run was made with")
        self._draws, self._drawn, self.weights = state["draws"], [], np.ones(0)
        rows = [self.snapshot.rows[key] for key in keys]
        if "wanted" in state:
            self._wanted = set(map(Key.parse, state["wanted"]))
        else:  # a state of an earlier build
            self._judge(rows)
        self._restart(rows, state["units"], state["pass"])
        self.limiter = RateLimiter.of(state["limiter"]) if state["limiter"] else None
        if self._index is not None:
            self._index.put([], anew=True)
            self._tell(range(len(self._units)))

    def _config_sha(self) -> str:
        about = {**self.config.identity(), "seed": self._seed, "max_staleness": self.max_staleness,
                 "tokenizer_sha256": self._filters.tokenizer_sha256,
                 "chat_template_sha256": self._filters.chat_template_sha256}
        if self._filters.where is not None:
            about["where"] = self._filters.where
        if self.limiter is not None:
            about["limit"] = self.limiter.state_dict()["limit"]
        return hashlib.sha256(canonical_json(about)).hexdigest()


def _arrivals(rows: Iterable[Located]) -> list[Located]:
    """New rows in the order they are numbered in: no clock, no order of appends."""
    return sorted(rows, key=lambda row: (row.version_min, row.key))
