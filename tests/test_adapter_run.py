"""A run that trains an adapter publishes adapters on one base, by every way it may go on; full weights when asked."""

from pathlib import Path

import numpy as np
import pytest
import torch

from agentsdpo.config import RunConfig, from_mapping
from agentsdpo.errors import ConfigError
from agentsdpo.loop import train
from agentsdpo.offline import learn_alone
from agentsdpo.publish.registry import PolicyRegistry

SETS = ["collect.window=512", "collect.concurrency=16", "collect.max_tokens=48", "episodes_per_step=6", "learn.batch=4",
        "eval.final_episodes=1", "eval.episodes=1", "eval.splits=['val']", "eval.final_splits=['val']",
        "tripwire.on=false", "learn.max_staleness=20", "learn.gate=off", "learn.veto=none", "learn.adapter.rank=4",
        "learn.control_every=0", "publish.keep=2"]


def config(steps: int, *more: str) -> RunConfig:
    return from_mapping({"name": "t", "steps": steps}, [*SETS, *more])


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("adapter") / "run"
    train(config(2, "checkpoint_every=1"), out=out, mode="none")
    train(config(3, "checkpoint_every=1"), out=out, mode="none", resume=True)
    return out


def test_a_run_publishes_adapters_and_reads_them_merged(played: Path) -> None:
    registry = PolicyRegistry(played / "policies")
    assert [(v, registry.manifest(v).kind) for v in registry.versions()] == [(0, "full"), (2, "adapter"),
                                                                             (3, "adapter")]
    assert registry.manifest(3).base == 0
    base, merged = registry.load(0, framework="np"), registry.load(3, framework="np")
    changed = {name for name in base if not np.array_equal(base[name], merged[name])}
    assert changed == {name for name in base if name.endswith("_proj.weight")}
    assert sum(p.stat().st_size for p in registry.folder(3).iterdir()) < 0.2 * sum(
        p.stat().st_size for p in registry.folder(0).iterdir())


def test_merged_weights_are_those_the_learner_would_publish_in_full(played: Path, tmp_path: Path) -> None:
    """The same steps on the same store, once as adapters and once as full weights."""
    torch.set_num_threads(1)
    for kind in ("adapter", "full"):
        learn_alone(config(2, f"publish.kind={kind}"), played / "replay", out=tmp_path / kind, mode="none")
    low, full = PolicyRegistry(tmp_path / "adapter" / "policies"), PolicyRegistry(tmp_path / "full" / "policies")
    newest = low.latest()
    assert newest is not None
    assert newest == full.latest()
    assert (low.manifest(newest).kind, full.manifest(newest).kind) == ("adapter", "full")
    one, two = low.load(newest), full.load(newest)
    assert [name for name in two if not torch.equal(one[name], two[name])] == []


def test_an_adapter_cannot_be_published_where_none_is_trained() -> None:
    with pytest.raises(ConfigError, match="publish.kind is 'adapter' but learn.adapter.rank is 0"):
        from_mapping({}, ["publish.kind=adapter"])
