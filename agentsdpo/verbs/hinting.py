"""Verbs of hints: ``hint write``, ``hint audit``."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from agentsdpo.verbs.base import Json, Sets
from agentsdpo.verbs.programs import Config, Store, kept, prepare, say, show

app = typer.Typer(name="hint", no_args_is_help=True, help="Write hints, and find out whether they are worth it.")


def write(
    config: Config,
    store: Store,
    follow: Annotated[bool, typer.Option("--follow", help="Go on with what is appended later.")] = False,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Write a hint to every episode of a store that lacks one."""
    from agentsdpo import config as settings

    resolved = settings.load(config, sets or ())
    prepare()
    from agentsdpo.programs.hinting import write_hints

    with kept("hints written so far are in the store"):
        about = write_hints(resolved, store, follow=follow, say=say)
    show(about, about.pop("words"), as_json)


def audit(
    store: Annotated[str, typer.Argument(metavar="STORE", help="Replay store: a folder or s3://bucket/prefix.")],
    config: Annotated[Path | None, typer.Option(metavar="CONFIG.toml", help="Settings of the run: model and suite; the "
                                                                            "defaults when not given.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Branches of each source that are scored.")] = 64,
    tasks: Annotated[int, typer.Option(min=0, help="Tasks of each source that are played with the hint, without it and "
                                                   "with another one's; 0 plays none.")] = 32,
    min_lift: Annotated[float | None, typer.Option(help="Exit with 1 unless the lower end of every source's lift is at "
                                                        "least this much.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of what is chosen and played.")] = 0,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Say whether the hints of a store are worth learning from, source by source, with intervals."""
    from agentsdpo import config as settings

    resolved = settings.load(config, sets or ())
    prepare()
    say(f"loading torch and {resolved.model}, to read {store}")
    from agentsdpo.audit import audit_store

    with kept("the store is only read"):
        verdicts = audit_store(resolved, store, rows=rows, tasks=tasks, seed=seed, say=say)
    found = [one.json() for one in verdicts]
    typer.echo(json.dumps(found) if as_json else "\n\n".join(map(_words, found)))
    short = [one for one in verdicts if min_lift is not None and (one.lift is None or one.lift.low < min_lift)]
    if short:
        say(f"lift of {', '.join(one.source for one in short)} is not shown to be at least {min_lift}")
        raise typer.Exit(1)


def _words(about: dict[str, Any]) -> str:
    """One verdict for people."""
    def ends(name: str, unit: str) -> str:
        value = about[name]
        return "not measured" if value is None else f"{value[0]:+.3f} {unit} [{value[1]:+.3f}, {value[2]:+.3f}]"

    over = f" over {about['tasks']} task{'s' * (about['tasks'] > 1)}" if about["tasks"] else ""
    lines = [f"{about['source']}: {about['verdict']}",
             f"  lift            {ends('lift', 'of score')}{over}",
             f"  of a wrong hint {ends('wrong_lift', 'of score')}",
             f"  gap             {ends('gap', 'nats')}", f"  wrong hint      {ends('wrong_gap', 'nats')}",
             f"  {about['branches']} branches, {about['distinct']:.1%} of the texts differ"]
    return "\n".join([*lines, *(f"  ! {warning}" for warning in about["warnings"])])


def register(root: typer.Typer) -> None:
    """Add these verbs."""
    for verb in (write, audit):
        app.command()(verb)
    root.add_typer(app)
