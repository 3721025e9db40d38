"""When the tripwire sounds: pure rules over probes, behaviour and the numbers of steps. No torch.

The score of a probe first, behaviour second, ratios last: in measured collapses lengths led more often than any ratio,
and ratios were wrong more often than they led. A policy that is learning looks alarming by its ratios alone: its
entropy falls, its gap closes, and the last few tokens that still disagree own the update. So numbers of the update
count where they persist, three of five steps, and while the newest probe shows no gain.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["clear", "soft", "hard"]
"""``soft``: be careful, and look again. ``hard``: go back."""

EPISODES = 64
"""Episodes behind a statement about score or behaviour."""
RECENT, OFTEN = 5, 3
"""An update is alarming when this many of its last steps are."""
MEMORY = 50
"""Steps a running median looks back."""


@dataclass(frozen=True)
class Alarm:
    """One rule that sounded: what was seen, and the limit it broke."""

    name: str
    value: float
    limit: float
    level: Level = "soft"


@dataclass(frozen=True)
class Probe:
    """Free episodes of one policy version on tasks and seeds that are always the same.

    ``score`` is their mean in [0, 1], ``n`` how many were scored, ``behaviour`` that of :func:`behaviour` or empty.
    """

    score: float
    n: int
    behaviour: dict[str, float]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Probe | None":
        """The probe an ``eval`` row of ``metrics.jsonl`` holds, None when nothing was scored.

        Of fewer than 64 episodes the score alone is taken.
        """
        n = row.get("n", 0)
        return cls(row["score"], n, behaviour([row]) if n >= EPISODES else {}) if n else None

    @property
    def error(self) -> float:
        """Standard error of the score; its largest, since a score of several criteria spreads less than a coin."""
        return math.sqrt(self.score * (1.0 - self.score) / self.n)


# --------------------------------------------------------------------------------------------------------- behaviour

BEHAVIOUR = ("collect/turns/mean", "collect/tokens_per_turn/mean", "collect/act/calls", "collect/act/valid_frac",
             "collect/act/mutating_ok_frac")
"""Keys of a row that say how agents acted."""


def behaviour(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How agents acted over all episodes of some rows of ``metrics.jsonl``, empty when the rows do not say.

    Keys: ``tokens_per_turn``, ``tokens_per_episode``, ``valid`` (share of tool calls), ``mutating`` (share of calls
    meant to change state that did).

    >>> row = dict(zip(BEHAVIOUR, (4.0, 10.0, 3.0, 1.0, 0.5)), **{"collect/episodes": 32})
    >>> behaviour([row])
    {'tokens_per_turn': 10.0, 'tokens_per_episode': 40.0, 'valid': 1.0, 'mutating': 0.5}
    """
    rows = [row for row in rows if all(key in row for key in BEHAVIOUR)]
    episodes = [row.get("collect/episodes", row.get("n", 0)) for row in rows]
    if not sum(episodes):
        return {}
    per = [[row[key] for key in BEHAVIOUR] for row in rows]
    turns = sum(n * turn for n, (turn, *_) in zip(episodes, per, strict=True))
    tokens = sum(n * turn * each for n, (turn, each, *_) in zip(episodes, per, strict=True))
    calls = sum(n * own[2] for n, own in zip(episodes, per, strict=True))
    valid = sum(n * own[2] * own[3] for n, own in zip(episodes, per, strict=True))
    mutating = sum(n * own[4] for n, own in zip(episodes, per, strict=True))
    return {"tokens_per_turn": tokens / max(turns, 1e-9), "tokens_per_episode": tokens / sum(episodes),
            "valid": valid / max(calls, 1e-9), "mutating": mutating / sum(episodes)}


def newest(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Behaviour of the newest 64 or so episodes collected, empty while there are fewer."""
    count, first = 0, len(rows)
    while first and count < EPISODES:
        first -= 1
        count += rows[first].get("collect/episodes", 0)
    return behaviour(rows[first:]) if count >= EPISODES else {}


def behaviour_alarms(now: Mapping[str, float], good: Mapping[str, float], where: str) -> list[Alarm]:
    """Lengths off by more than 25 %, calls a tenth worse, or (hard) valid calls halved, against the last good ones.

    >>> good = {"tokens_per_turn": 20.0, "tokens_per_episode": 80.0, "valid": 1.0, "mutating": 0.9}
    >>> [a.name for a in behaviour_alarms({**good, "tokens_per_episode": 101.0, "mutating": 0.8}, good, "collect")]
    ['collect/tokens_per_episode', 'collect/mutating']
    >>> [(a.name, a.level) for a in behaviour_alarms({**good, "valid": 0.4}, good, "probe")]
    [('probe/valid', 'hard')]
    """
    found = []
    for name in now.keys() & good.keys():
        value, then = now[name], good[name]
        if name.startswith("tokens"):
            limit = then * (1.25 if value > then else 0.75)
            wrong, level = abs(value - then) > 0.25 * then, "soft"
        else:
            dead = name == "valid" and value < 0.5 * then
            limit, level = then * (0.5 if dead else 0.9), "hard" if dead else "soft"
            wrong = value < limit
        if wrong:
            found.append(Alarm(f"{where}/{name}", value, limit, level))
    return sorted(found, key=lambda alarm: list(now).index(alarm.name.partition("/")[2]))


# ------------------------------------------------------------------------------------------------------------- score


def probe_alarms(probe: Probe, best: Probe, first: Probe) -> list[Alarm]:
    """Score below 0.7 of the best, or below the zero-shot score by two standard errors. Soft: one low probe can pass.

    A probe of fewer than 64 episodes must be below the best by two standard errors of their difference as well.

    >>> good = Probe(0.6, 64, {})
    >>> [(a.name, round(a.limit, 2)) for a in probe_alarms(Probe(0.41, 64, {}), good, good)]
    [('probe/best', 0.42), ('probe/zero_shot', 0.48)]
    >>> probe_alarms(Probe(0.4, 4, {}), good, Probe(0.5, 4, {}))
    []
    """
    limit = 0.7 * best.score
    if min(probe.n, best.n) < EPISODES:
        limit = min(limit, best.score - 2.0 * math.hypot(best.error, _error(best.score, probe.n)))
    floor = first.score - 2.0 * _error(first.score, min(probe.n, first.n))
    return [Alarm(f"probe/{name}", probe.score, bound) for name, bound in (("best", limit), ("zero_shot", floor))
            if probe.score < bound]


def gained(probe: Probe, best: Probe, first: Probe) -> bool:
    """Whether the policy is visibly better than at first, or has nothing left to gain, and is near its best now."""
    return best.score >= min(first.score + 2.0 * first.error, 0.95) and probe.score >= 0.9 * best.score


def _error(score: float, n: int) -> float:
    return math.sqrt(score * (1.0 - score) / n)


# ------------------------------------------------------------------------------------------------------------ updates


def update_alarms(rows: Sequence[Mapping[str, Any]], start: Mapping[str, float]) -> list[Alarm]:
    """Alarms in the numbers of the last steps; not to be asked while the probes show a gain.

    Gradient norm above four running medians, ``ess_frac`` below 0.5, one token's share of the update above 0.1: each in
    three of the last five steps. Means of the last five: entropy outside 30 to 300 % of its start, gap below 10 %.

    Args:
        rows: of steps, newest last; fewer than ten give no alarm.
        start: ``entropy`` and ``gap`` of the first steps, nats.
    """
    if len(rows) < 2 * RECENT:
        return []
    last, before = rows[-RECENT:], rows[-RECENT - MEMORY:-RECENT]
    norm = 4.0 * statistics.median(row["learn/grad_norm"] for row in before)
    rules = (("grad_norm", "learn/grad_norm", norm, 1), ("ess_frac", "learn/ess_frac", 0.5, -1),
             ("hijack", "learn/hijack/max", 0.1, 1))
    found = [Alarm(f"update/{name}", statistics.median(row[key] for row in last), limit)
             for name, key, limit, sign in rules if sum(sign * row[key] > sign * limit for row in last) >= OFTEN]
    return found + _drifts(last, start)


def _drifts(last: Sequence[Mapping[str, Any]], start: Mapping[str, float]) -> list[Alarm]:
    """Entropy and gap against their start."""
    entropy, gap = (statistics.fmean(row[key] for row in last) for key in ("learn/entropy/student", "learn/gap/abs"))
    low, high = 0.3 * start["entropy"], 3.0 * start["entropy"]
    found = [] if low <= entropy <= high else [Alarm("update/entropy", entropy, low if entropy < low else high)]
    return found + ([Alarm("update/gap", gap, 0.1 * start["gap"])] if gap < 0.1 * start["gap"] else [])
