"""A fake vLLM that says what it is told to, with ids, log-probs and versions; and the proxy in front of it."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
from aiohttp import web

from agentsdpo.chat import ChatFormat
from agentsdpo.collect.proxy.access import Keys
from agentsdpo.collect.proxy.config import ProxyConfig
from agentsdpo.collect.proxy.house import House
from agentsdpo.collect.proxy.server import Proxy
from agentsdpo.replay.store import ReplayStore
from agentsdpo.types import Episode

Json = dict[str, Any]


class FakeEngine:
    """Serves ``/inference/v1/generate`` and ``/v1/completions`` the way vLLM 0.32 does.

    Attributes:
        say: what to sample, from the text of the prompt.
        requests: bodies of all sampling requests so far.
        faults: what to do to the next answers instead, first in, first out: a status, or a function of the answer.
        version: label of the weights. adapters: names loaded.
    """

    def __init__(self, chat: ChatFormat) -> None:
        self.chat, self.version, self.mode = chat, "0", "processed_logprobs"
        self.say: Callable[[str], str] = lambda prompt: f"reply {prompt.count('<|im_start|>assistant')}"
        self.requests: list[Json] = []
        self.faults: list[int | str | Callable[[Json], Json]] = []
        self.adapters: list[str] = []
        self.generate, self.window, self.delay_s, self.port = True, 4096, 0.0, 0
        self._runner: web.AppRunner | None = None

    async def start(self, port: int = 0) -> None:
        app = web.Application(client_max_size=1 << 28)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/server_info", self._info)
        app.router.add_get("/weight_info", self._weights)
        app.router.add_post("/inference/v1/generate", self._generate)
        app.router.add_post("/v1/completions", self._completions)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", port or self.port).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        own = {"id": "base", "parent": None, "max_model_len": self.window}
        return web.json_response({"data": [own, *({"id": a, "parent": "base"} for a in self.adapters)]})

    async def _info(self, request: web.Request) -> web.Response:
        return web.json_response({"vllm_config": {"model_config": {"logprobs_mode": self.mode}}})

    async def _weights(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.version})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        if not self.generate:
            return web.json_response({"error": {"message": "scale-out is off"}}, status=403)
        body = await request.json()
        return await self._answer(request, body, body["token_ids"], body["sampling_params"]["max_tokens"], chat=False)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        return await self._answer(request, body, body["prompt"], body["max_tokens"], chat=True)

    async def _answer(self, request: web.Request, body: Json, prompt: list[int], most: int, *, chat: bool
                      ) -> web.StreamResponse:
        if body["request_id"] == "probe":
            return web.json_response(self.completion(prompt, most, completions=chat))
        self.requests.append(body)
        assert len(body["cache_salt"]) <= 128
        assert not set(body["cache_salt"]) & set("@/\\\0")
        if body["model"] not in ("base", *self.adapters):
            return web.json_response({"error": {"message": f"The model `{body['model']}` does not exist."}}, status=404)
        fault = self.faults.pop(0) if self.faults else None
        await asyncio.sleep(self.delay_s)
        if isinstance(fault, int):
            return web.json_response({"error": {"message": "made to fail"}}, status=fault)
        if fault == "cut":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if fault == "hang":
            await asyncio.sleep(60)
        answer = self.completion(prompt, most, completions=chat)
        return web.json_response(fault(answer) if callable(fault) else answer)

    def completion(self, prompt: list[int], most: int, *, completions: bool = False) -> Json:
        text = self.say(self.chat.decode(prompt))
        ids = [*self.chat.encode(text), self.chat.eos_id]
        finish = "stop" if len(ids) <= most else "length"
        ids = ids[:most]
        logps = [-0.25 - 0.001 * i for i in range(len(ids))]
        choice: Json = {"index": 0, "finish_reason": finish, "token_ids": ids}
        if completions:
            choice |= {"text": text, "logprobs": {"token_logprobs": logps}}
            return {"choices": [choice], "usage": {"completion_tokens": len(ids)}}
        choice["logprobs"] = {"content": [{"token_id": i, "logprob": x, "rank": 1, "top_logprobs": []}
                                          for i, x in zip(ids, logps, strict=True)]}
        choice["weight_versions"] = [{"version": self.version, "start": 0, "end": len(ids)}]
        return {"choices": [choice]}


class Stack:
    """Engine and proxy on one event loop in a thread.

    Attributes:
        engine, proxy: as they run. url: of the proxy.
    """

    def __init__(self, chat: ChatFormat, store: Path) -> None:
        self.chat, self.store, self.engine = chat, store, FakeEngine(chat)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.client = httpx.Client(timeout=30, verify=False, trust_env=False)  # certificates take long to read
        self.proxy: Proxy | None = None
        self.keys: dict[str, str] = {}
        self.vocab_size = 0
        self._up = False

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=60)

    def start(self, keys: dict[str, str] | None = None, **settings: Any) -> "Stack":
        """Start the engine when it is not up, and a proxy with these settings; recordings may be trained on."""
        if not self._up:
            self.run(self.engine.start())
            self._up = True
        self.keys = keys or {}
        config = ProxyConfig(**{"upstream": f"http://127.0.0.1:{self.engine.port}", "store": str(self.store),
                                "train_allowed": True, "retry_s": 2.0, **settings})
        guard = Keys(self.keys, tenant_header=config.tenant_header)

        async def begin() -> Proxy:
            house = House(config, self.chat, vocab_size=self.vocab_size, tenants=guard.tenants)
            proxy = Proxy(house, guard, config)
            await proxy.start("127.0.0.1", 0)
            return proxy

        self.proxy = self.run(begin())
        return self

    @property
    def url(self) -> str:
        assert self.proxy is not None
        return f"http://127.0.0.1:{self.proxy.port}"

    def stop_proxy(self) -> None:
        if self.proxy is not None:
            self.run(self.proxy.stop())
            self.proxy = None

    def stop(self) -> None:
        self.client.close()
        self.stop_proxy()
        self.run(self.engine.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()

    # -------------------------------------------------------------------------------------------------- clients

    def post(self, path: str, body: Any, *, key: str = "", **headers: str) -> httpx.Response:
        auth = {"Authorization": f"Bearer {key}"} if key else {}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.client.post(self.url + path, json=body, headers={**auth, **named})

    def ask(self, *messages: Json | str, conversation: str = "", key: str = "", **body: Any) -> Json:
        """A chat call; a text is a user's message. The answer, which must be one."""
        sent = [{"role": "user", "content": m} if isinstance(m, str) else m for m in messages]
        path = f"/c/{conversation}/v1/chat/completions" if conversation else "/v1/chat/completions"
        answer = self.post(path, {"model": "any", "messages": sent, **body}, key=key)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def close(self, conversation: str, key: str = "") -> int:
        return self.post("/v1/close", {"conversation": conversation}, key=key).json()["ended"]

    def episodes(self, tenant: str = "") -> list[Episode]:
        """What the store holds, oldest first."""
        store = ReplayStore.open(self.store / tenant if tenant else self.store, create=False)
        view = store.snapshot()
        attempts = sorted({(row.ts_us, key.episode_id, key.attempt) for key, row in view.rows.items()})
        return [view.episode(episode, attempt) for _, episode, attempt in attempts]


def said(answer: Json) -> Json:
    """The message of an answer, as a client sends it back."""
    message = answer["choices"][0]["message"]
    return {name: value for name, value in message.items() if name in ("role", "content", "tool_calls")}
