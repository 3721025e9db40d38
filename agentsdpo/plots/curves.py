"""Learning curves: pass rate or score against what was spent, seeds thin, their interquartile mean bold.

No chart stands without a baseline: zero-shot and oracle 100 %.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from agentsdpo import stats
from agentsdpo.formats import is_number, percent
from agentsdpo.plots.style import AXES, ROLES, STYLE, canvas, finish, legend_name, reference
from agentsdpo.results import SPLIT_WORDS, eval_interval, evals, steps
from agentsdpo.types import Json

VALUES = {"pass": ("pass rate", "collect/pass"), "score": ("mean score", "collect/score/mean")}
"""What a learning curve can show: its name, and the key of the fresh training episodes."""
DECODINGS = {"sampled": "-", "greedy": (0, (4, 2))}
"""Line style of each decoding."""

Point = tuple[float, stats.Interval]
"""Place on the x axis, and a rate with its interval."""


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
    scale, unit = x_unit(rows, x)
    _collected(axes, rows, x, scale, value)
    for i, (name, other) in enumerate((context or {}).items()):
        points = curve_points(evals(other, split, "sampled"), x, value)
        _line(axes, points, scale, color=ROLES["behaviour"], linestyle=(0, (3 + 2 * i, 1.5)), linewidth=1.4,
              label=legend_name(name))
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

    A step at which a seed is missing, as one that collapsed, is no point: the rest alone would look better than all.

    >>> rows = [{"kind": "eval", "step": 5, "episodes": 160, "pass": p, "n": 8, "seed": s}
    ...         for s, p in enumerate((0.25, 0.5, 0.75))]
    >>> [(at, rate.estimate) for at, rate in curve_points(rows, "episodes")]
    [(160.0, 0.5)]
    """
    known = [row for row in rows if is_number(row.get(value)) and is_number(row.get(x))]
    by_step: dict[int, list[Json]] = {}
    for row in known:
        by_step.setdefault(row.get("step", 0), []).append(row)
    return [(float(np.mean([row[x] for row in group])), _spread(group, value))
            for _, group in sorted(by_step.items()) if len(by_seed(group)) == len(by_seed(known))]


def _spread(group: Sequence[Json], value: str) -> stats.Interval:
    alone = eval_interval(group[0]) if len(group) == 1 and value == "pass" else None
    return alone or stats.over_seeds([float(row[value]) for row in group])


def _evaluated(
    axes: Axes, rows: Sequence[Json], x: str, scale: float, value: str, decoding: str, style: Any
) -> None:
    """Thin seeds, bold line and band of one decoding."""
    points = curve_points(rows, x, value)
    if not points:
        return
    # Two ends are no curve: a decoding measured only before and after training gets markers without a line.
    if decoding == "greedy" and len(points) <= 2:
        _line(axes, points, scale, color=ROLES["student"], linestyle="none", marker="D", markerfacecolor="none",
              markersize=7, markeredgewidth=1.6, label=decoding)
        return
    draw_seeds(axes, rows, x, scale, value, linestyle=style)
    label = f"{decoding}, IQM" if len(by_seed(rows)) > 1 else decoding
    draw_band(axes, rows, x, scale, value, linestyle=style, label=label, marker="o",
              markersize=4 if decoding == "sampled" else 0, banded=decoding == "sampled")


def draw_seeds(axes: Axes, rows: Sequence[Json], x: str, scale: float, value: str, *, role: str = "student",
               linestyle: Any = "-") -> None:
    """Every seed of some evaluations as a thin line, when there are several."""
    seeds = by_seed(rows)
    for one in seeds.values() if len(seeds) > 1 else ():
        _line(axes, curve_points(one, x, value), scale, color=ROLES[role], linestyle=linestyle, linewidth=0.8,
              alpha=0.5)


def draw_band(axes: Axes, rows: Sequence[Json], x: str, scale: float, value: str, *, role: str = "student",
              banded: bool = True, words: str = "95 % interval", **style: Any) -> None:
    """Some evaluations as a bold line in a band: :func:`curve_points`."""
    points = curve_points(rows, x, value)
    _line(axes, points, scale, **{"color": ROLES[role], "linewidth": 2.4, **style})
    low, high = (np.array([100 * getattr(rate, end) for _, rate in points]) for end in ("low", "high"))
    if banded and np.isfinite(low).any():
        axes.fill_between([at / scale for at, _ in points], low, high, color=ROLES[role], alpha=0.16, linewidth=0,
                          label=words if "label" in style else None)


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


def x_unit(rows: Sequence[Json], x: str) -> tuple[float, str]:
    """Divisor and unit of an x axis: seconds, or minutes from three minutes on; counts have none."""
    if x != "wall_s":
        return 1.0, ""
    longest = max((row[x] for row in rows if is_number(row.get(x))), default=0.0)
    return (60.0, " [min]") if longest >= 180 else (1.0, " [s]")
