"""The proxy as a program: put together, started, and stopped by a signal without losing a word."""

import asyncio
import gc
import json
import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agentsdpo.chat import ChatFormat
from agentsdpo.collect.proxy.access import Keys, check_binding, read_keys
from agentsdpo.collect.proxy.config import ProxyConfig
from agentsdpo.collect.proxy.house import House
from agentsdpo.collect.proxy.server import Proxy
from agentsdpo.envs.desk.seed import seed_path
from agentsdpo.errors import ModelError


def serve(config: ProxyConfig, *, model: str, host: str, port: int, keys: Path | None,
          say: Callable[[str], None]) -> None:
    """Run until SIGINT or SIGTERM; then answer what is under way, end all conversations and return.

    Args:
        config: of the proxy. model: folder or hub name of tokenizer and template, or ``seed``.
        host, port: to listen on. keys: file of keys. say: for people.

    Raises:
        ConfigError: keys or binding. ModelError: no tokenizer there. StoreError, EngineError, OSError: at the start.
    """
    known = read_keys(keys)
    check_binding(host, len(known))
    guard = Keys(known, tenant_header=config.tenant_header)
    chat, vocab_size = load_format(model)
    _log()
    house = House(config, chat, vocab_size=vocab_size, tenants=guard.tenants)
    asyncio.run(_run(Proxy(house, guard, config), host, port, say))


def _log() -> None:
    """One line a request on stderr, of this package alone."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    own = logging.getLogger("agentsdpo")
    own.addHandler(handler)
    own.setLevel(logging.INFO)


async def _run(proxy: Proxy, host: str, port: int, say: Callable[[str], None]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        await proxy.start(host, port)
        gc.freeze()  # libraries and tokenizer stay: a full collection of them stops all answers for 0.3 s
        recovered = proxy.house.recovered
        say(f"listening on http://{host}:{proxy.port}/v1 for {proxy.house.name} at {proxy.config.upstream}"
            + (f"; {recovered} conversations of an earlier proxy recovered" if recovered else ""))
        facts = proxy.house.upstream.known
        if facts.kind != "processed":
            say(f"the engine's log-probs are of kind {facts.kind!r}: nothing can be trained on; start it with "
                "`agentsdpo serve`, or with --logprobs-mode processed_logprobs")
        await stop.wait()
        say("stopping: conversations are written to the store")
    finally:
        await proxy.stop()


def load_format(model: str) -> tuple[ChatFormat, int]:
    """Chat format of a model folder or hub name, and the model's vocabulary size (0 where it does not say).

    Raises:
        ModelError: no tokenizer, or none with a chat template.
    """
    from transformers import AutoTokenizer

    path: Any = seed_path() if model == "seed" else Path(model) if Path(model).is_dir() else model
    if not isinstance(path, Path) and (model.startswith((".", "/")) or model.count("/") != 1):
        raise ModelError(f"there is no model folder {model!r}", fix="give a folder with tokenizer.json, a hub name, or "
                         "'seed'")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"no tokenizer can be loaded from {model!r}: {str(error).splitlines()[0]}",
                         fix="put tokenizer.json and tokenizer_config.json there") from error
    return ChatFormat(tokenizer), _vocab_size(path)


def _vocab_size(path: Path | str) -> int:
    """Of a local folder's ``config.json``."""
    about = Path(path) / "config.json"
    if not about.is_file():
        return 0
    try:
        found = json.loads(about.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{about} cannot be read: {error}", fix="restore it") from error
    return int((found.get("text_config") or found).get("vocab_size") or 0)
