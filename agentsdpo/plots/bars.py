"""Rates side by side: before and after training by split, and arm against arm."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from agentsdpo import stats
from agentsdpo.formats import is_number
from agentsdpo.plots.style import ROLES, STYLE, canvas, finish
from agentsdpo.results import SPLIT_WORDS, rate
from agentsdpo.types import Json


@matplotlib.rc_context(STYLE)
def split_bars(splits: Mapping[str, Json]) -> Figure:
    """Zero-shot against final pass rate of every split with 95 % intervals; greedy decoding as a diamond.

    Args:
        splits: ``{split: {zero_shot_pass, zero_shot_ci95, final_pass, final_ci95, final_greedy_pass, n}}``.
    """
    figure, axes = canvas((9.2, 1.5 + 0.62 * max(len(splits), 1)))
    names = list(splits)
    for when, offset, role in (("zero_shot", -0.19, "behaviour"), ("final", 0.19, "student")):
        rates = [rate(splits[name], when) for name in names]
        places = [i + offset for i, one in enumerate(rates) if one]
        _bars(axes, places, [one for one in rates if one], ROLES[role], when.replace("_", "-"))
    greedy = [(i + 0.19, splits[name].get("final_greedy_pass")) for i, name in enumerate(names)]
    found = [(100 * value, at) for at, value in greedy if is_number(value)]
    if found:
        axes.plot(*zip(*found, strict=True), "D", markersize=6, markerfacecolor="none", markeredgecolor=ROLES["ink"],
                  markeredgewidth=1.4, label="final, greedy", zorder=4)
    rate_axis(axes, [split_label(name, splits[name].get("n")) for name in names], left=0)
    axes.grid(axis="y", visible=False)
    return finish(figure, axes)


def _bars(axes: Axes, places: Sequence[float], rates: Sequence[stats.Interval], colour: str, label: str) -> None:
    middle = np.array([100 * one.estimate for one in rates])
    ends = np.array([[100 * (one.estimate - one.low), 100 * (one.high - one.estimate)] for one in rates]).reshape(-1, 2)
    whiskers = np.clip(np.nan_to_num(ends), 0, None).T
    axes.barh(places, middle, height=0.34, color=colour, alpha=0.4, label=label, zorder=2)
    axes.errorbar(middle, places, xerr=whiskers, fmt="o", color=colour, markersize=4.5, elinewidth=2, capsize=3,
                  zorder=3)


def rate_axis(axes: Axes, labels: Sequence[str], words: str = "pass rate", left: float = -2) -> None:
    """A line for each label, the first on top, against percent; the oracle at 100."""
    axes.set_yticks(range(len(labels)), labels)
    axes.axvline(100, color=ROLES["ink"], linestyle=(0, (1, 2)), linewidth=1.2, label="oracle 100 %")
    axes.set(xlim=(left, 103), ylim=(len(labels) - 0.5, -0.5), xlabel=f"{words} [%], 95 % interval")


def split_label(name: str, n: Any = None) -> str:
    """A split with its episodes, and below it what it asks."""
    words = SPLIT_WORDS.get(name, "")
    return "\n".join(part for part in (f"{name} (n = {n})" if is_number(n) else name, words) if part)


@matplotlib.rc_context(STYLE)
def arms_comparison(arms: Mapping[str, Json]) -> Figure:
    """Every arm's pass rate before and after training, with 95 % intervals and staleness in the label.

    Args:
        arms: ``{arm: {zero_shot_pass, final_pass, final_pass_ci95, staleness, ...}}``.
    """
    figure, axes = canvas((9.2, 1.4 + 0.5 * max(len(arms), 1)))
    for i, record in enumerate(arms.values()):
        before, after = rate(record, "zero_shot"), rate(record, "final")
        if before and after:
            axes.plot([100 * before.estimate, 100 * after.estimate], [i, i], color=ROLES["ink"], alpha=0.4, linewidth=1)
        dot(axes, i, before, ROLES["behaviour"], "zero-shot" if i == 0 else None)
        dot(axes, i, after, ROLES["student"], "final" if i == 0 else None)
    labels = [f"{name}\nstaleness {record['staleness']:.1f}" if is_number(record.get("staleness")) else name
              for name, record in arms.items()]
    rate_axis(axes, labels)
    return finish(figure, axes)


def dot(axes: Axes, y: float, value: stats.Interval | None, colour: str, label: str | None = None, *,
        scale: float = 100) -> None:
    """One rate with its interval, both in percent, or ``scale`` times as large; nothing where it is not known."""
    if value is None:
        return
    ends = np.nan_to_num([[value.estimate - value.low], [value.high - value.estimate]]).clip(0) * scale
    axes.errorbar([scale * value.estimate], [y], xerr=ends, fmt="o", color=colour, markersize=7, elinewidth=2,
                  capsize=3, label=label, zorder=3)
