"""Verbs that bring policy versions elsewhere: ``publish`` onto running servers, ``export`` into a model folder."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agentsdpo.errors import ConfigError
from agentsdpo.verbs.base import Json, fail
from agentsdpo.verbs.programs import prepare

if TYPE_CHECKING:
    from agentsdpo.publish.push import PushReport

Registry = Annotated[str, typer.Argument(metavar="REGISTRY", help="Policy registry: RUN/policies, RUN, or "
                                         "s3://bucket/prefix.")]
Trained = Annotated[str | None, typer.Option(help="Folder of the model that was trained, if it moved.")]


def publish(
    registry: Registry,
    to: Annotated[list[str], typer.Option("--to", "--server", metavar="URL", help="vLLM server; may be repeated.")],
    follow: Annotated[bool, typer.Option("--follow", help="Push every new version, until stopped.")] = False,
    version: Annotated[int | None, typer.Option(min=0, help="This version instead of the latest.")] = None,
    how: Annotated[str, typer.Option("--with", metavar="WAY", help="auto, reload (full weights), adapter, or "
                                     "module:function of a pusher of your own.")] = "auto",
    keep: Annotated[int, typer.Option(min=1, help="Adapters that stay loaded per server, newest first.")] = 4,
    stem: Annotated[str | None, typer.Option("--name", metavar="STEM", help="Adapters are served as STEM@v12; the "
                                             "server's model when not given.")] = None,
    bound: Annotated[float, typer.Option(min=0.0, help="Largest mean difference of log-probs, nats.")] = 0.02,
    model: Trained = None,
    as_json: Json = False,
) -> None:
    """Bring the latest policy version onto running servers; each ends with it, checked, or with what it served."""
    if follow and version is not None:
        raise ConfigError(f"--follow pushes what is latest, --version {version} is one version", fix="give one of them")
    from agentsdpo import publishing
    from agentsdpo.collect.vllm.server import base_url

    for url in to:
        base_url(url)  # before anything is read
    prepare()  # stopped in the middle of a push too: the server gets back what it had
    source = publishing.registry_at(registry)
    pusher = publishing.make_pusher(how, source, bound=bound, keep=keep, stem=stem, model=model)
    servers = list(dict.fromkeys(url.rstrip("/") for url in to))
    if follow:
        last = None
        for report in publishing.follow(source, pusher, servers):
            if report != last:  # the same failure again is no news
                _show(report, as_json)
            last = report
    else:
        report = publishing.push(source, pusher, publishing.newest(source) if version is None else version, servers)
        _show(report, as_json)
        if not report.ok:
            lacking = sum(not server.ok for server in report.servers)
            fail(f"version {report.version} is not on {lacking} of {len(servers)} servers", 1)


def export(
    registry: Registry,
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="Model folder to make.")],
    version: Annotated[int | None, typer.Option(min=0, help="This version instead of the latest.")] = None,
    model: Trained = None,
    as_json: Json = False,
) -> None:
    """Write a policy version as a folder that transformers, vLLM and --model take; adapters are merged."""
    from agentsdpo import publishing
    from agentsdpo.exporting import export as write

    source = publishing.registry_at(registry)
    number = publishing.newest(source) if version is None else version
    folder = write(source, number, out, model=model)
    typer.echo(json.dumps({"folder": str(folder), "version": number}) if as_json else f"{folder}: version {number}")


def _show(report: "PushReport", as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(report.as_json()))
        return
    for server in report.servers:
        if not server.ok:
            typer.echo(f"{server.url}: {server.error}", err=True)
            continue
        what = f"version {report.version}{f' as {report.name}' if report.name else ''}"
        parity = "" if server.parity_nats is None else f", log-probs within {server.parity_nats:.2g} nats"
        pause = f", paused for {server.pause_s:.2f} s" if server.pause_s else ""
        typer.echo(f"{server.url}: {'now serves' if server.changed else 'serves'} {what}{parity}{pause}")


def register(app: typer.Typer) -> None:
    """Add this verb."""
    app.command()(publish)
    app.command()(export)
