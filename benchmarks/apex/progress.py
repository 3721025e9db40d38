"""What a person sees while a benchmark runs: on stderr, a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from agentsdpo.benchmarks.apex.records import Attempt
from agentsdpo.benchmarks.apex.runner import Told
from agentsdpo.formats import duration

EVERY_S = 10.0
"""Seconds between two lines where there is no terminal."""


@contextmanager
def shown(what: str) -> Iterator[Told]:
    """Show progress until the block ends; what is yielded is to be told of every attempt that has ended."""
    if sys.stderr.isatty():
        with _bar(what) as told:
            yield told
    else:
        yield _Lines(what)


@contextmanager
def _bar(what: str) -> Iterator[Told]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what, markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
               TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar, passed = progress.add_task(what, total=None, rate=""), [0, 0]

        def told(attempt: Attempt, done: int, total: int) -> None:
            passed[0] += bool(attempt.passed)
            passed[1] += attempt.scored
            progress.update(bar, completed=done, total=total, rate=f"{passed[0]}/{passed[1]} passed")

        yield told


class _Lines:
    """One line every few seconds, and the last."""

    def __init__(self, what: str) -> None:
        self._what, self._began, self._said = what, time.monotonic(), 0.0
        self._passed = self._scored = self._new = 0

    def __call__(self, attempt: Attempt, done: int, total: int) -> None:
        self._passed, self._scored = self._passed + bool(attempt.passed), self._scored + attempt.scored
        self._new += 1
        now = time.monotonic() - self._began
        if done < total and now - self._said < EVERY_S:
            return
        self._said = now
        left = now / self._new * (total - done)
        more = f", {duration(left)} left" if done < total and self._new > 4 else ""
        sys.stderr.write(f"{self._what}: {done} of {total} attempts, {self._passed} of {self._scored} passed, "
                         f"{duration(now)}{more}\n")
