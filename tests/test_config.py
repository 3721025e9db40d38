"""Settings: TOML in and out, overrides, presets, and errors that name key, value and what is expected."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from agentsdpo.config import RunConfig, describe, from_mapping, load
from agentsdpo.errors import ConfigError
from agentsdpo.learn.presets import PRESETS, TOY
from agentsdpo.settings import Settings
from agentsdpo.settings_io import read_toml, with_sets


def test_nothing_said_is_the_default_run() -> None:
    assert load() == RunConfig()
    assert load().learn.lr == TOY["robust"]["lr"], "the shipped model learns at its own rate"


@pytest.mark.parametrize("sets", [[], ["preset=sdpopp", "learn.cap=3"], ["learn.max_staleness=none", "staleness=64"],
                                  ["collect.max_wall_s=1.5", "eval.splits=['val', 'test_firm']"],
                                  ['name="quoted \\" name"', "learn.betas=[0.8, 0.95]"]])
def test_toml_out_reads_back_to_the_same_config(sets: list[str], tmp_path: Path) -> None:
    config = load(sets=sets)
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml())
    assert load(path) == config
    assert load(path).to_toml() == config.to_toml()


def test_toml_holds_every_setting() -> None:
    tables = tomllib.loads(load().to_toml())
    for setting in describe():
        value: Any = tables
        for part in setting.key.split("."):
            value = value[part]


def test_file_then_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('steps = 7\n[learn]\nmax_staleness = 16\n[eval]\nsplits = ["val"]\n')
    config = load(path, ["steps=9", "hint.level=2", "model=/models/other"])
    assert (config.steps, config.learn.max_staleness, config.eval.splits, config.hint.level) == (9, 16, ("val",), 2)
    assert config.model == "/models/other"
    assert config.learn.lr == PRESETS["robust"]["lr"], "another model is not trained at the toy's learning rate"


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_preset_lies_under_the_learn_table(preset: str) -> None:
    learn = from_mapping({"preset": preset, "learn": {"weight_decay": 0.25}}).learn
    for key, value in {**PRESETS[preset], **TOY[preset], "weight_decay": 0.25}.items():
        assert getattr(learn, key) == value


@pytest.mark.parametrize("sets", [["learn.adapter.rank=8"], ["learn.lr=1e-6"], ["model=seed"]])
def test_an_adapters_rate_is_for_adapters_unless_it_is_given(sets: list[str]) -> None:
    assert load(sets=["preset=conversations", "model=/m", *sets]).preset == "conversations"


@pytest.mark.parametrize(("sets", "message"), [
    (["learn.max_stalness=3"], r"learn.max_stalness is not a setting; did you mean learn.max_staleness\?"),
    (["max_staleness=3"], r"max_staleness is not a setting; did you mean learn.max_staleness\?"),
    (["lern.lr=1"], r"lern is not a setting; (did you mean learn\.|list all)"),
    (["qqqq=3"], r"qqqq is not a setting; list all settings with: agentsdpo config --describe"),
    (["steps=0"], r"steps is 0; it must be an integer in \[1, 10000000\]"),
    (["steps='7'"], r"steps is '7'; it must be an integer in \[1, 10000000\]"),
    (["steps=many"], r"steps is 'many'; it must be an integer"),
    (["steps=7.5"], r"steps is 7.5; it must be an integer"),
    (["steps=true"], r"steps is True; it must be an integer"),
    (["learn.lr=2"], r"learn.lr is 2; it must be a number in \(0.0, 1.0\]"),
    (["learn.lr=nan"], r"learn.lr is nan; it must be a number"),
    (["learn.allow_live_lr=1"], r"learn.allow_live_lr is 1; it must be true or false"),
    (["learn.teacher=gold"], r"learn.teacher is 'gold'; it must be one of 'live', 'ema', 'frozen'"),
    (["learn.lr=none"], r"learn.lr is 'none'; it must be a number"),
    (["learn.max_staleness=soon"], 'learn.max_staleness is \'soon\'; it must be an integer or "none" in \\[0, 1'),
    (["learn.betas=[0.1]"], r"learn.betas.* it must be a list of 2, each a number"),
    (["eval.splits=[1]"], r"eval.splits is 1; it must be a list, each a text"),
    (["learn=3"], r"learn is 3; it must be a table of settings"),
    (["learn.adapter=3"], r"learn.adapter is 3; it must be a table of settings"),
    (["preset=best"], r"preset is 'best'; it must be one of sdpopp, robust, naive, sampled_tis"),
    (["preset=[1]"], r"preset is \[1\]; it must be one of"),
    (["learn.ratio=tis"], r"learn.ratio is 'tis' with learn.form 'divergence'; set ratio to 'none'"),
    (["staleness=9"], r"staleness is 9 but learn.max_staleness is 8: every row would be evicted; set"),
    (["learn.forward_tokens=900"], r"collect.window is 1536 but learn.forward_tokens is 900: an episode that fills"),
    (["preset=conversations", "model=/m"], r"the preset 'conversations' sets learn.lr to 3e-05, a rate for adapters"),
    (["steps"], r"--set 'steps' is not of the form key=value"),
    (["=3"], r"--set '=3' is not of the form"),
    (["seed.x=3", "seed.y=4"], r"seed is \{.*\}; it must be an integer"),
    (["seed=1", "seed.y=4"], r"--set 'seed.y=4' goes through 'seed', which is 1"),
])
def test_what_cannot_be_used_is_named(sets: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        load(sets=sets)
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_override_values_are_toml_or_bare_text() -> None:
    sets = ["a=1e-4", "b=true", "c=plain words", "d='x = y'", "e=[1, 2]", "f=1\ng = 2", "h=a=b", "i=inf"]
    found = with_sets({}, sets)
    assert found == {"a": 1e-4, "b": True, "c": "plain words", "d": "x = y", "e": [1, 2], "f": "1\ng = 2", "h": "a=b",
                     "i": float("inf")}


def test_overrides_leave_the_mapping_alone() -> None:
    data = {"learn": {"lr": 0.1}}
    with_sets(data, ["learn.lr=0.2"])
    assert data == {"learn": {"lr": 0.1}}


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.toml cannot be read: No such file"):
        read_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = 1\nb = = 2\n")
    with pytest.raises(ConfigError, match=r"bad.toml is not TOML: .*line 2"):
        read_toml(tmp_path / "bad.toml")
    (tmp_path / "latin.toml").write_bytes(b'a = "\xe9"')
    with pytest.raises(ConfigError, match=r"latin.toml cannot be read: it is not UTF-8"):
        read_toml(tmp_path / "latin.toml")


def test_every_setting_is_documented() -> None:
    settings = describe()
    assert len({s.key for s in settings}) == len(settings) > 40
    for setting in settings:
        assert setting.description, f"{setting.key} has no description"
        assert setting.type in ("a text", "true or false") or setting.range or "one of" in setting.type or (
            "list" in setting.type), f"{setting.key} has no range"


def test_documented_defaults_are_those_of_a_run() -> None:
    for setting in describe():
        value: Any = RunConfig()
        for part in setting.key.split("."):
            value = getattr(value, part)
        assert setting.default == value, setting.key


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().steps = 3  # pyright: ignore[reportAttributeAccessIssue]
    assert issubclass(RunConfig, Settings)


def test_verbs_with_settings_of_their_own_give_a_fitting_example_and_name_them() -> None:
    from typer.testing import CliRunner

    from agentsdpo.cli import app
    from agentsdpo.collect.proxy.config import ProxyConfig
    from agentsdpo.settings_io import build, with_sets

    for verb, example in ((["proxy"], "rate_per_minute=60"), (["bench", "run"], "budget.turns=40")):
        shown = " ".join(CliRunner().invoke(app, [*verb, "--help"]).stdout.split())
        assert f"as in --set {example};" in shown
        assert "learn.lr" not in shown
    with pytest.raises(ConfigError, match=r"^learn is not a setting; there are upstream, .*, rate_per_minute, "):
        build(ProxyConfig, with_sets({"upstream": "http://127.0.0.1:1", "store": "s"}, ["learn.lr=1"]))
