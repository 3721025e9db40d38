"""Settings of the learner: the objective of ``learn/sdpo.py``, the teacher, the optimiser. Imports nothing heavy."""

from typing import Literal, Self

from pydantic import Field, model_validator

from agentsdpo.errors import ConfigError
from agentsdpo.settings import Settings

LIVE_TEACHER_MAX_LR = 1e-6
"""Above this learning rate a live teacher chases itself: every loss tried collapsed within 30 steps at 3e-4."""


class LearnConfig(Settings):
    """One objective, one teacher, one optimiser. Presets are in ``learn/presets.py``.

    Raises:
        ConfigError: (inside pydantic's ValidationError; :func:`~agentsdpo.learn.presets.resolve` unwraps it) fields
            that make no sense together, with the reason.

    >>> LearnConfig().form, LearnConfig().ratio, LearnConfig().control_every
    ('divergence', 'none', 50)
    """

    form: Literal["divergence", "sampled"] = Field(
        default="divergence", description="divergence over the vocabulary, or the gap on the sampled token alone")
    beta: float = Field(default=0.0, ge=0.0, le=1.0, description="0 forward KL(teacher||student), 1 reverse KL, "
                                                                 "between: generalised JSD (no unit)")
    jsd_scale: Literal["raw", "unit"] = Field(
        default="unit", description="unit divides the JSD by beta(1-beta), so that it meets both KLs at its ends")
    support: Literal["full", "student", "teacher", "union"] = Field(
        default="union", description="ids the divergence is taken over; all but full add one tail bucket")
    top_k: int = Field(default=64, ge=1, le=1024, description="ids per side of a support that is not full")
    ratio: Literal["none", "is", "tis", "ppo"] = Field(
        default="none", description="weight of the sampled form: 1, r, min(r, cap), or that with the PPO mask")
    eps_lo: float = Field(default=0.2, gt=0.0, lt=1.0, description="PPO mask: 1 - eps_lo is the lower ratio bound")
    eps_hi: float = Field(default=0.2, gt=0.0, le=10.0, description="PPO mask: 1 + eps_hi is the upper ratio bound")
    cap: float = Field(default=2.0, ge=1.0, le=1000.0, description="largest ratio (no unit); there is no smallest")
    adv_clip: float | None = Field(default=None, gt=0.0, le=100.0,
                                   description="clip |gap| at this many running means; None is off")
    adv_decay: float = Field(default=0.99, ge=0.0, lt=1.0, description="decay of that running mean, per step")
    gate: Literal["off", "k3"] = Field(default="off", description="drop whole turns whose mean K3 exceeds c3")
    c3: float = Field(default=0.1, gt=0.0, le=10.0, description="largest mean K3 of a turn, in nats")
    veto: float | None = Field(default=None, gt=0.0, lt=1.0,
                               description="drop a turn that holds a ratio below this; None is off")
    max_staleness: int | None = Field(default=8, ge=0, le=1_000_000,
                                      description="policy versions; older rows are evicted; None is unlimited")
    teacher: Literal["live", "ema", "frozen"] = Field(default="frozen", description="whose weights read the hint")
    ema_rate: float = Field(default=0.05, gt=0.0, le=1.0, description="EMA teacher: share of the student per step")
    allow_live_lr: bool = Field(default=False, description="accept a live teacher above a learning rate of 1e-6")
    normaliser: Literal["token", "episode"] = Field(
        default="episode", description="each token, or each episode, weighs the same; counted before gates")
    lr: float = Field(default=1e-6, gt=0.0, le=1.0, description="AdamW learning rate")
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="AdamW moment decays, each in [0, 1)")
    weight_decay: float = Field(default=0.0, ge=0.0, le=1.0, description="AdamW decoupled decay, per step times lr")
    grad_clip: float = Field(default=1.0, gt=0.0, le=1e6, description="largest norm of the whole gradient")
    batch: int = Field(default=32, ge=1, le=65_536, description="units of replay.unit, episodes unless told otherwise, "
                                                                "drawn per optimiser step")
    microbatch_tokens: int = Field(default=4096, ge=1, le=10_000_000,
                                   description="padded teacher tokens per forward; one row may exceed it, uncut")
    control_every: int = Field(default=50, ge=0, le=1_000_000, description=(
        "optimiser steps between two looks at what no hint and a wrong hint would have done; 0 is never"))

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        for wrong, what, fix in self._conflicts():
            if wrong:
                raise ConfigError(what, fix=fix)
        return self

    def _conflicts(self) -> list[tuple[bool, str, str]]:
        """``(is wrong, what, fix)`` of every combination that makes no sense."""
        divergence = self.form == "divergence"
        return [
            (divergence and self.ratio != "none",
             f"learn.ratio is {self.ratio!r} with learn.form 'divergence'",
             "set ratio to 'none': the divergence does not depend on the sampled token, so a token ratio has mean 1 "
             "and only adds variance"),
            (divergence and self.adv_clip is not None,
             f"learn.adv_clip is {self.adv_clip} with learn.form 'divergence'",
             "remove adv_clip: the divergence form has no per-token gap to clip"),
            (divergence and self.support == "student" and self.beta < 0.5,
             f"learn.support is 'student' with learn.beta {self.beta}",
             "use support 'teacher' or 'union' below beta 0.5: teacher mass outside the student's top-k would only "
             "say 'raise the tail'"),
            (self.teacher == "live" and self.lr > LIVE_TEACHER_MAX_LR and not self.allow_live_lr,
             f"learn.teacher is 'live' with learn.lr {self.lr:g}, above {LIVE_TEACHER_MAX_LR:g}",
             "lower lr, use teacher 'frozen', or set allow_live_lr = true and watch the score: a live teacher "
             "follows the student and collapses"),
            (not all(0.0 <= b < 1.0 for b in self.betas),
             f"learn.betas is {self.betas}", "give two decays in [0, 1)"),
        ]
