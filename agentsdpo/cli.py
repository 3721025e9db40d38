"""The command line: verbs parse, call and print, nothing else. Each imports what it calls when it is called.

stdout is data, stderr is talk. Exit codes: 0 done, 1 something went wrong or the user stopped it (Ctrl-C), 2 the
request cannot be served as asked (usage, configuration, model folder).

``demo`` and ``train`` find modules in the folder they are called from, after all installed ones, so that
``suite = "tasks:make"`` may name a ``tasks.py`` that lies there.
"""

import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from agentsdpo import __version__
from agentsdpo.errors import AgentSdpoError
from agentsdpo.files import FULL
from agentsdpo.replay.cli import app as replay


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
            _stopped("")
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to flush goes nowhere
            sys.exit(0)
        return result


app = typer.Typer(
    name="agentsdpo", cls=Verbs, no_args_is_help=True, add_completion=False, rich_markup_mode=None,
    pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
    help="Off-policy self-distillation for agents: collect, hint, learn, publish.")
app.add_typer(replay)

Sets = Annotated[list[str] | None, typer.Option(
    "--set", metavar="KEY=VALUE", help="Override one setting, as in --set learn.lr=1e-4; may be repeated.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of words.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _global(version: Annotated[bool, typer.Option(
        "--version", callback=_print_version, is_eager=True, help="Print the version and leave.")] = False) -> None:
    pass


@app.command()
def demo(
    arms: Annotated[str | None, typer.Option(help="Presets to compare, with commas between, as in naive,sdpopp,robust; "
                                                  "robust alone when not given.")] = None,
    staleness: Annotated[int | None, typer.Option(min=0, help="Policy versions the collector is held behind.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps per arm.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of tasks, sampling and drawing.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A minute instead of several: fewer steps and episodes.")
                     ] = False,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Train the shipped model on the built-in world and show the reward curve."""
    chosen = tuple(name.strip() for name in arms.split(",") if name.strip()) if arms else None
    with _keeping(out, resume=None):
        from agentsdpo.demo import run_demo

        summary = run_demo(arms=chosen, staleness=staleness, steps=steps, seed=seed, out=out, quick=quick,
                           sets=tuple(sets or ()))
    _show(summary, out, as_json)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="Settings of the run.")],
    sets: Sets = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/<name> when not given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that is in the folder.")] = False,
    as_json: Json = False,
) -> None:
    """Collect, hint, learn and publish in one process, step by step; print what came of it."""
    from agentsdpo import config as settings

    resolved = settings.load(config, sets or ())  # before the slow imports: a mistyped key is refused at once
    folder = out or Path("runs") / resolved.name
    with _keeping(folder, resume="--resume"):
        from agentsdpo import loop
        from agentsdpo.demo import conclude

        loop.train(resolved, out=folder, resume=resume)
        summary = conclude(folder)
    _show(summary, folder, as_json)


@app.command()
def learn(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="Settings of the run.")],
    store: Annotated[str, typer.Option(metavar="URI", help="Replay store to learn from: a folder or s3://bucket/prefix.")],
    sets: Sets = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/<name> when not given.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps of the whole run.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that is in the folder.")] = False,
    as_json: Json = False,
) -> None:
    """Learn from a replay store that others fill, and publish policy versions; nothing is collected or evaluated."""
    from agentsdpo import config as settings

    resolved = settings.load(config, [*(sets or ()), *([f"steps={steps}"] if steps else [])])
    folder = out or Path("runs") / resolved.name
    with _keeping(folder, resume="--resume"):
        from agentsdpo.offline import learn_alone

        summary = learn_alone(resolved, store, out=folder, resume=resume)
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        typer.echo(f"{summary['steps']} steps on {summary['tokens']} tokens of {summary['rows']} rows: policy version "
                   f"{summary['version']} in {folder / 'policies'}")


def _show(summary: dict[str, Any], folder: Path, as_json: bool) -> None:
    """The result as data, and where to see more."""
    if as_json:
        typer.echo(json.dumps(summary))
        return
    from agentsdpo.console import print_summary

    print_summary(summary)
    typer.echo(f"curves: {folder / 'report.html'}", err=True)


@app.command()
def config(
    path: Annotated[Path | None, typer.Argument(metavar="[CONFIG.toml]", help="Settings, or the defaults.")] = None,
    sets: Sets = None,
    describe: Annotated[bool, typer.Option("--describe", help="List every setting with type, range and default.")
                        ] = False,
    as_json: Json = False,
) -> None:
    """Print the resolved settings as TOML, or say what each setting means."""
    from agentsdpo import config as settings

    if describe:
        listed = [{"key": s.key, "expected": s.expected, "default": s.default, "description": s.description}
                  for s in settings.describe()]
        typer.echo(json.dumps(listed) if as_json else "\n".join(
            f"{s['key']} = {s['default']}\n    {s['description']}\n    {s['expected']}" for s in listed))
        return
    resolved = settings.load(path, sets or ())
    typer.echo(resolved.model_dump_json() if as_json else resolved.to_toml(), nl=as_json)


@contextmanager
def _keeping(folder: Path, *, resume: str | None) -> Iterator[None]:
    """Let modules of this folder be imported; on Ctrl-C and on a full disk, say what is kept and how to go on.

    Args:
        folder: of the run.
        resume: the flag with which the verb goes on with a run; None when it does so by itself.
    """
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    try:
        yield
    except KeyboardInterrupt:
        _stopped(f"; {_way_on(folder, resume)}")
    except OSError as error:
        if isinstance(error, AgentSdpoError) or error.errno not in FULL:
            raise
        _fail(f"{_full(error)} free some space; {_way_on(folder, resume)}", 1)


def _way_on(folder: Path, resume: str | None) -> str:
    """What is kept and the command that goes on with it."""
    words = [word for word in sys.argv[1:] if word != resume]
    begun = (folder / "config.toml").is_file() or any(folder.glob("arms/*/config.toml"))
    again = shlex.join(["agentsdpo", *words, *([resume] if resume and begun else [])])
    kept = (f"finished episodes and the newest checkpoint are kept in {folder}, go on" if begun
            else "nothing was done yet, start again")
    return f"{kept} with: {again}"


def _full(error: OSError) -> str:
    return f"the disk is full{f' while writing {error.filename}' if error.filename else ''} ({error.strerror});"


def _stopped(more: str) -> NoReturn:
    """The end after Ctrl-C; a second one while libraries tidy up would only print their traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _fail(f"stopped{more}", 1)


def _fail(message: str, code: int) -> NoReturn:
    """One sentence on stderr, then the exit code."""
    typer.echo(f"agentsdpo: {message}", err=True)
    sys.exit(code)


def main() -> NoReturn:
    """Run the command line; errors raised on purpose become one sentence, faults keep their traceback."""
    try:
        app()
    except AgentSdpoError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _stopped("")
    except OSError as error:
        if error.errno not in FULL:
            raise
        _fail(f"{_full(error)} free some space", 1)
    sys.exit(0)


if __name__ == "__main__":
    main()
