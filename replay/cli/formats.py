"""Verbs between a store and the rest of the world: ``import``, ``export``, ``publish``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentsdpo.errors import ConfigError
from agentsdpo.replay.cli.base import Json, Out, Store, Where, existing, size, verb

if TYPE_CHECKING:
    from agentsdpo.replay.formats.redact import Redactor

app = typer.Typer(rich_markup_mode=None)
Format = Annotated[str, typer.Argument(metavar="FORMAT", help="atif, openai, hf, verifiers, parquet; archipelago "
                                       "for import alone, pairs and sts for export alone.")]
Redact = Annotated[bool, typer.Option("--redact", help="Take secrets out of texts and tokens.")]
Rules = Annotated[Path | None, typer.Option(metavar="FILE.toml", help="More rules for --redact.")]
Tokens = Annotated[str, typer.Option(help="What happens to tokens that spell a secret: drop the branch's tokens, or "
                                     "mask these.")]
Checked = Annotated[bool, typer.Option("--i-have-checked", help="Somebody has looked for secrets.")]
Model = Annotated[str | None, typer.Option(help="Folder of the model whose tokenizer --redact needs.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Episodes at most.")]


@verb(app, "import")
def take_in(
    out: Out, store: Store, fmt: Format,
    paths: Annotated[list[Path], typer.Argument(metavar="FILE...")],
    strict: Annotated[bool, typer.Option("--strict", help="Refuse what has a field that finds no place.")] = False,
    train_allowed: Annotated[bool, typer.Option("--train-allowed", help="I vouch that data without a stamp may be "
                                                "trained on.")] = False,
) -> None:
    """Add episodes of another format, and say what was lost."""
    from agentsdpo.replay.formats import import_

    opened = existing(store)
    with out.progress("episodes") as tick:
        report = import_(opened, fmt, list(paths), strict=strict, train_allowed=train_allowed, progress=tick)
    opened.close()
    _report(out, {"store": store, **report.as_json()})


@verb(app)
def export(
    out: Out, store: Store, fmt: Format, to: Annotated[Path, typer.Argument(metavar="FILE")], where: Where = None,
    limit: Limit = None, redact: Redact = False, redact_rules: Rules = None, redact_tokens: Tokens = "drop",
    i_have_checked: Checked = False, model: Model = None,
) -> None:
    """Write episodes in another format."""
    from agentsdpo.replay.formats import export as write

    opened = existing(store)
    redactor = _redactor(store, redact, redact_rules, redact_tokens, model)
    with out.progress("episodes") as tick:
        report = write(opened, fmt, to, where=where, redact=redactor, limit=limit, checked=i_have_checked,
                       progress=tick)
    _report(out, {"store": store, **report.as_json()})


@verb(app)
def publish(
    out: Out, store: Store, to: Annotated[Path, typer.Argument(metavar="FOLDER")], where: Where = None,
    fmt: Annotated[str, typer.Option("--format", help="hf: a folder that datasets.load_dataset reads.")] = "hf",
    title: Annotated[str, typer.Option(help="Of the dataset card.")] = "Agent episodes",
    licence: Annotated[str, typer.Option("--license", help="Identifier for the card, as apache-2.0.")] = "other",
    limit: Limit = None, redact: Redact = False, redact_rules: Rules = None, redact_tokens: Tokens = "drop",
    i_have_checked: Checked = False, model: Model = None,
) -> None:
    """Write a dataset folder with its card, for others."""
    from agentsdpo.replay.formats.dataset import publish as write

    if fmt != "hf":
        raise ConfigError(f"there is no dataset format {fmt!r}", fix="use hf")
    opened = existing(store)
    redactor = _redactor(store, redact, redact_rules, redact_tokens, model)
    with out.progress("episodes") as tick:
        report = write(opened, to, title=title, licence=licence, where=where, redact=redactor, checked=i_have_checked,
                       limit=limit, progress=tick)
    _report(out, {"store": store, "folder": report.folder, "snapshot": report.snapshot, **report.export.as_json()})


def _redactor(store: str, wanted: bool, rules: Path | None, tokens: str, model: str | None) -> "Redactor | None":
    """The redactor that was asked for; it finds tokenizers where ``show`` finds them."""
    if not wanted:
        if rules is not None:
            raise ConfigError("--redact-rules without --redact would be ignored", fix="add --redact")
        return None
    from agentsdpo.replay.cli.decode import decoder_for, model_folders
    from agentsdpo.replay.formats.redact import Redactor
    from agentsdpo.replay.formats.secret_rules import load_rules

    folders: list[Any] = [model] * bool(model) + model_folders(store, "")
    return Redactor(load_rules(rules) if rules else (), tokens=tokens,  # pyright: ignore[reportArgumentType]
                    decoder=lambda sha: decoder_for(sha, folders))


def _report(out: Out, document: Json) -> None:
    """A report as lines of name and value; what was lost or taken out, one line each."""
    lines: list[tuple[str, Any]] = []
    for name, value in document.items():
        if isinstance(value, dict):
            lines += [(f"{name.replace('_', ' ')}: {key}", each) for key, each in value.items()]
        elif value is not None:
            lines.append((name.replace("_", " "), size(value) if name == "bytes" else value))
    out.answer(document, lambda: out.table(["what", "value"], lines))
