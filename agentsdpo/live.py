"""The live view of a training run on a terminal: progress, a sparkline of the reward, the evaluations so far."""

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from agentsdpo.console import ASCII_BARS, BARS, Pace, clean, sparkline, step_words
from agentsdpo.formats import interval, is_number, percent
from agentsdpo.results import eval_interval

REWARD = "collect/score/mean"
"""Metric behind the sparkline, a fraction."""


class LiveView:
    """Redraws itself four times a second; notes scroll by above. A context manager; see :func:`console.training`."""

    def __init__(self, total_steps: int, title: str, out: TextIO) -> None:
        self._console = Console(file=out, highlight=False, force_terminal=True)
        self._progress = Progress(TextColumn("{task.description}", markup=False), BarColumn(bar_width=30),
                                  MofNCompleteColumn(), TimeElapsedColumn(),
                                  TextColumn("{task.fields[pace]}", markup=False), console=self._console)
        self._task = self._progress.add_task(title, total=total_steps, pace="")
        self._pace, self._stage, self._metrics = Pace(total_steps), "", ""
        self._rewards: list[float] = []
        self._evals: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        # A piped stdout is data and must not be drawn into the view on stderr.
        self._live = Live(self._render(), console=self._console, refresh_per_second=4,
                          redirect_stdout=sys.stdout.isatty())

    def __enter__(self) -> "LiveView":
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.update(self._render(), refresh=True)
        self._live.stop()

    def stage(self, text: str) -> None:
        """Name what happens now."""
        self._stage = clean(text)
        self._live.update(self._render())

    def eval(self, row: Mapping[str, Any]) -> None:
        """Add an evaluation to the table of pass rates."""
        key = clean(row.get("split", "")), clean(row.get("decoding", "sampled"))
        self._evals.setdefault(key, []).append(row)
        self._live.update(self._render(), refresh=True)

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Advance the bar and show the step's metrics."""
        done = int(metrics.get("step", 0))
        self._progress.update(self._task, completed=done, pace="  ".join(self._pace.words(done)))
        self._metrics = "  ".join(step_words(metrics))
        if is_number(metrics.get(REWARD)):
            self._rewards.append(float(metrics[REWARD]))
        self._live.update(self._render())

    def note(self, text: str) -> None:
        """Print a line above the live part."""
        self._console.print(Text(clean(text), style="dim"))

    def _render(self) -> Group:
        lines: list[Any] = [self._progress]
        if self._stage:
            lines.append(Text(self._stage, style="bold"))
        if self._metrics:
            lines.append(Text(self._metrics))
        if self._rewards:
            bars = ASCII_BARS if self._console.options.ascii_only else BARS
            lines.append(Text.assemble("reward ", (sparkline(self._rewards, bars=bars), "blue"),
                                       f" {self._rewards[-1]:.2f}"))
        return Group(*lines, self._table()) if self._evals else Group(*lines)

    def _table(self) -> Table:
        """Zero-shot and newest pass rate of each split and decoding."""
        table = Table.grid(padding=(0, 2))
        table.add_row(*(Text(head, style="dim") for head in ("split", "decoding", "zero-shot", "now", "95 %", "step")))
        for (split, decoding), rows in self._evals.items():
            now = rows[-1]
            cells = (split, decoding, percent(rows[0].get("pass")), percent(now.get("pass")),
                     interval(eval_interval(dict(now))), str(now.get("step", "")))
            table.add_row(*map(Text, cells))
        return table
