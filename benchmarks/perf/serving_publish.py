"""What a client feels of a new version: the longest gap between two of its tokens while versions are pushed.

    python -m agentsdpo.benchmarks.perf.serving_publish [--json]

One vLLM server with the seed model, a steady load of streaming clients, and ``agentsdpo publish --follow`` as a program
of its own. In each round a version is published into the registry, first full weights, then, on the same server,
adapters. The gap counts from the last token before to the first after, for the client that waited longest, whatever
the machine does besides: server, publisher and clients share it. The same load without a push stands beside it.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import torch

from agentsdpo.benchmarks.perf.figure import Figure, run_all, tell
from agentsdpo.envs.desk.seed import seed_path
from agentsdpo.learn.adapters import adapter_config, adapter_weights, add_adapter
from agentsdpo.learn.config import AdapterConfig
from agentsdpo.learn.load import load_chat, load_model
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.serve import ServeOptions, Server
from agentsdpo.types import Json

CLIENTS, TOKENS, ROUNDS, QUIET_S = 8, 256, 12, 1.0
BOUND_S = 60.0
"""Seconds after which no further push of one kind begins."""
WARM_S = 60.0
"""Seconds for the first whole answers."""


@dataclass
class Load:
    """Streaming clients, one request after the other. ``gaps`` are (when the later token came, seconds), ``failed``
    what went wrong, ``done`` the number of whole answers."""

    url: str
    gaps: list[tuple[float, float]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    done: int = 0
    _over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Load":
        self._threads = [threading.Thread(target=self._client) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()
        began = time.monotonic()
        while self.done < CLIENTS and not self.failed and time.monotonic() - began < WARM_S:  # compiled, cached, warm
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _client(self) -> None:
        body = {"model": "policy", "prompt": list(range(50, 90)), "max_tokens": TOKENS, "temperature": 1.0,
                "ignore_eos": True, "stream": True, "return_token_ids": True}
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while not self._over.is_set():
                try:
                    self._one(client, body)
                except (httpx.HTTPError, ValueError, KeyError) as error:
                    self.failed.append(repr(error))
                    return

    def _one(self, client: httpx.Client, body: dict[str, Any]) -> None:
        """One answer; a stream that ends early is a failure."""
        last, seen = None, 0
        with client.stream("POST", "/v1/completions", json=body) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                now = time.monotonic()
                seen += len(json.loads(line[6:])["choices"][0].get("token_ids") or [])
                if last is not None:
                    self.gaps.append((now, now - last))
                last = now
        if seen != TOKENS:
            raise ValueError(f"{seen} tokens instead of {TOKENS}")
        self.done += 1

    def longest(self, act: Callable[[], None]) -> float:
        """Longest gap that ended while something was done, or within half a second after it."""
        began = time.monotonic()
        act()
        time.sleep(0.5)
        end = time.monotonic()
        return max((gap for at, gap in list(self.gaps) if began <= at <= end), default=end - began)


def moved(model: Any, step: int) -> None:
    """Give every trained weight another value, the same in every run."""
    dice = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=dice))


@contextmanager
def follower(registry: PolicyRegistry, url: str) -> Iterator[Callable[[], Json]]:
    """The publisher as a program; gives what waits for its next report, of one server.

    Raises:
        AssertionError: (from the wait) a push failed: there is nothing to measure.
    """
    words = [sys.executable, "-m", "agentsdpo.cli", "publish", str(registry.root), "--to", url, "--follow", "--json"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, env=environment) as process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, b"")

        def report() -> Json:
            found = json.loads(next(lines))
            assert found["ok"], found
            return found["servers"][0]

        try:
            yield report
        finally:
            process.terminate()


def pushes(load: Load, registry: PolicyRegistry, publish: Callable[[int], int]) -> tuple[list[float], list[Json]]:
    """Publish one version a round; the longest gap until it serves, and what the publisher says of it."""
    gaps, reports = list[float](), list[Json]()
    with follower(registry, load.url) as report:
        report()  # of the first version, once the program has started
        publish(1)
        report()  # the first of its kind also warms the server
        began = time.monotonic()

        def one(step: int) -> None:
            publish(step)
            reports.append(report())

        for step in range(2, ROUNDS + 2):
            if gaps and time.monotonic() - began > BOUND_S:
                break
            gaps.append(load.longest(lambda: one(step)))  # noqa: B023
            tell(f"version {step}: the longest gap between two tokens was {gaps[-1]:.2f} s")
    return gaps, reports


def measure() -> Iterator[Figure]:
    """Pause, failed requests and parity of both ways to publish."""
    model = load_model(seed_path(), load_chat(seed_path()))
    with tempfile.TemporaryDirectory() as folder:
        full, low = (PolicyRegistry(Path(folder) / kind, base_model="seed") for kind in ("full", "low"))
        for registry in (full, low):
            registry.publish(model.state_dict(), learner_step=0)
        with Server.start(ServeOptions(str(seed_path()), port=0, adapters=4)) as server, Load(server.url) as load:
            tell(f"the server answers after {server.started_s:.0f} s; {CLIENTS} clients ask it")
            quiet = [load.longest(lambda: time.sleep(QUIET_S)) for _ in range(3)]
            tell(f"without a push the longest gap was {max(quiet):.2f} s; now full weights")

            def whole(step: int) -> int:
                moved(model, step)
                return full.publish(model.state_dict(), learner_step=step)

            of_full = pushes(load, full, whole)
            adapted = load_model(seed_path(), load_chat(seed_path()))
            add_adapter(adapted, AdapterConfig(rank=8))

            def factors(step: int) -> int:
                moved(adapted, step)
                return low.publish_adapter(adapter_weights(adapted), adapter_config(adapted), base=0, learner_step=step)

            tell("now adapters")
            of_low = pushes(load, low, factors)
    yield from _figures(load, quiet, of_full, of_low)


def _figures(load: Load, quiet: list[float], full: tuple[list[float], list[Json]],
             low: tuple[list[float], list[Json]]) -> Iterator[Figure]:
    yield Figure("publish_pause_s", round(max(full[0]), 4), "s", "the same load without a push", {
        "clients": CLIENTS, "each_s": [round(gap, 2) for gap in full[0]], "median_s": round(median(full[0]), 4),
        "quiet_s": round(max(quiet), 4), "adapter_each_s": [round(gap, 2) for gap in low[0]],
        "server_paused_s": round(max(server["pause_s"] for server in full[1]), 4),
        "adapter_s": round(max(low[0]), 4), "adapter_median_s": round(median(low[0]), 4),
        "parity_full_nats": max(server["parity_nats"] for server in full[1]),
        "parity_adapter_nats": max(server["parity_nats"] for server in low[1])})
    yield Figure("publish_failed_requests", len(load.failed), "count", None, {
        "requests": load.done, "pushes": len(full[0]) + len(low[0]), "tokens_each": TOKENS,
        "first": (load.failed or [""])[0]})


if __name__ == "__main__":
    run_all(__doc__ or "", {"publish": measure})
