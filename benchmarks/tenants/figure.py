"""The curve of a service with tenants: held-out work that is right, against conversations."""

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from agentsdpo.plots.style import ROLES, STYLE, canvas, finish, reference
from agentsdpo.types import Json

LINES = ("-", "--", ":", "-.")


@matplotlib.rc_context(STYLE)
def curve(rows: Sequence[Json], crossed: Mapping[str, float]) -> Figure:
    """One line a tenant; seeds thin, their mean bold where there are several.

    Args:
        rows: of the study's table. crossed: final pass rate of each tenant's adapter by the others' rules.
    """
    figure, axes = canvas((6.4, 4.0))
    held = [row for row in rows if row["decoding"] == "greedy"]
    tenants = list(dict.fromkeys(row["arm"] for row in held))
    for tenant, line in zip(tenants, LINES, strict=False):
        mine = [row for row in held if row["arm"] == tenant]
        seeds = sorted({row["seed"] for row in mine})
        for seed in seeds if len(seeds) > 1 else ():
            axes.plot(*_points([row for row in mine if row["seed"] == seed]), line, color=ROLES["student"],
                      linewidth=0.8, alpha=0.4)
        axes.plot(*_points(mine), line, color=ROLES["student"], label=f"{tenant}, its own rules", marker="o",
                  markersize=3)
    if crossed:
        reference(axes, max(crossed.values()), "by the other's rules, at the end", "-.")
    axes.set(xlabel="conversations of each tenant", ylabel="held-out work that is right", ylim=(-0.02, 1.02),
             title="Two tenants, opposite house rules, one server")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    return finish(figure, axes)


def _points(rows: Sequence[Json]) -> tuple[list[int], list[float]]:
    """Conversations, and the mean pass rate over seeds."""
    places = sorted({row["episodes"] for row in rows})
    by_place = [[row["pass"] for row in rows if row["episodes"] == at] for at in places]
    return places, [sum(rates) / len(rates) for rates in by_place]
