"""What the HTML pages share: colours, figures that take them, and the template's environment.

A page needs no network, and none but that of tokens a script: figures are inline SVG, the content policy forbids
everything but the page's own styles (and that one script), and every text that comes from files is escaped.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentsdpo import formats
from agentsdpo.types import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THEMES: dict[str, dict[str, str]] = {
    "light": {"page": "#ffffff", "card": "#f6f8fa", "rule": "#d1d9e0", "text": "#1f2328", "ink": "#59636e",
              "student": "#0072b2", "teacher": "#d55e00", "behaviour": "#767676", "hint": "#008060"},
    "dark": {"page": "#0d1117", "card": "#151b23", "rule": "#3d444d", "text": "#f0f6fc", "ink": "#a3acb7",
             "student": "#56b4e9", "teacher": "#e69f00", "behaviour": "#9a9a9a", "hint": "#2fb58f"},
}
"""Colours of the page and of the figures' roles; text is at least 4.5:1 on page and card, lines 3:1."""


@dataclass(frozen=True)
class Picture:
    """A figure ready for the page: its ``<svg>`` text, a caption, and whether it needs the full width."""

    svg: str
    caption: str
    title: str = ""
    wide: bool = False


def picture(figure: "Figure", name: str, caption: str, title: str = "", wide: bool = False) -> Picture:
    """The figure as SVG whose colours are the page's variables and whose size follows the page."""
    from agentsdpo import plots

    text = plots.svg(figure, name)
    for role, colour in plots.ROLES.items():
        text = re.sub(colour, f"var(--{role})", text, flags=re.IGNORECASE)
    tag, end, rest = text.partition(">")
    return Picture(re.sub(r' (xmlns|width|height)="[^"]*"', "", tag) + end + rest, caption, title, wide)


def environment(**filters: Callable[..., str]) -> Any:
    """The template engine with more filters: it escapes everything, and a name that a template misses is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    found = Environment(loader=PackageLoader("agentsdpo.show"), autoescape=True, undefined=StrictUndefined,
                        trim_blocks=True, lstrip_blocks=True)
    found.filters.update(percent=formats.percent, interval=formats.interval, number=formats.number, **filters)
    found.globals["themes"] = THEMES
    return found


def render(template: str, **content: Any) -> str:
    """A page from one of the package's templates, as UTF-8 can hold it: names of files need not be text."""
    return printable(environment().get_template(template).render(**content))


def missing_words(names: Sequence[str]) -> str:
    """Names as a list in words; empty when there are none.

    >>> missing_words(["learn/loss", "learn/ess_frac"])
    'Not recorded: learn/loss, learn/ess_frac.'
    """
    return f"Not recorded: {', '.join(names)}." if names else ""
