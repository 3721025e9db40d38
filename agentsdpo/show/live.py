"""The live view of a training run on a terminal: progress, sparklines of what matters, the evaluations so far."""

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from agentsdpo.formats import interval, is_number, number, percent
from agentsdpo.results import eval_interval
from agentsdpo.show.console import ASCII_BARS, BARS, TRENDS, Pace, alarm_words, clean, sparkline, step_words

FRACTIONS = ("reward", "ESS")
"""Trends drawn between 0 and 1; the others between 0 and their highest."""


class LiveView:
    """Redraws itself four times a second; notes scroll by above. A context manager; see :func:`console.training`."""

    def __init__(self, total_steps: int, title: str, out: TextIO) -> None:
        self._console = Console(file=out, highlight=False, force_terminal=True)
        self._progress = Progress(TextColumn("{task.description}", markup=False), BarColumn(bar_width=30),
                                  MofNCompleteColumn(), TimeElapsedColumn(), console=self._console)
        self._progress.add_task(title, total=total_steps)
        self._pace, self._stage, self._lines, self._alarms = Pace(total_steps), "", [""], ""
        self._trends: dict[str, list[float]] = {word: [] for _, word in TRENDS}
        self._evals: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        # A piped stdout is data and must not be drawn into the view on stderr.
        self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4,
                          redirect_stdout=sys.stdout.isatty())

    def __enter__(self) -> "LiveView":
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()  # draws once more

    def stage(self, text: str) -> None:
        """Name what happens now."""
        self._stage = clean(text)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Add an evaluation to the table of pass rates."""
        key = clean(row.get("split", "")), clean(row.get("decoding", "sampled"))
        self._evals[key] = [*self._evals.get(key, [])[:1], row]

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Advance the bar and show the step's metrics."""
        task = self._progress.tasks[0]
        if is_number(metrics.get("wall_s")):  # looked at later, or from elsewhere: the run's own clock
            task.start_time, task.stop_time = 0.0, metrics["wall_s"]
        self._progress.update(task.id, completed=int(metrics.get("step", 0)))
        self._lines = ["  ".join(step_words(metrics)), "  ".join(self._pace.words(metrics))]
        self._alarms = "  ".join(alarm_words(metrics))
        for key, word in TRENDS:
            if is_number(metrics.get(key)):
                self._trends[word].append(float(metrics[key]))

    def note(self, text: str) -> None:
        """Print a line above the live part."""
        self._console.print(Text(clean(text), style="dim"))

    def _render(self) -> Group:
        lines: list[Any] = [self._progress]
        if self._stage:
            lines.append(Text(self._stage, style="bold"))
        lines += [Text(line) for line in self._lines if line]
        if self._alarms:
            lines.append(Text(self._alarms, style="bold red"))
        lines += [self._trend(word, values) for word, values in self._trends.items() if values]
        return Group(*lines, self._table()) if self._evals else Group(*lines)

    def _trend(self, word: str, values: list[float]) -> Text:
        """One sparkline with the newest value; the scale is named where it is not 0 to 1."""
        top = 1.0 if word in FRACTIONS else max(values) or 1.0
        bars = ASCII_BARS if self._console.options.ascii_only else BARS
        drawn = sparkline([value / top for value in values], bars=bars)
        scale = "" if word in FRACTIONS else f"  (highest {number(max(values))})"
        return Text.assemble(f"{word:<10}", (drawn, "blue"), f" {number(values[-1])}", (scale, "dim"))

    def _table(self) -> Table:
        """Zero-shot and newest pass rate of each split and decoding."""
        table = Table.grid(padding=(0, 2))
        table.add_row(*(Text(head, style="dim") for head in ("split", "decoding", "zero-shot", "now", "95 %", "step")))
        for (split, decoding), rows in list(self._evals.items()):
            now = rows[-1]
            cells = (split, decoding, percent(rows[0].get("pass")), percent(now.get("pass")),
                     interval(eval_interval(dict(now))), str(now.get("step", "")))
            table.add_row(*map(Text, cells))
        return table
