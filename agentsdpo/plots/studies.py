"""Figures of a study: the same training under several arms and seeds, one row per evaluation.

The first kind of arm is blue and bold, the others are grey with a dash of their own, as all of them are students.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from agentsdpo.formats import is_number, percent
from agentsdpo.plots.curves import VALUES, draw_band, draw_seeds
from agentsdpo.plots.style import AXES, ROLES, STYLE, canvas, finish, reference
from agentsdpo.plots.tables import NEVER, arms_of, final, held_out, judged, kind_of, main_kind, records
from agentsdpo.results import evals, headline_split
from agentsdpo.types import Json

_MARKS: Any = (("o", "-"), ("s", (0, (4, 2))), ("^", (0, (1, 1.5))), ("D", (0, (6, 2, 1, 2))), ("v", (0, (3, 1))))


def age_words(staleness: float) -> str:
    """An age of data on an axis.

    >>> age_words(8), age_words(1_000_000)
    ('8', 'first policy\\nonly')
    """
    return "first policy\nonly" if staleness >= NEVER else f"{staleness:.0f}"


@matplotlib.rc_context(STYLE)
def age_curve(frame: Any, *, value: str = "pass", main: str = "robust") -> Figure:
    """What is left after training on data of some age: final held-out rate against staleness, a line per kind of arm.

    Seeds are short strokes, the line is their interquartile mean over seeds and splits, the bar its 95 % stratified
    bootstrap interval; Wilson's over the episodes where there is one seed.

    Args:
        frame: rows of a study.
        value: ``pass`` or ``score``.
        main: the kind of arm in blue; the first there is where it is not among them.
    """
    rows = records(frame)
    figure, axes = canvas((8.2, 4.4))
    ages = sorted({row["staleness"] for row in rows})
    main = main_kind([row["arm"] for row in rows], main)
    kinds = sorted({kind_of(row["arm"]) for row in rows}, key=lambda kind: (kind != main, kind))
    for i, kind in enumerate(kinds):
        _age_line(axes, [row for row in rows if kind_of(row["arm"]) == kind], ages, value, i, len(kinds), kind == main)
    splits = judged(rows)
    first = [row[value] for row in evals(rows, None, "sampled")
             if row["step"] == 0 and row["split"] in splits and is_number(row.get(value))]
    if first:
        reference(axes, 100 * float(np.mean(first)), f"zero-shot {percent(np.mean(first))}", (0, (6, 3)))
    reference(axes, 100, "oracle 100 %", (0, (1, 2)))
    axes.set_xticks(range(len(ages)), [age_words(age) for age in ages])
    axes.set(ylim=(-3, 104), xlim=(-0.5, len(ages) - 0.5), xlabel="staleness of the collected data [policy versions]",
             ylabel=f"{VALUES[value][0]} after training [%]")
    axes.set_title(f"Held-out tasks, {_seed_words(rows)}")
    return finish(figure, axes)


def _age_line(axes: Axes, rows: Sequence[Json], ages: Sequence[int], value: str, i: int, n: int, bold: bool) -> None:
    """One kind of arm; kinds stand a little apart, so that their bars can be told from each other."""
    colour, (mark, dash) = ROLES["student" if bold else "behaviour"], _MARKS[i % len(_MARKS)]
    points = []
    for arm in arms_of(rows).values():
        ends, middle = final(arm, value), held_out(arm, value)
        at = ages.index(arm[0]["staleness"]) + 0.09 * (i - (n - 1) / 2)
        if middle is None:
            continue
        points.append((at, middle))
        own = [100 * float(np.mean([row[value] for row in one])) for one in ends.values()]
        axes.plot([at] * len(own), own, "_", color=colour, alpha=0.5, markersize=9, zorder=2)
    if not points:
        return
    low, high = (np.array([100 * abs(np.nan_to_num(getattr(p, end) - p.estimate)) for _, p in points])
                 for end in ("low", "high"))
    axes.errorbar([at for at, _ in points], [100 * p.estimate for _, p in points], yerr=[low, high], color=colour,
                  marker=mark, linestyle=dash, linewidth=2.4 if bold else 1.3, markersize=6, capsize=3,
                  label=kind_of(rows[0]["arm"]), zorder=4 if bold else 3)


@matplotlib.rc_context(STYLE)
def arm_grid(frame: Any, *, x: str = "episodes", value: str = "pass", columns: int = 4) -> Figure:
    """Learning curves of every arm, side by side on the same axes: seeds thin, IQM bold, 95 % band."""
    rows = records(frame)
    split = headline_split(rows)
    rows = evals(rows, split, "sampled")
    arms = arms_of(rows)
    lines = -(-len(arms) // columns)
    figure = Figure(figsize=(9.2, 0.6 + 2.1 * lines), layout="constrained")
    grid = figure.subplots(lines, min(columns, len(arms)), sharex=True, sharey=True, squeeze=False).ravel()
    for axes, (name, own) in zip(grid, arms.items(), strict=False):
        draw_seeds(axes, own, x, 1.0, value)
        draw_band(axes, own, x, 1.0, value, marker="o", markersize=3)
        axes.axhline(100, color=ROLES["ink"], linestyle=(0, (1, 2)), linewidth=1.2)
        axes.set_title(f"{name} ({_seed_words(own)})", fontsize=9, pad=4)
        axes.set(ylim=(-3, 104))
    for axes in grid[len(arms):]:
        axes.set_visible(False)
    for axes in grid[max(len(arms) - columns, 0):len(arms)]:
        axes.tick_params(labelbottom=True)
    figure.supxlabel(AXES[x], fontsize=10)
    figure.supylabel(f"{VALUES[value][0]} on {split} [%]", fontsize=10)
    return figure


def _seed_words(rows: Sequence[Json]) -> str:
    """How many seeds stand behind some rows."""
    counts = sorted({len({row["seed"] for row in own}) for own in arms_of(rows).values()})
    words = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{words} seed{'' if counts == [1] else 's'}"
