"""The figures of the studies ``episodes`` and ``test_time``, drawn from their tables.

    python -m agentsdpo.benchmarks.methods.figures        # docs/images/methods-*.svg, of what tables there are
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from agentsdpo.benchmarks.methods import attempts, episodes
from agentsdpo.files import write_text
from agentsdpo.plots.curves import draw_band, draw_seeds
from agentsdpo.plots.style import AXES, ROLES, STYLE, canvas, finish, reference, svg
from agentsdpo.results import evals
from agentsdpo.types import Json

IMAGES = Path("docs/images")
_DISCOVERY: dict[str, tuple[str, str, Any]] = {
    "sdpo": ("learns from feedback (sdpo)", "student", "-"),
    "sdpo_told_which": ("the same, told which criteria failed", "student", (0, (4, 2))),
    "multi_turn": ("reads the feedback (multi_turn)", "hint", "-"),
    "best_of_k": ("tries again (best_of_k)", "behaviour", "-")}
_EPISODES = {"robust": ("student", "-"), "grpo": ("behaviour", "-"), "opd_grpo": ("teacher", "-"),
             "safe_agent": ("teacher", (0, (4, 2))), "sdpo": ("student", (0, (4, 2))),
             "sdft": ("hint", "-")}


@matplotlib.rc_context(STYLE)
def discovery_figure(rows: Sequence[Json]) -> Figure:
    """Share of tasks solved by each number of attempts, with its 95 % bootstrap band over tasks."""
    figure, axes = canvas((8.2, 4.2))
    for arm, (words, role, style) in _DISCOVERY.items():
        curve = attempts.discovery(rows, arm)
        if not curve:
            continue
        at = list(curve)
        low, middle, high = (np.array([100 * found[i] for found in curve.values()]) for i in (1, 0, 2))
        axes.step(at, middle, where="post", color=ROLES[role], linestyle=style, label=words)
        axes.fill_between(at, low, high, step="post", color=ROLES[role], alpha=0.14, linewidth=0)
    most = max(row["episodes"] for row in rows)
    ticks = [k for k in attempts.SHOWN if k <= most]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.set(ylim=(-3, 104), xlim=(1, most), xlabel="attempts at the task", ylabel="tasks solved [%]")
    axes.set_title(f"First success on {len({row['seed'] for row in rows})} hard tasks, 95 % band over tasks")
    return finish(figure, axes, columns=2)


@matplotlib.rc_context(STYLE)
def episodes_figure(rows: Sequence[Json]) -> Figure:
    """Held-out pass rate against episodes played: seeds thin, IQM bold, 95 % band."""
    figure, axes = canvas((9.2, 4.2))
    rows = [row for row in rows if row["arm"] in _EPISODES]
    known = evals([{"kind": "eval", **row} for row in rows], episodes.SPLIT, "sampled")
    seeds = len({row["seed"] for row in known})
    for arm, (role, style) in _EPISODES.items():
        own = [row for row in known if row["arm"] == arm]
        if own:
            n = len({row["seed"] for row in own})
            label = arm if n == seeds else f"{arm}, {n} seed{'s' * (n > 1)}"
            draw_seeds(axes, own, "episodes", 1.0, "pass", role=role, linestyle=style)
            draw_band(axes, own, "episodes", 1.0, "pass", role=role, linestyle=style, label=label, words="95 % band")
    reference(axes, 100 * episodes.GOAL, f"{100 * episodes.GOAL:.0f} %", (0, (1, 2)))
    axes.set(ylim=(-3, 104), xlabel=AXES["episodes"], ylabel="held-out tasks passed [%]")
    axes.set_title(f"Rollouts until unseen clients pass, {seeds} seed{'s' * (seeds > 1)}")
    return finish(figure, axes, columns=len({row["arm"] for row in known}) + 1)  # each band below its curve


FIGURES = {attempts.TABLE: discovery_figure, episodes.STUDY.results: episodes_figure}


def main() -> None:
    """Draw what there is a table for."""
    for path, draw in FIGURES.items():
        if path.exists():
            image = IMAGES / f"{path.stem}.svg"
            write_text(image, svg(draw(pq.read_table(path).to_pylist()), path.stem) + "\n")
            print(image)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
