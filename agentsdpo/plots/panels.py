"""The diagnostics of a run: one panel per alarm of the learner, each with its on-policy value or its alarm line.

Keys are those of the metric table, alarms its own and the tripwire's; a panel without a recorded metric is left out.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from agentsdpo.formats import is_number
from agentsdpo.plots.curves import by_seed
from agentsdpo.plots.style import AXES, ROLES, STYLE, canvas, finish, reference
from agentsdpo.results import steps
from agentsdpo.types import Json


@dataclass(frozen=True)
class Series:
    """One line of a diagnostic panel: the metric key, its label, the role that colours it, its line style."""

    key: str
    label: str
    role: str
    style: Any = "-"


@dataclass(frozen=True)
class Panel:
    """One diagnostic against optimiser steps.

    ``references`` takes the columns recorded and returns the baselines and alarms as (value, label).
    """

    name: str
    title: str
    unit: str
    series: tuple[Series, ...]
    references: Callable[[Mapping[str, np.ndarray]], Sequence[tuple[float, str]]]
    log: bool = False

    def recorded(self, rows: Iterable[Json]) -> list[Series]:
        """The series with at least one finite value."""
        return [one for one in self.series if any(is_number(row.get(one.key)) for row in steps(rows))]


def _gap_references(columns: Mapping[str, np.ndarray]) -> list[tuple[float, str]]:
    size = columns.get("learn/gap/abs")
    finite = size[np.isfinite(size)] if size is not None else np.array([])
    return [(0.0, "no gap")] + ([(0.1 * finite[0], "alarm: 10 % of the first")] if len(finite) else [])


def _median_references(columns: Mapping[str, np.ndarray]) -> list[tuple[float, str]]:
    middle = float(np.nanmedian(columns["learn/grad_norm"]))
    return [(middle, "median"), (4 * middle, "alarm: 4 x median")]


def _first_reference(columns: Mapping[str, np.ndarray]) -> list[tuple[float, str]]:
    loss = columns["learn/loss"]
    return [(float(loss[np.isfinite(loss)][0]), "first step")]


PANELS = (
    Panel("staleness", "Staleness of the consumed data", "staleness [policy versions]", (
        Series("replay/staleness/max", "oldest", "behaviour", (0, (1, 1.5))),
        Series("replay/staleness/p95", "95 %", "behaviour", (0, (4, 2))),
        Series("replay/staleness/mean", "mean", "student")), lambda _: [(0.0, "on-policy")]),
    Panel("ratio", "Importance ratio, student to behaviour policy", "importance ratio", (
        Series("learn/ratio/max", "maximum", "behaviour", (0, (1, 1.5))),
        Series("learn/ratio/p99", "99 %", "student", (0, (4, 2))),
        Series("learn/ratio/p95", "95 %", "student", (0, (1, 1))),
        Series("learn/ratio/p50", "median", "student"),
        Series("learn/ratio/mean", "mean", "student", (0, (6, 2, 1, 2)))), lambda _: [(1.0, "on-policy")], log=True),
    Panel("ess", "Effective sample size", "share of the tokens",
          (Series("learn/ess_frac", "ESS", "student"),), lambda _: [(1.0, "on-policy"), (0.5, "alarm below 0.5")]),
    Panel("clipped", "Clipped, capped and masked tokens", "share of the tokens", (
        Series("learn/adv_clip/frac", "gap clipped", "teacher"),
        Series("learn/capped_frac", "ratio capped", "student"),
        Series("learn/gated_frac", "gated", "hint"),
        Series("learn/masked_frac/pos", "masked, signal > 0", "behaviour"),
        Series("learn/masked_frac/neg", "masked, signal < 0", "behaviour", (0, (4, 2)))),
        lambda _: [(0.0, "nothing cut"), (0.5, "alarm above 0.5, of gaps 0.25")]),
    Panel("gap", "Teacher-student gap", "gap [nats per token]", (
        Series("learn/gap/abs", "mean size", "teacher"),
        Series("learn/gap/mean", "mean", "teacher", (0, (4, 2)))), _gap_references),
    Panel("grad_norm", "Gradient norm before clipping", "gradient norm", (
        Series("learn/grad_norm", "gradient norm", "student"),), _median_references, log=True),
    Panel("loss", "Loss", "loss [nats per token]", (Series("learn/loss", "loss", "student"),), _first_reference),
)
"""The diagnostics of a report, in order."""
FAN_PLACES = 1000
"""Most points along a shaded edge, more than a panel has pixels."""


@matplotlib.rc_context(STYLE)
def diagnostic(rows: Sequence[Json], panel: Panel) -> Figure | None:
    """One panel of diagnostics against optimiser steps; None when none of its metrics was recorded."""
    found = panel.recorded(rows)
    if not found:
        return None
    figure, axes = canvas((3.9, 3.1))
    table = [row for row in steps(rows) if is_number(row.get("step"))]
    columns = {one.key: column(table, one.key) for one in found}
    for one in found:
        for i, group in enumerate(by_seed(table).values()):
            draw(axes, group, one, label=one.label if i == 0 else None, color=ROLES[one.role], linestyle=one.style)
    if panel.name == "ratio" and len(by_seed(table)) == 1:
        _fan(axes, table, columns)
    for i, (value, label) in enumerate(panel.references(columns)):
        reference(axes, value, label, ((0, (6, 3)), (0, (1, 2)))[i])
    log_scale(axes, panel)
    axes.set(xlabel=AXES["step"], ylabel=panel.unit)
    return finish(figure, axes)


def draw(axes: Axes, rows: Sequence[Json], series: Series, **style: Any) -> None:
    """A line of a panel against optimiser steps, with a dot for each step whose neighbours did not record it."""
    at, values = np.array([row["step"] for row in rows]), column(rows, series.key)
    axes.plot(at, values, linewidth=1.6, **style)
    known = np.pad(np.isfinite(values), 1)
    alone = known[1:-1] & ~known[:-2] & ~known[2:]
    if alone.any():
        axes.plot(at[alone], values[alone], ".", color=style["color"])


def log_scale(axes: Axes, panel: Panel) -> None:
    """A logarithmic axis with plain numbers, for panels that ask for one and span enough; what is 0 falls below it."""
    values = np.concatenate([np.asarray(line.get_ydata(), np.float64) for line in axes.get_lines()])
    above = values[values > 0]  # not the limits: their margin may reach below zero
    if not panel.log or not above.size or (values < 0).any() or above.max() <= 3 * above.min():
        return
    axes.set_yscale("log")
    few = above.max() > 1000 * above.min()  # at 1, 2 and 5 of so many decades the locator gives up
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if few else (1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _fan(axes: Axes, table: Sequence[Json], columns: Mapping[str, np.ndarray]) -> None:
    """Shade between 1 and the ratio's upper quantiles; of a long run, the highest of every stretch of steps.

    Unlike lines, shapes are written out point by point: a run of 20 000 steps had 2 MB of them.
    """
    starts = range(0, len(table), -(-len(table) // FAN_PLACES))
    for key in ("learn/ratio/p99", "learn/ratio/p95"):
        if key in columns:
            axes.fill_between([table[i]["step"] for i in starts], 1.0, np.fmax.reduceat(columns[key], starts),
                              color=ROLES["student"], alpha=0.14, linewidth=0)


def column(rows: Sequence[Json], key: str) -> np.ndarray:
    """One metric of some rows, float64[n], NaN where it was not recorded."""
    return np.array([row[key] if is_number(row.get(key)) else np.nan for row in rows], np.float64)
