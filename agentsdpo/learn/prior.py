"""What a loss token weighs before anything is scored: its share of the step, its factors, its episode's advantage.

Pure functions of numpy arrays over all loss tokens of one optimiser step; no torch. Shares are counted here, before
gates and masks, so that a token rejected later makes the step smaller instead of the others louder.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np

Normaliser = Literal["token", "turn", "branch", "episode", "constant"]
Advantage = Literal["grpo", "reinforce"]


def shares(normaliser: Normaliser, *, turn: np.ndarray, branch: np.ndarray, episode: np.ndarray,
           loss_tokens: int = 1) -> np.ndarray:
    """Share of each loss token in the step, float64[N].

    ``token``: all tokens alike, ``1/N``. ``turn``, ``branch``, ``episode``: all of these alike, and within one its
    tokens, ``1 / (units * tokens of the unit)``. ``constant``: ``1 / loss_tokens`` whatever the step holds, so that a
    step of few tokens is a small step (Dr. GRPO, 2503.20783). All but the last sum to 1.

    Args:
        normaliser: which of the five.
        turn, branch, episode: numbers of each token's own, int64[N], unique within the step.
        loss_tokens: of ``constant``, tokens of a full step.

    >>> ids = dict(turn=np.array([0, 0, 1, 2]), branch=np.array([0, 0, 0, 1]), episode=np.array([0, 0, 0, 0]))
    >>> [shares(unit, **ids).round(3).tolist() for unit in ("token", "turn", "branch")]
    [[0.25, 0.25, 0.25, 0.25], [0.167, 0.167, 0.333, 0.333], [0.167, 0.167, 0.167, 0.5]]
    """
    if normaliser == "constant":
        return np.full(len(turn), 1.0 / loss_tokens)
    unit = np.zeros_like(turn) if normaliser == "token" else {"turn": turn, "branch": branch,
                                                              "episode": episode}[normaliser]
    _, own, count = np.unique(unit, return_inverse=True, return_counts=True)
    return 1.0 / (len(count) * count[own])


def span_factor(tool: np.ndarray, weight: float) -> np.ndarray:
    """``weight`` for tokens of the agent's tool calls, 1 for the others; bool[N] to float64[N].

    >>> span_factor(np.array([False, True]), 2.0).tolist()
    [1.0, 2.0]
    """
    return np.where(tool, weight, 1.0)


def skip_factor(turn: np.ndarray, first: int) -> np.ndarray:
    """0 for the first ``first`` loss tokens of each turn, 1 after them; turns stand side by side. int64[N] to float64.

    >>> skip_factor(np.array([0, 0, 0, 1, 1]), 1).tolist()
    [0.0, 1.0, 1.0, 0.0, 1.0]
    """
    starts = np.flatnonzero(np.diff(turn, prepend=turn[:1] - 1))
    offset = np.arange(len(turn)) - np.repeat(starts, np.diff(starts, append=len(turn)))
    return (offset >= first).astype(np.float64)


def decay_factor(age: np.ndarray, rate: float) -> np.ndarray:
    """``rate ** S`` of each token's own staleness, instead of a bound on it; int64[N] to float64[N].

    >>> decay_factor(np.array([0, 1, 2]), 0.5).tolist()
    [1.0, 0.5, 0.25]
    """
    return np.power(float(rate), age)


def advantages(kind: Advantage, scores: Mapping[str, tuple[str, float]]) -> dict[str, float]:
    """Advantage of every episode from the grades of a step.

    ``grpo``: ``(s - mean) / (std + 1e-4)`` over the episodes of its own group, 0 for one alone in its group
    (2402.03300, outcome supervision; TRL's epsilon, sample standard deviation). ``reinforce``: ``s - mean`` over all
    episodes of the step.

    Args:
        kind: which of the two.
        scores: group and score of each episode, by its id.

    >>> advantages("reinforce", {"a": ("", 1.0), "b": ("", 0.0)})
    {'a': 0.5, 'b': -0.5}
    >>> {k: round(v, 3) for k, v in advantages("grpo", {"a": ("g", 1.0), "b": ("g", 0.0), "c": ("h", 1.0)}).items()}
    {'a': 0.707, 'b': -0.707, 'c': 0.0}
    """
    if kind == "reinforce":
        every = [score for _, score in scores.values()]
        return {episode: _centred(score, every) for episode, score in zip(scores, every, strict=True)}
    groups: dict[str, list[float]] = {}
    for group, score in scores.values():
        groups.setdefault(group, []).append(score)
    return {episode: _standardised(score, groups[group]) for episode, (group, score) in scores.items()}


def _centred(score: float, others: list[float]) -> float:
    """One score less the mean; exactly 0 where all are alike, whatever their mean rounds to."""
    return score - float(np.mean(others)) if min(others) < max(others) else 0.0


def _standardised(score: float, group: list[float]) -> float:
    """One score among those of its group."""
    return _centred(score, group) / float(np.std(group, ddof=1) + 1e-4) if len(group) > 1 else 0.0
