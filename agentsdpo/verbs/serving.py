"""Verbs of model servers: ``serve`` starts one, ``doctor`` says what is wrong with one."""

import json
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from agentsdpo.errors import AgentSdpoError
from agentsdpo.verbs.base import Json, fail, stopped

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub name, or 'seed' for the shipped model.")]


def serve(
    model: Model,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Where it listens. Beyond loopback anybody who reaches it can swap its "
                                           "weights: give it a private network.")] = "127.0.0.1",
    name: Annotated[str, typer.Option(help="What requests call the model.")] = "policy",
    gpu: Annotated[bool, typer.Option("--gpu", help="Serve from GPUs; without it float32 on the CPU.")] = False,
    window: Annotated[int | None, typer.Option(min=2, help="Longest prompt plus completion, tokens.")] = 4096,
    adapters: Annotated[int, typer.Option(min=0, help="LoRA adapters loaded at once; 0 serves none. More than "
                                                      "--keep of publish.")] = 8,
    max_rank: Annotated[int, typer.Option(min=1, help="Rank of the largest adapter.")] = 32,
    kept_sets: Annotated[bool, typer.Option("--kept-sets", help="Return what top-k kept; needs --gpu.")] = False,
    version: Annotated[int, typer.Option(min=0, help="Policy version of these weights.")] = 0,
    log: Annotated[Path | None, typer.Option(help="File for vLLM's output; a temporary one when not given.")] = None,
    extra: Annotated[list[str] | None, typer.Argument(metavar="[-- VLLM OPTIONS]", help="Passed on to vLLM.")] = None,
    as_json: Json = False,
) -> None:
    """Start a vLLM server as recording needs it, say when it is ready, and stop it on Ctrl-C."""
    from agentsdpo.serve import LOOPBACK, ServeOptions, Server

    options = ServeOptions(_folder(model), name, host, port, gpu, window, adapters, max_rank, kept_sets, version,
                           tuple(extra or ()))
    if host not in (LOOPBACK, "localhost", "::1"):
        typer.echo(f"agentsdpo: {host} is no loopback address: whoever reaches it can replace the weights", err=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # an end by a job controller must not orphan the server either
        signal.signal(number, signal.default_int_handler)
    try:
        with Server.start(options, log=log, tell=_waiting(options.model)) as server:
            about = {"url": server.url, "model": name, "pid": server.pid, "log": str(server.log)}
            typer.echo(f"ready after {server.started_s:.0f} s; log: {server.log}; Ctrl-C stops it", err=True)
            typer.echo(json.dumps(about) if as_json else server.url)
            sys.stdout.flush()
            code = server.wait()
            fail(f"vLLM ended with code {code}; the end of {server.log}:\n{server.tail()}", 1)
    except KeyboardInterrupt:
        stopped("")


def _folder(model: str) -> str:
    """A model's folder or hub name; the seed model by its name in settings."""
    from agentsdpo.config import SEED_MODEL

    if model != SEED_MODEL:
        return model
    from agentsdpo.envs.desk.seed import seed_path

    return str(seed_path())


def _waiting(model: str) -> Any:
    """Progress on stderr: in place on a terminal, else a line every ten seconds."""
    last = [-10.0]

    def tell(waited_s: float) -> None:
        if sys.stderr.isatty():
            typer.echo(f"\rstarting vLLM with {model}: {waited_s:3.0f} s ", err=True, nl=False)
        elif waited_s - last[0] >= 10:
            last[0] = waited_s
            typer.echo(f"starting vLLM with {model}: {waited_s:.0f} s", err=True)

    return tell


def doctor(
    url: Annotated[str, typer.Argument(metavar="URL", help="Address of the server, http://host:port.")],
    model: Annotated[str, typer.Option(help="Folder of the model that learns, or 'seed'.")],
    served: Annotated[str | None, typer.Option(help="Name to ask for, as in policy@v12; the server's own model when "
                                                    "not given.")] = None,
    store: Annotated[str, typer.Option(metavar="URI", help="Where episodes will be kept: a folder or s3://bucket.")
                     ] = ".",
    update: Annotated[bool, typer.Option("--update", help="Also swap in the weights of --model, which must be those "
                                                          "it serves, and look whether it answers as before.")] = False,
    as_json: Json = False,
) -> None:
    """Find out whether what a server says can be learnt from; each finding with its fix, exit code 1 if any."""
    from agentsdpo.doctor import examine

    began, found = time.monotonic(), []
    for check in examine(url, _folder(model), served=served, store=store, update=update):
        found.append(check)
        if not as_json:
            typer.echo(check.line())
    bad = [check for check in found if check.state == "bad"]
    if as_json:
        typer.echo(json.dumps([check.as_json() for check in found]))
    else:
        verdict = f"{len(bad)} finding{'s' * (len(bad) != 1)}" if bad else "nothing wrong"
        typer.echo(f"{verdict}, {len(found)} checks in {time.monotonic() - began:.1f} s", err=True)
    if bad:
        sys.exit(AgentSdpoError.exit_code)


def register(app: typer.Typer) -> None:
    """Add these verbs."""
    for verb in (serve, doctor):
        app.command()(verb)
