"""What every ``replay`` verb shares: its switches, how it answers, how it fails.

stdout is data, stderr is talk. Text for people when stdout is a terminal, tab-separated columns with a heading in a
pipe, one JSON document with ``--json``, one object a line with ``--jsonl``. Nothing is cut off or coloured in a pipe.
Exit codes: 0 done, 1 error, 2 usage or unsupported file system, 3 damage found, 4 not found, 5 lock held.
"""

import inspect
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer

from agentsdpo.errors import AgentSdpoError, ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from agentsdpo.replay.store import ReplayStore

Store = Annotated[str, typer.Argument(metavar="STORE", help="Folder of the store, or s3://bucket/prefix.")]
Where = Annotated[str | None, typer.Option(
    metavar="EXPR", help="Rows that count, as in \"env_id == 'desk' and reward >= 0.5\".")]
Sole = Annotated[bool, typer.Option("--sole-maintainer", help="Where slots cannot be taken exclusively: nobody else "
                                    "maintains this store.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do it; without this the verb only says what it would do.")]

Verb = Callable[..., None]
"""A function that does what a verb says; its first argument is an :class:`Out`."""
Json = dict[str, Any]
"""A JSON object; ``agentsdpo.types``, where it comes from, is too slow to load for a ``--help``."""

_SWITCHES: dict[str, tuple[str, ...]] = {"as_json": ("--json",), "as_lines": ("--jsonl",), "quiet": ("-q", "--quiet"),
                                         "plain": ("--no-color",)}
_HELP = {"as_json": "Print one JSON document.", "as_lines": "Print one JSON object a line.",
         "quiet": "No notes on stderr.", "plain": "No colours; so does NO_COLOR."}


class Out:
    """Where a verb's answer goes, and in which form.

    Args:
        verb: its name, part of the ``schema`` of a JSON answer.
        form: ``text``, ``json`` (one document) or ``jsonl`` (one object a line).
        quiet: whether notes are left out.
        plain: whether colours are.
    """

    def __init__(self, verb: str, form: str = "text", *, quiet: bool = False, plain: bool = False) -> None:
        self.verb, self.form, self.quiet = verb, form, quiet
        self.tty = form == "text" and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        forced = form == "text" and bool(os.environ.get("FORCE_COLOR"))
        self.colour = (self.tty or forced) and not plain and not os.environ.get("NO_COLOR")

    def answer(self, document: Json, text: "Callable[[], str | Text | None]", *, lines: str = "") -> None:
        """Print a verb's result.

        Args:
            document: the whole of it, for ``--json``.
            text: makes, and may print itself, what people read; called only when it is wanted.
            lines: name of the list in ``document`` that ``--jsonl`` prints.
        """
        if self.form == "json":
            write(json.dumps({"schema": f"agentsdpo-replay/{self.verb}/1", **jsonable(document)}) + "\n")
        elif self.form == "jsonl":
            for row in document[lines]:
                write(json.dumps(jsonable(row)) + "\n")
        elif (said := text()) is not None:
            self.say(said)

    def finish(self, yes: bool, document: Json, done: str, would: str) -> None:
        """Say what a destructive verb did, or without ``--yes`` would do."""
        self.answer({**document, "dry_run": not yes}, lambda: done if yes else would)
        if not yes:
            self.note("nothing was changed; do it with --yes")

    def line(self, row: Json, text: "str | Text") -> None:
        """Print one item of an answer that has no end: JSON unless people read it."""
        if self.form == "text":
            self.say(text)
        else:
            write(json.dumps(jsonable(row)) + "\n")

    def say(self, text: "str | Text") -> None:
        """Print text; styles of a rich ``Text`` show where colours are on."""
        if isinstance(text, str):
            write(printable(text) + "\n")
            return
        console = self.console()
        with console.capture() as got:
            console.print(text, soft_wrap=not self.tty)
        write(got.get())

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """A table for people on a terminal, tab-separated lines in a pipe; numbers stand to the right."""
        rows = [[cell(value) for value in row] for row in rows]
        if not self.tty:
            write("".join("\t".join(row) + "\n" for row in [list(columns), *rows]))
            return
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for i, name in enumerate(columns):
            number = all(row[i].replace(".", "").replace("-", "").isdigit() for row in rows if row[i])
            short = all(len(row[i]) <= 12 for row in rows)
            table.add_column(Text(name), justify="right" if number and rows else "left", no_wrap=short,
                             overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        console = self.console()
        with console.capture() as got:
            console.print(table)
        write(got.get())

    def console(self) -> "Console":
        """A rich console in this form's width and colours."""
        from rich.console import Console

        return Console(force_terminal=self.colour, no_color=not self.colour, highlight=False, markup=False,
                       emoji=False, width=None if self.tty else 160, color_system="truecolor" if self.colour else None)

    def note(self, text: str) -> None:
        """A remark on stderr."""
        if not self.quiet:
            write(printable(f"agentsdpo: {text}") + "\n", sys.stderr)

    @contextmanager
    def progress(self, words: str, total: int = 0) -> Iterator[Callable[..., None]]:
        """A bar on stderr while the block runs, when that is a terminal.

        Call what is given after each item, or with the number done and their total.
        """
        if self.quiet or not sys.stderr.isatty():
            yield lambda done=0, total=0: None
            return
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(words, total=total or None)

            def tick(done: int | None = None, total: int = 0) -> None:
                if done is None:
                    bar.advance(task)
                else:
                    bar.update(task, completed=done, total=total or None)

            yield tick


def verb(app: typer.Typer, name: str = "", *, lists: bool = False) -> Callable[[Verb], Verb]:
    """Register a function ``f(out, ...)`` as a verb: adds the shared switches and turns errors into exit codes.

    Args:
        app: where to register.
        name: of the verb; the function's own when empty.
        lists: whether the answer is a list, so that ``--jsonl`` makes sense.
    """
    def register(function: Verb) -> Verb:
        title = name or function.__name__
        own = [p.replace(kind=p.KEYWORD_ONLY) for p in list(inspect.signature(function).parameters.values())[1:]]
        switches = [inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=False,
                                      annotation=Annotated[bool, typer.Option(*flags, help=_HELP[key])])
                    for key, flags in _SWITCHES.items() if lists or key != "as_lines"]

        def run(as_json: bool, quiet: bool, plain: bool, as_lines: bool = False, **given: Any) -> None:
            out = Out(title, "json" if as_json else "jsonl" if as_lines else "text", quiet=quiet, plain=plain)
            with _told(out):
                if as_json and as_lines:
                    raise ConfigError("both --json and --jsonl are given", fix="choose one")
                function(out, **given)

        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__signature__ = inspect.Signature([*own, *switches])  # pyright: ignore[reportFunctionMemberAccess]
        run.__annotations__ = {p.name: p.annotation for p in [*own, *switches]}
        app.command(title)(run)
        return function
    return register


@contextmanager
def _told(out: Out) -> Iterator[None]:
    """Errors raised on purpose become one red line and their exit code; faults keep their traceback."""
    try:
        yield
    except AgentSdpoError as error:
        fail(str(error), error.exit_code, colour=out.colour)


def fail(message: str, code: int, *, colour: bool = False) -> NoReturn:
    """One line on stderr, red on a terminal, then the exit code."""
    line = printable(f"agentsdpo: {message}")
    write((f"\x1b[31m{line}\x1b[0m" if colour and sys.stderr.isatty() else line) + "\n", sys.stderr)
    raise typer.Exit(code)


def write(text: str, to: TextIO | None = None) -> None:
    """Write and flush; characters that the stream's encoding lacks become question marks."""
    stream = to or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(text.encode(encoding, "replace").decode(encoding))
    stream.flush()


def printable(text: str) -> str:
    """The text with control, bidi and other invisible characters as spaces; line breaks and tabs stay.

    >>> printable("a\\x1b[31mb\\n\\tc")
    'a [31mb\\n\\tc'
    """
    return "".join(char if char.isprintable() or char in "\n\t" else " " for char in text)


def cell(value: Any) -> str:
    """One value as a table shows it: one line, empty when missing.

    >>> cell(0.123456), cell(None), cell(True), cell([1, 2]), cell("a\\tb")
    ('0.1235', '', 'yes', '1, 2', 'a b')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(cell, value))
    if isinstance(value, datetime):
        return f"{_utc(value):%Y-%m-%d %H:%M:%S}"
    return " ".join(printable(value.hex() if isinstance(value, bytes) else str(value)).split())


def jsonable(value: Any) -> Any:
    """The value as JSON takes it: times in ISO 8601, bytes in hex, no NaN; what JSON has no word for as text.

    >>> jsonable({"a": float("nan"), "b": b"\\x01", "c": (1, 2)})
    {'a': None, 'b': '01', 'c': [1, 2]}
    """
    if isinstance(value, dict):
        return {str(key): jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(inner) for inner in value]
    if isinstance(value, float | Decimal):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, datetime):
        return _utc(value).isoformat()
    if isinstance(value, bytes):
        return value.hex()
    return value if value is None or isinstance(value, str | int) else str(value)


def _utc(time: datetime) -> datetime:
    """A time in UTC; one that does not say where it was taken, as SQL makes them, stays as it is."""
    return time.astimezone(UTC) if time.tzinfo else time


def size(n: float) -> str:
    """Bytes in the unit that fits.

    >>> size(590), size(3_600), size(128 * 2**20)
    ('590 B', '3.5 KiB', '128.0 MiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


TIMES = {"s": 1, "min": 60, "h": 3600, "d": 86400}
"""Seconds of each unit of time."""
SIZES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30,
         "TiB": 2**40}
"""Bytes of each unit of size."""


def amount(text: str, option: str, units: Mapping[str, int]) -> float:
    """A number with a unit, in seconds or bytes.

    Raises:
        ConfigError: another form, or a unit that is none of ``units``.

    >>> amount("1.5h", "--ttl", TIMES)
    5400.0
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", text.strip())
    if not found or found[2] not in units:
        raise ConfigError(f"{option} is {text!r}", fix=f"write a number and one of {', '.join(units)}")
    return float(found[1]) * units[found[2]]


def existing(uri: str) -> "ReplayStore":
    """The store at a place, never made.

    Raises:
        StoreNotFound: there is none.
        StoreError: it cannot be read.
    """
    from agentsdpo.replay.layout import missing
    from agentsdpo.replay.storage import storage_for
    from agentsdpo.replay.store import ReplayStore

    if not storage_for(uri).exists("STORE.json"):
        raise missing(uri, fix="check the path, or make one with: agentsdpo replay init")
    return ReplayStore.open(uri, create=False)
