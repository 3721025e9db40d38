"""The benchmark card: pass@k and pass^k with their intervals, and which criteria are met on which task.

A report is what ``agentsdpo bench report`` writes as ``report.json``.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from agentsdpo.errors import RunError
from agentsdpo.formats import is_number
from agentsdpo.plots.style import DARK, ROLES, STYLE, canvas, finish, legend_name, tint
from agentsdpo.results import criteria_columns, criteria_names
from agentsdpo.types import Json

_SHADES = LinearSegmentedColormap.from_list("met", [tint("student", strength) for strength in (0.08, 1.0)])


def read_bench(folder: Path | str) -> Json:
    """``report.json`` of a benchmark run.

    Raises:
        RunError: the folder has none.
    """
    path = Path(folder) / "report.json"
    if not path.is_file():
        raise RunError(f"there is no report.json in {folder}", fix="write it with: agentsdpo bench report RUN")
    return json.loads(path.read_text(encoding="utf-8"))


@matplotlib.rc_context(STYLE)
def pass_curve(reports: Mapping[str, Json]) -> Figure:
    """pass@k (solid: any of k attempts passes) and pass^k (dashed: all of k do) against k, with 95 % intervals.

    Args:
        reports: by name; the last is blue, those before it grey.
    """
    figure, axes = canvas((6.6, 4.4))
    for i, (name, report) in enumerate(reports.items()):
        last = i == len(reports) - 1
        for mark, words, dash in (("@", "any of k", "-"), ("^", "all of k", (0, (4, 2)))):
            _powers(axes, report, mark, label=f"{legend_name(name)}, pass{mark}k ({words})", linestyle=dash,
                    color=ROLES["student" if last else "behaviour"], linewidth=2.4 if last else 1.6)
    attempts = {report["attempts"] for report in reports.values()}
    axes.set_xscale("log", base=2)
    axes.set_xticks([1 << i for i in range(max(attempts).bit_length())])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axes.minorticks_off()
    axes.set(ylim=(-3, 104), xlabel="attempts k", ylabel="tasks [%], 95 % interval")
    one = list(reports.values())[-1]
    axes.set_title(f"{one['benchmark']}: n = {one['overall']['n_tasks']} tasks in {one['overall']['n_worlds']} worlds, "
                   f"{' and '.join(map(str, sorted(attempts)))} attempts each", fontsize=10)
    return finish(figure, axes, columns=2)


def _powers(axes: Axes, report: Json, mark: str, **style: Any) -> None:
    """One family of numbers; pass^1 is pass@1. Where not every task has k attempts there is no number."""
    known = report["overall"]["conditional"]
    family = {int(name[5:]): one for name, one in known.items() if name.startswith(f"pass{mark}")}
    found = {1: known["pass@1"], **family}
    points = [(k, one) for k, one in sorted(found.items()) if is_number(one["value"])]
    if not points:
        return
    ends = [np.array([100 * abs(one[end] - one["value"]) for _, one in points]) for end in ("low", "high")]
    axes.errorbar([k for k, _ in points], [100 * one["value"] for _, one in points], yerr=ends, marker="o",
                  markersize=5, capsize=3, elinewidth=1.2, **style)


@matplotlib.rc_context(STYLE)
def criteria_matrix(report: Json, *, tasks: int = 40) -> Figure:
    """Share of the attempts that met each criterion, task by task; the worst tasks on top, numbers where not all did.

    Args:
        report: of one run.
        tasks: most lines that are shown; the hardest are.
    """
    table, shown, names = criteria_table(report)
    figure, axes = canvas((min(9.2, 2.8 + 0.75 * len(names)), 1.5 + 0.22 * min(len(shown), tasks)))
    known = np.ma.masked_invalid(table)
    order = np.argsort(known.mean(axis=1).filled(np.inf), kind="stable")[:tasks]
    drawn = axes.pcolormesh(known[order], cmap=_SHADES, vmin=0, vmax=1)
    for y, line in enumerate(table[order]):
        for x, share in enumerate(line):
            if np.isfinite(share) and share < 1:
                axes.text(x + 0.5, y + 0.52, f"{100 * share:.0f}", ha="center", va="center", fontsize=7.5,
                          color="#ffffff" if share > 0.7 else DARK)
    axes.set_xticks(np.arange(len(names)) + 0.5, names, rotation=30, ha="left", rotation_mode="anchor")
    axes.set_yticks(np.arange(len(order)) + 0.5, [shown[i] for i in order], fontsize=8)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.invert_yaxis()
    bar = figure.colorbar(drawn, ax=axes, pad=0.02, aspect=30, format=lambda value, _: f"{100 * value:.0f}",
                          label="attempts that met it [%]")
    bar.outline.set_visible(False)
    return figure


def criteria_table(report: Json) -> tuple[np.ndarray, list[str], list[str]]:
    """Share of attempts that met a criterion, ``[tasks, criteria]`` (NaN: not asked or not judged), and both names.

    Where every task has criteria of its own, columns are their places in the task: 1, 2, ...

    >>> criteria_table({"tasks": [{"task_id": "t", "criteria": {"file": [1, 4], "mail": [0, 0]}}]})
    (array([[0.25,  nan]]), ['t'], ['file', 'mail'])
    """
    tasks: Sequence[Json] = report["tasks"]
    names, columns = criteria_names(report), criteria_columns(report)
    table = np.full((len(tasks), len(columns)), np.nan)
    for i, task in enumerate(tasks):
        for place, (name, (met, judged)) in enumerate(task["criteria"].items()):
            table[i, names.index(name) if names else place] = met / judged if judged else np.nan
    return table, [task["task_id"] for task in tasks], columns
