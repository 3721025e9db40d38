"""Figures of a run, from rows to a matplotlib ``Figure``; no pyplot, no global state, one house style.

Colour means role everywhere, after Okabe and Ito: student blue, teacher orange, behaviour grey, hint green.
Okabe-Ito's own orange has a contrast of 2.2:1 on white, so its vermillion stands for the teacher here, and the
report swaps both for the lighter pair on dark backgrounds (:data:`agentsdpo.report.THEMES`).
Text is a mid-tone grey, 4.3:1 on white and on near-black, so that a bare SVG reads on either.
No chart stands without a baseline: zero-shot and oracle 100 %, or the value the quantity has on-policy.
"""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from agentsdpo import stats
from agentsdpo.formats import is_number, percent
from agentsdpo.results import SPLIT_WORDS, eval_interval, evals, rate, steps
from agentsdpo.types import Json

ROLES = {"student": "#0072b2", "teacher": "#d55e00", "behaviour": "#8c8c8c", "hint": "#009e73", "ink": "#787b80"}
"""Colour of each role; ``ink`` is text, axes and reference lines."""
STYLE: Any = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "Helvetica", "sans-serif"],
    "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.titlepad": 10, "text.color": ROLES["ink"], "axes.labelcolor": ROLES["ink"], "axes.edgecolor": ROLES["ink"],
    "axes.titlecolor": ROLES["ink"], "xtick.color": ROLES["ink"], "ytick.color": ROLES["ink"],
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": ROLES["ink"],
    "grid.alpha": 0.18, "grid.linewidth": 0.8, "axes.facecolor": "none", "figure.facecolor": "none",
    "savefig.facecolor": "none", "legend.frameon": False, "legend.fontsize": 9, "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round", "text.parse_math": False, "axes.formatter.use_mathtext": False,
    "svg.fonttype": "none", "svg.hashsalt": "agentsdpo",
}
"""The house style; ``text.parse_math`` is off because arm and split names come from files."""
AXES = {"episodes": "episodes collected", "env_steps": "environment steps", "wall_s": "wall clock",
        "step": "optimiser steps"}
"""What a learning curve can stand against, and how the axis is called."""
VALUES = {"pass": ("pass rate", "collect/pass"), "score": ("mean score", "collect/score/mean")}
"""What a learning curve can show: its name, and the key of the fresh training episodes."""
DECODINGS = {"sampled": "-", "greedy": (0, (4, 2))}
"""Line style of each decoding."""

Point = tuple[float, stats.Interval]
"""Place on the x axis, and a rate with its interval."""


# ------------------------------------------------------------------------------------------------ learning curves


@matplotlib.rc_context(STYLE)
def learning_curve(
    rows: Sequence[Json], *, x: str = "episodes", split: str, baseline: float | None = None, value: str = "pass",
    context: Mapping[str, Sequence[Json]] | None = None, size: tuple[float, float] = (4.6, 3.6),
    below: str = "",
) -> Figure:
    """Pass rate (or mean score) of one split against episodes, environment steps or wall clock.

    One seed: a line with the Wilson 95 % band of each evaluation. Several: seeds thin, IQM bold, stratified
    bootstrap band. The fresh episodes of training are grey (behaviour policy). ``baseline`` draws the zero-shot
    line; the oracle stands at 100 %. ``context`` adds other arms as labelled grey lines.

    Args:
        rows: metric rows of one arm, see :mod:`agentsdpo.results`.
        x: a key of :data:`AXES`.
        value: ``pass`` or ``score``, fractions in the rows, percent on the axis.
        size: inches.
        below: words added under the title, after the number of episodes and seeds.
    """
    figure, axes = canvas(size)
    scale, unit = _x_unit(rows, x)
    _collected(axes, rows, x, scale, value)
    for i, (name, other) in enumerate((context or {}).items()):
        points = curve_points(evals(other, split, "sampled"), x, value)
        _line(axes, points, scale, color=ROLES["behaviour"], linestyle=(0, (3 + 2 * i, 1.5)), linewidth=1.4, label=name)
    for decoding, style in DECODINGS.items():
        _evaluated(axes, evals(rows, split, decoding), x, scale, value, decoding, style)
    if baseline is not None:
        reference(axes, baseline * 100, f"zero-shot {percent(baseline)}", (0, (6, 3)))
    reference(axes, 100, "oracle 100 %", (0, (1, 2)))
    right = max(axes.get_xlim()[1], 1.0)
    axes.set(xlim=(-0.03 * right, right), ylim=(-3, 104), xlabel=f"{AXES[x]}{unit}", ylabel=f"{VALUES[value][0]} [%]")
    counted = _sizes(evals(rows, split))
    words = f"{SPLIT_WORDS[split].capitalize()} ({split})" if split in SPLIT_WORDS else split
    _title(axes, words, f"{counted}; {below}" if below else counted)
    return finish(figure, axes)


def curve_points(rows: Sequence[Json], x: str, value: str = "pass") -> list[Point]:
    """Evaluations as points: Wilson interval for one seed, IQM with stratified bootstrap for several.

    >>> rows = [{"kind": "eval", "step": 5, "episodes": 160, "pass": p, "n": 8, "seed": s}
    ...         for s, p in enumerate((0.25, 0.5, 0.75))]
    >>> [(at, rate.estimate) for at, rate in curve_points(rows, "episodes")]
    [(160.0, 0.5)]
    """
    by_step: dict[int, list[Json]] = {}
    for row in rows:
        if is_number(row.get(value)) and is_number(row.get(x)):
            by_step.setdefault(row.get("step", 0), []).append(row)
    return [(float(np.mean([row[x] for row in group])), _spread(group, value))
            for _, group in sorted(by_step.items())]


def _spread(group: Sequence[Json], value: str) -> stats.Interval:
    if len(group) > 1:
        return stats.stratified_bootstrap([float(row[value]) for row in group])
    interval = eval_interval(group[0]) if value == "pass" else None
    return interval or stats.Interval(float(group[0][value]), np.nan, np.nan)


def _evaluated(
    axes: Axes, rows: Sequence[Json], x: str, scale: float, value: str, decoding: str, style: Any
) -> None:
    """Thin seeds, bold line and band of one decoding."""
    seeds = by_seed(rows)
    if len(seeds) > 1:
        for one in seeds.values():
            _line(axes, curve_points(one, x, value), scale, color=ROLES["student"], linestyle=style,
                  linewidth=0.8, alpha=0.5)
    points = curve_points(rows, x, value)
    if not points:
        return
    label = f"{decoding}, IQM" if len(seeds) > 1 else decoding
    # Two ends are no curve: a decoding measured only before and after training gets markers without a line.
    ends_only = decoding == "greedy" and len(points) <= 2
    marker: dict[str, Any] = {"marker": "D", "markerfacecolor": "none", "markersize": 7, "markeredgewidth": 1.6}
    plain: dict[str, Any] = {"marker": "o", "markersize": 4 if decoding == "sampled" else 0}
    _line(axes, points, scale, color=ROLES["student"], linestyle="none" if ends_only else style, linewidth=2.4,
          label=label, **(marker if ends_only else plain))
    low, high = (np.array([100 * getattr(rate, end) for _, rate in points]) for end in ("low", "high"))
    if decoding == "sampled" and np.isfinite(low).any():
        axes.fill_between([at / scale for at, _ in points], low, high, color=ROLES["student"], alpha=0.16,
                          linewidth=0, label="95 % interval")


def _sizes(rows: Sequence[Json]) -> str:
    """How many tasks and seeds stand behind a curve, in words."""
    counts = sorted({row["n"] for row in rows if is_number(row.get("n"))})
    tasks = f"n = {counts[0]}" + (f" to {counts[-1]}" if len(counts) > 1 else "") if counts else "n not recorded"
    seeds = len(by_seed(rows))
    return f"{tasks} episodes per evaluation, {seeds} seed{'s' if seeds > 1 else ''}"


def _title(axes: Axes, title: str, below: str) -> None:
    axes.set_title(title, pad=24)
    axes.annotate(below, (0, 1), (0, 8), xycoords="axes fraction", textcoords="offset points", fontsize=9)


def _collected(axes: Axes, rows: Sequence[Json], x: str, scale: float, value: str) -> None:
    key = VALUES[value][1]
    seeds = by_seed(steps(rows))
    for i, one in enumerate(seeds.values()):
        pairs = [(row[x] / scale, 100 * row[key]) for row in one if is_number(row.get(x)) and is_number(row.get(key))]
        if pairs:
            axes.plot(*zip(*pairs, strict=True), color=ROLES["behaviour"], linewidth=0.9, zorder=1.5,
                      alpha=0.7 / len(seeds) ** 0.5, label="training episodes" if i == 0 else None)


def _line(axes: Axes, points: Sequence[Point], scale: float, **style: Any) -> None:
    if points:
        axes.plot([at / scale for at, _ in points], [100 * rate.estimate for _, rate in points], **style)


def by_seed(rows: Iterable[Json]) -> dict[Any, list[Json]]:
    """Rows grouped by their ``seed``; rows without one share a group."""
    groups: dict[Any, list[Json]] = {}
    for row in rows:
        groups.setdefault(row.get("seed", 0), []).append(row)
    return groups


def _x_unit(rows: Sequence[Json], x: str) -> tuple[float, str]:
    """Divisor and unit of an x axis: seconds, or minutes from three minutes on; counts have none."""
    if x != "wall_s":
        return 1.0, ""
    longest = max((row[x] for row in rows if is_number(row.get(x))), default=0.0)
    return (60.0, " [min]") if longest >= 180 else (1.0, " [s]")


# ------------------------------------------------------------------------------------------- bars and arms


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
    axes.set_yticks(range(len(names)), [_split_label(name, splits[name].get("n")) for name in names])
    axes.axvline(100, color=ROLES["ink"], linestyle=(0, (1, 2)), linewidth=1.2, label="oracle 100 %")
    axes.set(xlim=(0, 103), ylim=(len(names) - 0.5, -0.5), xlabel="pass rate [%], 95 % interval")
    axes.grid(axis="y", visible=False)
    return finish(figure, axes)


def _bars(axes: Axes, places: Sequence[float], rates: Sequence[stats.Interval], colour: str, label: str) -> None:
    middle = np.array([100 * one.estimate for one in rates])
    ends = np.array([[100 * (one.estimate - one.low), 100 * (one.high - one.estimate)] for one in rates]).reshape(-1, 2)
    whiskers = np.clip(np.nan_to_num(ends), 0, None).T
    axes.barh(places, middle, height=0.34, color=colour, alpha=0.4, label=label, zorder=2)
    axes.errorbar(middle, places, xerr=whiskers, fmt="o", color=colour, markersize=4.5, elinewidth=2, capsize=3,
                  zorder=3)


def _split_label(name: str, n: Any) -> str:
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
        _dot(axes, i, before, ROLES["behaviour"], "zero-shot" if i == 0 else None)
        _dot(axes, i, after, ROLES["student"], "final" if i == 0 else None)
    labels = [f"{name}\nstaleness {record['staleness']:.1f}" if is_number(record.get("staleness")) else name
              for name, record in arms.items()]
    axes.set_yticks(range(len(arms)), labels)
    axes.axvline(100, color=ROLES["ink"], linestyle=(0, (1, 2)), linewidth=1.2, label="oracle 100 %")
    axes.set(xlim=(-2, 103), ylim=(len(arms) - 0.5, -0.5), xlabel="pass rate [%], 95 % interval")
    return finish(figure, axes)


def _dot(axes: Axes, y: float, value: stats.Interval | None, colour: str, label: str | None) -> None:
    if value is None:
        return
    ends = np.nan_to_num([[value.estimate - value.low], [value.high - value.estimate]]).clip(0) * 100
    axes.errorbar([100 * value.estimate], [y], xerr=ends, fmt="o", color=colour, markersize=7, elinewidth=2,
                  capsize=3, label=label, zorder=3)


# ------------------------------------------------------------------------------------------------- canvas and SVG


def canvas(size: tuple[float, float]) -> tuple[Figure, Axes]:
    """An empty figure of some inches with one set of axes, the grid behind the data."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    return figure, axes


def reference(axes: Axes, value: float, label: str, style: Any) -> None:
    """A baseline or an alarm across the axes, named in the legend."""
    axes.axhline(value, color=ROLES["ink"], linestyle=style, linewidth=1.2, label=label, zorder=1.8)


def finish(figure: Figure, axes: Axes) -> Figure:
    """Whole numbers on counted axes, and the legend below, where it cannot hide data."""
    if axes.get_xlabel() in AXES.values():
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower left", ncols=2 if figure.get_figwidth() < 6 else 4,
                      handlelength=2.4, columnspacing=1.4)
    return figure


@matplotlib.rc_context(STYLE)
def svg(figure: Figure, name: str) -> str:
    """The figure as one ``<svg>`` element: transparent, text as text, ids prefixed, the same bytes every time.

    Args:
        name: prefix of every id, so that several figures can stand in one page.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<!--.*?-->|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "").replace("xlink:href=", "href=")
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text).strip()
