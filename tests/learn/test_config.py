"""Presets, overrides, and combinations that are refused with their reason."""

import subprocess
import sys
from typing import Any

import pytest

from agentsdpo.errors import ConfigError
from agentsdpo.learn.config import LearnConfig
from agentsdpo.learn.presets import PRESETS, TOY, resolve


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_resolves_alone_and_for_the_toy_model(name: str) -> None:
    assert resolve(name).lr == 1e-6
    assert resolve(name, TOY[name]).lr >= 1e-4


def test_preset_fields_are_those_of_the_specification() -> None:
    blog, robust = resolve("sdpopp"), resolve("robust")
    assert (blog.form, blog.ratio, blog.eps_lo, blog.eps_hi, blog.cap) == ("sampled", "ppo", 0.2, 0.2, 2.0)
    assert (blog.adv_clip, blog.adv_decay, blog.max_staleness, blog.teacher, blog.batch) == (3.0, 0.99, 3, "live", 16)
    assert (robust.form, robust.beta, robust.support, robust.top_k, robust.ratio) == (
        "divergence", 0.0, "union", 64, "none")
    assert (robust.gate, robust.c3, robust.veto, robust.max_staleness, robust.batch) == ("k3", 0.1, 1e-4, 8, 32)


def test_naive_differs_from_sdpopp_in_the_corrections_alone() -> None:
    ours, control = resolve("sdpopp").model_dump(), resolve("naive").model_dump()
    assert {key for key in ours if ours[key] != control[key]} == {"ratio", "adv_clip"}
    assert TOY["naive"] == TOY["sdpopp"]


@pytest.mark.parametrize(("preset", "overrides", "reason"), [
    ("robust", {"ratio": "tis"}, "does not depend on the sampled token"),
    ("robust", {"adv_clip": 3.0}, "no per-token gap to clip"),
    ("robust", {"support": "student"}, "raise the tail"),
    ("sdpopp", {"lr": 1e-4}, "allow_live_lr"),
    ("sdpopp", {"cap": 0.8}, "learn.cap is 0.8"),
    ("sdpopp", {"ratio_floor": 0.8}, "does not exist"),
    ("robust", {"beta": 1.5}, "learn.beta is 1.5"),
    ("robust", {"betas": (0.9, 1.0)}, "decays"),
    ("best", {}, "no preset 'best'"),
])
def test_what_makes_no_sense_is_refused_with_the_reason(preset: str, overrides: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        resolve(preset, overrides)


def test_the_override_flag_admits_a_fast_live_teacher() -> None:
    assert resolve("sdpopp", {"lr": 1e-4, "allow_live_lr": True}).teacher == "live"
    assert resolve("robust", {"support": "student", "beta": 1.0}).support == "student"


def test_a_nested_configuration_is_checked_too() -> None:
    with pytest.raises(ValueError, match="does not depend on the sampled token"):
        LearnConfig(ratio="is")


def test_settings_import_without_torch() -> None:
    code = "import agentsdpo.learn.presets, agentsdpo.learn.rows, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
