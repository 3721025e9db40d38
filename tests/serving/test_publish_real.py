"""Publishing to a real vLLM while it serves: nothing fails, every token belongs to the version its span names."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from agentsdpo.publish.control import VllmControl
from agentsdpo.publish.push import mean_difference
from agentsdpo.publish.push_adapter import AdapterPusher
from agentsdpo.publish.push_full import ReloadPusher
from agentsdpo.publish.registry import PolicyRegistry

pytestmark = pytest.mark.vllm

CLOSE = 1e-3
"""Nats; float32 on both sides gives about 1e-6."""


@pytest.fixture(scope="module")
def seed() -> Any:
    """Weights of the seed model by name, tied ones of one memory."""
    from agentsdpo.envs.desk.seed import seed_path
    from agentsdpo.learn.load import load_chat, load_model

    return load_model(seed_path(), load_chat(seed_path())).state_dict()


@pytest.fixture
def registry(seed: Any, tmp_path: Path) -> PolicyRegistry:
    """Version 0 is the seed model; 1 and 2 are it with every weight moved."""
    import torch

    found = PolicyRegistry(tmp_path / "policies", base_model="seed")
    found.publish(seed, learner_step=0)
    for version in (1, 2):
        dice = torch.Generator().manual_seed(version)
        moved = {name: tensor + 0.02 * torch.randn(tensor.shape, generator=dice) for name, tensor in seed.items()
                 if name != "lm_head.weight"}
        found.publish(moved | {"lm_head.weight": moved["model.embed_tokens.weight"]}, learner_step=version)
    return found


@pytest.fixture
def adapters(tmp_path: Path) -> PolicyRegistry:
    """Version 0 is the seed model, 1 to 3 are adapters on it."""
    import torch

    from agentsdpo.envs.desk.seed import seed_path
    from agentsdpo.learn.adapters import adapter_config, adapter_weights, add_adapter
    from agentsdpo.learn.config import AdapterConfig
    from agentsdpo.learn.load import load_chat, load_model

    model = load_model(seed_path(), load_chat(seed_path()))
    found = PolicyRegistry(tmp_path / "low", base_model="seed")
    found.publish(model.state_dict(), learner_step=0)
    add_adapter(model, AdapterConfig(rank=8))
    for version in (1, 2, 3):
        dice = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=dice))
        found.publish_adapter(adapter_weights(model), adapter_config(model), base=0, learner_step=version)
    return found


@pytest.fixture
def server(vllm_server: Any, registry: PolicyRegistry) -> Iterator[VllmControl]:
    """The server's controls; afterwards it is as it was started."""
    with VllmControl(vllm_server.url) as found:
        yield found
        for name in found.adapters():
            found.unload_adapter(name)
        found.pause()
        found.reload(registry.folder(0).resolve())
        found.reset_cache()
        found.set_label("0")
        found.resume()


def scorer_of(registry: PolicyRegistry) -> Any:
    from agentsdpo.publishing import RegistryScorer

    return RegistryScorer(registry)


class Load:
    """Clients that ask for one completion after the other until the block ends; ``answers`` are all they got."""

    def __init__(self, url: str, prompt: list[int], *, clients: int = 4, tokens: int = 60, model: str = "policy"
                 ) -> None:
        self.url, self.prompt, self.clients, self.tokens, self.model = url, prompt, clients, tokens, model
        self.answers, self.failures = list[Any](), list[str]()
        self._over = threading.Event()
        self.busy = threading.Event()

    def __enter__(self) -> "Load":
        self._threads = [threading.Thread(target=self._ask) for _ in range(self.clients)]
        for thread in self._threads:
            thread.start()
        self.busy.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        body = {"token_ids": self.prompt, "model": self.model, "sampling_params": {
            "max_tokens": self.tokens, "temperature": 1.0, "logprobs": 0, "ignore_eos": True}}
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while not self._over.is_set():
                self.busy.set()
                try:
                    answer = client.post("/inference/v1/generate", json=body).raise_for_status()
                    self.answers.append(answer.json()["choices"][0])
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                    return


def told(choice: Any) -> list[float]:
    return [token["logprob"] for token in choice["logprobs"]["content"]]


def test_reload_under_load_loses_no_request_and_spans_tell_the_truth(
        vllm_server: Any, server: VllmControl, registry: PolicyRegistry) -> None:
    scorer = scorer_of(registry)
    pusher = ReloadPusher(scorer)
    scorer.load(1)
    prompt = list(scorer.prompt[:80])
    with Load(vllm_server.url, prompt, tokens=200) as load:
        reports = [pusher.push(registry, version, [vllm_server.url]) for version in (1, 2)]
    assert [report.ok for report in reports] == [True, True], reports
    parity = [report.servers[0].parity_nats for report in reports]
    assert all(nats is not None and nats < CLOSE for nats in parity)
    assert load.failures == []
    assert all(len(choice["token_ids"]) == 200 for choice in load.answers)
    mixed = [choice for choice in load.answers if len(choice["weight_versions"]) > 1]
    assert mixed, "no request was in flight during a push"
    for choice in mixed[:2]:
        for span in choice["weight_versions"]:
            scorer.load(int(span["version"]))
            ids = [*prompt, *choice["token_ids"][:span["end"]]]
            want = scorer.logps(ids, span["end"] - span["start"])
            assert mean_difference(told(choice)[span["start"]:span["end"]], want) < CLOSE, span


def test_a_prompt_seen_before_is_answered_by_the_new_weights(vllm_server: Any, server: VllmControl,
                                                             registry: PolicyRegistry) -> None:
    scorer = scorer_of(registry)
    scorer.load(1)
    prompt = (list(scorer.prompt) * 3)[:700]
    model, _ = server.base()

    def off() -> float:
        ids, logps = server.sample(model, prompt, 1)
        return mean_difference(logps, scorer.logps([*prompt, *ids], 1))

    server.sample(model, prompt, 1)
    server.pause()
    server.reload(registry.folder(1).resolve())
    server.resume()
    assert off() < 1e-4, "pausing clears the cache as well"
    scorer.load(2)
    server.reload(registry.folder(2).resolve())
    assert off() > 1e-4, "a reload alone leaves K/V of the old weights: the trap is there"
    server.set_label("0")
    scorer.load(1)
    assert ReloadPusher(scorer).push(registry, 1, [vllm_server.url]).ok
    assert off() < 1e-4


def test_adapters_of_two_versions_are_served_at_once(vllm_server: Any, server: VllmControl,
                                                     adapters: PolicyRegistry) -> None:
    scorer = scorer_of(adapters)
    pusher = AdapterPusher(scorer, keep=2)
    with Load(vllm_server.url, list(range(50, 90)), tokens=40) as load:
        for version in (1, 2):
            report = pusher.push(adapters, version, [vllm_server.url])
            assert report.ok, report
            assert report.servers[0].pause_s == 0.0
    assert load.failures == []
    assert list(server.adapters()) == ["policy@v1", "policy@v2"]
    prompt = list(scorer.prompt[:100])

    def ask(name: str) -> tuple[str, list[int], list[float]]:
        with VllmControl(vllm_server.url) as own:
            return name, *own.sample(name, prompt, 24)

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, ["policy", "policy@v1", "policy@v2"] * 2))
    for name, ids, logps in answers:
        version = int(name.partition("@v")[2] or 0)
        scorer.load(version)
        assert mean_difference(logps, scorer.logps([*prompt, *ids], 24)) < CLOSE, name
        scorer.load((version + 1) % 3)
        assert mean_difference(logps, scorer.logps([*prompt, *ids], 24)) > 0.02, "versions are told apart"
    assert pusher.push(adapters, 3, [vllm_server.url]).ok
    assert list(server.adapters()) == ["policy@v2", "policy@v3"]
    refused = httpx.post(f"{vllm_server.url}/v1/completions", json={"model": "policy@v1", "prompt": prompt})
    assert refused.status_code == 404


def _gone(scorer: Any, folder: Path) -> None:
    """Files that vanish after they were checked: the server's reload fails."""
    load = scorer.load

    def then_lost(version: int) -> None:
        load(version)
        (folder / "model.safetensors").rename(folder / "lost")

    scorer.load = then_lost


def _wrong(scorer: Any, folder: Path) -> None:
    """Other log-probs than the server's."""
    logps = scorer.logps
    scorer.logps = lambda ids, n: [value - 0.1 for value in logps(ids, n)]


@pytest.mark.parametrize("fault", [_gone, _wrong])
def test_a_failed_push_leaves_the_old_version_serving(vllm_server: Any, server: VllmControl, registry: PolicyRegistry,
                                                      fault: Callable[[Any, Path], None]) -> None:
    good = scorer_of(registry)
    assert ReloadPusher(good).push(registry, 1, [vllm_server.url]).ok
    bad = scorer_of(registry)
    fault(bad, registry.folder(2))
    with Load(vllm_server.url, list(range(50, 90)), clients=2, tokens=60) as load:
        report = ReloadPusher(bad).push(registry, 2, [vllm_server.url])
    assert not report.ok
    assert "it serves '1' as before" in str(report.servers[0].error)
    assert load.failures == []
    assert (server.label(), server.paused()) == ("1", False)
    ids, logps = server.sample("policy", good.prompt, 8)
    assert mean_difference(logps, good.logps([*good.prompt, *ids], 8)) < CLOSE
