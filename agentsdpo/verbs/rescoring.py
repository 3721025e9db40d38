"""Verbs that score stored episodes anew: ``replay rescore``, and ``replay diff`` between two policy versions.

They stand among the verbs of the store and need the learner, which the store's own room knows nothing of.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentsdpo.errors import ConfigError
from agentsdpo.replay.cli.base import Out, Store, verb
from agentsdpo.verbs.viewing import loaded, write_page

if TYPE_CHECKING:
    from agentsdpo.types import Json

_APP = typer.Typer(rich_markup_mode=None)
_MOST = 20
"""Lines of a table that is read; JSON has all of them."""
Episode = Annotated[str, typer.Argument(help="Id, or as much of its beginning as is unique.")]
Model = Annotated[str | None, typer.Option(help="Folder of the model that scores, or 'seed'; that of the store's run "
                                                "when not given.")]
Page = Annotated[Path | None, typer.Option("-o", "--out", help="Also write one HTML page here.")]


@verb(_APP, lists=True)
def rescore(
    out: Out, store: Store, episode: Episode,
    hint: Annotated[str, typer.Option(help="What the teacher reads in the place of the recorded hint.")],
    model: Model = None, page: Page = None,
    preset: Annotated[str, typer.Option(help="Objective whose weights are shown.")] = "robust",
) -> None:
    """What would the teacher have wanted, had it read another hint? Beside it the recorded one, and none."""
    from agentsdpo.replay.cli import view as shows
    from agentsdpo.show.counterfactual import NONE, apart, reading, token_rows, unhinted
    from agentsdpo.show.viewing import Scorer, Wanted

    shown = loaded(store, episode, model=model)
    scorer = Scorer(Wanted(model or _model(store), preset=preset))
    told, scores = scorer.score(shown, hint=hint)
    this, none = token_rows(told, scores), token_rows(told, unhinted(scores))
    before, name = none, NONE
    if shown.rows[0].hint is not None:
        before, name = token_rows(*scorer.score(shown)), "the recorded hint"
    readings = [reading(words, rows) for words, rows in {name: before, "this hint": this, NONE: none}.items()]
    tokens = apart(before, this)
    _page(page, told, scores, f"{scorer.words}; the teacher reads: {hint}", out)

    def text() -> None:
        shows.render(out, told, "text", None)
        out.table(["the teacher reads", "tokens", "mean gap", "size of gap", "would write otherwise"],
                  [list(row.values()) for row in readings])
        _tokens(out, tokens, f"likeliest with {name}", "likeliest with this hint")
    out.answer({"store": store, "episode": shown.episode.episode_id, "hint": hint, "readings": readings,
                "tokens": tokens}, text, lines="tokens")


@verb(_APP, lists=True)
def diff(
    out: Out, store: Store,
    other: Annotated[str, typer.Argument(metavar="OTHER|EPISODE", help="Another store; with --from and --to an "
                                                                       "episode of this one.")],
    first: Annotated[str | None, typer.Option("--from", metavar="VERSION", help="Policy version, as in v3.")] = None,
    last: Annotated[str | None, typer.Option("--to", metavar="VERSION", help="The one it is compared with.")] = None,
    policies: Annotated[Path | None, typer.Option(metavar="DIR", help="Policy registry; policies/ beside the "
                                                                      "store when not given.")] = None,
    model: Model = None, page: Page = None,
) -> None:
    """Compare two stores by key and content; or, token by token, what two policy versions think of an episode."""
    if first is None and last is None:
        from agentsdpo.replay.cli import share

        if model is not None or policies is not None or page is not None:
            raise ConfigError("stores are compared without a model", fix="give --from and --to to compare versions")
        share.diff(out, store, other)
        return
    from agentsdpo.replay.cli import view as shows
    from agentsdpo.show.counterfactual import apart, token_rows
    from agentsdpo.show.viewing import Scorer, Wanted

    versions = _version("--from", first), _version("--to", last)
    registry = policies or Path(store).parent / "policies"
    if not registry.is_dir():
        raise ConfigError(f"there is no policy registry at {registry}", fix="name it with --policies RUN/policies")
    scorer = Scorer(Wanted(model or _model(store), registry, *versions))
    shown, scores = scorer.score(loaded(store, other, model=model))
    rows = token_rows(shown, scores)
    tokens = apart(rows, rows, "student_best")
    _page(page, shown, scores, scorer.words, out)

    def text() -> None:
        shows.render(out, shown, "text", None)
        _tokens(out, tokens, f"likeliest for version {versions[0]}", f"likeliest for version {versions[1]}")
    out.answer({"store": store, "episode": shown.episode.episode_id, "from": versions[0], "to": versions[1],
                "differences": tokens}, text, lines="differences")


def _version(option: str, text: str | None) -> int:
    """A version as people write it, 3 or v3."""
    digits = (text or "").removeprefix("v")
    if not digits.isdecimal():
        raise ConfigError(f"{option} is {text!r}" if text else f"{option} is missing",
                          fix="name both policy versions, as in --from v3 --to v9")
    return int(digits)


def _model(store: str) -> str:
    """The model of the run that a store lies in, the shipped one for a store that lies by itself."""
    from agentsdpo.settings_io import read_toml

    config = Path(store).parent / "config.toml"
    return str(read_toml(config).get("model", "seed")) if config.is_file() else "seed"


def _page(path: Path | None, shown: Any, scores: Any, note: str, out: Out) -> None:
    if path is not None:
        write_page(path, shown, scores, note=note)
        out.note(f"page: {path}")


def _tokens(out: Out, rows: "list[Json]", before: str, after: str) -> None:
    """Tokens whose likeliest word is another one now."""
    if not rows:
        out.say("no token's likeliest word is another one")
        return
    out.table(["turn", "token", "written", before, after, "change [nats]"],
              [[row["turn"], row["token"], *(repr(row[key])[1:-1] for key in ("written", "before", "after")),
                f"{row['change']:+.2f}"] for row in rows[:_MOST]])
    if len(rows) > _MOST:
        out.note(f"{_MOST} of {len(rows)} tokens; all of them with --json")


def register(app: typer.Typer) -> None:
    """Add these verbs to those of the store."""
    app.registered_commands.extend(_APP.registered_commands)
