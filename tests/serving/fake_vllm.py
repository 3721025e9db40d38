"""A small HTTP server that answers as vLLM 0.32 does, and then, on request, as buggy or dying ones do.

Its model: id ``i`` of a vocabulary of 16 has logit ``-0.25 i``; what it samples is fixed by the prompt. After
``length`` tokens it ends with :data:`EOS`. ``plan`` holds one fault per coming request to a sampling endpoint; when it
is used up, answers are good again::

    fake.plan += [status(503), edit(lambda body: body.update(choices=[]))]
"""

import json
import math
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

VOCAB, EOS = 16, 2
Json = dict[str, Any]
Fault = Callable[["_Handler", Json], None]
"""What happens to one request instead of an answer; gets the good answer."""


def logits() -> list[float]:
    return [-0.25 * token for token in range(VOCAB)]


def distribution(temperature: float, top_k: int, mode: str) -> tuple[list[float], list[int]]:
    """Log-probs of all ids as the mode reports them (-9999 for what is cut), and the ids kept."""
    heat = temperature or 1.0
    scaled = [x / heat for x in logits()]
    kept = list(range(VOCAB))[:top_k] if top_k > 0 else list(range(VOCAB))
    shown = logits() if mode == "raw_logprobs" else scaled
    inside = range(VOCAB) if mode in ("raw_logprobs", "tempered") else kept
    total = math.log(sum(math.exp(shown[i]) for i in inside))
    return [shown[i] - total if i in inside else -9999.0 for i in range(VOCAB)], kept


def tokenized(chat: Any, body: Json) -> list[int]:
    """Ids of a text or a conversation."""
    if "prompt" in body:
        return chat.encode(body["prompt"])
    shown = chat.tokenizer.apply_chat_template(body["messages"], tools=body.get("tools"), tokenize=False,
                                               add_generation_prompt=True)
    return chat.encode(shown)


class FakeVllm:
    """The server; ``url``, what it was sent (``requests``: path and body), and what it will do next (``plan``)."""

    def __init__(self, *, mode: str = "processed_logprobs", generate: bool = True, dev: bool = True,
                 kept_sets: bool = False, label: str = "0", length: int = 3, key: str = "", port: int = 0) -> None:
        self.mode, self.generate, self.dev, self.kept_sets = mode, generate, dev, kept_sets
        self.label, self.length, self.key, self.models = label, length, key, ["policy"]
        self.chat: Any = None  # a chat format: then /tokenize answers with it
        self.plan: list[Fault] = []
        self.requests: list[tuple[str, Json]] = []
        self.server = _Server(("127.0.0.1", port), _Handler)
        self.server.fake = self
        self.port: int = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def sampled(self) -> list[Json]:
        """Bodies of the requests that asked for tokens, probes left out."""
        return [body for path, body in self.requests if path in ("/inference/v1/generate", "/v1/completions")
                and body.get("request_id") != "probe"]

    def close(self) -> None:
        """Stop listening and cut every connection, as a killed process does."""
        if self._thread.is_alive():
            self.server.shutdown()
            self._thread.join()
            self.server.server_close()
            self.server.cut()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------- answers

    def info(self) -> Json:
        config = {"logprobs_mode": self.mode, "return_sampling_mask": self.kept_sets, "max_model_len": 128}
        return {"vllm_config": {"model_config": config, "device_config": {"device": "cpu"}}}

    def get(self, path: str) -> Json | None:
        if path == "/v1/models":
            return {"data": [{"id": name, "parent": "policy" if "@" in name else None, "max_model_len": 128}
                             for name in self.models]}
        if path in ("/health", "/version"):
            return {"version": "0.32.0"}
        if self.dev and path.startswith("/server_info"):
            return self.info()
        return {"weight_version": self.label} if self.dev and path == "/weight_info" else None

    def sample(self, body: Json, path: str) -> Json:
        """A good answer to a request for tokens."""
        own = body.get("sampling_params", body)
        prompt = body.get("token_ids") or body["prompt"]
        table, kept = distribution(own["temperature"], own["top_k"], self.mode)
        n = min(self.length, own["max_tokens"])
        ids = [kept[(sum(prompt) + 7 * i) % min(len(kept), 5)] or 1 for i in range(n)]
        if n == self.length:
            ids[-1] = EOS
        choice: Json = {"index": 0, "finish_reason": "stop" if ids[-1] == EOS else "length", "token_ids": ids}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
        tops = sorted(range(VOCAB), key=lambda i: -table[i])[:max(own["logprobs"], 1)]
        if path == "/v1/completions":
            choice["logprobs"] = {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": [table[i] for i in ids],
                                  "top_logprobs": [{f"token_id:{i}": table[i] for i in tops} for _ in ids]}
            choice["text"] = "".join(chr(97 + i) for i in ids)
        else:
            top = [{"token_id": i, "logprob": table[i]} for i in tops]
            choice["logprobs"] = {"content": [{"token_id": i, "logprob": table[i], "rank": 1, "top_logprobs": top}
                                              for i in ids]}
            choice["weight_versions"] = [{"version": self.label, "start": 0, "end": len(ids)}]
            choice["sampling_mask"] = [kept] * len(ids) if self.kept_sets and own["top_k"] > 0 else None
        return {"request_id": body.get("request_id"), "choices": [choice], "usage": usage}


class _Server(ThreadingHTTPServer):
    fake: FakeVllm
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def cut(self) -> None:
        for one in list(self._open):
            one.close() if one.fileno() < 0 else one.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""

    def answer(self, status: int, body: Any, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def _authorised(self) -> bool:
        key = self.server.fake.key
        return not key or self.headers.get("authorization") == f"Bearer {key}"

    def do_GET(self) -> None:
        if not self._authorised():
            return self.answer(401, {"error": "Unauthorized"})
        body = self.server.fake.get(self.path)
        return self.answer(404, {"detail": "Not Found"}) if body is None else self.answer(200, body)

    def do_POST(self) -> None:
        fake = self.server.fake
        body = json.loads(self.rfile.read(int(self.headers["content-length"])) or b"{}")
        fake.requests.append((self.path, body))
        if not self._authorised():
            return self.answer(401, {"error": "Unauthorized"})
        if self.path == "/inference/v1/generate" and not fake.generate:
            return self.answer(403, {"error": {"message": "Use --enable-scale-out to enable them."}})
        if self.path == "/tokenize" and fake.chat is not None:
            return self.answer(200, {"tokens": tokenized(fake.chat, body)})
        if self.path not in ("/inference/v1/generate", "/v1/completions"):
            return self.answer(404, {"detail": "Not Found"})
        if body["model"] not in fake.models:
            return self.answer(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
        good = fake.sample(body, self.path)
        if fake.plan and body.get("request_id") != "probe":
            return fake.plan.pop(0)(self, good)
        return self.answer(200, good)


# ------------------------------------------------------------------------------------------------------------ faults


def status(code: int, **headers: str) -> Fault:
    """Refuses: 429, 500, 503 and such."""
    return lambda handler, good: handler.answer(code, {"error": {"message": "no", "code": code}}, **headers)


def half(handler: _Handler, good: Json) -> None:
    """The connection breaks in the middle of the body."""
    data = json.dumps(good).encode()
    handler.send_response(200)
    handler.send_header("content-length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[:len(data) // 2])
    handler.close_connection = True


def drop(handler: _Handler, good: Json) -> None:
    """The connection breaks before a word was said: the process was killed."""
    handler.close_connection = True


def slow(seconds: float) -> Fault:
    """Answers too late."""
    def fault(handler: _Handler, good: Json) -> None:
        time.sleep(seconds)
        handler.answer(200, good)
    return fault


def says(data: bytes) -> Fault:
    """Answers 200 with something else."""
    return lambda handler, good: handler.answer(200, data)


def edit(change: Callable[[Json], Any]) -> Fault:
    """A good answer with a flaw in its choice."""
    def fault(handler: _Handler, good: Json) -> None:
        change(good["choices"][0])
        handler.answer(200, good)
    return fault


def abort(n: int) -> Fault:
    """A publisher cuts the call after ``n`` tokens."""
    def change(choice: Json) -> None:
        choice["finish_reason"], choice["token_ids"] = "abort", choice["token_ids"][:n]
        choice["logprobs"]["content"] = choice["logprobs"]["content"][:n]
        choice["weight_versions"] = [{"version": "0", "start": 0, "end": n}] if n else []

    def fault(handler: _Handler, good: Json) -> None:
        change(good["choices"][0])
        good["usage"]["completion_tokens"] = n
        handler.answer(200, good)
    return fault
