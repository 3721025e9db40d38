"""The recording proxy before a real vLLM: what it stores is what that server sampled, for each tenant by its own
adapter."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "collect" / "proxy"))

from proxy_stack import Stack, said  # pyright: ignore[reportMissingImports]

from agentsdpo.learn.scoring import ModelScorer
from agentsdpo.types import Episode

pytestmark = pytest.mark.vllm

TOOL = {"type": "function", "function": {"name": "note_get", "description": "", "parameters": {"type": "object"}}}
ANN, BOB = "ann-has-this-long-key", "bob-has-that-long-key"


@pytest.fixture
def stack(chat: Any, tmp_path: Path) -> Iterator[Stack]:
    made = Stack(chat, tmp_path / "store")
    yield made
    made.stop()


def parity(scorer: ModelScorer, episode: Episode) -> float:
    """Mean absolute difference of recorded and recomputed log-probs, nats."""
    off = [abs(own - told) for branch in episode.branches for call in branch.calls
           for own, told in zip(scorer.logps(branch.token_ids[:call.end].tolist(), call.end - call.start),
                                branch.logprobs[call.start:call.end].tolist(), strict=True)]
    return float(np.mean(off))


def test_conversations_are_recorded_as_they_were_sampled(vllm_server: Any, stack: Stack) -> None:
    from agentsdpo.envs.desk.seed import seed_path

    stack.start(upstream=vllm_server.url)
    history: list[Any] = [{"role": "system", "content": "You work at a desk."}, {"role": "user", "content": "File it."}]
    for i in range(3):
        answer = stack.ask(*history, conversation="c", tools=[TOOL], max_tokens=24, logprobs=True, top_logprobs=2)
        assert len(answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) >= 2
        history += [said(answer), {"role": "user", "content": f"Again, {i}."}]
    text = stack.post("/v1/completions", {"prompt": "Once", "max_tokens": 8, "conversation": "t", "stop": ["e"]}).json()
    assert "e" not in text["choices"][0]["text"]
    stack.stop_proxy()
    chat = next(e for e in stack.episodes() if e.task_id == "c")
    (branch,) = chat.branches
    assert [call.untrainable_reason for call in branch.calls] == [None] * 3
    assert branch.policy_versions == (0, 0)
    assert parity(ModelScorer(seed_path()), chat) < 1e-4
    assert chat.hint is not None
    assert chat.hint.turns == ((0, "Again, 0."), (1, "Again, 1."))


def test_each_tenant_is_served_by_its_newest_adapter(vllm_server: Any, stack: Stack, chat: Any, tmp_path: Path) -> None:
    import torch

    from agentsdpo.envs.desk.seed import seed_path
    from agentsdpo.learn.adapters import adapter_config, adapter_weights, add_adapter
    from agentsdpo.learn.config import AdapterConfig
    from agentsdpo.learn.load import load_model
    from agentsdpo.publish.registry import PolicyRegistry

    registries, loaded = {}, []
    for seed, tenant in enumerate(("ann", "bob")):
        model = load_model(seed_path(), chat)
        registry = registries[tenant] = PolicyRegistry(tmp_path / tenant, base_model="seed")
        registry.publish(model.state_dict(), learner_step=0)
        add_adapter(model, AdapterConfig(rank=4))
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        registry.publish_adapter(adapter_weights(model), adapter_config(model), base=0, learner_step=1)
    try:
        stack.start({ANN: "ann", BOB: "bob"}, upstream=vllm_server.url, adapters="pol")
        assert stack.ask("Hi.", key=ANN, max_tokens=8)["model"] == "policy"
        for tenant, registry in registries.items():
            loaded.append(f"pol-{tenant}@v1")
            httpx.post(f"{vllm_server.url}/v1/load_lora_adapter", timeout=60, json={
                "lora_name": loaded[-1], "lora_path": str(registry.folder(1).resolve())}).raise_for_status()
        assert stack.proxy is not None
        stack.run(stack.proxy.house.upstream.look())
        for key, tenant in ((ANN, "ann"), (BOB, "bob")):
            assert stack.ask("Same words.", conversation="c", key=key, max_tokens=32)["model"] == f"pol-{tenant}@v1"
        stack.stop_proxy()
    finally:
        for name in loaded:
            httpx.post(f"{vllm_server.url}/v1/unload_lora_adapter", json={"lora_name": name}, timeout=60)
    scorer = ModelScorer(seed_path())
    for tenant, other in (("ann", "bob"), ("bob", "ann")):
        episode = next(e for e in stack.episodes(tenant) if e.task_id == "c")
        assert episode.branches[0].policy_versions == (1, 1)
        scorer.load(registries[tenant].load(1))
        assert parity(scorer, episode) < 1e-3
        scorer.load(registries[other].load(1))
        assert parity(scorer, episode) > 1e-2
