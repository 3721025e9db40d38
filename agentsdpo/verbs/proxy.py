"""The verb ``proxy``: agents that speak OpenAI's API or Anthropic's play through it and are recorded."""

from pathlib import Path
from typing import Annotated

import typer

from agentsdpo.verbs.base import fail, override


def proxy(
    upstream: Annotated[str, typer.Option(metavar="URL", help="The engine: a vLLM server started with "
                                          "--enable-scale-out and --logprobs-mode processed_logprobs.")],
    store: Annotated[str, typer.Option(metavar="URI", help="Replay store: a folder or s3://bucket/prefix.")],
    model: Annotated[str, typer.Option(help="Model folder (or hub name) whose tokenizer and chat template the engine "
                                            "has, or 'seed'.")],
    host: Annotated[str, typer.Option(help="Address to listen on; other than this machine's own only with keys.")
                    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8100,
    keys: Annotated[Path | None, typer.Option(help="File of bearer keys, one KEY or TENANT=KEY a line; also from "
                                                   "AGENTSDPO_PROXY_KEYS.")] = None,
    tenant_header: Annotated[str, typer.Option(help="Header that names the tenant where the key does not.")] = "",
    adapters: Annotated[str, typer.Option(metavar="STEM", help="Serve each tenant its newest adapter STEM-TENANT@vN."
                                          )] = "",
    train_allowed: Annotated[bool, typer.Option("--train-allowed", help="The traffic is yours to learn from: it goes "
                                                "into the store. Without this it is kept beside it.")] = False,
    redact: Annotated[str, typer.Option(help="Secrets in what is stored: off, drop or mask.")] = "off",
    idle: Annotated[float, typer.Option(min=0.1, help="Seconds without a request after which a conversation ends.")
                    ] = 900.0,
    sets: Annotated[list[str] | None, override("rate_per_minute=60")] = None,
) -> None:
    """Record an agent's conversations token by token, in front of a vLLM server, and learn from them.

    Further limits (rate_per_minute, body_bytes, timeout_s, ...) by --set.
    """
    from agentsdpo.collect.proxy.config import ProxyConfig
    from agentsdpo.settings_io import build, with_sets

    config = build(ProxyConfig, with_sets({
        "upstream": upstream, "store": store, "adapters": adapters, "train_allowed": train_allowed, "redact": redact,
        "idle_s": idle, "tenant_header": tenant_header}, sets or ()))
    from agentsdpo.collect.proxy.run import serve

    try:
        serve(config, model=model, host=host, port=port, keys=keys, say=lambda text: typer.echo(text, err=True))
    except OSError as error:
        if error.errno != 98 and error.errno != 48:  # address in use, on Linux and on macOS
            raise
        fail(f"port {port} of {host} is in use; give another --port", 2)


def register(app: typer.Typer) -> None:
    """Add this verb."""
    app.command()(proxy)
