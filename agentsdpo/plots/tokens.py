"""Figures of tokens: where teacher and student differ, and where the gradient goes.

Rows are those of :mod:`agentsdpo.show.counterfactual`: one per scored token, hints apart by ``hint``.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from agentsdpo.plots.bars import dot
from agentsdpo.plots.style import DARK, ROLES, STYLE, canvas, finish, tint
from agentsdpo.plots.tables import records
from agentsdpo.stats import Interval, bootstrap, cluster_bootstrap
from agentsdpo.types import Json

COLUMNS = 108
"""Characters in a line of the strip."""
PARTS = {"value": "values of arguments", "argument": "names of arguments", "tool": "names of tools", "syntax": "JSON",
         "frame": "marks of the template", "words": "words"}
"""Parts of a turn, see :func:`agentsdpo.show.counterfactual.token_rows`, and how they are called."""


def diverging() -> LinearSegmentedColormap:
    """Blue where the student likes a token more, orange where the teacher does, nothing in between."""
    ends = [to_rgba(ROLES["student"], 1), to_rgba(ROLES["student"], 0), to_rgba(ROLES["teacher"], 0),
            to_rgba(ROLES["teacher"], 1)]
    return LinearSegmentedColormap.from_list("gap", list(zip((0, 0.5, 0.5, 1), ends, strict=True)))


def by_hint(rows: Sequence[Json]) -> dict[str, list[Json]]:
    """Rows by the hint the teacher read, in order of appearance."""
    found: dict[str, list[Json]] = {}
    for row in rows:
        found.setdefault(row.get("hint", ""), []).append(row)
    return found


@matplotlib.rc_context(STYLE)
def gap_heatmap(frame: Any, *, limit: float = 3.0) -> Figure:
    """Mean gap by turn and by place in the turn, one panel per hint, all on one scale.

    Args:
        frame: scored tokens of episodes that are built alike.
        limit: nats at which the colour is full.
    """
    hints = by_hint(records(frame))
    turns = 1 + max(row["turn"] for rows in hints.values() for row in rows)
    places = 1 + max(row["place"] for rows in hints.values() for row in rows)
    figure = Figure(figsize=(9.2, 0.9 + len(hints) * (0.55 + 0.2 * turns)), layout="constrained")
    panels = figure.subplots(len(hints), 1, sharex=True, squeeze=False)[:, 0]
    drawn = None
    for axes, (name, rows) in zip(panels, hints.items(), strict=True):
        drawn = axes.pcolormesh(_means(rows, turns, places), cmap=diverging(), vmin=-limit, vmax=limit)
        axes.set(ylim=(turns, 0), ylabel="turn")
        axes.set_yticks(np.arange(turns) + 0.5, [str(turn) for turn in range(turns)])
        axes.grid(visible=False)
        axes.set_title(f"The teacher reads {name}" if name else "Gap", fontsize=10, pad=4)
    panels[-1].set_xlabel("place in the turn [tokens]")
    if drawn is not None:
        bar = figure.colorbar(drawn, ax=list(panels), label="gap [nats]", extend="both", pad=0.01)
        bar.outline.set_visible(False)
    return figure


def _means(rows: Sequence[Json], turns: int, places: int) -> np.ndarray:
    """Mean gap ``[turns, places]``, NaN where no episode has a token."""
    sums, counts = np.zeros((turns, places)), np.zeros((turns, places))
    for row in rows:
        sums[row["turn"], row["place"]] += row["gap"]
        counts[row["turn"], row["place"]] += 1
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


@matplotlib.rc_context(STYLE)
def attribution_strip(frame: Any, *, by: str = "weight") -> Figure:
    """The episode's own text, each token shaded by what it adds to the step; below it what the teacher wants instead.

    Args:
        frame: scored tokens of one episode under one hint.
        by: ``weight`` or ``gap``; full colour at the largest of this episode.
    """
    rows = records(frame)
    lines = _lines(rows)
    heights = [2.2 if any(_wish(row) for _, row in line) else 1.25 for _, line in lines]
    figure = Figure(figsize=(9.2, 0.5 + 0.18 * sum(heights)), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(-8, COLUMNS), ylim=(sum(heights) + 0.2, -0.9))
    axes.axis("off")
    largest = max(abs(row[by]) for row in rows) or 1.0
    at = 0.0
    for (label, line), height in zip(lines, heights, strict=True):
        axes.text(-8, at, label, fontsize=8, va="center")
        for column, row in line:
            _token(axes, column, at, row, row[by] / largest)
        at += height
    axes.set_title(f"Shaded by {'gradient weight' if by == 'weight' else by}; below: what the teacher holds likeliest "
                   "where it differs", fontsize=10, pad=2)
    return figure


def _lines(rows: Sequence[Json]) -> list[tuple[str, list[tuple[int, Json]]]]:
    """Tokens with their columns, in lines that are labelled with their turn."""
    lines: list[tuple[str, list[tuple[int, Json]]]] = []
    column, turn = 0, None
    for row in rows:
        width = len(_seen(row["text"]))
        if row["turn"] != turn or column + width > COLUMNS:
            lines.append((f"turn {row['turn']}" if row["turn"] != turn else "", []))
            column, turn = 0, row["turn"]
        lines[-1][1].append((column, row))
        column += max(width, len(_seen(row["teacher_best"])) + 1 if _wish(row) else 0)
    return lines


def _seen(text: str) -> str:
    """Text on one line; pages run plain spaces together."""
    return text.replace("\n", "↵").replace("\t", " ").replace(" ", "\u00a0")


def _wish(row: Json) -> bool:
    return row["teacher_best"] != row["text"] and bool(row["teacher_best"])


def _token(axes: Axes, column: int, line: float, row: Json, share: float) -> None:
    """One token: its shade, its text, and the teacher's wish in the line below.

    Shades are opaque tints under dark text: what is highlighted reads the same on a light and on a dark page.
    """
    text = _seen(row["text"])
    font: Any = {"family": "monospace", "fontsize": 9.2, "va": "center"}
    shaded = abs(share) > 0.02
    if shaded:
        shade = tint("teacher" if share > 0 else "student", 0.2 + 0.7 * abs(share))
        axes.add_patch(Rectangle((column, line - 0.55), len(text), 1.1, linewidth=0, facecolor=shade))
    axes.text(column, line, text, color=DARK if shaded else ROLES["ink"], **font)
    if _wish(row):
        axes.text(column, line + 1.05, _seen(row["teacher_best"]), color=ROLES["teacher"], weight="bold", **font)


@matplotlib.rc_context(STYLE)
def loss_by_part(frame: Any) -> Figure:
    """Where the loss lives: each part's share of the gradient weight beside its share of the tokens."""
    rows = records(frame)
    shares = part_shares(rows)
    figure, axes = canvas((8.2, 1.3 + 0.5 * len(shares)))
    for key, offset, role, label in ((1, -0.19, "teacher", "share of the gradient weight"),
                                     (0, 0.19, "behaviour", "share of the tokens")):
        values = [100 * share[key] for share in shares.values()]
        bars = axes.barh([i + offset for i in range(len(shares))], values, height=0.34, color=ROLES[role],
                         label=label, alpha=0.85)
        axes.bar_label(bars, fmt="%.0f %%", padding=3, color=ROLES["ink"], fontsize=9)
    axes.set_yticks(range(len(shares)), [PARTS[part] for part in shares])
    axes.set(ylim=(len(shares) - 0.5, -0.5), xlim=(0, 108), xlabel="share [%]")
    axes.grid(axis="y", visible=False)
    axes.set_title(f"n = {len(rows)} tokens of {len({row['episode'] for row in rows})} episodes")
    return finish(figure, axes)


def part_shares(rows: Sequence[Json]) -> dict[str, tuple[float, float]]:
    """By part of a turn: its share of the tokens, and of the gradient weight.

    >>> part_shares([{"part": "value", "weight": -3.0}, {"part": "tool", "weight": 1.0}])
    {'value': (0.5, 0.75), 'tool': (0.5, 0.25)}
    """
    total = sum(abs(row["weight"]) for row in rows) or 1.0
    found = {part: [row for row in rows if row["part"] == part] for part in PARTS}
    return {part: (len(own) / len(rows), sum(abs(row["weight"]) for row in own) / total)
            for part, own in found.items() if own}


@matplotlib.rc_context(STYLE)
def hint_control(frame: Any) -> Figure:
    """Hint against wrong hint against none: how far the teacher moves, and whether it asks for the same corrections."""
    hints = by_hint(records(frame))
    figure = Figure(figsize=(9.2, 1.0 + 0.55 * len(hints)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for i, rows in enumerate(hints.values()):
        means = episode_means(rows)
        left.plot(list(means.values()), [i] * len(means), "|", color=ROLES["hint"], alpha=0.6, markersize=9)
        dot(left, i, bootstrap(list(means.values())), ROLES["hint"], scale=1)
    for i, share in enumerate(corrections_kept(hints).values()):
        dot(right, i, share, ROLES["hint"])
    left.set_yticks(range(len(hints)), list(hints))
    left.set(ylim=(len(hints) - 0.5, -0.5), xlabel="size of the gap [nats per token]")
    left.set_title("How far the teacher moves", fontsize=10)
    right.set(xlim=(-3, 105), xlabel="corrections of its own hint it asks for [%]")
    right.set_title("Whether it asks for the same", fontsize=10)
    return figure


def episode_means(rows: Sequence[Json]) -> dict[str, float]:
    """Mean size of the gap of each episode, nats per token."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["episode"], []).append(abs(row["gap"]))
    return {name: float(np.mean(values)) for name, values in found.items()}


def corrections_kept(hints: dict[str, list[Json]]) -> dict[str, Interval]:
    """By hint: the share of the first hint's corrections that the teacher asks for as well; episodes redrawn whole.

    A correction is a token in whose place the teacher holds another one likeliest.
    """
    own = {(row["episode"], row["branch"], row["token"]): row["teacher_best"]
           for row in next(iter(hints.values())) if _wish(row)}
    found = {}
    for name, rows in hints.items():
        same = [(row["episode"], float(row["teacher_best"] == own[key])) for row in rows
                if (key := (row["episode"], row["branch"], row["token"])) in own]
        found[name] = (cluster_bootstrap([value for _, value in same], [episode for episode, _ in same]) if same
                       else Interval(np.nan, np.nan, np.nan))
    return found
