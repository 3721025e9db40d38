"""The numbers of a step once more by group of tokens: by staleness, tool call or text, and source of the hint.

An average hides what goes wrong first: the stale tenth of a step, or the tool calls among much text. Keys are those of
the whole step with the group behind them, ``learn/gap/abs/S4-7``, ``learn/entropy/student/tool``,
``learn/push/criteria``. A group without a token has no keys.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from agentsdpo.learn.config import LearnConfig
from agentsdpo.learn.ratio import MASKING
from agentsdpo.learn.records import TokenStats
from agentsdpo.learn.rows import LossRow

AGES = {"S0": 0, "S1": 1, "S2-3": 2, "S4-7": 4, "S8+": 8}
"""Groups by staleness of the token itself, policy versions: name and lower end."""


@dataclass(frozen=True)
class Partition:
    """Every loss token in one of ``names``: ``own`` int64[N] indexes them."""

    names: tuple[str, ...]
    own: np.ndarray

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sum of float[N] per group, float64[G]."""
        return np.bincount(self.own, weights=values, minlength=len(self.names))

    def max(self, values: np.ndarray) -> np.ndarray:
        """Largest of float[N] per group, minus infinity for none, float64[G]."""
        top = np.full(len(self.names), -np.inf)
        np.maximum.at(top, self.own, values)
        return top


def partitions(rows: list[LossRow]) -> list[Partition]:
    """The three partitions of all loss tokens of some rows, in the order of the rows.

    Tool calls and text are told apart only where every row knows its tool calls.
    """
    age = np.concatenate([row.age for row in rows])
    found = [Partition(tuple(AGES), np.searchsorted(list(AGES.values()), age, side="right") - 1)]
    calls = [row.row.tool[row.position] for row in rows if row.row.tool is not None]
    if len(calls) == len(rows):
        found.append(Partition(("text", "tool"), np.concatenate(calls).astype(np.int64)))
    sources = [row.row.source or "unnamed" for row in rows]
    names, own = np.unique(sources, return_inverse=True)
    found.append(Partition(tuple(map(str, names)), np.repeat(own, [len(row.position) for row in rows])))
    return found


def split_metrics(stats: TokenStats, rows: list[LossRow], config: LearnConfig) -> dict[str, float]:
    """Numbers of every group that has a token; units as for the whole step.

    Args:
        stats: all loss tokens of the step, [N].
        rows: that hold these tokens, in the same order.
        config: the objective that produced them.
    """
    columns = _columns(stats)
    metrics: dict[str, float] = {}
    for part in partitions(rows):
        sums = {name: part.sum(values) for name, values in columns.items()} | {"top": part.max(columns["r"])}
        for i in np.flatnonzero(sums["n"]):
            own = {name: float(values[i]) for name, values in sums.items()}
            metrics |= _numbers(part.names[i], own, config, float(columns["push"].sum()), len(columns["n"]))
    return metrics


def _columns(stats: TokenStats) -> dict[str, np.ndarray]:
    """What the sums run over, float64[N]."""
    gap, log_r = _array(stats.gap), _array(stats.log_ratio)
    r = np.exp(log_r)
    return {"n": np.ones_like(gap), "gap": gap, "abs": np.abs(gap), "negative": np.abs(gap) * (gap < 0),
            "r": r, "r2": r * r, "k3": r - 1.0 - log_r, "divergence": _array(stats.divergence),
            "push": np.abs(_array(stats.push)), "student": _array(stats.entropy_student),
            "teacher": _array(stats.entropy_teacher), "agree": _array(stats.top1_agree),
            "masked": _array(~stats.mask), "gated": _array(~stats.gate)}


def _numbers(name: str, own: dict[str, float], config: LearnConfig, push: float, total: int) -> dict[str, float]:
    """Numbers of one group from its sums; ``push`` and ``total`` are those of the whole step."""
    n = own["n"]
    metrics = {
        f"learn/share/{name}": n / total, f"learn/push/{name}": own["push"] / max(push, 1e-30),
        f"learn/gap/mean/{name}": own["gap"] / n, f"learn/gap/abs/{name}": own["abs"] / n,
        f"learn/gap/negative_share/{name}": own["negative"] / max(own["abs"], 1e-12),
        f"learn/ratio/mean/{name}": own["r"] / n, f"learn/ratio/max/{name}": own["top"],
        f"learn/ess_frac/{name}": own["r"] ** 2 / max(n * own["r2"], 1e-30), f"learn/kl_k3/{name}": own["k3"] / n,
        f"learn/entropy/student/{name}": own["student"] / n, f"learn/entropy/teacher/{name}": own["teacher"] / n,
        f"learn/top1_agree/{name}": own["agree"] / n, f"learn/gated_frac/{name}": own["gated"] / n}
    if config.ratio in MASKING:
        metrics[f"learn/masked_frac/{name}"] = own["masked"] / n
    if config.form == "divergence":
        metrics[f"learn/divergence/mean/{name}"] = own["divergence"] / n
    return metrics


def _array(values: Tensor) -> np.ndarray:
    return values.double().cpu().numpy()
