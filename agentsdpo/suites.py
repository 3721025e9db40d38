"""What a configuration names: suite, model, and the run itself. Apart from the parts of a run, which need torch."""

import hashlib
import importlib
import json
from pathlib import Path

from agentsdpo.config import KEEPING, SEED_MODEL, RunConfig
from agentsdpo.envs.desk import PRESETS, DeskSuite
from agentsdpo.envs.desk.seed import seed_path
from agentsdpo.errors import ConfigError
from agentsdpo.learn.tripwire import TripwireConfig
from agentsdpo.types import Suite

TASKS_PER_SEED = 10_000_000
"""Training tasks of two seeds never meet."""


def make_suite(config: RunConfig) -> Suite:
    """The suite a configuration names: a preset of the desk world, or ``package.module:factory`` of the user's own.

    Raises:
        ConfigError: no such preset, module or factory.
    """
    name = config.suite
    if name in PRESETS:
        world = config.desk
        return DeskSuite(name, firm_seed=world.firm_seed, families=world.families, n=world.n, rows=world.rows,
                         distractors=world.distractors, fault_rate=world.fault_rate,
                         feedback_level=config.hint.level, hint_scope=config.hint.scope)
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(f"suite is {name!r}: {error}",
                          fix=f"use {' or '.join(PRESETS)}, or package.module:factory without arguments") from error


def run_id(config: RunConfig) -> str:
    """Name and settings in one word: two runs of the same settings make the same episode ids, others never do.

    >>> run_id(RunConfig(steps=5)) == run_id(RunConfig(steps=9)) != run_id(RunConfig(seed=1))
    True
    """
    unnamed = {"steps", "replay", "flow", *KEEPING} | ({"tripwire"} if config.tripwire == TripwireConfig() else set())
    unnamed |= {"group"} if config.group == 1 else set()  # what later releases added counts only where it is used
    settings = config.model_dump(mode="json", exclude=unnamed) | {"replay": config.replay.identity()}
    settings["hint"].pop("min_lift")  # decides whether a run begins, nothing that is played or learnt
    if config.collect.device == "auto":
        settings["collect"].pop("device")
    text = json.dumps(settings, sort_keys=True)
    return f"{config.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def model_path(config: RunConfig) -> Path | str:
    """Where the model to train is."""
    return seed_path() if config.model == SEED_MODEL else config.model
