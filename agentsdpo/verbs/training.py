"""Verbs that train: ``demo``, ``train``, ``learn``, and ``config``, which says what they will do."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from agentsdpo.errors import ConfigError
from agentsdpo.verbs.base import Json, Sets, keeping


def demo(
    arms: Annotated[str | None, typer.Option(help="Presets to compare, with commas between, as in naive,sdpopp,robust; "
                                                  "robust alone when not given.")] = None,
    staleness: Annotated[int | None, typer.Option(min=0, help="Policy versions the collector is held behind.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps per arm.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of tasks, sampling and drawing.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the run; a stopped demo there goes on.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps and episodes: a look, not a result.")] = False,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Train the shipped model on the built-in world and show the reward curve."""
    chosen = tuple(name.strip() for name in arms.split(",") if name.strip()) if arms else None
    with keeping(out, resume=None):
        from agentsdpo.demo import run_demo

        summary = run_demo(arms=chosen, staleness=staleness, steps=steps, seed=seed, out=out, quick=quick,
                           sets=tuple(sets or ()))
    _show(summary, out, as_json)
    if quick and not as_json:
        typer.echo("--quick is a look, not a result: the mean score rises before whole episodes pass; leave it out to "
                   "see them pass", err=True)


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="Settings of the run.")],
    sets: Sets = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/<name> when not given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that is in the folder.")] = False,
    apart: Annotated[bool, typer.Option("--async", help="Collectors, hint writer, learner and evaluator as processes "
                                                        "side by side: nobody waits for the slowest tool.")] = False,
    collectors: Annotated[int | None, typer.Option(min=1, help="With --async: processes that collect; 1 for every "
                                                               "server when not given.")] = None,
    server: Annotated[list[str] | None, typer.Option(metavar="URL", help="With --async: an inference server to collect "
                                                                         "from; may be repeated.")] = None,
    as_json: Json = False,
) -> None:
    """Collect, hint, learn and publish, step by step in one process or side by side; print what came of it."""
    from agentsdpo import config as settings

    if not apart and (collectors or server):
        raise ConfigError("--collectors and --server are of --async", fix="add --async, or leave them out")
    resolved = settings.load(config, sets or ())  # before the slow imports: a mistyped key is refused at once
    folder = out or Path("runs") / resolved.name
    with keeping(folder, resume="--resume"):
        from agentsdpo.demo import conclude

        if apart:
            from agentsdpo.programs.side_by_side import train_async

            train_async(resolved, out=folder, collectors=collectors or 1, servers=server or (), resume=resume)
        else:
            from agentsdpo import loop

            loop.train(resolved, out=folder, resume=resume)
        summary = conclude(folder)
    _show(summary, folder, as_json)


def learn(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="Settings of the run.")],
    store: Annotated[str, typer.Option(metavar="URI", help="Replay store to learn from: a folder or s3://bucket/prefix.")],
    sets: Sets = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/<name> when not given.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps of the whole run.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that is in the folder.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Wait for fresh episodes, let what has a hint join at every "
                                                          "step, and have evaluations played by `agentsdpo evaluate`."
                                         )] = False,
    as_json: Json = False,
) -> None:
    """Learn from a replay store that others fill, and publish policy versions; nothing is collected."""
    from agentsdpo import config as settings

    resolved = settings.load(config, [*(sets or ()), *([f"steps={steps}"] if steps else [])])
    folder = out or Path("runs") / resolved.name
    with keeping(folder, resume="--resume"):
        if follow:
            from agentsdpo.programs.following import learn_following
            from agentsdpo.programs.tether import stoppable

            stoppable()
            summary = learn_following(resolved, store, out=folder, resume=resume)
        else:
            from agentsdpo.offline import learn_alone

            summary = learn_alone(resolved, store, out=folder, resume=resume)
    if as_json:
        typer.echo(json.dumps(summary))
    elif follow:
        typer.echo(f"{summary['steps']} steps, {summary['episodes']} episodes joined: policy version "
                   f"{summary['version']} in {folder / 'policies'}")
    else:
        typer.echo(f"{summary['steps']} steps on {summary['tokens']} tokens of {summary['rows']} rows: policy version "
                   f"{summary['version']} in {folder / 'policies'}")


def _show(summary: dict[str, Any], folder: Path, as_json: bool) -> None:
    """The result as data, and where to see more."""
    if as_json:
        typer.echo(json.dumps(summary))
        return
    from agentsdpo.show.console import print_summary

    print_summary(summary)
    typer.echo(f"curves: {folder / 'report.html'}", err=True)


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


def register(app: typer.Typer) -> None:
    """Add these verbs."""
    for verb in (demo, train, learn, config):
        app.command()(verb)
