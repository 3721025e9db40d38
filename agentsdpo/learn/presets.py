"""Named starting points of the objective, and how overrides are laid over them.

Published forms:

- ``sdpopp`` Scaling SDPO (field note, June 2026): sampled tokens, PPO mask, cap 2, gap clipped at 3 running means,
  staleness up to 3, live teacher.
- ``robust`` the default: forward KL recomputed over the vocabulary, no token ratio, turn gates, staleness up to 8.
- ``sampled_tis`` the baseline to beat: truncated ratio, negatives tapered as in TOPR (2503.14286).
- ``sdpo`` on policy, as published (2601.20802): reverse KL on the student's own top 100, the hint a successful other
  attempt at the task or, without one, the grader's words.
- ``safe_agent`` keeps tool use: a policy gradient of grades decides the direction, the gap reshapes the credit (in the
  spirit of SGCD, 2606.12634). Grades come in groups: it needs several attempts a task.
- ``opd_grpo`` adds the gap to the advantage of the grade, one to one, as OpenClaw-RL's combined script does.
- ``grpo`` the baseline without a teacher: groups of attempts, the advantage of each within its group, PPO clip
  (2402.03300, with the clip-higher bound of DAPO, 2503.14476).
- ``sdft`` distils demonstrations (2601.19897, in the JSD form of its port).
- ``conversations`` learns from logs of users (2603.12273): no bound on staleness but a decay, a pull to the start.
- ``test_time`` one hard task (SDPO, 2601.20802, section on test time): reverse KL on the student's own top 20.

Controls: ``naive`` is ``sdpopp`` field by field (teacher, learning rate, batch, normaliser, staleness bound) with its
three corrections (ratio, mask, gap clip) taken out, so that a difference between the two curves is theirs.

``parity_*`` do what TRL 1.16, lasgroup/SDPO and OpenClaw-RL compute, known flaws included: a ratio on a divergence, a
ratio that never corrects, a fast EMA. They are there to compare with, and a learner says so when it is made.

What a preset needs of other rooms (groups, who writes hints, where they are read) is in :data:`AROUND`.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from agentsdpo.errors import ConfigError
from agentsdpo.learn.config import LearnConfig

_SDPOPP: dict[str, Any] = {
    "form": "sampled", "ratio": "ppo", "eps_lo": 0.2, "eps_hi": 0.2, "cap": 2.0, "adv_clip": 3.0, "adv_decay": 0.99,
    "gate": "off", "veto": None, "max_staleness": 3, "teacher": "live", "normaliser": "token", "lr": 1e-6, "batch": 16}
_K3 = {"gate": "k3", "c3": 0.1, "veto": 1e-4}
_GRADES: dict[str, Any] = {
    "form": "sampled", "advantage": "grpo", "ratio": "ppo", "eps_lo": 0.2, "eps_hi": 0.28, "cap": 3.0,
    "max_staleness": 3, "normaliser": "episode", "lr": 1e-6, "batch": 8}
"""A policy gradient of grades; a batch is so many groups."""
_OPENCLAW: dict[str, Any] = {
    "ratio": "none", "gate": "off", "max_staleness": 0, "teacher": "frozen", "normaliser": "branch",
    "betas": (0.9, 0.98), "weight_decay": 0.1, "parity": True}

PRESETS: dict[str, dict[str, Any]] = {
    "sdpopp": _SDPOPP,
    "robust": {
        "form": "divergence", "beta": 0.0, "support": "union", "top_k": 64, "ratio": "none",
        **_K3, "max_staleness": 8, "teacher": "frozen", "normaliser": "episode", "lr": 1e-6, "batch": 32},
    "naive": {**_SDPOPP, "ratio": "none", "adv_clip": None},
    "sampled_tis": {**_SDPOPP, "ratio": "tis_topr", "max_staleness": 1, "teacher": "frozen"},
    "sdpo": {
        "form": "divergence", "beta": 1.0, "support": "student", "top_k": 100, "ratio": "none", "gate": "off",
        "max_staleness": 0, "teacher": "ema", "ema_rate": 0.05, "normaliser": "token", "lr": 1e-6, "batch": 32},
    "safe_agent": {
        **_GRADES, "mix": "credit", "adv_clip": 3.0, "adv_decay": 0.99, **_K3, "teacher": "gated",
        "refresh_every": 100, "tau": 1e-3},
    "opd_grpo": {**_GRADES, "mix": "add", "mix_weight": 1.0, "adv_clip": 3.0, "adv_decay": 0.99, "teacher": "frozen"},
    "grpo": {**_GRADES, "mix": "grade", "teacher": "live"},
    "sdft": {
        "form": "divergence", "beta": 0.5, "jsd_scale": "unit", "support": "union", "top_k": 100,
        "ratio": "none", "gate": "off", "max_staleness": 4, "teacher": "frozen", "normaliser": "episode",
        "lr": 1e-6, "batch": 32},
    "conversations": {
        "form": "divergence", "beta": 0.0, "support": "union", "top_k": 64, "ratio": "none", **_K3,
        "max_staleness": None, "staleness_decay": 0.97, "teacher": "frozen", "normaliser": "turn", "beta_kl": 0.01,
        "lr": 3e-5, "batch": 16},
    "test_time": {
        "form": "divergence", "beta": 1.0, "support": "student", "top_k": 20, "ratio": "none", "gate": "off",
        "max_staleness": 1, "teacher": "frozen", "normaliser": "token", "lr": 1e-5, "batch": 4},
    "parity_trl": {
        "form": "sampled", "ratio": "tis", "cap": 2.0, "gate": "off", "max_staleness": 0, "teacher": "ema",
        "ema_rate": 0.05, "normaliser": "branch", "lr": 5e-5, "batch": 8, "parity": True},
    "parity_lasgroup": {
        "form": "divergence", "beta": 0.5, "jsd_scale": "raw", "support": "student", "top_k": 100, "ratio": "tis",
        "cap": 2.0, "gate": "off", "max_staleness": 8, "teacher": "ema", "ema_rate": 0.05, "normaliser": "token",
        "lr": 1e-5, "weight_decay": 0.01, "batch": 32, "parity": True},
    "parity_openclaw": {**_OPENCLAW, "form": "sampled", "lr": 1e-5, "batch": 16},
    "parity_openclaw_topk": {
        **_OPENCLAW, "form": "divergence", "beta": 1.0, "support": "teacher", "top_k": 50, "lr": 1e-6, "batch": 4},
}
"""Fields each preset sets; the rest are the defaults of :class:`LearnConfig`. Learning rates are for full weights, but
for those of :data:`OF_ADAPTERS`."""
OF_ADAPTERS = ("conversations",)
"""Presets whose learning rate is an adapter's."""

_GROUPS: dict[str, Any] = {"group": 8, "replay": {"unit": "group"}}
AROUND: dict[str, dict[str, Any]] = {
    "sdpo": {"group": 8, "hint": {"sources": ("peer", "criteria"), "peer_similarity": 1.0}},
    "safe_agent": {**_GROUPS, "hint": {"sources": ("contrast", "peer", "criteria"), "peer_similarity": 1.0}},
    "opd_grpo": _GROUPS,
    "grpo": {**_GROUPS, "hint": {"sources": ()}},
    "sdft": {"hint": {"sources": ("demo",)}},
    "test_time": {"group": 4, "hint": {"sources": ("criteria", "feedback"), "scope": "failed"}},
}
"""What presets set outside ``[learn]``, as nested settings of a run; a configuration's own win."""

_SMALL = {"divergence": 6e-4, "sampled": 1e-4}
_TRIED = {"sdpopp": 6e-4, "grpo": 3e-4, "opd_grpo": 3e-4, "safe_agent": 3e-4}
"""``sdpopp``, ``grpo``: the best of several (docs/staleness.md, docs/methods/grpo.md); the other two take that of
``grpo``. For ``naive`` a larger one is the end."""
TOY: dict[str, dict[str, Any]] = {
    name: {"lr": _TRIED.get(name, _SMALL[fields["form"]]), **({"teacher": "frozen"} if name == "sdpo" or (
        fields["teacher"] == "live" and fields.get("mix") != "grade") else {})}
    for name, fields in PRESETS.items()}
"""What a model of a few million parameters needs instead: higher learning rates, hence no teacher that moves."""


def around(preset: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings of a run with those of its preset beneath them.

    >>> around("grpo", {"group": 4, "replay": {"max_uses": 2}})["replay"]
    {'unit': 'group', 'max_uses': 2}
    """
    merged = dict(data)
    for key, value in AROUND.get(preset, {}).items():
        own = merged.get(key, {} if isinstance(value, dict) else value)
        merged[key] = {**value, **own} if isinstance(value, dict) and isinstance(own, dict) else own
    return merged


def unit_size(preset: str) -> int:
    """Episodes in one unit of ``learn.batch``: those of a group, where groups are drawn as a whole.

    >>> unit_size("robust"), unit_size("grpo"), unit_size("sdpo")
    (1, 8, 1)
    """
    own = AROUND.get(preset, {})
    return own["group"] if own.get("replay", {}).get("unit") == "group" else 1


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
