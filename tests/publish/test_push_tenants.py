"""Registries of several tenants on one server: adapters side by side on a base that each has its own number for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentsdpo.publish.push_adapter import AdapterPusher, AutoPusher
from agentsdpo.publish.push_full import ReloadPusher
from agentsdpo.publish.registry import PolicyRegistry

URL = "http://server:8000"
ScorerOf = Callable[[PolicyRegistry], Any]


@pytest.fixture
def late(adapters: PolicyRegistry, tmp_path: Path) -> PolicyRegistry:
    """The registry of a tenant whose learner began when there was traffic of version 0: the base is its version 1."""
    found = PolicyRegistry(tmp_path / "late", base_model="seed", first=1)
    found.publish(dict(adapters.load(0)), learner_step=0)
    factors = {f"base_model.model.q.lora_{side}.weight": np.ones((1, 1), np.float32) for side in "AB"}
    found.publish_adapter(factors, {"r": 1, "lora_alpha": 1, "bias": "none"}, base=1, learner_step=1)
    return found


def auto(registry: PolicyRegistry, fake: Any, scorer_of: ScorerOf, stem: str | None) -> AutoPusher:
    scorer = scorer_of(registry)
    return AutoPusher(ReloadPusher(scorer, connect=fake.connect),
                      AdapterPusher(scorer, stem=stem, connect=fake.connect), connect=fake.connect)


def test_tenants_share_a_server_by_name(adapters: PolicyRegistry, fake: Any, scorer_of: ScorerOf) -> None:
    for version in (1, 2, 3):
        for tenant in ("pol-a", "pol-b"):
            AdapterPusher(scorer_of(adapters), keep=2, stem=tenant, connect=fake.connect).push(adapters, version, [URL])
    assert sorted(fake.adapters) == ["pol-a@v2", "pol-a@v3", "pol-b@v2", "pol-b@v3"]


def test_a_base_that_serves_already_is_no_push_to_another_tenant(adapters: PolicyRegistry, fake: Any,
                                                                 scorer_of: ScorerOf, tmp_path: Path) -> None:
    fake.label = "0"
    AdapterPusher(scorer_of(adapters), stem="pol-ann", connect=fake.connect).push(adapters, 1, [URL])
    other = PolicyRegistry(tmp_path / "bob")
    other.publish(dict(adapters.load(0)), learner_step=0)
    report = ReloadPusher(scorer_of(other), connect=fake.connect).push(other, 0, [URL])
    assert report.ok
    assert not report.servers[0].changed
    assert list(fake.adapters) == ["pol-ann@v1"]
    assert "/pause" not in fake.calls


@pytest.mark.parametrize("alone", [True, False])
def test_a_base_may_have_another_number_with_each_tenant(
        adapters: PolicyRegistry, late: PolicyRegistry, fake: Any, scorer_of: ScorerOf, alone: bool) -> None:
    fake.label = "0"
    if not alone:
        assert auto(adapters, fake, scorer_of, "pol-ann").push(adapters, 1, [URL]).ok
    report = auto(late, fake, scorer_of, "pol-bob").push(late, 2, [URL])
    assert report.ok, report
    assert (fake.label, list(fake.adapters)[-1]) == ("0", "pol-bob@v2")
    assert "/pause" not in fake.calls, "nobody else's traffic stands still, nor is renamed"
    assert auto(adapters, fake, scorer_of, "pol-ann").push(adapters, 2, [URL]).ok


def test_weights_that_are_not_the_base_are_seen_through(
        adapters: PolicyRegistry, late: PolicyRegistry, fake: Any, scorer_of: ScorerOf) -> None:
    fake.label, fake.value = "0", 3.0
    report = AdapterPusher(scorer_of(late), stem="pol-bob", connect=fake.connect).push(late, 2, [URL])
    assert "if the server was started with another model than version 1, push that first" in str(
        report.servers[0].error)
    assert not fake.adapters
    assert auto(late, fake, scorer_of, "pol-bob").push(late, 2, [URL]).ok, "there is nobody else: the base is reloaded"
    assert (fake.value, fake.label) == (0.0, "1")


@pytest.mark.parametrize(("stem", "label"), [(None, "0"), ("pol-bob", "unknown"), ("pol-bob", "3")])
def test_a_label_that_says_otherwise_is_believed(late: PolicyRegistry, fake: Any, scorer_of: ScorerOf,
                                                 stem: str | None, label: str) -> None:
    """Of the servers' only registry, of weights of no version, and of full weights of this registry."""
    late.publish(dict(late.load(1)), learner_step=2)
    fake.label = label
    report = AdapterPusher(scorer_of(late), stem=stem, connect=fake.connect).push(late, 2, [URL])
    assert f"serves weights {label!r}, the adapter stands on version 1" in str(report.servers[0].error)
