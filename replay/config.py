"""How safely episodes reach the replay store, and how the learner draws from it."""

from typing import Literal

from pydantic import Field, model_validator

from agentsdpo.errors import ConfigError
from agentsdpo.settings import Settings
from agentsdpo.types import Json

Durability = Literal["step", "episode", "none"]
"""What survives while an episode runs: each step a power cut, each step a killed process, nothing before its end."""
KEEPING = {"durability", "spool"}
"""Settings that say how safely data is kept, not which: runs that differ in these alone are the same run."""


class ReplayConfig(Settings):
    """What survives a crash; which branches are drawn, in which order, and how often.

    >>> ReplayConfig(max_uses=4).strategy
    'uniform'
    """

    strategy: Literal["uniform", "fifo", "newest", "uniform_iid", "prioritised"] = Field(
        default="uniform", description="order within one pass over the eligible units: by a seeded hash, oldest "
                                       "arrival first, newest arrival first; or draws that may repeat: all alike, by "
                                       "priority")
    unit: Literal["branch", "episode", "group"] = Field(
        default="episode", description="what one draw takes, and what learn.batch counts: all eligible branches of an "
                                       "episode, one branch, all of a group of rollouts")
    group_mode: Literal["any", "closed"] = Field(
        default="any", description="closed: units of groups with members still missing wait, and the staleness of a "
                                   "unit is that of its whole group")
    max_uses: int = Field(
        default=0, ge=0, le=1_000_000, description="draws of one unit before it is set aside, a cap on samples per "
                                                   "insert; 0 is no cap")
    cooldown: int = Field(
        default=0, ge=0, le=1_000_000_000, description="draws a unit rests after it was drawn; uniform_iid and "
                                                       "prioritised only")
    staleness_weight: float = Field(
        default=1.0, gt=0.0, le=1.0, description="factor on the probability of a draw per policy version of staleness; "
                                                 "1 is none; uniform_iid and prioritised only")
    alpha: float = Field(
        default=0.6, ge=0.0, le=4.0, description="prioritised: exponent of the priority; 0 draws all alike")
    beta: float = Field(
        default=0.4, ge=0.0, le=1.0, description="prioritised: exponent of the importance weights at the first draw; "
                                                 "1 undoes the preference")
    beta_draws: int = Field(
        default=100_000, ge=0, le=1_000_000_000, description="prioritised: draws until beta has grown to 1; 0 leaves "
                                                             "it as it is")
    decay: float = Field(
        default=1.0, gt=0.0, le=1.0, description="prioritised: factor on the priority per use; 1 is none")
    durability: Durability = Field(
        default="step", description="what survives while an episode runs: each call and tool result a power cut (the "
                                    "disk is waited for before the next), each one a killed process, nothing before "
                                    "the end")
    spool: str = Field(
        default="", description="folder on a local disk for the journals of running episodes; empty: in the store, or "
                                "~/.local/state/agentsdpo/spool for one in a bucket")

    @model_validator(mode="after")
    def _no_idle_settings(self) -> "ReplayConfig":
        """Refuse settings that the strategy does not look at."""
        heard = _HEARD.get(self.strategy, set())
        for name in sorted(set().union(*_HEARD.values()) - heard):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ConfigError(f"replay.{name} is {getattr(self, name)}, which strategy {self.strategy!r} does not "
                                  "look at", fix=f"leave it out, or choose {' or '.join(_listening(name))}")
        return self

    def identity(self) -> Json:
        """What decides which branches are drawn, for hashes over a configuration.

        Settings that later releases added count only where they are not at their default: a run keeps its name and its
        checkpoints.

        >>> ReplayConfig().identity()
        {'strategy': 'uniform', 'unit': 'episode', 'max_uses': 0}
        """
        return {name: value for name, value in self.model_dump(exclude=KEEPING).items()
                if name in _FIRST or value != type(self).model_fields[name].default}


class FlowConfig(Settings):
    """How far collectors and learner may run apart where they are programs of their own; see
    :mod:`agentsdpo.replay.sampling.limiter`.

    >>> FlowConfig().ahead is None
    True
    """

    samples_per_insert: float | None = Field(
        default=None, gt=0.0, le=10_000.0, description="mean draws of a unit that the learner may not exceed: it waits "
                                                       "for fresh ones; none: learn.batch over episodes_per_step")
    ahead: int | None = Field(
        default=None, ge=0, le=1_000_000, description="optimiser steps' worth of units that collectors may be ahead, "
                                                      "those in flight counted, before they pause; none: as many as "
                                                      "learn.max_staleness lets through, 8 without a bound; 0: they "
                                                      "never pause")

    @model_validator(mode="after")
    def _room(self) -> "FlowConfig":
        """Refuse bounds within which both sides could wait for each other."""
        if self.ahead == 1:
            raise ConfigError("flow.ahead is 1: the learner could wait for a batch that collectors wait to begin",
                              fix="set it to 2 or more, or to 0, which never pauses")
        return self


_FIRST = {"strategy", "unit", "max_uses"}
_HEARD = {"uniform_iid": {"cooldown", "staleness_weight"},
          "prioritised": {"cooldown", "staleness_weight", "alpha", "beta", "beta_draws", "decay"}}
"""Settings by the strategies that look at them; those in no set are for all."""


def _listening(name: str) -> list[str]:
    return [strategy for strategy, names in _HEARD.items() if name in names]
