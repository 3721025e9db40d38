"""Named starting points of the objective, and how overrides are laid over them.

``sdpopp`` is the published recipe (Scaling SDPO, field note, June 2026): sampled tokens, PPO mask, cap 2, gap clipped
at 3 running means, staleness up to 3, live teacher. ``robust`` is the default: forward KL recomputed over the
vocabulary, no token ratio, turn gates, staleness up to 8. ``sdft`` distils demonstrations (2601.19897, in the
JSD form of its port). ``naive`` is the control: it is ``sdpopp`` field by field (teacher, learning rate, batch,
normaliser, staleness bound) with its three corrections (ratio, mask, gap clip) taken out, so that a
difference between the two curves is theirs.
"""

from typing import Any

from pydantic import ValidationError

from agentsdpo.errors import ConfigError
from agentsdpo.learn.config import LearnConfig

_SDPOPP: dict[str, Any] = {
    "form": "sampled", "ratio": "ppo", "eps_lo": 0.2, "eps_hi": 0.2, "cap": 2.0, "adv_clip": 3.0, "adv_decay": 0.99,
    "gate": "off", "veto": None, "max_staleness": 3, "teacher": "live", "normaliser": "token", "lr": 1e-6, "batch": 16}

PRESETS: dict[str, dict[str, Any]] = {
    "sdpopp": _SDPOPP,
    "robust": {
        "form": "divergence", "beta": 0.0, "support": "union", "top_k": 64, "ratio": "none",
        "gate": "k3", "c3": 0.1, "veto": 1e-4, "max_staleness": 8, "teacher": "frozen", "normaliser": "episode",
        "lr": 1e-6, "batch": 32},
    "naive": {**_SDPOPP, "ratio": "none", "adv_clip": None},
    "sdft": {
        "form": "divergence", "beta": 0.5, "jsd_scale": "unit", "support": "union", "top_k": 100,
        "ratio": "none", "gate": "off", "max_staleness": 4, "teacher": "frozen", "normaliser": "episode",
        "lr": 1e-6, "batch": 32},
}
"""Fields each preset sets; the rest are the defaults of :class:`LearnConfig`. Learning rates are for full weights."""

TOY: dict[str, dict[str, Any]] = {
    "sdpopp": {"lr": 1e-4, "teacher": "frozen"},
    "robust": {"lr": 6e-4},
    "naive": {"lr": 1e-4, "teacher": "frozen"},
    "sdft": {"lr": 6e-4},
}
"""What a model of a few million parameters needs instead: higher learning rates, hence no live teacher."""


def resolve(preset: str = "robust", overrides: dict[str, Any] | None = None) -> LearnConfig:
    """A preset with overrides laid over it, checked as a whole.

    Args:
        preset: a key of :data:`PRESETS`.
        overrides: fields of :class:`LearnConfig`.

    Raises:
        ConfigError: unknown preset or field, value out of range, or a combination that makes no sense.

    >>> resolve("sdpopp").ratio, resolve("naive", TOY["naive"]).lr
    ('ppo', 0.0001)
    >>> resolve("robust", {"ratio": "tis"})
    Traceback (most recent call last):
    agentsdpo.errors.ConfigError: learn.ratio is 'tis' with learn.form 'divergence'; set ratio to 'none': ...
    """
    if preset not in PRESETS:
        raise ConfigError(f"there is no preset {preset!r}", fix=f"use one of {', '.join(sorted(PRESETS))}")
    try:
        return LearnConfig(**{**PRESETS[preset], **(overrides or {})})
    except ValidationError as error:
        raise _readable(error) from error


def _readable(error: ValidationError) -> ConfigError:
    """The first complaint of pydantic as one line; our own errors come back as they were raised."""
    first = error.errors()[0]
    inner = first.get("ctx", {}).get("error")
    if isinstance(inner, ConfigError):
        return inner
    where = ".".join(["learn", *(str(part) for part in first["loc"])])
    if first["type"] == "extra_forbidden":
        known = ", ".join(sorted(LearnConfig.model_fields))
        return ConfigError(f"{where} does not exist", fix=f"the fields are {known}")
    return ConfigError(f"{where} is {first['input']!r}: {first['msg']}", fix="give a value in range")
