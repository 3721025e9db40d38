"""Adapter versions: small files that engines can serve, full weights for whoever reads weights, a base that stays."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentsdpo.errors import CorruptionError, RegistryError
from agentsdpo.publish.adapter import refuse_unservable
from agentsdpo.publish.manifest import ADAPTER, ADAPTER_CONFIG, WEIGHTS
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.publish.served import Served, all_served, pushing_to, read_served, write_served

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "bias": "none"}
NAME = "base_model.model.layers.0.q"


def factors(value: float, layer: str = NAME) -> dict[str, np.ndarray]:
    """A pair of rank 2 on a layer of 3 outputs and 4 inputs; its product is ``value`` times a matrix of twos."""
    return {f"{layer}.lora_A.weight": np.full((2, 4), 1, np.float32),
            f"{layer}.lora_B.weight": np.full((3, 2), value, np.float32)}


def filled(root: Path, n: int) -> PolicyRegistry:
    """Version 0 is the base, of ones; version v an adapter that adds 4 v."""
    registry = PolicyRegistry(root / "policies", base_model="seed")
    registry.publish({"layers.0.q.weight": np.ones((3, 4), np.float32), "layers.0.o.weight": np.ones((2, 2))},
                     learner_step=0)
    for step in range(1, n):
        registry.publish_adapter(factors(step), CONFIG, base=0, learner_step=step)
    return registry


def test_adapter_is_small_and_reads_as_full_weights(tmp_path: Path) -> None:
    registry = filled(tmp_path, 3)
    manifest = registry.manifest(2)
    assert (manifest.kind, manifest.base, manifest.base_weights_id) == ("adapter", 0, registry.manifest(0).weights_id)
    assert sorted(p.name for p in registry.folder(2).iterdir()) == [ADAPTER_CONFIG, ADAPTER, "manifest.json"]
    loaded = registry.load(2, framework="np")
    assert loaded["layers.0.q.weight"].dtype == np.float32
    assert loaded["layers.0.q.weight"].tolist() == np.full((3, 4), 1 + 8 * 2 / 2 * 1.0).tolist()
    assert loaded["layers.0.o.weight"].tolist() == np.ones((2, 2)).tolist()
    assert registry.base() == 0


def test_ids_are_equal_exactly_for_equal_weights(tmp_path: Path) -> None:
    registry = filled(tmp_path, 2)
    same = registry.publish_adapter(factors(1), CONFIG, base=0, learner_step=9)
    scaled = registry.publish_adapter(factors(1), CONFIG | {"lora_alpha": 8}, base=0, learner_step=9)
    ids = [registry.manifest(v).weights_id for v in (1, same, scaled)]
    assert ids[0] == ids[1] != ids[2]


def test_patterns_and_rank_stabilised_scales_are_those_of_peft(tmp_path: Path) -> None:
    registry = filled(tmp_path, 1)
    version = registry.publish_adapter(factors(1), CONFIG | {"alpha_pattern": {"q": 8}}, base=0, learner_step=1)
    assert registry.load(version, framework="np")["layers.0.q.weight"][0, 0] == 1 + 8 / 2 * 2
    version = registry.publish_adapter(factors(1), CONFIG | {"use_rslora": True}, base=0, learner_step=1)
    np.testing.assert_allclose(registry.load(version, framework="np")["layers.0.q.weight"], 1 + 4 / np.sqrt(2) * 2)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers
def test_peft_reads_what_the_learner_publishes_and_both_agree(tmp_path: Path, tiny_model: Any) -> None:
    import torch
    from peft import PeftModel

    from agentsdpo.learn.adapters import adapter_config, adapter_weights, add_adapter, merged_weights
    from agentsdpo.learn.config import AdapterConfig

    registry = PolicyRegistry(tmp_path)
    registry.publish({name: t.clone() for name, t in tiny_model.state_dict().items() if name != "lm_head.weight"},
                     learner_step=0)
    learnt, plain = tiny_model, type(tiny_model)(tiny_model.config).eval()
    plain.load_state_dict(learnt.state_dict())
    add_adapter(learnt, AdapterConfig(rank=4))
    with torch.no_grad():
        for parameter in learnt.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    version = registry.publish_adapter(adapter_weights(learnt), adapter_config(learnt), base=0, learner_step=1)
    loaded, merged = registry.load(version), merged_weights(learnt)
    assert {n: t for n, t in loaded.items() if not torch.equal(t, merged[n])} == {}, "bit for bit the learner's own"
    ids = torch.arange(12)[None]
    with torch.no_grad():
        read = PeftModel.from_pretrained(plain, str(registry.folder(version)))
        torch.testing.assert_close(read(input_ids=ids).logits, learnt(input_ids=ids).logits)
    targets = json.loads((registry.folder(version) / ADAPTER_CONFIG).read_text())["target_modules"]
    assert targets == sorted(targets), "the same bytes in every run"


@pytest.mark.parametrize(("more", "names", "match"), [
    ({"modules_to_save": ["norm"]}, NAME, r"modules_to_save = \['norm'\], which vLLM does not serve; publish the"),
    ({"use_dora": True}, NAME, "use_dora = True"),
    ({"bias": "all"}, NAME, r"trains biases \(bias = 'all'\)"),
    ({"lora_bias": True}, NAME, "lora_bias"),
    ({"target_parameters": ["experts"]}, NAME, "target_parameters"),
    ({}, "base_model.model.lm_head", "the adapter changes lm_head"),
    ({}, "base_model.model.model.embed_tokens", r"changes model.embed_tokens: .* publish.kind = \"full\""),
    ({"r": 16}, NAME, "has rank 2 but adapter_config.json says r = 16"),
])
def test_what_vllm_cannot_serve_is_refused_with_the_way_out(more: dict[str, Any], names: str, match: str) -> None:
    with pytest.raises(RegistryError, match=match):
        refuse_unservable(CONFIG | more, factors(1, names))


def test_a_half_pair_and_other_tensors_are_refused() -> None:
    with pytest.raises(RegistryError, match="only one factor for"):
        refuse_unservable(CONFIG, {f"{NAME}.lora_A.weight": np.ones((2, 4))})
    with pytest.raises(RegistryError, match="is no low-rank factor"):
        refuse_unservable(CONFIG, factors(1) | {"base_model.model.norm.weight": np.ones(2)})


def test_misfits_and_wrong_bases_are_refused(tmp_path: Path) -> None:
    registry = filled(tmp_path, 2)
    with pytest.raises(RegistryError, match=r"product of shape \[3, 4\], the base has \[2, 2\]"):
        registry.publish_adapter(factors(1, "base_model.model.layers.0.o"), CONFIG, base=0, learner_step=1)
    with pytest.raises(RegistryError, match="the base has None"):
        registry.publish_adapter(factors(1, "base_model.model.elsewhere"), CONFIG, base=0, learner_step=1)
    with pytest.raises(RegistryError, match="is an adapter itself, no base for one; name the version it stands on, 0"):
        registry.publish_adapter(factors(1), CONFIG, base=1, learner_step=1)
    assert registry.versions() == [0, 1], "nothing was published"


def test_damage_of_adapter_and_of_its_base_is_found(tmp_path: Path) -> None:
    registry = filled(tmp_path, 3)
    path = registry.folder(1) / ADAPTER
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptionError, match="adapter_model.safetensors of policy version 1"):
        registry.load(1, framework="np")
    other = PolicyRegistry(tmp_path / "other")
    other.publish({"layers.0.q.weight": np.zeros((3, 4), np.float32)}, learner_step=0)
    for name in (WEIGHTS, "manifest.json"):
        (registry.folder(0) / name).write_bytes((other.folder(0) / name).read_bytes())
    with pytest.raises(CorruptionError, match="version 2 is an adapter on weights .* but version 0 holds"):
        registry.load(2, framework="np")


def test_prune_keeps_bases_and_what_servers_hold(tmp_path: Path) -> None:
    registry = filled(tmp_path, 10)
    write_served(registry.root, Served(url="http://a:1", version=5, holds=(4, 5), pushing=6, before=("5", "/x")))
    assert registry.prune(2) == [1, 2, 3, 7]
    assert registry.versions() == [0, 4, 5, 6, 8, 9]
    assert registry.load(9, framework="np")["layers.0.q.weight"][0, 0] == 1 + 4 * 9
    registry.publish({"layers.0.q.weight": np.zeros((3, 4), np.float32)}, learner_step=99)
    write_served(registry.root, Served(url="http://a:1", version=10, holds=(10,)))
    assert registry.prune(1) == [0, 4, 5, 6, 8, 9], "a base that nothing needs goes"
    assert registry.base() is None, "weights in the middle of training are no base of later adapters"


def test_record_of_a_server(tmp_path: Path) -> None:
    one, two = Served(url="http://h:1/", version=3, holds=(3,)), Served(url="http://h:2/")
    for record in (one, two):
        write_served(tmp_path, record)
    assert read_served(tmp_path, one.url) == one
    assert all_served(tmp_path) == [one, two]
    with pushing_to(tmp_path, one.url), pushing_to(tmp_path, two.url), pytest.raises(
            RegistryError, match=r"another program is pushing .* to http://h:1/"), pushing_to(tmp_path, one.url):
        pass
    next((tmp_path / "served").glob("h-1-*.json")).write_text("{}")
    with pytest.raises(CorruptionError, match="no record of a server"):
        all_served(tmp_path)
