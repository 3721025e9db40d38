"""The control endpoints of one vLLM server over HTTP, and the two requests a probe makes.

The server must run with ``VLLM_SERVER_DEV_MODE=1``, and with ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=1`` and
``--enable-lora`` for adapters (``agentsdpo serve`` sets all). These endpoints know no key: keep them on loopback or a
private network.
"""

import os
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from agentsdpo.errors import PushError
from agentsdpo.types import Json

T = TypeVar("T")
ATTEMPTS = 4
"""Tries of one control call; only those that never reached a server, or a proxy that had none, are repeated."""
RESET_S = 30.0
"""Seconds in which ``/reset_prefix_cache`` must succeed. Blocks are held for as long as a running forward lasts."""
_AWAY = {429, 502, 503, 504}


class _NotNow(Exception):
    """An answer that is worth another try."""


class ServerGone(PushError):
    """No server answers there: it is down, or it died in mid-call."""


class VllmControl:
    """One server.

    Args:
        url: as in ``http://127.0.0.1:8000``, with or without ``/v1``.
        timeout_s: seconds one call may take; loading weights of a large model takes minutes.
        transport: of httpx, for tests.
    """

    def __init__(self, url: str, *, timeout_s: float = 600.0, transport: httpx.BaseTransport | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        key = os.environ.get("VLLM_API_KEY")
        self._client = httpx.Client(base_url=self.url, timeout=httpx.Timeout(timeout_s, connect=5.0), trust_env=False,
                                    verify=self.url.startswith("https:"),  # reading certificates takes 30 ms of CPU
                                    transport=transport, headers={"Authorization": f"Bearer {key}"} if key else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._client.close()

    # ------------------------------------------------------------------------------------------------- what it is

    def label(self) -> str:
        """The engine's weight version; ``default`` when none was ever set."""
        return self._ask("/weight_info", lambda told: str(told["weight_version"]))

    def paused(self) -> bool:
        """Whether generation is paused."""
        return self._ask("/is_paused", lambda told: bool(told["is_paused"]))

    def base(self) -> tuple[str, str]:
        """Name of the model served, and the folder or hub name it was started with."""
        return self._ask("/v1/models", lambda told: (told["data"][0]["id"], told["data"][0]["root"]))

    def adapters(self) -> dict[str, str]:
        """Loaded adapters, oldest first: name -> folder."""
        return self._ask("/v1/models", lambda told: {
            card["id"]: card["root"] for card in told["data"] if card.get("parent")})

    # --------------------------------------------------------------------------------------------- what changes it

    def pause(self) -> None:
        """Freeze generation; requests in flight are kept and go on after :meth:`resume`, later ones wait."""
        self._call("POST", "/pause", params={"mode": "keep"})

    def resume(self) -> None:
        """Go on."""
        self._call("POST", "/resume")

    def reload(self, folder: Path | str) -> None:
        """Replace the weights by those of a folder, as the server sees it; cache and label stay as they were."""
        self._rpc("reload_weights", weights_path=str(folder))
        if self.repacks:
            self._rpc("repack_tied_layers")

    @cached_property
    def repacks(self) -> bool:
        """Whether its workers can mend what a reload forgets on CPUs, see ``in_vllm/agentsdpo_worker.py``."""
        config = self._ask("/server_info", lambda told: told["vllm_config"]["parallel_config"],
                           params={"config_format": "json"})
        return str(config.get("worker_extension_cls")).endswith("agentsdpo_worker.TiedHead")

    def _rpc(self, method: str, **more: Any) -> None:
        self._call("POST", "/collective_rpc", json={"method": method, "kwargs": more})

    def reset_cache(self, *, within_s: float = RESET_S) -> None:
        """Empty the prefix cache, which a reload leaves as it was: K/V of the old weights.

        Raises:
            PushError: the server kept answering that it could not.
        """
        end = time.monotonic() + within_s
        while not self._call("POST", "/reset_prefix_cache").get("success"):
            if time.monotonic() > end:
                raise PushError(f"{self.url} did not reset its prefix cache within {within_s:g} s",
                                fix="its requests hold blocks though it is paused: look at its log, or restart it")
            time.sleep(0.02)

    def set_label(self, label: str) -> None:
        """Name the weights in the spans of everything sampled from now on; only right while paused."""
        self._call("POST", "/update_weight_version", json={"new_version": label})

    def load_adapter(self, name: str, folder: Path | str) -> None:
        """Load an adapter under a name that is not in use."""
        self._call("POST", "/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(folder)})

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; a request that names it then answers 404."""
        self._call("POST", "/v1/unload_lora_adapter", json={"lora_name": name})

    def post(self, path: str, body: Json) -> Json:
        """Any other control call."""
        return self._call("POST", path, json=body)

    # -------------------------------------------------------------------------------------------------- what it says

    def sample(self, model: str, prompt: Sequence[int], n: int, *, temperature: float = 1.0
               ) -> tuple[list[int], list[float]]:
        """Sample ``n`` tokens after a prompt, through the prefix cache: ids, and log-probs at temperature 1.

        Without a seed, and never ``prompt_logprobs``: both have ended servers that were busy (vLLM 0.32 on CPUs).

        Raises:
            PushError: ids and log-probs do not match up.
        """
        body = {"model": model, "prompt": list(prompt), "max_tokens": n, "temperature": temperature, "logprobs": 0,
                "return_token_ids": True, "ignore_eos": True}
        choice = self._ask("/v1/completions", lambda told: told["choices"][0], method="POST", json=body)
        ids, logps = choice.get("token_ids") or [], (choice.get("logprobs") or {}).get("token_logprobs") or []
        if len(ids) != n or len(logps) != n:
            raise PushError(f"{self.url} answered a probe of {n} tokens with {len(ids)} ids and {len(logps)} log-probs",
                            fix="use a vLLM that returns token ids (0.11 or newer)")
        return ids, logps

    # ---------------------------------------------------------------------------------------------------- transport

    def _ask(self, path: str, pick: Callable[[Json], T], method: str = "GET", **more: Any) -> T:
        """What ``pick`` finds in the answer of one call.

        Raises:
            PushError: it is not there. What :meth:`_call` raises.
        """
        told = self._call(method, path, **more)
        try:
            return pick(told)
        except (LookupError, TypeError, AttributeError) as error:
            raise self._foreign(path) from error

    def _foreign(self, path: str) -> PushError:
        return PushError(f"{self.url}{path} does not answer as vLLM does",
                         fix="give --to the address of a vLLM server, with no path but /v1")

    def _call(self, method: str, path: str, **more: Any) -> Json:
        """One call; JSON of the answer, ``{}`` for text.

        A server that fails a call closes its connection, so that the next call on it may find it dead: such calls are
        sent again. All of them may be: what they ask for twice is done once.

        Raises:
            ServerGone: no answer. PushError: an answer that is an error.
        """
        waiting = wait_random_exponential(multiplier=0.1, max=1.0)
        retrying = Retrying(stop=stop_after_attempt(ATTEMPTS), wait=waiting, reraise=True,
                            retry=retry_if_exception_type((_NotNow, httpx.NetworkError, httpx.RemoteProtocolError)))
        try:
            answer = retrying(self._once, method, path, **more)
        except (httpx.HTTPError, _NotNow) as error:
            raise ServerGone(f"{self.url}{path} does not answer ({str(error) or type(error).__name__})",
                             fix="start the server, or give --to the address it listens on") from error
        if answer.is_error:
            raise PushError(f"{self.url}{path} answered {answer.status_code}: {_reason(answer)}",
                            fix=_fix(answer, path))
        try:
            return answer.json() if "json" in answer.headers.get("content-type", "") else {}
        except ValueError as error:
            raise self._foreign(path) from error

    def _once(self, method: str, path: str, **more: Any) -> httpx.Response:
        answer = self._client.request(method, path, **more)
        if answer.status_code in _AWAY:
            raise _NotNow(f"{answer.status_code} {answer.reason_phrase}")
        return answer


def _reason(answer: httpx.Response) -> str:
    """What the server says of an error, in one line."""
    try:
        told = answer.json()
    except ValueError:
        told = answer.text
    if isinstance(told, dict):
        inner = told.get("error", told.get("detail", told))
        told = inner.get("message", inner) if isinstance(inner, dict) else inner
    return " ".join(str(told).split())[:300] or answer.reason_phrase


def _fix(answer: httpx.Response, path: str) -> str:
    """The likeliest way out."""
    if answer.status_code in (404, 405) and answer.text.find("Not Found") >= 0:
        wanted = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" if "lora" in path else "VLLM_SERVER_DEV_MODE=1"
        return f"start the server with {wanted} in its environment, as `agentsdpo serve` does"
    if answer.status_code in (401, 403):
        return "set VLLM_API_KEY to the key the server was started with"
    return "see the server's log"
