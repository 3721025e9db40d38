"""What a person sees while a run trains: a live view on a terminal, one line per event elsewhere, or nothing.

Talk goes to stderr, so that stdout stays data; :func:`print_summary` prints the result, which is data. The views take
the very rows that go into ``metrics.jsonl``. ``NO_COLOR`` is honoured (rich reads it), and control characters in
names and notes are dropped, so that no text from a task can drive the terminal.
"""

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol, TextIO, get_args

from agentsdpo.errors import ConfigError
from agentsdpo.formats import MISSING, duration, interval, is_number, number, percent
from agentsdpo.results import arm_rate, eval_interval, rate, split_words
from agentsdpo.runfolder import Arm, arm_records
from agentsdpo.types import Json

if TYPE_CHECKING:
    from rich.table import Table

Mode = Literal["auto", "rich", "plain", "none"]
"""``auto`` is ``rich`` when stderr is a terminal and ``plain`` otherwise."""
BARS = "▁▂▃▄▅▆▇█"
"""Heights of a sparkline, lowest first."""
ASCII_BARS = "_.-=+*#@"
"""The same for terminals that cannot show block characters."""
SHOWN = (
    ("collect/pass", "pass", percent), ("collect/score/mean", "score", number),
    ("replay/staleness/mean", "staleness", number), ("replay/staleness/max", "oldest", number),
    ("learn/loss", "loss", number), ("learn/gap/abs", "gap", number), ("learn/ess_frac", "ESS", number),
)
"""Metric keys of a step that are worth a glance, with their words and formats."""
TRENDS = (("collect/score/mean", "reward"), ("replay/staleness/mean", "staleness"), ("learn/ess_frac", "ESS"),
          ("learn/gap/abs", "gap"))
"""Metric keys whose course over the run is drawn, with their words; reward and ESS are fractions."""
RATES = (("s_per_step", "s/step"), ("episodes_per_s", "episodes/s"), ("tokens_per_s", "tokens/s"))
"""What a run gets through, with its units."""
COSTS = (
    ("staleness", "staleness", number), ("steps", "optimiser steps", number), ("episodes", "episodes", number),
    ("wall_s", "wall clock", duration), ("peak_rss_mib", "peak memory [MiB]", number),
)
"""Keys of an arm's summary below its pass rates, with their words and formats."""
ARMS_ABREAST = 3
"""Arms side by side in one summary table."""


class View(Protocol):
    """What a training loop tells its audience."""

    def stage(self, text: str) -> None:
        """A new part of the run begins."""
        ...

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """An evaluation ended; ``row`` is the ``eval`` row of ``metrics.jsonl``."""
        ...

    def step(self, metrics: Mapping[str, Any]) -> None:
        """An optimiser step ended; ``metrics`` is the ``step`` row of ``metrics.jsonl``."""
        ...

    def note(self, text: str) -> None:
        """Something worth a line happened."""
        ...


@contextmanager
def training(total_steps: int, title: str, mode: str = "auto", file: TextIO | None = None) -> Iterator[View]:
    """Show a training run until the block ends; the last state stays on the screen.

    Args:
        total_steps: optimiser steps planned, at least 1.
        title: what is trained, one line.
        mode: see :data:`Mode`.
        file: where to write; None is stderr.

    Raises:
        ConfigError: the mode is unknown.

    >>> with training(2, "demo", mode="plain", file=sys.stdout) as view:
    ...     view.stage("zero-shot evaluation")
    ...     view.evaluation({"step": 0, "split": "val", "pass": 0.25, "n": 64})
    demo: 2 steps
    zero-shot evaluation
    step 0/2  eval val sampled  pass 25.0 % [16.0, 36.8]  n 64
    """
    out = file or sys.stderr
    mode = settled(mode, out)
    if mode == "rich":
        from agentsdpo.show.live import LiveView

        with LiveView(total_steps, clean(title), out) as view:
            yield view
    else:
        yield PlainView(total_steps, title, out) if mode == "plain" else SilentView()


def settled(mode: str, out: TextIO) -> str:
    """What ``auto`` means for a stream; any other mode is itself.

    Raises:
        ConfigError: the mode is unknown.
    """
    if mode not in get_args(Mode):
        raise ConfigError(f"console mode {mode!r}", fix="use auto, rich, plain or none")
    if mode != "auto":
        return mode
    return "rich" if out.isatty() and os.environ.get("TERM") != "dumb" else "plain"


def show_row(view: View, row: Mapping[str, Any]) -> None:
    """Tell a view one line of ``metrics.jsonl``, as the loop that wrote it told its own."""
    if row.get("kind") == "step":
        view.step(row)
    elif row.get("kind") == "eval":
        view.evaluation(row)
    else:
        view.note(f"{row.get('level')} alarm at step {row.get('step')}: {row.get('action')}")


class SilentView:
    """Says nothing."""

    def stage(self, text: str) -> None:
        """Ignored."""

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Ignored."""

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Ignored."""

    def note(self, text: str) -> None:
        """Ignored."""


class PlainView:
    """One line per event, no colour, no cursor movement: for logs, pipes and screen readers."""

    def __init__(self, total_steps: int, title: str, out: TextIO) -> None:
        self._total, self._out, self._pace = total_steps, out, Pace(total_steps)
        self._say(f"{title}: {total_steps} steps")

    def _say(self, text: str) -> None:
        encoding = getattr(self._out, "encoding", None) or "utf-8"
        safe = clean(text).encode(encoding, "replace").decode(encoding)
        print(safe, file=self._out, flush=True)

    def stage(self, text: str) -> None:
        """The stage's name on a line."""
        self._say(text)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Split, decoding and pass rate with its interval."""
        self._say(f"step {row.get('step', 0)}/{self._total}  {eval_words(row)}")

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Progress, the metrics worth a glance, rate and time left."""
        done = int(metrics.get("step", 0))
        words = [*step_words(metrics), *alarm_words(metrics), *self._pace.words(metrics)]
        self._say("  ".join([f"step {done}/{self._total}", *words]))

    def note(self, text: str) -> None:
        """The note on a line."""
        self._say(f"note: {text}")


class Pace:
    """Rate and time left, from the last twenty steps, not from the slow start.

    Times are those of the rows (``wall_s``) where these have them, so that a run may be looked at later; else now.
    """

    def __init__(self, total_steps: int) -> None:
        self._total, self._began = total_steps, time.monotonic()
        self._seen: list[tuple[float, Mapping[str, Any]]] = []

    def words(self, row: Mapping[str, Any]) -> list[str]:
        """Seconds per step, episodes and sampled tokens per second, time left; empty until time has passed."""
        return rate_words(self.rates(row))

    def rates(self, row: Mapping[str, Any]) -> dict[str, float]:
        """One more step: ``s_per_step``, ``left_s``, and ``episodes_per_s``, ``tokens_per_s`` where rows count them."""
        at = row.get("wall_s")
        # By its own clock a run began at 0; by ours, just before the first step seen, which may be a resumed one's.
        now, start = (at, (0.0, {"step": 0, "episodes": 0, "tokens": 0})) if is_number(at) else (
            time.monotonic(), (self._began, {"step": max(row.get("step", 0) - 1, 0)}))
        self._seen = [*(self._seen or [start])[-20:], (now, row)]
        pace = self._growth("step")
        if pace <= 0:
            return {}
        grown = {name: self._growth(key) for key, name in (("episodes", "episodes_per_s"), ("tokens", "tokens_per_s"))}
        left = max(self._total - row.get("step", 0), 0) / pace
        return {"s_per_step": 1 / pace, **{name: rate for name, rate in grown.items() if rate > 0}, "left_s": left}

    def _growth(self, key: str) -> float:
        """How much a counter grows a second, over the steps remembered; 0 where that is not known."""
        known = [(at, row[key]) for at, row in self._seen if is_number(row.get(key))]
        (first, low), (last, high) = (known[0], known[-1]) if known else ((0.0, 0), (0.0, 0))
        return (high - low) / (last - first) if last > first else 0.0


def clean(text: str) -> str:
    """One printable line: control, bidi and other invisible characters become spaces.

    >>> clean("a\\x1b[31mb\\nc")
    'a [31mb c'
    """
    return "".join(char if char.isprintable() else " " for char in str(text))


def step_words(metrics: Mapping[str, Any]) -> list[str]:
    """The metrics of :data:`SHOWN` that a step has.

    >>> step_words({"collect/pass": 0.5, "replay/staleness/mean": 3.14159, "learn/loss": float("nan")})
    ['pass 50.0 %', 'staleness 3.14']
    """
    return [f"{word} {show(metrics[key])}" for key, word, show in SHOWN if is_number(metrics.get(key))]


def rate_words(rates: Mapping[str, float]) -> list[str]:
    """What :meth:`Pace.rates` found; the time left where there is any.

    >>> rate_words({"s_per_step": 2.0, "left_s": 90.0}), rate_words({})
    (['2 s/step', 'left 1 min 30 s'], [])
    """
    left = [f"left {duration(rates['left_s'])}"] if rates.get("left_s") else []
    return [*(f"{number(rates[key])} {word}" for key, word in RATES if key in rates), *left]


def alarm_words(metrics: Mapping[str, Any]) -> list[str]:
    """What is wrong with a step, by the step's own line; nothing in a healthy run.

    >>> alarm_words({"tripwire/restrained": 1.0, "tripwire/rollbacks": 2, "learn/skipped/gated": 1.0})
    ['restrained by an alarm', 'rolled back 2 x', 'skipped: gated']
    >>> alarm_words({"tripwire/restrained": 0.0, "learn/loss": 0.5})
    []
    """
    words = ["restrained by an alarm"] if metrics.get("tripwire/restrained") else []
    back = metrics.get("tripwire/rollbacks")
    words += [f"rolled back {number(int(back))} x"] if is_number(back) and back else []
    return words + [f"skipped: {key.rpartition('/')[2]}" for key in metrics if key.startswith("learn/skipped/")]


def eval_words(row: Mapping[str, Any]) -> str:
    """One evaluation in words."""
    ends = interval(eval_interval(dict(row)))
    parts = [f"eval {row.get('split', '')} {row.get('decoding', 'sampled')}",
             f"pass {percent(row.get('pass'))}{' ' if ends else ''}{ends}"]
    parts += [f"{key} {number(row[key])}" for key in ("score", "n") if is_number(row.get(key))]
    return "  ".join(parts)


def sparkline(values: list[float], width: int = 40, bars: str = BARS) -> str:
    """Values as bars between 0 and 1, each bar the mean of its share when there are more values than bars.

    >>> sparkline([0.0, 0.5, 1.0]), sparkline([0.0, 0.2, 0.8, 1.0], width=2)
    ('▁▅█', '▁█')
    """
    if len(values) > width:
        edges = [round(i * len(values) / width) for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    return "".join(bars[min(max(int(value * len(bars)), 0), len(bars) - 1)] for value in values)


def print_summary(summary: Json, file: TextIO | None = None) -> None:
    """Print the final table of a run: each arm before and after with 95 % intervals, then the splits.

    Args:
        summary: the content of ``summary.json``; whatever it lacks is shown as a dash.
        file: where to write; None is stdout, since a result is data.
    """
    from rich.console import Console

    out = file or sys.stdout
    console = Console(file=out, highlight=False, width=None if out.isatty() else 160)
    arms = list(arm_records(summary).items())
    for i in range(0, len(arms), ARMS_ABREAST):
        console.print(_arms_table(arms[i:i + ARMS_ABREAST]))
    for name, record in arms:
        if record.get("splits"):
            console.print(_splits_table(name, record["splits"]))


def _table(title: str, *columns: str) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(clean(title), style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(Text(clean(column)), justify="right" if i else "left", overflow="fold")
    return table


def _row(table: "Table", *cells: str) -> None:
    """Add cells as plain text: square brackets in names are no markup."""
    from rich.text import Text

    table.add_row(*(Text(clean(cell)) for cell in cells))


def _arms_table(arms: Sequence[tuple[str, Json]]) -> "Table":
    """Arms side by side, one quantity a line, so that three fit on 80 columns."""
    table = _table("Before and after training", "95 % intervals in brackets", *(name for name, _ in arms))
    records = [record for _, record in arms]
    both = [Arm(name, "", (), record) for name, record in arms]
    _row(table, "evaluated on", *(split_words(record) or MISSING for record in records))
    for when, words in (("zero_shot", "zero-shot"), ("final", "final")):
        _row(table, f"{words} pass", *(_rate(arm_rate(arm, when)) for arm in both))
        if any(is_number(one.get(f"{when}_score")) for one in records):
            _row(table, f"{words} mean score", *(percent(one.get(f"{when}_score")) for one in records))
    for key, words, show in (cost for cost in COSTS if any(is_number(one.get(cost[0])) for one in records)):
        _row(table, words, *(show(record.get(key)) for record in records))
    return table


def _splits_table(name: str, splits: Mapping[str, Json]) -> "Table":
    table = _table(f"Splits of arm {name}", "split", "n", "zero-shot", "final", "final, greedy")
    for split, record in splits.items():
        _row(table, split, number(record.get("n")), _rate(rate(record, "zero_shot")), _rate(rate(record, "final")),
             percent(record.get("final_greedy_pass")))
    return table


def _rate(value: Any) -> str:
    return f"{percent(value.estimate)} {interval(value)}".strip() if value else percent(None)
