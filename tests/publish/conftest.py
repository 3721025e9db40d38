"""A stand-in for a vLLM server's control endpoints, with its traps: a cache that outlives a reload, a label that does
too, connections that end after an error; and faults on request."""

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx
import numpy as np
import pytest

from agentsdpo.publish.control import VllmControl
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.publish.tensors import read_tensors

PROMPT = list(range(40))


def logp(value: float, ids: list[int]) -> list[float]:
    """The model: one number; what it says of an id depends on it."""
    return [-0.1 - abs(value - token % 5) / 10 for token in ids]


def value_of(folder: Path) -> float:
    """The one number of a folder of full weights."""
    return float(read_tensors(folder / "model.safetensors", "np")["q.weight"][0, 0])


class FakeVllm:
    """One server; ``faults`` maps a path to what its next calls answer: a status, ``"die"``, a body, or ``"cut"``: what
    is asked for is done, and then nothing reaches it any more."""

    def __init__(self, start: Path) -> None:
        self.start, self.faults, self.calls = start, dict[str, list[Any]](), list[str]()
        self.on_call: Callable[[str], None] = lambda path: None
        self.alive, self.lock, self.extension, self.methods = True, Lock(), "", list[str]()
        self.boot()

    def boot(self) -> None:
        """A fresh process on the model it was started with."""
        self.alive, self.value, self.label, self.paused = True, value_of(self.start), "default", False
        self.adapters: dict[str, str] = {}
        self.cache: dict[str, float] = {}
        self.starved = False

    def answer(self, method: str, url: str, body: Any) -> tuple[int, Any]:
        parts = urlsplit(url)
        with self.lock:
            self.calls.append(parts.path)
            fault = self.faults.get(parts.path, [])
            wrong = fault.pop(0) if fault else None
            if wrong == "die":
                self.alive = False
            if not self.alive:
                raise ConnectionError
        self.on_call(parts.path)
        if isinstance(wrong, int):
            return wrong, {"error": {"message": f"injected {wrong}"}}
        if wrong not in (None, "cut"):
            return 200, wrong
        act = getattr(self, "do_" + parts.path.strip("/").replace("/", "_"), None)
        if wrong == "cut":
            assert act
            act({**dict(parse_qsl(parts.query)), **(body or {})})
            self.alive = False
            raise ConnectionError
        return act({**dict(parse_qsl(parts.query)), **(body or {})}) if act else (404, {"detail": "Not Found"})

    def do_weight_info(self, _: Any) -> tuple[int, Any]:
        return 200, {"weight_version": self.label}

    def do_is_paused(self, _: Any) -> tuple[int, Any]:
        return 200, {"is_paused": self.paused}

    def do_server_info(self, _: Any) -> tuple[int, Any]:
        return 200, {"vllm_config": {"parallel_config": {"worker_extension_cls": self.extension}}}

    def do_v1_models(self, _: Any) -> tuple[int, Any]:
        cards = [{"id": "pol", "root": str(self.start), "parent": None}]
        return 200, {"data": cards + [{"id": n, "root": r, "parent": "pol"} for n, r in self.adapters.items()]}

    def do_pause(self, body: Any) -> tuple[int, Any]:
        assert body["mode"] == "keep"
        self.paused = True
        return 200, {"status": "paused"}

    def do_resume(self, _: Any) -> tuple[int, Any]:
        self.paused = False
        return 200, {"status": "resumed"}

    def do_collective_rpc(self, body: Any) -> tuple[int, Any]:
        self.methods.append(body["method"])
        if body["method"] == "repack_tied_layers":
            return 200, {"results": [2]}
        folder = Path(body["kwargs"]["weights_path"])
        if not (folder / "model.safetensors").is_file():
            return 500, {"error": {"message": f"Cannot find any model weights with `{folder}`"}}
        self.value = value_of(folder)
        return 200, {"results": [None]}

    def do_reset_prefix_cache(self, _: Any) -> tuple[int, Any]:
        self.cache.clear()
        return 200, {"success": True}

    def do_update_weight_version(self, body: Any) -> tuple[int, Any]:
        assert self.paused, "a label that changes while tokens are sampled puts the border of a span in a wrong place"
        self.label = body["new_version"]
        return 200, {"success": True}

    def do_v1_load_lora_adapter(self, body: Any) -> tuple[int, Any]:
        if body["lora_name"] in self.adapters:
            return 400, {"error": {"message": "has already been loaded"}}
        if not (Path(body["lora_path"]) / "adapter_config.json").is_file():
            return 404, {"error": {"message": f"No adapter found for {body['lora_path']}"}}
        self.adapters[body["lora_name"]] = body["lora_path"]
        return 200, None

    def do_v1_unload_lora_adapter(self, body: Any) -> tuple[int, Any]:
        return (200, None) if self.adapters.pop(body["lora_name"], None) else (404, {"error": {"message": "not found"}})

    def do_v1_completions(self, body: Any) -> tuple[int, Any]:
        if self.paused:
            self.starved = True
            return 500, {"error": {"message": "this request would have waited for ever"}}
        name, value = body["model"], self.value
        if name != "pol":
            if name not in self.adapters:
                return 404, {"error": {"message": f"The model `{name}` does not exist."}}
            tensors = read_tensors(Path(self.adapters[name]) / "adapter_model.safetensors", "np")
            a, b = (tensors[f"base_model.model.q.lora_{side}.weight"] for side in "AB")
            value += float((b @ a)[0, 0])
        prompt = body["prompt"]
        assert not {"prompt_logprobs", "seed"} & body.keys(), "both have ended servers that were busy"
        value = self.cache.setdefault(f"{name}{prompt}", value)  # K/V of whoever saw the prompt first
        ids = [(7 * i) % 11 for i in range(body["max_tokens"])]
        return 200, {"choices": [{"token_ids": ids, "logprobs": {"token_logprobs": logp(value, ids)}}]}

    # ----------------------------------------------------------------------------------------------- ways to reach it

    def connect(self, url: str) -> VllmControl:
        """Without a socket; after an error the connection is closed, as the real server does."""
        dead = False

        def handle(request: httpx.Request) -> httpx.Response:
            nonlocal dead
            if dead:
                dead = False
                raise httpx.ReadError("Connection reset by peer", request=request)
            try:
                status, body = self.answer(request.method, str(request.url),
                                           json.loads(request.content) if request.content else None)
            except ConnectionError:
                raise httpx.ConnectError("Connection refused", request=request) from None
            dead = status == 500
            return httpx.Response(status, json=body) if body is not None else httpx.Response(status, text="Success")

        return VllmControl(url, transport=httpx.MockTransport(handle))

    def listen(self) -> tuple[ThreadingHTTPServer, str]:
        """On a port of the loopback."""
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def reply(self) -> None:
                text = self.rfile.read(int(self.headers.get("content-length") or 0))
                try:
                    status, body = fake.answer(self.command, self.path, json.loads(text) if text else None)
                except ConnectionError:
                    self.close_connection = True
                    return
                data = json.dumps(body).encode() if body is not None else b"Success"
                self.send_response(status)
                self.send_header("content-type", "application/json" if body is not None else "text/plain")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = reply

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=server.serve_forever, daemon=True).start()
        return server, f"http://127.0.0.1:{server.server_address[1]}"


class FakeScorer:
    """Scores with the registry's own numbers."""

    prompt = PROMPT

    def __init__(self, registry: PolicyRegistry) -> None:
        self.registry, self.value, self.off = registry, 0.0, 0.0

    def load(self, version: int) -> None:
        self.value = float(self.registry.load(version, framework="np")["q.weight"][0, 0])

    def logps(self, ids: list[int], n: int) -> list[float]:
        return [p + self.off for p in logp(self.value, ids[-n:])]


def full(value: float) -> dict[str, np.ndarray]:
    return {"q.weight": np.full((1, 1), value, np.float32)}


def low_rank(value: float) -> dict[str, np.ndarray]:
    """An adapter that adds ``value``, under a scale of 1."""
    return {"base_model.model.q.lora_A.weight": np.ones((1, 1), np.float32),
            "base_model.model.q.lora_B.weight": np.full((1, 1), value, np.float32)}


@pytest.fixture
def registry(tmp_path: Path) -> PolicyRegistry:
    """Three versions of full weights, of values 0, 1 and 2."""
    found = PolicyRegistry(tmp_path / "policies", base_model="seed")
    for value in range(3):
        found.publish(full(value), learner_step=value)
    return found


@pytest.fixture
def adapters(tmp_path: Path) -> PolicyRegistry:
    """A base of value 0 and adapters 1 to 6, each adding half its number."""
    found = PolicyRegistry(tmp_path / "low", base_model="seed")
    found.publish(full(0), learner_step=0)
    for version in range(1, 7):
        found.publish_adapter(low_rank(version / 2), {"r": 1, "lora_alpha": 1, "bias": "none"}, base=0,
                              learner_step=version)
    return found


@pytest.fixture
def fake(tmp_path: Path) -> FakeVllm:
    """A server started with a model of value 0 that no registry knows."""
    folder = tmp_path / "model"
    PolicyRegistry(folder).publish(full(0), learner_step=0)
    return FakeVllm(folder / "000000000000")


@pytest.fixture
def listening(fake: FakeVllm) -> Iterator[str]:
    """Address at which ``fake`` answers."""
    server, url = fake.listen()
    yield url
    server.shutdown()
    server.server_close()


@pytest.fixture
def scorer_of() -> Callable[[PolicyRegistry], FakeScorer]:
    return FakeScorer
