"""What a vLLM server is and can be trusted with, asked once at the start and again after it was lost.

No response says which log-probs it holds: the server's mode is read from ``/server_info``, or, where that is not
shown, found by a probe at two temperatures (:func:`probe_kind`).
"""

import asyncio
import math
import os
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from agentsdpo.collect.vllm.retry import Asker, Refused
from agentsdpo.collect.vllm.wire import COMPLETIONS, GENERATE, Kind, Route, completions_body, generate_body
from agentsdpo.errors import ConfigError, EngineError
from agentsdpo.types import Frozen, Sampling

_MODES: dict[str, Kind] = {"processed_logprobs": "processed", "raw_logprobs": "raw"}
PROBE = (5, 6, 7, 8)
"""Prompt of a probe: ids that every vocabulary has."""
_TOP = 5


class ServerFacts(Frozen):
    """What the engine relies on.

    Attributes:
        models: names that are served, base models and adapters; base: name of the first base model.
        window: longest prompt plus completion, tokens.
        route: endpoint that samples; the token one, unless it is switched off.
        kind: what its log-probs are of.
        records_kept: truncated sampling comes with the set each token was drawn from.
        seeded: a request may carry a seed; not on CPUs, see :func:`agentsdpo.collect.vllm.wire.generate_body`.
        label: of the weights; None where the server does not show it.
        software: vLLM's version, "" when unknown.
    """

    models: tuple[str, ...]
    base: str
    window: int
    route: Route
    kind: Kind
    records_kept: bool
    seeded: bool
    label: str | None
    software: str


def base_url(url: str) -> str:
    """The server's address without a path.

    Raises:
        ConfigError: this is no http address.

    >>> base_url("http://127.0.0.1:8000/v1/")
    'http://127.0.0.1:8000'
    """
    try:
        parts = urlsplit(url)
    except ValueError:  # a bracket that is not closed
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"{url!r} is no address of a server", fix="give one such as http://127.0.0.1:8000")
    if parts.username or parts.password:
        raise ConfigError("the server's address holds a user name or password",
                          fix="put the key into VLLM_API_KEY: addresses are written into records")
    return f"{parts.scheme}://{parts.netloc}" + parts.path.rstrip("/").removesuffix("/v1")


def headers(api_key: str | None) -> dict[str, str]:
    """Authorisation by the given key, or by ``VLLM_API_KEY``."""
    key = api_key or os.environ.get("VLLM_API_KEY", "")
    return {"authorization": f"Bearer {key}"} if key else {}


def ask_server(ask: Asker) -> ServerFacts:
    """The handshake.

    Raises:
        EngineError: the server cannot be reached, or serves nothing that samples.
    """
    cards = (ask.get("/v1/models") or {}).get("data") or []
    bases = [card for card in cards if not card.get("parent")]
    if not bases:
        raise EngineError(f"{ask.url} serves no model", fix="start one: agentsdpo serve MODEL")
    base, info = bases[0], ask.get("/server_info?config_format=json")
    settings = (info or {}).get("vllm_config") or {}
    config, device = settings.get("model_config") or {}, (settings.get("device_config") or {}).get("device")
    window = base.get("max_model_len") or config.get("max_model_len")
    if not window:
        raise EngineError(f"{ask.url} does not say how long its window is", fix="use vLLM 0.32 or newer")
    route: Route = GENERATE if has_generate(ask, base["id"]) else COMPLETIONS
    mode = config.get("logprobs_mode")
    kind = probe_kind(first_token(ask, base["id"], route)) if mode is None else _MODES.get(mode, "unknown")
    label = (ask.get("/weight_info") or {}).get("weight_version")
    return ServerFacts(
        models=tuple(card["id"] for card in cards), base=base["id"], window=int(window), route=route, kind=kind,
        records_kept=bool(config.get("return_sampling_mask")) and route == GENERATE,
        seeded=device not in (None, "cpu"),
        label=None if label is None else str(label), software=str((ask.get("/version") or {}).get("version", "")))


class Handshake:
    """The question what a server is; all calls that wait for the answer share one.

    Args:
        shake: asks it, in a thread.
    """

    def __init__(self, shake: Callable[[], ServerFacts]) -> None:
        self._shake = shake
        self._asking: asyncio.Task[ServerFacts] | None = None

    async def __call__(self) -> ServerFacts:
        """The answer of now. Raises what ``shake`` raises."""
        asking = self._asking = self._asking or asyncio.create_task(asyncio.to_thread(self._shake))
        try:
            return await asyncio.shield(asking)
        finally:
            if asking.done() and self._asking is asking:
                self._asking = None


def has_generate(ask: Asker, model: str) -> bool:
    """Whether the token endpoint is switched on."""
    one = Sampling(max_tokens=1)
    try:
        ask.send("POST", GENERATE, generate_body(PROBE, one, model=model, request_id="probe", salt="probe"))
    except Refused as refusal:
        if refusal.status in (403, 404, 405):
            return False
        raise
    return True


def first_token(ask: Asker, model: str, route: Route) -> Callable[[float, int], dict[int, float]]:
    """Asks for the likeliest first tokens after :data:`PROBE`: ``(temperature, top_k) -> {id: log-prob}``."""
    make = generate_body if route == GENERATE else completions_body

    def top(temperature: float, top_k: int) -> dict[int, float]:
        sampling = Sampling(temperature=temperature, top_k=top_k, max_tokens=1)
        answer = ask.send("POST", route, make(PROBE, sampling, model=model, request_id="probe", salt="probe",
                                              logprobs=_TOP))
        return _top(answer)

    return top


def _top(answer: Any) -> dict[int, float]:
    """The listed alternatives of the first token, sentinels left out; empty when there are none."""
    told = answer["choices"][0].get("logprobs") or {}
    if told.get("content"):
        pairs = [(one["token_id"], one["logprob"]) for one in told["content"][0].get("top_logprobs") or []]
    else:
        listed = ((told.get("top_logprobs") or [None])[0] or {}).items()
        pairs = [(int(name.removeprefix("token_id:")), logp) for name, logp in listed if name.startswith("token_id:")]
    return {token: logp for token, logp in pairs if logp is not None and logp > -1000.0}


def probe_kind(top: Callable[[float, int], dict[int, float]]) -> Kind:
    """What a server's log-probs are of, from its own numbers at temperatures 1 and 0.5 and with top_k 2.

    Differences between two ids double when the temperature is halved, unless it is left out (``raw``); what survives
    a filter sums to one, unless the filter is left out (``tempered``).

    >>> logits = {1: 2.0, 2: 1.0, 3: -1.0}
    >>> def served(temperature, top_k):
    ...     kept = dict(list(logits.items())[:top_k or None])
    ...     total = math.log(sum(math.exp(x / temperature) for x in kept.values()))
    ...     return {i: x / temperature - total for i, x in kept.items()}
    >>> probe_kind(served), probe_kind(lambda temperature, top_k: served(1.0, 0))
    ('processed', 'raw')
    """
    warm, cold = top(1.0, 0), top(0.5, 0)
    both = sorted(warm.keys() & cold.keys(), key=lambda token: -warm[token])
    if len(both) < 2 or warm[both[0]] - warm[both[-1]] < 1e-3:
        return "unknown"
    ratio = (cold[both[0]] - cold[both[-1]]) / (warm[both[0]] - warm[both[-1]])
    if abs(ratio - 1.0) < 0.05:
        return "raw"
    if abs(ratio - 2.0) > 0.1:
        return "unknown"
    mass = sum(math.exp(logp) for logp in top(1.0, 2).values())
    return "processed" if abs(mass - 1.0) < 1e-2 else "tempered"
