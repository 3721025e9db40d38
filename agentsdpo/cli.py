"""The command line: verbs parse, call and print, nothing else. Each imports what it calls when it is called.

stdout is data, stderr is talk. Exit codes: 0 done, 1 something went wrong or the user stopped it (Ctrl-C), 2 the
request cannot be served as asked (usage, configuration, model folder).

Verbs that may be given a module of the user's own find it in the folder they are called from, after all installed ones,
so that ``suite = "tasks:make"`` may name a ``tasks.py`` that lies there.
"""

import os
import sys
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from agentsdpo import __version__
from agentsdpo.errors import AgentSdpoError
from agentsdpo.files import FULL
from agentsdpo.replay.cli import app as replay
from agentsdpo.verbs import (
    bench,
    hinting,
    programs,
    proxy,
    publishing,
    reporting,
    rescoring,
    serving,
    solving,
    training,
    viewing,
    watching,
)
from agentsdpo.verbs.base import fail, full, stopped

SPINS = "10000"
"""Turns for which a thread of torch's OpenMP waits awake before it sleeps. Its own 300,000 take the core from others
and from the work itself: beside two programs a step took 2.4 times as long with them, and alone no less."""


class Verbs(TyperGroup):
    """All verbs. What typer would turn into its own exit codes, without a word, is told here."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Where a verb comes first, no option before it has a value, and the slow check of values is left out."""
        if not args or args[0].startswith("-"):
            return super().parse_args(ctx, args)
        kept = self.params, self.add_help_option
        self.params, self.add_help_option = [], False
        try:
            return super().parse_args(ctx, args)
        finally:
            self.params, self.add_help_option = kept

    def invoke(self, ctx: typer.Context) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Run one verb; an interrupt becomes a sentence, a reader that has left is no fault."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except KeyboardInterrupt:
            stopped("")
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to flush goes nowhere
            sys.exit(0)
        return result


app = typer.Typer(
    name="agentsdpo", cls=Verbs, no_args_is_help=True, add_completion=False, rich_markup_mode=None,
    pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
    help="Off-policy self-distillation for agents: collect, hint, learn, publish.")
app.add_typer(replay)
for room in (training, solving, programs, watching, reporting, serving, publishing, proxy, bench, viewing, hinting):
    room.register(app)
rescoring.register(replay)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _global(version: Annotated[bool, typer.Option(
        "--version", callback=_print_version, is_eager=True, help="Print the version and leave.")] = False) -> None:
    pass


def main() -> NoReturn:
    """Run the command line; errors raised on purpose become one sentence, faults keep their traceback."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch is first imported
    try:
        app()
    except AgentSdpoError as error:
        fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        stopped("")
    except OSError as error:
        if error.errno not in FULL:
            raise
        fail(f"{full(error)} free some space", 1)
    sys.exit(0)


if __name__ == "__main__":
    main()
