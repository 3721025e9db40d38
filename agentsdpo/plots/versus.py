"""Two runs in one figure: the one in question in blue, the one it is held against in grey and dashed."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from agentsdpo.formats import is_number
from agentsdpo.plots.bars import dot, rate_axis, split_label
from agentsdpo.plots.curves import VALUES, draw_band, draw_seeds, x_unit
from agentsdpo.plots.panels import Panel, Series, column, draw, log_scale
from agentsdpo.plots.style import AXES, ROLES, STYLE, canvas, finish, legend_name, reference
from agentsdpo.results import SPLIT_WORDS, evals, rate, steps
from agentsdpo.types import Json

LOOKS: tuple[tuple[str, Any], ...] = (("student", "-"), ("behaviour", (0, (4, 2))))
"""Role and line of the first and of the second run."""


@matplotlib.rc_context(STYLE)
def versus_curve(runs: Mapping[str, Sequence[Json]], *, split: str, x: str = "episodes", value: str = "pass") -> Figure:
    """Sampled evaluations of two runs against what they spent, each with its 95 % band.

    Args:
        runs: metric rows by name, the run in question first.
        split: evaluated in both.
        x: a key of :data:`agentsdpo.plots.AXES`.
        value: ``pass`` or ``score``.
    """
    figure, axes = canvas((5.6, 3.9))
    scale, unit = x_unit([row for rows in runs.values() for row in rows], x)
    for (name, rows), (role, dash) in zip(runs.items(), LOOKS, strict=False):
        own = evals(rows, split, "sampled")
        draw_seeds(axes, own, x, scale, value, role=role, linestyle=dash)
        draw_band(axes, own, x, scale, value, role=role, linestyle=dash, label=legend_name(name), marker="o",
                  markersize=4, words=f"95 % interval, {name}")
    reference(axes, 100, "oracle 100 %", (0, (1, 2)))
    right = max(axes.get_xlim()[1], 1.0)
    axes.set(xlim=(-0.03 * right, right), ylim=(-3, 104), xlabel=f"{AXES[x]}{unit}", ylabel=f"{VALUES[value][0]} [%]")
    axes.set_title(f"{SPLIT_WORDS.get(split, split).capitalize()} ({split})")
    return finish(figure, axes, columns=2)


@matplotlib.rc_context(STYLE)
def versus_splits(runs: Mapping[str, Mapping[str, Json]]) -> Figure:
    """Final pass rate of every split that both runs have, with 95 % intervals.

    Args:
        runs: ``{run: {split: {final_pass, final_ci95, n}}}``, the run in question first.
    """
    (first, own), (second, other) = runs.items()
    splits = [name for name in own if name in other]
    figure, axes = canvas((9.2, 1.5 + 0.55 * max(len(splits), 1)))
    for i, split in enumerate(splits):
        for offset, (role, _), name, record in zip((-0.14, 0.14), LOOKS, (first, second), (own, other), strict=True):
            label = legend_name(name) if i == 0 else None
            dot(axes, i + offset, rate(record[split], "final"), ROLES[role], label)
    rate_axis(axes, [split_label(name) for name in splits], "final pass rate")
    return finish(figure, axes)


@matplotlib.rc_context(STYLE)
def versus_panel(panel: Panel, runs: Mapping[str, Sequence[Json]]) -> Figure | None:
    """The panel's first line of both runs against optimiser steps; None where one of them did not record it."""
    series = leading(panel)
    tables = [[row for row in steps(rows) if is_number(row.get("step"))] for rows in runs.values()]
    if not all(np.isfinite(column(table, series.key)).any() for table in tables):
        return None
    figure, axes = canvas((3.9, 3.1))
    for name, table, (role, dash) in zip(runs, tables, LOOKS, strict=True):
        draw(axes, table, series, label=legend_name(name), color=ROLES[role], linestyle=dash)
    (value, label), other = (panel.references({series.key: column(table, series.key)})[0] for table in tables)
    if (value, label) == other:  # what is read from a run's own numbers is no baseline of the other
        reference(axes, value, label, (0, (6, 3)))
    log_scale(axes, panel)
    axes.set(xlabel=AXES["step"], ylabel=panel.unit)
    return finish(figure, axes)


def leading(panel: Panel) -> Series:
    """The line that stands for a panel: the first of the student, else the first."""
    return next((one for one in panel.series if one.role == "student"), panel.series[0])
