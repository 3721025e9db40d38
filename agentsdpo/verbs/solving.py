"""The verb ``solve``: one hard task at test time."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from agentsdpo.errors import ConfigError
from agentsdpo.verbs.base import Json, Sets
from agentsdpo.verbs.programs import prepare, say

if TYPE_CHECKING:
    from agentsdpo.solve import Attempt, Solution


def solve(
    task: Annotated[str, typer.Argument(metavar="TASK", help="SPLIT/INDEX, as in train/3, or an index of train.")],
    config: Annotated[Path | None, typer.Option(metavar="CONFIG.toml", help="Settings: model, suite, objective; the "
                                                                            "preset test_time when not given.")] = None,
    method: Annotated[str, typer.Option(metavar="sdpo|best_of_k|multi_turn", help=(
        "Learn from feedback between rounds, try again, or read the feedback on earlier attempts."))] = "sdpo",
    attempts: Annotated[int, typer.Option(min=1, help="The budget.")] = 64,
    updates: Annotated[int, typer.Option(min=1, help="Optimiser steps after each round; --set group=N attempts make "
                                                     "a round.")] = 4,
    keep: Annotated[Path | None, typer.Option(metavar="DIR", help="Policy registry for the policy that comes out; it "
                                                                  "is thrown away when not given.")] = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Try one hard task, learning from every failure, until it is solved; exit with 1 where it is not."""
    from agentsdpo import config as settings
    from agentsdpo.settings_io import read_toml

    resolved = settings.from_mapping({"preset": "test_time", **(read_toml(config) if config else {})}, sets or ())
    prepare()
    from agentsdpo.solve import Method, parse_task
    from agentsdpo.solve import solve as run

    if method not in get_args(Method):
        raise ConfigError(f"method is {method!r}", fix=f"use one of {', '.join(get_args(Method))}")
    found = run(resolved, parse_task(task), method=cast("Method", method), attempts=attempts, updates=updates,
                keep=keep, told=lambda fresh: say(_line(fresh)))
    if keep:
        say(f"the policy is kept in {keep}" + ("" if found.steps else ", as it was: there was nothing to learn"))
    typer.echo(json.dumps({**found.json(), "kept": str(keep) if keep else None}) if as_json else words(found))
    if found.solved_at is None:
        raise typer.Exit(1)


def words(found: "Solution") -> str:
    """What came of it, for people."""
    at, tried = found.solved_at, f"{found.budget} attempt{'s' * (found.budget > 1)}"
    end = f"solved by attempt {at} of at most {found.budget}" if at else f"not solved in {tried}"
    best = "" if at or found.best is None else f", best score {found.best:.2f}"
    learnt = f", {found.steps} optimiser steps" if found.steps else ""
    return "\n".join([f"{found.task}: {end}{best}{learnt}, {found.wall_s:.1f} s", f"  {strip(found.attempts)}",
                      *(f"  {line}" for line in (found.deeds or "").splitlines())])


def strip(attempts: "Sequence[Attempt]") -> str:
    """One sign per attempt: its score as a bar, a tick for a success, a cross where it could not be scored."""
    from agentsdpo.show.console import sparkline

    return "".join("✓" if one.passed else "✗" if one.score is None else sparkline([one.score]) for one in attempts)


def _line(fresh: "Sequence[Attempt]") -> str:
    scores = " ".join("  -  " if one.score is None else f"{one.score:5.2f}" for one in fresh)
    return f"round {fresh[0].round:3}  attempts {fresh[0].number:3} to {fresh[-1].number:3}  {strip(fresh)}  {scores}"


def register(app: typer.Typer) -> None:
    """Add this verb."""
    app.command()(solve)
