"""The registry in a bucket: what a learner announces is read elsewhere, whole and unchanged, from copies."""

from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentsdpo.config import from_mapping
from agentsdpo.errors import ConfigError, CorruptionError, RegistryError
from agentsdpo.publish import bucket
from agentsdpo.publish.bucket import BucketRegistry, MirroredRegistry
from agentsdpo.publish.push_full import ReloadPusher
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.publish.served import Served, read_served, write_served
from agentsdpo.publishing import follow, push, registry_at
from agentsdpo.replay.ids import uuid7

Reader = Callable[..., BucketRegistry]


@pytest.fixture(params=["folder", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "bucket")
    moto = request.getfixturevalue("moto")
    return f"s3://bucket/{uuid7()}?endpoint_override=127.0.0.1:{moto.port}&scheme=http"


@pytest.fixture
def learner(address: str, tmp_path: Path) -> MirroredRegistry:
    return MirroredRegistry(tmp_path / "policies", address, base_model="seed")


@pytest.fixture
def reader(address: str, tmp_path: Path, monkeypatch: Any) -> Reader:
    """Registries of machines with disks of their own, which ask the bucket every time."""
    monkeypatch.setattr("agentsdpo.publish.bucket.LOOK_S", -1.0)
    return lambda machine="there": BucketRegistry(address, tmp_path / machine)


def weights(value: float) -> dict[str, Any]:
    return {"q.weight": np.full((4, 3), value, np.float32)}


def test_what_is_announced_is_read_elsewhere(learner: MirroredRegistry, reader: Reader) -> None:
    there = reader()
    assert (there.latest(), there.versions()) == (None, [])
    for step in range(3):
        learner.publish(weights(step), learner_step=step)
    assert (there.latest(), there.versions()) == (2, [0, 1, 2])
    assert there.manifest(1) == learner.manifest(1)
    assert there.load(2, framework="np")["q.weight"].tolist() == weights(2)["q.weight"].tolist()
    assert [path.name for path in there.root.iterdir()] == ["000000000002"], "nothing else was fetched"
    assert learner.prune(1) == [0, 1]
    assert there.versions() == [2]
    with pytest.raises(RegistryError, match="policy version 0 is not in"):
        there.load(0)


def test_an_adapter_comes_with_its_base(learner: MirroredRegistry, reader: Reader) -> None:
    learner.publish(weights(1.0), learner_step=0)
    factors = {"base_model.model.q.lora_A.weight": np.ones((2, 3), np.float32),
               "base_model.model.q.lora_B.weight": np.ones((4, 2), np.float32)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"], "bias": "none"}
    learner.publish_adapter(factors, config, base=0, learner_step=1)
    there = reader()
    assert there.load(1, framework="np")["q.weight"].tolist() == learner.load(1, framework="np")["q.weight"].tolist()
    assert sorted(path.name for path in there.root.iterdir()) == ["000000000000", "000000000001"]


def test_a_roll_back_and_a_new_life_of_the_learner_are_seen(learner: MirroredRegistry, reader: Reader, address: str,
                                                            tmp_path: Path) -> None:
    there = reader()
    for step in range(3):
        learner.publish(weights(step), learner_step=step)
    assert there.load(2, framework="np")["q.weight"][0, 0] == 2
    learner.rewind(1)
    assert there.versions() == [0, 1]
    again = MirroredRegistry(tmp_path / "policies", address, base_model="seed")
    again.publish(weights(9.0), learner_step=2)
    assert again.latest() == there.latest() == 2
    assert reader("fresh").load(2, framework="np")["q.weight"][0, 0] == 9.0
    assert there.load(2, framework="np")["q.weight"][0, 0] == 9.0, "the copy of the version that was given up is not it"


def test_copies_that_nobody_needs_are_deleted(learner: MirroredRegistry, reader: Reader) -> None:
    there = reader()
    for step in range(5):
        learner.publish(weights(step), learner_step=step)
        there.load(step, framework="np")
        if step == 1:
            write_served(there.root, Served(url="http://h:1", version=1, holds=(1,)))
    assert sorted(int(path.name) for path in there.root.glob("0*")) == [1, 3, 4]


def test_a_damaged_copy_is_not_loaded(learner: MirroredRegistry, reader: Reader, address: str) -> None:
    learner.publish(weights(1.0), learner_step=0)
    there = reader()
    (there.folder(0) / "model.safetensors").write_bytes(b"half")
    with pytest.raises(CorruptionError):
        there.load(0)
    learner._bucket.remove("000000000000/model.safetensors")
    with pytest.raises(CorruptionError, match="is not whole"):
        reader("another").load(0)


def test_a_copy_that_breaks_off_is_tried_again_by_who_follows(
        learner: MirroredRegistry, reader: Reader, fake: Any, scorer_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    learner.publish({"q.weight": np.full((4, 4), 2.0, np.float32)}, learner_step=0)
    there, whole = reader(), bucket._pieces

    def breaks(source: Any) -> Iterator[bytes]:
        monkeypatch.setattr(bucket, "_pieces", whole)
        raise OSError("AWS Error NETWORK_CONNECTION during GetObject")
        yield

    monkeypatch.setattr(bucket, "_pieces", breaks)
    pusher = ReloadPusher(scorer_of(there), connect=fake.connect)
    reports = follow(there, pusher, ["http://127.0.0.1:1"], sleep=lambda _: None, clock=count().__next__)
    first, second = islice(reports, 2)
    assert "was not copied to" in (first.servers[0].error or "")
    assert second.ok


def test_readers_do_not_write_and_others_learn_what_a_server_holds(learner: MirroredRegistry, reader: Reader, fake: Any,
                                                                   scorer_of: Any) -> None:
    learner.publish({"q.weight": np.full((4, 4), 2.0, np.float32)}, learner_step=0)
    there, elsewhere = reader(), reader("elsewhere")
    for act in (lambda: there.publish(weights(1), learner_step=1), lambda: there.prune(1), lambda: there.rewind(0)):
        with pytest.raises(RegistryError, match="a copy to read"):
            act()
    url = "http://127.0.0.1:1"
    assert elsewhere.served(url) == Served(url=url)
    report = push(there, ReloadPusher(scorer_of(there), connect=fake.connect), 0, [url])
    assert report.ok, report
    assert elsewhere.served(url).version == 0
    assert read_served(elsewhere.root, url).version is None


def test_addresses(tmp_path: Path) -> None:
    assert isinstance(registry_at("s3://bucket/run/policies"), BucketRegistry)
    assert type(registry_at(tmp_path)) is PolicyRegistry
    with pytest.raises(ConfigError, match="publish.mirror is 'runs/x'"):
        from_mapping({"publish": {"mirror": "runs/x"}})
