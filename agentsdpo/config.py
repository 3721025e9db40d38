"""The configuration of a run: the rooms' settings side by side, read from one TOML file.

::

    name = "first"
    preset = "robust"          # starting point of [learn] and what it needs around it, see learn/presets.py
    steps = 200
    [learn]
    max_staleness = 16

What the file does not say is the preset's, then the default. ``config.toml`` in a run folder holds everything.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from agentsdpo.collect.config import CollectConfig
from agentsdpo.errors import ConfigError
from agentsdpo.hint.config import HintConfig
from agentsdpo.learn.config import LearnConfig
from agentsdpo.learn.presets import OF_ADAPTERS, PRESETS, TOY, around, resolve
from agentsdpo.learn.trackers import TrackConfig
from agentsdpo.learn.tripwire import TripwireConfig
from agentsdpo.publish.config import PublishConfig
from agentsdpo.replay.config import FlowConfig, ReplayConfig
from agentsdpo.settings import Settings
from agentsdpo.settings_io import Setting, build, read_toml, to_toml, with_sets
from agentsdpo.settings_io import describe as _describe

SEED_MODEL = "seed"
"""Name of the small model that ships with the package and is trained with the presets' toy learning rates."""

KEEPING = ("checkpoint_keep", "checkpoint_keep_every", "track")
"""Settings of what is kept and who is told: they change nothing that is played or learnt."""


class EvalConfig(Settings):
    """Which tasks the policy is evaluated on, and when. The same tasks and seeds every time, so that curves compare."""

    splits: tuple[str, ...] = Field(default=("test_names",), description="splits of the curve, played sampled")
    episodes: int = Field(default=64, ge=1, le=100_000, description="episodes per split of the curve; 1 or more")
    every: int = Field(default=20, ge=1, le=100_000, description="optimiser steps between evaluations; 1 or more")
    final_splits: tuple[str, ...] = Field(
        default=("val", "test_world", "test_names", "test_period", "test_firm"),
        description="splits before and after training, played sampled and greedy")
    final_episodes: int = Field(default=128, ge=1, le=100_000, description="episodes per final split; 1 or more")


class DeskConfig(Settings):
    """The built-in world, for the suites ``desk-mini`` and ``desk``."""

    firm_seed: int = Field(default=7, ge=0, le=2**31 - 1, description="fixes the firm's house rules; 0 or more")
    families: tuple[Literal["lookup", "correct", "reconcile", "rollup", "close"], ...] = Field(
        default=("lookup",), min_length=1, description="task families, drawn from evenly")
    n: tuple[Literal[1, 2, 4, 8, 16, 32, 48], ...] = Field(
        default=(1,), min_length=1, description="horizon knob, figures to file, drawn from evenly")
    rows: int | None = Field(default=None, ge=0, le=8, description=(
        "rows of a sheet that are not asked for; none: the suite's own, 0 in desk-mini and 3 in desk"))
    distractors: int = Field(default=2, ge=0, le=100, description="mails that ask for nothing; 0 or more")
    fault_rate: float = Field(default=0.0, ge=0.0, le=0.5, description="share of reads that fail once, 0 to 0.5")


class RunConfig(Settings):
    """Everything that decides how a run goes.

    >>> config = RunConfig()
    >>> config.learn.max_staleness, config.eval.every
    (8, 20)
    """

    LISTED: ClassVar[str] = "agentsdpo config --describe"

    name: str = Field(default="run", min_length=1, description="of the run, shown in reports")
    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="of tasks, sampling and drawing; 0 or more")
    model: str = Field(default=SEED_MODEL, min_length=1, description=(
        "folder or hub name of the model to train, or 'seed' for the small one that ships with the package"))
    suite: str = Field(default="desk-mini", min_length=1, description=(
        "tasks the agent is trained on: 'desk-mini', 'desk', or 'package.module:factory' of your own"))
    preset: str = Field(default="robust", description=(
        f"starting point of [learn] and of what the method needs around it: {', '.join(PRESETS)}"))
    steps: int = Field(default=150, ge=1, le=10_000_000, description="optimiser steps of the whole run; 1 or more")
    episodes_per_step: int = Field(default=32, ge=1, le=65_536, description=(
        "fresh episodes collected per optimiser step; learn.batch over this is the samples per insert; 1 or more"))
    group: int = Field(default=1, ge=1, le=1024, description=(
        "attempts at each task, compared with each other by an advantage of grades; episodes_per_step is a multiple"))
    staleness: int = Field(default=0, ge=0, le=1_000_000, description=(
        "policy versions the collector is held behind the learner on purpose; 0 samples from the newest"))
    checkpoint_every: int = Field(default=25, ge=1, le=1_000_000, description=(
        "optimiser steps between two checkpoints, from which a stopped run goes on; 1 or more"))
    checkpoint_keep: int = Field(default=3, ge=1, le=1_000_000, description="newest checkpoints that stay; 1 or more")
    checkpoint_keep_every: int = Field(default=0, ge=0, le=10_000_000, description=(
        "checkpoints of multiples of this many optimiser steps stay for good; 0 is none"))
    desk: DeskConfig = DeskConfig()
    collect: CollectConfig = CollectConfig()
    replay: ReplayConfig = ReplayConfig()
    flow: FlowConfig = FlowConfig()
    hint: HintConfig = HintConfig()
    learn: LearnConfig = resolve("robust", TOY["robust"])
    publish: PublishConfig = PublishConfig()
    eval: EvalConfig = EvalConfig()
    tripwire: TripwireConfig = TripwireConfig()
    track: TrackConfig = TrackConfig()

    def to_toml(self) -> str:
        """Every setting as TOML, defaults included; :func:`from_mapping` reads it back to an equal config."""
        return to_toml(self)


def from_mapping(data: Mapping[str, Any], sets: Iterable[str] = ()) -> RunConfig:
    """A config from nested mappings, with overrides ``learn.lr=1e-4`` and the preset beneath both.

    Raises:
        ConfigError: see :func:`agentsdpo.settings_io.build`; also an unknown preset.

    >>> from_mapping({"preset": "sdpopp"}, ["learn.cap=3", "steps=5"]).learn.cap
    3.0
    >>> from_mapping({"learn": {"ration": "tis"}})
    Traceback (most recent call last):
    agentsdpo.errors.ConfigError: learn.ration is not a setting; did you mean learn.ratio?
    """
    merged = with_sets(data, sets)
    preset, learn = merged.get("preset", RunConfig.model_fields["preset"].default), merged.get("learn", {})
    if preset not in list(PRESETS):
        raise ConfigError(f"preset is {preset!r}", fix=f"it must be one of {', '.join(PRESETS)}")
    merged = around(preset, merged)
    if isinstance(learn, dict):
        learn = {**(TOY[preset] if merged.get("model", SEED_MODEL) == SEED_MODEL else {}), **learn}
        merged["learn"] = {**PRESETS[preset], **learn}
    config = build(RunConfig, merged)
    if preset in OF_ADAPTERS and not config.learn.adapter.rank and "lr" not in learn:
        raise ConfigError(f"the preset {preset!r} sets learn.lr to {config.learn.lr:g}, a rate for adapters, but "
                          "learn.adapter.rank is 0: full weights are trained",
                          fix="set learn.adapter.rank, 32 say, or learn.lr, 1e-6 say")
    return _checked(config)


def load(path: Path | str | None = None, sets: Iterable[str] = ()) -> RunConfig:
    """A config from a TOML file (the defaults without one) and overrides.

    Raises:
        ConfigError: the file cannot be read, or what it says cannot be used.
    """
    return from_mapping(read_toml(Path(path)) if path else {}, sets)


def describe() -> list[Setting]:
    """Every setting of a run with type, range, default and unit: the reference page, and ``config --describe``.

    >>> [s.expected for s in describe() if s.key == "learn.beta"]
    ['a number in [0.0, 1.0]']
    """
    return _describe(RunConfig)


def _checked(config: RunConfig) -> RunConfig:
    """Refuse what no single room can see.

    Raises:
        ConfigError: every row would be evicted, because collection is held further behind than the learner accepts;
            a forward cannot take the longest episode; episodes would be greedy; groups would be cut.
    """
    if config.episodes_per_step % config.group:
        raise ConfigError(f"episodes_per_step is {config.episodes_per_step} with groups of {config.group} attempts",
                          fix=f"set episodes_per_step to a multiple of {config.group}, or another group")
    bound = config.learn.max_staleness
    if bound is not None and config.staleness > bound:
        raise ConfigError(f"staleness is {config.staleness} but learn.max_staleness is {bound}: every row would be "
                          "evicted", fix=f"set learn.max_staleness to {config.staleness} or more, or lower staleness")
    if config.collect.window > config.learn.forward_tokens:
        raise ConfigError(f"collect.window is {config.collect.window} but learn.forward_tokens is "
                          f"{config.learn.forward_tokens}: an episode that fills the window could not be learnt from",
                          fix=f"set learn.forward_tokens to {config.collect.window} plus the longest hint, or more")
    if config.publish.kind == "adapter" and not config.learn.adapter.rank:
        raise ConfigError("publish.kind is 'adapter' but learn.adapter.rank is 0: full weights are trained",
                          fix="set learn.adapter.rank, or publish.kind = \"auto\"")
    if config.collect.temperature == 0:
        raise ConfigError("collect.temperature is 0: greedy episodes have no behaviour log-probs to learn from",
                          fix="set it above 0; evaluations are played greedily as well in any case")
    return config
