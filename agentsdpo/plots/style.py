"""The house style of all figures: no pyplot, no global state.

Colour means role everywhere, after Okabe and Ito: student blue, teacher orange, behaviour grey, hint green.
Okabe-Ito's own orange has a contrast of 2.2:1 on white, so its vermillion stands for the teacher here, and the
report swaps both for the lighter pair on dark backgrounds (:data:`agentsdpo.show.pages.THEMES`).
Text is a mid-tone grey, 4.3:1 on white and on near-black, so that a bare SVG reads on either.
"""

import io
import re
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

ROLES = {"student": "#0072b2", "teacher": "#d55e00", "behaviour": "#8c8c8c", "hint": "#009e73", "ink": "#787b80"}
"""Colour of each role; ``ink`` is text, axes and reference lines."""
DARK = "#1b1d20"
"""Text on a tint."""
STYLE: Any = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "Helvetica", "sans-serif"],
    "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.titlepad": 10, "text.color": ROLES["ink"], "axes.labelcolor": ROLES["ink"], "axes.edgecolor": ROLES["ink"],
    "axes.titlecolor": ROLES["ink"], "xtick.color": ROLES["ink"], "ytick.color": ROLES["ink"],
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": ROLES["ink"],
    "grid.alpha": 0.18, "grid.linewidth": 0.8, "axes.facecolor": "none", "figure.facecolor": "none",
    "savefig.facecolor": "none", "legend.frameon": False, "legend.fontsize": 9, "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round", "text.parse_math": False, "axes.formatter.use_mathtext": False,
    "axes.formatter.useoffset": False, "svg.fonttype": "none", "svg.hashsalt": "agentsdpo",
}
"""The house style; ``text.parse_math`` is off because arm and split names come from files."""
AXES = {"episodes": "episodes collected", "env_steps": "environment steps", "wall_s": "wall clock",
        "step": "optimiser steps"}
"""What a learning curve can stand against, and how the axis is called."""

def canvas(size: tuple[float, float]) -> tuple[Figure, Axes]:
    """An empty figure of some inches with one set of axes, the grid behind the data."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    return figure, axes


def reference(axes: Axes, value: float, label: str, style: Any) -> None:
    """A baseline or an alarm across the axes, named in the legend."""
    axes.axhline(value, color=ROLES["ink"], linestyle=style, linewidth=1.2, label=label, zorder=1.8)


def legend_name(name: str) -> str:
    """A name that comes from files, for a legend, which leaves out what begins with an underscore.

    >>> legend_name("robust"), legend_name("_old")
    ('robust', ' _old')
    """
    return f" {name}" if name.startswith("_") else name


def tint(role: str, strength: float) -> tuple[float, float, float]:
    """An opaque mixture of white and a role's colour: with dark text it reads the same on light and on dark pages.

    >>> tint("student", 0.0)
    (1.0, 1.0, 1.0)
    """
    red, green, blue = (1 - strength * (1 - part) for part in to_rgb(ROLES[role]))
    return red, green, blue


def finish(figure: Figure, axes: Axes, columns: int | None = None) -> Figure:
    """Whole numbers on counted axes, and the legend below, where it cannot hide data."""
    if axes.get_xlabel() in AXES.values():
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        many = columns or (2 if figure.get_figwidth() < 6 else 4)
        figure.legend(handles, labels, loc="outside lower left", ncols=many, handlelength=2.4, columnspacing=1.4)
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


@dataclass(frozen=True)
class Shown:
    """A figure as notebooks display it: vectors, transparent, so that it reads on light and on dark."""

    text: str = field(repr=False)

    def _repr_svg_(self) -> str:
        return self.text


def show(figure: Figure, name: str) -> Shown:
    """What a notebook's cell ends with; ``name`` as :func:`svg` takes it."""
    return Shown(svg(figure, name))
