"""The command line: verbs parse, call and print, nothing else. Each imports what it calls when it is called.

stdout is data, stderr is talk. Exit codes: 0 done, 1 something went wrong, 2 the request cannot be served as asked
(configuration, model folder), 130 interrupted.
"""

import errno
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from agentsdpo import __version__
from agentsdpo.errors import AgentSdpoError

app = typer.Typer(
    name="agentsdpo", no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Off-policy self-distillation for agents: collect, hint, learn, publish.")

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
    from agentsdpo.console import print_summary
    from agentsdpo.demo import run_demo

    chosen = tuple(name.strip() for name in arms.split(",") if name.strip()) if arms else None
    with _keeping(out, shlex.join(["agentsdpo", *sys.argv[1:]])):
        summary = run_demo(arms=chosen, staleness=staleness, steps=steps, seed=seed, out=out, quick=quick,
                           sets=tuple(sets or ()))
    if as_json:
        typer.echo(json.dumps(summary))
        return
    print_summary(summary)
    typer.echo(f"curves: {out / 'report.html'}", err=True)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="Settings of the run.")],
    sets: Sets = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/<name> when not given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that is in the folder.")] = False,
) -> None:
    """Collect, hint, learn and publish in one process, step by step."""
    from agentsdpo import config as settings

    resolved = settings.load(config, sets or ())  # before the slow imports: a mistyped key is refused at once
    from agentsdpo import loop

    folder = out or Path("runs") / resolved.name
    with _keeping(folder, shlex.join(["agentsdpo", *sys.argv[1:], *([] if resume else ["--resume"])])):
        loop.train(resolved, out=folder, resume=resume)


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
def _keeping(folder: Path, again: str) -> Iterator[None]:
    """On Ctrl-C, say what is kept and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"\nagentsdpo: stopped. Every finished step is kept in {folder}; go on with: {again}", err=True)
        raise typer.Exit(130) from None


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
        _fail("stopped.", 130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has left; Python would complain while flushing
        sys.exit(0)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        _fail(f"the disk is full{where}; free some space, then go on with --resume: finished steps are kept", 1)
    sys.exit(0)


if __name__ == "__main__":
    main()
