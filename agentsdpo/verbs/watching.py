"""The verb that looks on at a run: ``watch``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from agentsdpo.errors import ConfigError
from agentsdpo.verbs.base import Json, stopped


def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder that a run writes to, or has written.")],
    mode: Annotated[str, typer.Option(help="auto, rich (a live picture), plain (a line each) or none (wait for its "
                                           "end and say nothing).")] = "auto",
    once: Annotated[bool, typer.Option("--once", help="Say how it stands now, and leave.")] = False,
    as_json: Json = False,
) -> None:
    """Look on at a run from any terminal, until it has finished."""
    from agentsdpo.show import watch as looking

    if (as_json or once) and mode != "auto":
        raise ConfigError(f"--mode is {mode!r} and --{'json' if as_json else 'once'} is set",
                          fix="leave one of them out")
    try:
        if once:
            about = looking.snapshot(run)
            typer.echo(json.dumps(about) if as_json else "\n".join(looking.words(about)))
        elif as_json:
            said = ""
            for sight, rows, begun in looking.changes(run):
                if rows or begun or sight.state != said:
                    about = sight.as_json()
                    typer.echo(json.dumps(about))
                    said = about["state"]
        else:
            looking.follow(run, mode=mode)
    except KeyboardInterrupt:
        stopped(" watching; the run goes on")


def register(app: typer.Typer) -> None:
    """Add this verb."""
    app.command()(watch)
