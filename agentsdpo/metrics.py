"""Every number a run writes: key, unit, meaning, and the alarm where there is one. Nothing else may be written.

Keys are ``<room>/<quantity>[/<stat>]``. ``{a,b}`` in a pattern stands for each of the words, ``*`` for one word that is
not known beforehand (a reason, a split). Formulas: student, teacher and behaviour log-probs are ``p``, ``q``, ``mu`` of
the sampled token, ``gap = q - p``, ``r = exp(p - mu)``; ``S`` is staleness.
"""

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass

from agentsdpo.errors import ConfigError
from agentsdpo.settings_io import nearest


@dataclass(frozen=True)
class Metric:
    """One line of the table; ``alarm`` says when to look closer, empty when there is no rule."""

    pattern: str
    unit: str
    meaning: str
    alarm: str = ""

    def spelt_out(self) -> list[str]:
        """The pattern with its braces spelt out.

        >>> Metric("learn/gap/{mean,abs}", "nats", "").spelt_out()
        ['learn/gap/mean', 'learn/gap/abs']
        """
        parts = re.split(r"\{([^}]*)\}", self.pattern)
        choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
        return ["".join(pieces) for pieces in itertools.product(*choices)]


TABLE = (
    Metric("learn/loss", "nats per token", "the objective, normalised as learn.normaliser says"),
    Metric("learn/gap/{mean,abs,negative_share}", "nats; share", "mean gap; mean |gap|; share of sum |gap| below zero",
           "abs under 1e-3: dead; negative_share above 0.9: use the divergence form"),
    Metric("learn/divergence/{mean,p95,max}", "nats", "divergence of teacher and student per loss token"),
    Metric("learn/ratio/{mean,p50,p95,p99,max}", "ratio", "importance ratio r",
           "mean off 1 by 0.05 at S = 0; max above 20"),
    Metric("learn/mismatch/{mean,max}", "nats", "|p - mu| at S = 0 right after a publish: engine against learner",
           "mean above 0.02"),
    Metric("learn/ess_frac", "share", "effective sample size of r over the tokens", "below 0.5"),
    Metric("learn/{kl_k1,kl_k3,chi2}", "nats", "mean -log r; mean r-1-log r; mean r^2-1",
           "rising at constant S, or without gain in score"),
    Metric("learn/masked_frac/{pos,neg}", "share",
           "tokens whose update the ratio mask stopped, by sign of the gap, in a mix of the advantage", "above 0.5"),
    Metric("learn/{capped_frac,gated_frac}", "share", "ratios truncated at the cap; tokens in gated turns",
           "above 0.5"),
    Metric("learn/adv_clip/{frac,bound,mass}", "share; nats; share", "gaps clipped; the bound; share of sum |gap| cut",
           "frac above 0.25"),
    Metric("learn/hijack/{max,top0.1pct}", "share", "of the whole update held by one token; by the top 0.1 %",
           "above 0.1"),
    Metric("learn/entropy/{student,teacher}", "nats", "entropy of the next token", "outside 30-300 % of the start"),
    Metric("learn/top1_agree", "share", "tokens on which student and teacher agree about the likeliest one"),
    Metric("learn/tail_mass/{student,teacher}", "share", "probability off the top-k support", "above 0.1: raise top_k"),
    Metric("learn/grad_norm", "norm", "of the whole gradient before clipping", "above 4x its running median"),
    Metric("learn/grad_norm/*", "norm", "of attention, mlp, norm, embedding alone, before clipping"),
    Metric("learn/{share,push}/*", "share", "of all loss tokens, of all |push|, by group: staleness S0, S1, S2-3, "
           "S4-7, S8+ of the token; tool calls or text; source of the hint", "push far above share"),
    Metric("learn/{gap/mean,gap/abs,gap/negative_share,divergence/mean,entropy/student,entropy/teacher}/*",
           "nats; share", "as for the whole step, by the same groups"),
    Metric("learn/{ratio/mean,ratio/max,ess_frac,kl_k3,top1_agree,gated_frac,masked_frac}/*", "ratio; share; nats",
           "as for the whole step, by the same groups", "ratio/mean/S0 off 1 by 0.05"),
    Metric("learn/{rows,tokens,microbatches}", "count", "trained on in this step"),
    Metric("learn/skipped/*", "flag", "1 for a step without an update: every row refused or too stale (refused), "
           "grades that are all alike (alike), every loss token masked or gated (gated), a gradient of exactly 0 "
           "(no_gradient)",
           "any; 8 in a row end the run, but for alike"),
    Metric("eval/zero_shot_delta", "share", "mean score of the newest probe less that of the first", "below 0"),
    Metric("tripwire/{restrained,rollbacks}", "flag; count", "1 while a soft alarm is in force; roll-backs so far",
           "any"),
    Metric("teacher/refreshes", "count", "copies of the student a snapshot or gated teacher has taken"),
    Metric("publish/lag_s", "seconds", "from the end of the update to the new version's announcement"),
    Metric("learn/lr", "per step", "learning rate of this step, roll-backs and soft alarms counted in"),
    Metric("learn/step_s", "seconds", "from drawing rows to the new policy version"),
    Metric("replay/staleness/{mean,p95,max}", "policy versions", "of the rows as they were consumed"),
    Metric("replay/evicted_frac", "share", "branches that grew too stale before any draw, of all that could be drawn",
           "above 0.3"),
    Metric("replay/{age_s/p95,version_span}", "seconds; versions",
           "of the rows drawn: age; newest minus oldest version"),
    Metric("replay/refused/*", "count", "rows refused, by reason", "any"),
    Metric("hint/{made,dropped_frac,novelty,leak_frac}", "count; share", "hints made; episodes without one; distinct "
           "texts; hints found in the agent's words", "dropped_frac above 0 for long; any leak; novelty near 0"),
    Metric("hint/tokens/mean", "tokens", "length of the hint as the teacher reads it"),
    Metric("hint/{empty_gap,wrong_gap}", "nats", "mean |gap| without a hint; mean |difference| a wrong hint makes per "
           "token; every learn.control_every steps", "empty_gap above 1e-3; wrong_gap near 0"),
    Metric("collect/{pass,score/mean,unscored_frac}", "share", "fresh episodes: passed; mean score; not scored"),
    Metric("collect/{episodes,sampled_tokens}", "count", "collected for this step"),
    Metric("collect/{turns,branches,tokens_per_turn,wall_s}/mean", "count; seconds", "per episode, tokens per turn",
           "length off by 25 % from the last good version"),
    Metric("collect/act/{calls,valid_frac,mutating_ok_frac,early_finish_frac}", "count; share",
           "tool calls per episode; parsed and accepted; changed state; finished without a valid call",
           "worse by 10 %"),
    Metric("collect/{repeat_frac,truncated_frac}", "share", "calls made before; turns cut at max_tokens"),
    Metric("collect/longest_repeat/max", "count", "longest run of one call that changed nothing, in any episode"),
    Metric("collect/merge_ratio", "share", "sampled tokens over tokens of the rows they are learnt from",
           "falling: compaction opens branches faster than agents write"),
    Metric("collect/fork/*", "count", "branches opened by reason", "any but compaction"),
    Metric("collect/working_s/mean", "seconds", "model calls that succeeded and tools, per episode"),
    Metric("collect/stop/*", "share", "episodes by stop reason"),
)
"""The table, by room."""

_TOTALS = {"episodes": "collected since the run began", "env_steps": "tool calls since the run began",
           "tokens": "sampled since the run began", "version": "newest policy version", "seed": "of the run"}
ROW_FIELDS = {
    "step": _TOTALS,
    "eval": {**_TOTALS, "split": "of the suite", "decoding": "sampled or greedy", "n": "episodes scored",
             "pass": "share of episodes passed", "score": "mean score",
             "hinted": "whether the policy read hints: the teacher's own free run"},
    "tripwire": {**_TOTALS, "level": "soft or hard", "alarms": "by name: value seen, limit, level",
                 "action": "what was done", "good_step": "the step gone back to", "good_version": "its policy version",
                 "tombstoned": "branches hidden from later draws"},
}
"""Plain fields a row of each kind may carry beside ``kind``, ``step``, ``wall_s`` and metric keys."""

_EXACT = frozenset(key for metric in TABLE for key in metric.spelt_out() if "*" not in key)
_OPEN = tuple(key.removesuffix("*") for metric in TABLE for key in metric.spelt_out() if "*" in key)


def check_keys(keys: Iterable[str], kind: str) -> None:
    """Refuse a key that is not in the table.

    Raises:
        ConfigError: names the key and the nearest one that exists.

    >>> check_keys(["learn/loss", "replay/refused/no_hint", "seed"], "step")
    >>> check_keys(["learn/los"], "step")
    Traceback (most recent call last):
    agentsdpo.errors.ConfigError: learn/los is not in the table of metrics; did you mean learn/loss? ...
    """
    for key in keys:
        known = key in _EXACT or key in ROW_FIELDS[kind]
        if not known and not any(key.startswith(stem) and "/" not in key[len(stem):] for stem in _OPEN):
            hint = nearest(key, [*_EXACT, *ROW_FIELDS[kind]])
            fix = f"{hint} " if hint else ""
            raise ConfigError(f"{key} is not in the table of metrics", fix=f"{fix}add new ones to agentsdpo/metrics.py")
