"""Verbs that run one program of a cluster: ``collect``, ``evaluate``; the learner is ``learn --follow``."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from agentsdpo.errors import ConfigError
from agentsdpo.verbs.base import Json, Sets, find_here, stopped

Config = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="Settings of the run: its RUN/config.toml.")]
Store = Annotated[str, typer.Option(metavar="URI", help="Replay store: a folder or s3://bucket/prefix.")]


def collect(
    config: Config,
    store: Store,
    policies: Annotated[str, typer.Option(metavar="URI", help="Policy registry to follow: RUN/policies, or "
                                                              "s3://bucket/prefix.")],
    engine: Annotated[str, typer.Option(metavar="inprocess|URL", help="A model in this process, or an inference "
                                                                      "server.")] = "inprocess",
    episodes: Annotated[int | None, typer.Option(min=1, help="How many, those of earlier lives counted; no end when "
                                                             "not given.")] = None,
    number: Annotated[int, typer.Option(min=0, help="Which collector this is, from 0; no two of a run share one.")] = 0,
    of: Annotated[int, typer.Option(min=1, help="How many collectors there are.")] = 1,
    ray: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Run all of them on a Ray cluster: its address, "
                                                                    "auto or local.")] = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Play episodes with the newest policy and append them to a store, until stopped."""
    from agentsdpo import config as settings

    resolved = settings.load(config, sets or ())
    if number and ray:
        raise ConfigError(f"--number is {number}, but --ray runs all of --of {of}", fix="leave --number out")
    prepare()
    with kept("finished episodes are in the store, begun ones in its journals"):
        if ray:
            from agentsdpo.programs.fan_out import collect_over_ray

            about = collect_over_ray(resolved, store, policies, address=ray, of=of, engine=engine,
                                     episodes=episodes, say=say)
        else:
            from agentsdpo.programs.collecting import collect as run

            about = run(resolved, store, policies, engine=engine, episodes=episodes, number=number, of=of,
                        say=say)
    show(about, f"{about['episodes']} episodes in {about['store']}, the last with policy version {about['version']}",
          as_json)


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run whose learner asks for evaluations.")],
    follow: Annotated[bool, typer.Option("--follow", help="Go on with what becomes due later.")] = False,
    server: Annotated[str | None, typer.Option(metavar="URL", help="Play on an inference server that nobody else uses: "
                                                                   "versions are swapped into it.")] = None,
    ray: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Play on a Ray cluster: its address, auto or "
                                                                    "local.")] = None,
    of: Annotated[int, typer.Option(min=1, help="How many evaluators there are, with --ray.")] = 1,
    as_json: Json = False,
) -> None:
    """Play the evaluations that a learner has asked for."""
    if ray and server:
        raise ConfigError("--server and --ray were both given, and a server plays one version at a time",
                          fix="leave one of them out")
    if of > 1 and not ray:
        raise ConfigError(f"--of is {of}, but one evaluator plays without a cluster", fix="give --ray ADDRESS")
    prepare()
    with kept("evaluations played so far are in the run folder"):
        if ray:
            from agentsdpo.programs.fan_out import evaluate_over_ray

            about = evaluate_over_ray(run, address=ray, of=of, follow=follow, say=say)
        else:
            from agentsdpo.programs.evaluating import evaluate_due

            about = evaluate_due(run, follow=follow, server=server, say=say)
    show(about, f"{about['played']} evaluations played in {about['run']}", as_json)


def prepare() -> None:
    """Find modules in the folder this was called from, and stop when told to."""
    from agentsdpo.programs.tether import stoppable

    find_here()
    stoppable()


@contextmanager
def kept(words: str) -> Iterator[None]:
    """On Ctrl-C, say what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        stopped(f"; {words}")


def say(text: str) -> None:
    """A line of progress."""
    typer.echo(text, err=True)


def show(about: dict[str, Any], words: str, as_json: bool) -> None:
    """The result, in words or as data."""
    typer.echo(json.dumps(about) if as_json else words)


def register(app: typer.Typer) -> None:
    """Add these verbs."""
    for verb in (collect, evaluate):
        app.command()(verb)
