"""Draws branches for the learner: filtered, bounded in staleness, repeatable.

Each strategy goes through the eligible units pass by pass, every unit once per pass; new ones join at a refresh. The
strategies differ in the order within a pass alone. A draw depends on seed, state and learner version, on nothing else:
no clock, no world size. One process draws; others are told the keys.
"""

import hashlib
import time
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from agentsdpo.errors import ConfigError, StoreError
from agentsdpo.replay.canonical import canonical_json
from agentsdpo.replay.config import ReplayConfig
from agentsdpo.replay.ids import Key
from agentsdpo.replay.log import Located
from agentsdpo.replay.rows import Row
from agentsdpo.replay.snapshot import Snapshot
from agentsdpo.replay.store import ReplayStore
from agentsdpo.types import Json

_REFUSED = ("untrainable", "not_allowed", "tokenizer", "template", "no_logprob", "no_version")
"""Filters that do not depend on the learner's version, in the order they are counted."""


class Sampler:
    """A learner's position in the store; none of it is kept in the store itself.

    Always refused: branches without trainable tokens, not stamped ``train_allowed``, of another tokenizer or chat
    template, without exact behaviour log-probs (a kind before temperature or filters, a truncated call without its
    kept set), of unknown policy version, and those staler than the bound.

    Args:
        store: where to draw from.
        config: strategy, unit and cap of uses.
        seed: of the order under ``uniform``.
        tokenizer_sha256: tokenizer of the learner's model; None accepts all (to look at data, not to train on it).
        chat_template_sha256: likewise its chat template, in which the hint will be rendered.
        max_staleness: a unit is eligible iff learner version - its oldest version <= this; None is no bound.

    Raises:
        ConfigError: a negative ``max_staleness``.
        CorruptionError, StoreError: as :meth:`ReplayStore.snapshot`.
    """

    def __init__(self, store: ReplayStore, config: ReplayConfig, *, seed: int, tokenizer_sha256: str | None,
                 max_staleness: int | None, chat_template_sha256: str | None = None) -> None:
        if max_staleness is not None and max_staleness < 0:
            raise ConfigError(f"max_staleness is {max_staleness}", fix="set it to 0 (on-policy) or more, or to None")
        self.store, self.config, self.max_staleness = store, config, max_staleness
        self._seed, self._tokenizer, self._template = seed, tokenizer_sha256, chat_template_sha256
        self._pass = self._draws = self._learner_version = 0
        self._drawn: list[Located] = []
        self.snapshot = store.snapshot()
        self._rebuild(_arrivals(self.snapshot.rows.values()), {})

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
        live, known = self.snapshot.rows, {row.key for row in self._rows}
        new = _arrivals(row for key, row in live.items()
                        if key not in known and (only is None or key.episode_id in only))
        if any(live.get(row.key) is not row for row in self._rows):
            state = {name: (int(self._uses[i]), int(self._last_pass[i])) for name, i in self._units.items()}
            kept = [live[row.key] for row in self._rows if row.key in live]
            self._rebuild(kept + new, state)
        else:
            self._join(new, {})
        return len(new)

    def _rebuild(self, rows: list[Located], state: Mapping[str, tuple[int, int]]) -> None:
        """Start over from these rows, in order of arrival, with the uses and last passes of ``state``."""
        self._rows: list[Located] = []
        self._units: dict[str, int] = {}
        self._members: list[list[int]] = []
        self._oldest, self._uses, self._last_pass = (np.zeros(0, np.int64) for _ in range(3))
        self._order = np.zeros(0, np.uint64)
        self._refused: dict[str, int] = dict.fromkeys(_REFUSED, 0)
        self._join(rows, state)

    def _join(self, rows: list[Located], state: Mapping[str, tuple[int, int]]) -> None:
        """Number new rows and their units; refused rows are counted and belong to no unit."""
        oldest, first = self._oldest.tolist(), len(self._units)
        for row in rows:
            self._rows.append(row)
            reason = self._reason(row)
            if reason is not None:
                self._refused[reason] += 1
                continue
            unit = self._units.setdefault(self._unit(row.key), len(self._units))
            if unit == len(oldest):
                oldest.append(row.version_min)
                self._members.append([])
            oldest[unit] = min(oldest[unit], row.version_min)
            self._members[unit].append(len(self._rows) - 1)
        names = list(self._units)[first:]
        seen = np.array([state.get(name, (0, -1)) for name in names], np.int64).reshape(-1, 2)
        self._oldest = np.array(oldest, np.int64)
        self._uses = np.concatenate([self._uses, seen[:, 0]])
        self._last_pass = np.concatenate([self._last_pass, seen[:, 1]])
        self._order = np.concatenate([self._order, self._ranks(names, first)])

    def _unit(self, key: Key) -> str:
        return str(key) if self.config.unit == "branch" else f"{key.episode_id}/{key.attempt}"

    def _reason(self, row: Located) -> str | None:
        """The first filter a row fails for good, None when there is none."""
        exact = row.logprob_kind == "processed" or (row.logprob_kind == "tempered" and row.kept_set == "not_needed")
        checks = (row.trainable, row.train_allowed, self._tokenizer in (None, row.tokenizer_sha256),
                  self._template in (None, row.chat_template_sha256), exact and row.kept_set != "missing",
                  row.version_min >= 0)
        return next((name for name, good in zip(_REFUSED, checks, strict=True) if not good), None)

    # -------------------------------------------------------------------------------------------------- drawing

    def sample(self, n: int, learner_version: int) -> list[Row]:
        """Draw ``n`` units and read their branches; see :meth:`draw` and :meth:`Snapshot.read`."""
        return self.snapshot.read(self.draw(n, learner_version))

    def draw(self, n: int, learner_version: int) -> list[Key]:
        """Keys of ``n`` units, no unit twice; fewer when fewer are eligible, none when none is.

        A draw that reaches the end of a pass goes on in the next one.
        """
        eligible = self._fresh(learner_version) & self._unused()
        chosen: list[int] = []
        while len(chosen) < n and eligible.any():
            left = np.flatnonzero(eligible & (self._last_pass < self._pass))
            if not len(left):
                self._next_pass()
                continue
            ranks = self._order[left]
            count = min(n - len(chosen), len(left))
            nearest = np.argpartition(ranks, count - 1)[:count]
            pick = left[nearest[np.argsort(ranks[nearest])]]
            self._last_pass[pick] = self._pass
            self._uses[pick] += 1
            eligible[pick] = False
            chosen += pick.tolist()
        self._draws, self._learner_version = self._draws + len(chosen), learner_version
        self._drawn = [self._rows[i] for unit in chosen for i in sorted(self._members[unit], key=self._row_key)]
        return [row.key for row in self._drawn]

    def _row_key(self, i: int) -> Key:
        return self._rows[i].key

    def _fresh(self, learner_version: int) -> np.ndarray:
        """bool[U]: units within the staleness bound."""
        if self.max_staleness is None:
            return np.ones(len(self._oldest), bool)
        return learner_version - self._oldest <= self.max_staleness

    def _unused(self) -> np.ndarray:
        """bool[U]: units that may still be drawn."""
        return self._uses < self.config.max_uses if self.config.max_uses else np.ones(len(self._uses), bool)

    def _next_pass(self) -> None:
        self._pass += 1
        if self.config.strategy == "uniform":
            self._order = self._ranks(list(self._units), 0)

    def _ranks(self, names: list[str], first: int) -> np.ndarray:
        """uint64[len(names)]: place of units within this pass, lowest first; ``first`` is the number of the first."""
        if self.config.strategy == "uniform":
            head = f"{self._seed}/{self._pass}/"
            hashes = [hashlib.blake2b((head + name).encode(), digest_size=8).digest() for name in names]
            return np.frombuffer(b"".join(hashes), ">u8").astype(np.uint64)
        arrival = np.arange(first, first + len(names), dtype=np.uint64)
        return arrival if self.config.strategy == "fifo" else np.uint64(2**63) - arrival

    # ------------------------------------------------------------------------------------------ looking, resuming

    def explain(self, learner_version: int) -> dict[str, int]:
        """How many branches each filter removes, every branch counted at the first filter it fails.

        Keys: ``total``, ``untrainable``, ``not_allowed``, ``tokenizer``, ``template``, ``no_logprob``, ``no_version``,
        ``stale``, ``used_up``, ``eligible``, and ``withheld`` (two versions of one key, not part of the total).
        """
        size = np.array([len(members) for members in self._members], np.int64)
        fresh, unused = self._fresh(learner_version), self._unused()
        return {"total": len(self._rows), **self._refused, "stale": int(size[~fresh].sum()),
                "used_up": int(size[fresh & ~unused].sum()), "eligible": int(size[fresh & unused].sum()),
                "withheld": len(self.snapshot.conflicts)}

    def metrics(self) -> dict[str, float]:
        """Numbers of the last draw: staleness in versions, age in seconds, share of usable branches too stale."""
        counts = self.explain(self._learner_version)
        usable = counts["stale"] + counts["used_up"] + counts["eligible"]
        metrics = {"replay/evicted_frac": counts["stale"] / max(usable, 1),
                   "replay/refused/count": float(sum(self._refused.values()))}
        metrics |= {f"replay/refused/{n}": float(self._refused[n])
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
        return {"v": 1, "config": self._config_sha(), "pass": self._pass, "draws": self._draws,
                "snapshot": {writer: list(at) for writer, at in self.snapshot.vector.items()},
                "rows": [str(row.key) for row in self._rows],
                "units": {name: [int(self._uses[i]), int(self._last_pass[i])] for name, i in self._units.items()}}

    def load_state_dict(self, state: Json) -> None:
        """Continue where :meth:`state_dict` was taken: the same draws follow, though the store has grown since.

        Raises:
            ConfigError: the state belongs to another configuration, seed, staleness bound, tokenizer or template.
            StoreError: the store's log is not the one the state was taken on.
        """
        if state["config"] != self._config_sha():
            raise ConfigError(f"the sampler state was taken with configuration {state['config'][:12]}, this is "
                              f"{self._config_sha()[:12]}", fix="resume with the replay settings, seed, staleness "
                              "bound, tokenizer and template of the run, or start a new run on the same store")
        self.snapshot: Snapshot = self.store.snapshot(at=state["snapshot"])
        keys = [Key.parse(text) for text in state["rows"]]
        missing = [key for key in keys if key not in self.snapshot.rows]
        if missing:
            raise StoreError(f"branch {missing[0]} of the sampler state is not in the store",
                             fix="resume on the store the run was made with")
        self._pass, self._draws, self._drawn = state["pass"], state["draws"], []
        self._rebuild([self.snapshot.rows[key] for key in keys],
                      {name: (uses, last) for name, (uses, last) in state["units"].items()})

    def _config_sha(self) -> str:
        about = {**self.config.model_dump(), "seed": self._seed, "max_staleness": self.max_staleness,
                 "tokenizer_sha256": self._tokenizer, "chat_template_sha256": self._template}
        return hashlib.sha256(canonical_json(about)).hexdigest()


def _arrivals(rows: Iterable[Located]) -> list[Located]:
    """New rows in the order they are numbered in: no clock, no order of appends."""
    return sorted(rows, key=lambda row: (row.version_min, row.key))
