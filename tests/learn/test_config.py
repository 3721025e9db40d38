"""Presets, overrides, and combinations that are refused with their reason."""

import subprocess
import sys
from typing import Any, get_args

import pytest

from agentsdpo.assemble import check_request
from agentsdpo.config import from_mapping
from agentsdpo.errors import ConfigError
from agentsdpo.learn.config import LearnConfig
from agentsdpo.learn.presets import PRESETS, TOY, resolve


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_resolves_alone_and_for_the_toy_model(name: str) -> None:
    published = {"conversations": 3e-5, "test_time": 1e-5, "parity_trl": 5e-5, "parity_lasgroup": 1e-5,
                 "parity_openclaw": 1e-5}
    assert resolve(name).lr == published.get(name, 1e-6)
    tried = {"sdpopp": 6e-4, "grpo": 3e-4, "opd_grpo": 3e-4, "safe_agent": 3e-4}
    assert resolve(name, TOY[name]).lr == tried.get(name, 1e-4 if resolve(name).form == "sampled" else 6e-4)
    assert resolve(name).parity == name.startswith("parity_"), "a known flaw is never the default"


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
    assert {**TOY["naive"], "lr": 6e-4} == TOY["sdpopp"]


@pytest.mark.parametrize(("preset", "overrides", "reason"), [
    ("robust", {"ratio": "tis"}, "does not depend on the sampled token"),
    ("robust", {"adv_clip": 3.0}, "no per-token gap to clip"),
    ("robust", {"support": "student"}, "raise the tail"),
    ("sdpopp", {"lr": 1e-4}, "allow_live_lr"),
    ("sdpopp", {"cap": 0.8}, "learn.cap is 0.8"),
    ("sdpopp", {"ratio_floor": 0.8}, "does not exist"),
    ("robust", {"beta": 1.5}, "learn.beta is 1.5"),
    ("robust", {"betas": (0.9, 1.0)}, "decays"),
    ("robust", {"ratio": "clamp"}, "does not depend on the sampled token"),
    ("sdpopp", {"ratio": "clamp"}, "floor keeps pushing"),
    ("sdpopp", {"cap": 1.1}, "learn.cap is 1.1 with learn.eps_hi 0.2"),
    ("sdpopp", {"gate_unit": "branch"}, "neither learn.gate nor learn.veto"),
    ("robust", {"normaliser": "constant"}, "loss_tokens None"),
    ("robust", {"loss_tokens": 100}, "with normaliser 'constant', and with no other"),
    ("safe_agent", {"token_weight": "sdar"}, "reshaped by the gap already"),
    ("robust", {"max_staleness": 0, "staleness_decay": 0.9}, "nothing stale is left"),
    ("robust", {"mix": "credit"}, "a divergence has no sign"),
    ("robust", {"mix": "grade"}, "neither divergence nor gap"),
    ("grpo", {"adv_clip": 3.0}, "learn.mix is 'grade' with learn.form 'sampled', learn.adv_clip 3.0"),
    ("sdpopp", {"mix": "blend", "mix_weight": 1.0}, "weight below 1"),
    ("robust", {"beta_kl": 0.01, "teacher": "ema"}, "initial weights are the reference"),
    ("robust", {"teacher": "trust_region", "trust": 1.0, "lr": 1e-4}, "follows the student"),
    ("robust", {"mix": "everything"}, "learn.mix is 'everything'"),
    ("best", {}, "no preset 'best'"),
])
def test_what_makes_no_sense_is_refused_with_the_reason(preset: str, overrides: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        resolve(preset, overrides)


def test_a_preset_brings_its_groups_and_its_hints_and_yields_to_what_is_asked() -> None:
    grpo = from_mapping({"preset": "grpo"})
    assert (grpo.group, grpo.replay.unit, grpo.hint.sources, grpo.learn.batch) == (8, "group", (), 8)
    mine = from_mapping({"preset": "grpo", "replay": {"max_uses": 2}}, ["group=4", "hint.sources=['criteria']"])
    assert (mine.group, mine.replay.unit, mine.replay.max_uses, mine.hint.sources) == (4, "group", 2, ("criteria",))
    sdpo = from_mapping({"preset": "sdpo"})
    assert (sdpo.group, sdpo.replay.unit, sdpo.hint.sources) == (8, "episode", ("peer", "criteria"))
    assert from_mapping({"preset": "sdft"}).hint.sources == ("demo",)
    assert from_mapping({}).group == 1
    with pytest.raises(ConfigError, match="episodes_per_step is 12 with groups of 8 attempts; set .* multiple of 8"):
        from_mapping({"preset": "grpo", "episodes_per_step": 12})


@pytest.mark.parametrize(("sets", "reason"), [
    (["group=1"], "with group 1: alone in its group"),
    (["replay.unit='episode'"], "replay.unit 'episode': episodes of one group would be drawn in different steps")])
def test_an_advantage_of_groups_needs_groups(sets: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_request(from_mapping({"preset": "grpo"}, sets))
    check_request(from_mapping({"preset": "grpo"}, [*sets, "learn.advantage='reinforce'"]))


def test_the_override_flag_admits_a_fast_live_teacher() -> None:
    assert resolve("sdpopp", {"lr": 1e-4, "allow_live_lr": True}).teacher == "live"
    assert resolve("robust", {"support": "student", "beta": 1.0}).support == "student"


def test_every_correction_has_its_name_in_the_settings_and_every_setting_its_correction() -> None:
    from agentsdpo.learn.ratio import RATIOS
    assert set(get_args(LearnConfig.model_fields["ratio"].annotation)) == set(RATIOS)
    for name in RATIOS:
        assert resolve("sdpopp", {"ratio": name, "parity": name == "clamp"}).ratio == name
    assert resolve("robust", {"ratio": "tis", "mix": "add"}).ratio == "tis", "there it corrects the policy gradient"
    assert resolve("robust", {"ratio": "turn_geo"}).ratio == "turn_geo", "a prefix has a meaning"


def test_a_parity_preset_says_that_it_repeats_a_flaw(tiny_model: Any, caplog: pytest.LogCaptureFixture) -> None:
    from agentsdpo.learn.learner import Learner
    Learner(tiny_model, resolve("robust"))
    assert not caplog.records
    Learner(tiny_model, resolve("parity_lasgroup"))
    assert "repeats a known flaw" in caplog.text


def test_a_nested_configuration_is_checked_too() -> None:
    with pytest.raises(ValueError, match="does not depend on the sampled token"):
        LearnConfig(ratio="is")


def test_settings_import_without_torch() -> None:
    code = "import agentsdpo.learn.presets, agentsdpo.learn.rows, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
