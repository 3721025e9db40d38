"""What the recording proxy adds to a request: latency at 32 conversations at once, beside the engine alone.

    python -m agentsdpo.benchmarks.perf.serving_proxy --json

Three processes: this one plays 32 conversations of four turns with a growing history; the proxy, as ``agentsdpo proxy``
starts it, with its journal waiting for the disk; and an engine that answers every call with 128 tokens after one
second, which is what a small model takes for them at that concurrency. The same conversations go to the engine
directly and through the proxy, in turn and several times, so that both see the same machine. A figure is the
difference of the two percentiles. A third run asks an engine that answers at once, for requests a second and CPU time.
"""

import asyncio
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import orjson
from aiohttp import web

from agentsdpo.benchmarks.perf.figure import Figure, Measure, run_all, tell
from agentsdpo.envs.desk.seed import seed_path

CONCURRENCY, TURNS, TOKENS, DELAY_S, ROUNDS = 32, 4, 128, 1.0, 5
TASK = "File the quarter's figure for the tax team in thousands, and say where you put it. " * 8
ANSWER = "The file is read and the figure is in it; next comes the report for the tax team, in thousands of dollars. "


class BareEngine:
    """An engine that has its answers ready as bytes, so that what it takes to read and to write JSON is in no figure:
    ids, log-probs and versions as vLLM sends them, and chat for clients that come without a proxy.

    Args:
        delay_s: before each answer.
    """

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s
        ids = [40 + i % 60 for i in range(TOKENS)]
        choice = {"index": 0, "finish_reason": "length", "token_ids": ids,
                  "weight_versions": [{"version": "0", "start": 0, "end": TOKENS}],
                  "logprobs": {"content": [{"token_id": i, "logprob": -0.5, "rank": 1, "top_logprobs": []}
                                           for i in ids]}}
        self._tokens = orjson.dumps({"request_id": "r", "choices": [choice]})
        message = {"role": "assistant", "content": ANSWER * 2}
        self._chat = orjson.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "bare", "choices": [
            {"index": 0, "message": message, "finish_reason": "stop"}]})

    def app(self) -> web.Application:
        """Its routes."""
        app = web.Application(client_max_size=1 << 24)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/server_info", self._info)
        app.router.add_get("/weight_info", self._weights)
        app.router.add_post("/inference/v1/generate", self._generate)
        app.router.add_post("/v1/chat/completions", self._complete)
        return app

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "bare", "parent": None, "max_model_len": 32768}]})

    async def _info(self, request: web.Request) -> web.Response:
        return web.json_response({"vllm_config": {"model_config": {"logprobs_mode": "processed_logprobs"}}})

    async def _weights(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": "0"})

    async def _generate(self, request: web.Request) -> web.Response:
        return await self._answer(request, self._tokens)

    async def _complete(self, request: web.Request) -> web.Response:
        return await self._answer(request, self._chat)

    async def _answer(self, request: web.Request, answer: bytes) -> web.Response:
        await request.read()
        await asyncio.sleep(self._delay_s)
        return web.Response(body=answer, content_type="application/json")


@contextmanager
def program(folder: Path, *command: str) -> Iterator[tuple[str, int]]:
    """A program that says ``http://host:port`` once it listens; gives the address and its process id.

    Raises:
        RuntimeError: it ended instead.
    """
    log = folder / f"{time.monotonic_ns()}.log"
    with log.open("w") as sink:
        process = subprocess.Popen([sys.executable, "-m", *command], stderr=sink, stdout=sink,
                                   env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    try:
        while not (found := re.search(r"on (http://\S+:\d+)", log.read_text())):
            if process.poll() is not None:
                raise RuntimeError(f"{command[0]} ended: {log.read_text()[-2000:]}")
            time.sleep(0.05)
        yield found[1], process.pid
    finally:
        process.terminate()
        process.wait(timeout=60)


@contextmanager
def both(delay_s: float) -> Iterator[tuple[str, str, int]]:
    """An engine and a proxy before it: their addresses, and the proxy's process id."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (program(folder, __spec__.name if __spec__ else "", "--engine", str(delay_s)) as (engine, _),
              program(folder, "agentsdpo.cli", "proxy", "--upstream", engine, "--store", str(folder / "store"),
                      "--model", str(seed_path()), "--train-allowed", "--port", "0", "--set", "rate_per_minute=1e9",
                      "--set", "burst=1000000") as (proxy, pid)):
            yield engine, proxy, pid


async def play(url: str, delay_s: float, spread_s: float) -> list[float]:
    """All conversations once; per request the seconds beyond the engine's own delay.

    Args:
        url: whom to ask. delay_s: the engine's. spread_s: over which the conversations begin.
    """
    over: list[float] = []

    async def one(session: aiohttp.ClientSession, number: int) -> None:
        await asyncio.sleep(spread_s * number / CONCURRENCY)
        messages = [{"role": "system", "content": "You work at a desk."}, {"role": "user", "content": TASK}]
        name = f"{time.monotonic_ns()}-{number}"
        for turn in range(TURNS):
            began = time.perf_counter()
            async with session.post(f"{url}/v1/chat/completions", headers={"x-agentsdpo-conversation": name},
                                    json={"model": "m", "messages": messages, "max_tokens": TOKENS}) as answer:
                answer.raise_for_status()
                message = (await answer.json())["choices"][0]["message"]
            over.append(time.perf_counter() - began - delay_s)
            messages += [{"role": "assistant", "content": message["content"]},
                         {"role": "user", "content": f"Go on with part {turn}, please. " * 4}]

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(one(session, number) for number in range(CONCURRENCY)))
    return over


def percentile(values: list[float], share: float) -> float:
    """The value that this share of the values does not exceed.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 0.5), percentile([1.0, 2.0], 0.99)
    (2.0, 2.0)
    """
    ordered = sorted(values)
    return ordered[max(0, min(len(ordered) - 1, -int(-share * len(ordered) // 1) - 1))]


def cpu_s(pid: int) -> float:
    """CPU seconds a process has used, itself alone."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def added() -> Iterator[Figure]:
    """Milliseconds that the proxy adds, at the median and at the 99th percentile."""
    rounds: list[tuple[list[float], list[float]]] = []
    with both(DELAY_S) as (engine, proxy, pid):
        for url in (engine, proxy):
            asyncio.run(play(url, DELAY_S, DELAY_S))  # connections, imports, first files
        before = cpu_s(pid)
        for number in range(ROUNDS):
            tell(f"round {number + 1} of {ROUNDS}, without and with the proxy")
            rounds.append((asyncio.run(play(engine, DELAY_S, DELAY_S)), asyncio.run(play(proxy, DELAY_S, DELAY_S))))
        used = cpu_s(pid) - before
    direct, through = ([x for one in rounds for x in one[side]] for side in (0, 1))
    about = {"concurrency": CONCURRENCY, "requests": len(through), "engine_delay_s": DELAY_S, "tokens": TOKENS,
             "proxy_cpu_ms_per_request": round(1e3 * used / len(through), 2)}
    for name, share in (("proxy_p50_ms", 0.50), ("proxy_p99_ms", 0.99)):
        own, alone = percentile(through, share), percentile(direct, share)
        yield Figure(name, 1e3 * (own - alone), "ms", "the same engine without a proxy", {
            **about, "through_ms": round(1e3 * own, 2), "direct_ms": round(1e3 * alone, 2), "rounds_ms": [
                round(1e3 * (percentile(proxied, share) - percentile(bare, share)), 2) for bare, proxied in rounds]})


def rate() -> Iterator[Figure]:
    """Requests a second where the engine answers at once: what one proxy process can carry."""
    with both(0.0) as (_, proxy, pid):
        asyncio.run(play(proxy, 0.0, 0.0))
        before, began = cpu_s(pid), time.perf_counter()
        over = [x for _ in range(ROUNDS) for x in asyncio.run(play(proxy, 0.0, 0.0))]
        wall, used = time.perf_counter() - began, cpu_s(pid) - before
    yield Figure("proxy_requests_per_s", len(over) / wall, "1/s", None, {
        "concurrency": CONCURRENCY, "median_ms": round(1e3 * statistics.median(over), 1),
        "proxy_cpu_ms_per_request": round(1e3 * used / len(over), 2)})


MEASURES: dict[str, Measure] = {"added": added, "rate": rate}


def measure() -> Iterator[Figure]:
    """All of them, for the benchmark of serving."""
    for part in MEASURES.values():
        yield from part()


async def _serve(delay_s: float) -> None:
    runner = web.AppRunner(BareEngine(delay_s).app(), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(f"on http://127.0.0.1:{runner.addresses[0][1]}", flush=True)  # noqa: T201
    await asyncio.Event().wait()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--engine"]:
        asyncio.run(_serve(float(sys.argv[2])))
    else:
        run_all(__doc__ or "", MEASURES)
