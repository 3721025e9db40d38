"""Verbs to look at tokens: ``view``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentsdpo.errors import ConfigError
from agentsdpo.verbs.base import Json

if TYPE_CHECKING:
    from agentsdpo.replay.cli.view import Shown


def view(
    store: Annotated[str, typer.Argument(metavar="STORE", help="Replay store: a folder or s3://bucket/prefix.")],
    episode: Annotated[str, typer.Argument(help="Id, or as much of its beginning as is unique.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write one HTML page here instead.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder of the model that scores, or 'seed'; without one tokens are "
                                                   "shaded by what the store holds.")] = None,
    hint: Annotated[str | None, typer.Option(help="Read in the place of the recorded hint: what if?")] = None,
    policies: Annotated[Path | None, typer.Option(metavar="DIR", help="Policy registry: RUN/policies.")] = None,
    first: Annotated[int | None, typer.Option("--from", min=0, help="Policy version that scores; the newest when not "
                                                                    "given.")] = None,
    last: Annotated[int | None, typer.Option("--to", min=0, help="Compare with this version: what changed.")] = None,
    preset: Annotated[str, typer.Option(help="Objective whose weights are shown.")] = "robust",
    by: Annotated[str, typer.Option(help="Shade the page by gap, ratio, weight or logprob.")] = "",
    attempt: Annotated[int | None, typer.Option(min=0, help="Of several attempts; the latest when not given.")] = None,
    branch: Annotated[int | None, typer.Option(min=0, help="One branch alone.")] = None,
    as_json: Json = False,
) -> None:
    """Show an episode, each token shaded by what teacher and student think of it: here, or as one HTML page."""
    from agentsdpo.replay.cli import view as shows
    from agentsdpo.replay.cli.base import Out, jsonable

    if by not in ("", "gap", "ratio", "weight", "logprob"):
        raise ConfigError(f"--by is {by!r}", fix="write gap, ratio, weight or logprob")
    if model is None and (by not in ("", "logprob") or (hint, policies, first, last) != (None,) * 4):
        raise ConfigError("a hint, policy versions and every --by but logprob need a model that scores",
                          fix="give --model FOLDER, or seed")
    if hint is not None and last is not None:
        raise ConfigError("two policy versions are compared without any hint", fix="leave out --hint or --to")
    found = loaded(store, episode, attempt=attempt, branch=branch, model=model)
    scores, words = [None] * len(found.rows), ""
    if model is not None:
        from agentsdpo.show.viewing import Scorer, Wanted

        scorer = Scorer(Wanted(model, policies, first, last, preset))
        (found, scores), words = scorer.score(found, hint=hint), scorer.words
    if out is not None:
        size = write_page(out, found, scores, by=by, note=words)
        tokens = sum(len(row.branch.token_ids) for row in found.rows)
        typer.echo(json.dumps({"page": str(out), "tokens": tokens, "bytes": size}) if as_json else
                   f"{out}: {tokens} tokens, {size / 1e6:.1f} MB")
    elif as_json:
        from agentsdpo.show.counterfactual import token_rows

        about = shows.document(found, "messages", None)["episode"]
        typer.echo(json.dumps(jsonable({"schema": "agentsdpo/view/1", "episode": about, "note": words,
                                        "tokens": token_rows(found, scores)})))
    else:
        shows.render(Out("view"), found, "text", None)


def loaded(store: str, episode: str, *, attempt: int | None = None, branch: int | None = None,
           model: str | None = None) -> "Shown":
    """The episode whose id begins so; ``model`` is where its tokenizer may be, beside the usual places."""
    from agentsdpo.replay.cli import summary
    from agentsdpo.replay.cli import view as shows
    from agentsdpo.replay.cli.base import existing

    opened = existing(store)
    snapshot = opened.snapshot()
    return shows.load(opened, snapshot, summary.find_episode(snapshot, episode), attempt=attempt, branch=branch,
                      model=None if model in (None, "seed") else model)


def write_page(out: Path, found: "Shown", scores: Any, *, by: str = "", note: str = "") -> int:
    """Write the page of an episode, see :func:`agentsdpo.show.viewer.page`; how many bytes it has."""
    from agentsdpo.files import write_out
    from agentsdpo.show.viewer import page

    text = page(found, scores, by=by, note=note)
    write_out(out, text)
    return len(text.encode())


def register(app: typer.Typer) -> None:
    """Add these verbs."""
    app.command()(view)
