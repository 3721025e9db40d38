"""The suite a configuration names. Apart from the other parts of a run, since who only reads tasks needs no model."""

import importlib

from agentsdpo.config import RunConfig
from agentsdpo.envs.desk import PRESETS, DeskSuite
from agentsdpo.errors import ConfigError
from agentsdpo.types import Suite


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
