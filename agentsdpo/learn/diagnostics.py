"""Numbers of one optimiser step from its per-token statistics, keyed ``learn/<quantity>[/<stat>]``. No training."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agentsdpo.learn.config import LearnConfig
from agentsdpo.learn.gates import ess_frac, k3
from agentsdpo.learn.ratio import MASKING
from agentsdpo.learn.records import TokenStats, whole

Metrics = dict[str, float]


def step_metrics(stats: TokenStats, staleness: Tensor, config: LearnConfig, bound: float | None) -> Metrics:
    """Everything a step can say about itself.

    Args:
        stats: all loss tokens of the step, [N].
        staleness: of each token's row, int64[N].
        config: the objective that produced them.
        bound: largest |gap| allowed in this step (nats), None when the gap was not clipped.
    """
    metrics = {**gap_metrics(stats), **shape_metrics(stats, config), **push_metrics(stats.push),
               "learn/gated_frac": _share(~stats.gate)}
    metrics |= ratio_metrics(stats.log_ratio, config) | mismatch_metrics(stats.log_ratio[staleness == 0])
    if config.ratio in MASKING:
        metrics |= mask_metrics(stats)
    if bound is not None:
        metrics |= clip_metrics(stats.gap, bound)
    return metrics


def gap_metrics(stats: TokenStats) -> Metrics:
    """Mean gap, mean |gap|, and the negative share of all |gap|, before clipping."""
    size = stats.gap.abs()
    return {"learn/gap/mean": float(stats.gap.mean()), "learn/gap/abs": float(size.mean()),
            "learn/gap/negative_share": float(size[stats.gap < 0].sum() / size.sum().clamp_min(1e-12))}


def shape_metrics(stats: TokenStats, config: LearnConfig) -> Metrics:
    """Entropies and divergence (nats), share of equal first choices, and mass off the support per side."""
    metrics = {"learn/entropy/student": float(stats.entropy_student.mean()),
               "learn/entropy/teacher": float(stats.entropy_teacher.mean()),
               "learn/top1_agree": _share(stats.top1_agree)}
    if config.form == "divergence":
        d = stats.divergence
        metrics |= {"learn/divergence/mean": float(d.mean()), "learn/divergence/p95": quantile(d, 0.95),
                    "learn/divergence/max": float(d.max())}
    if config.form == "divergence" and config.support != "full":
        metrics["learn/tail_mass/student"] = float(stats.tail_student.mean())
        metrics["learn/tail_mass/teacher"] = float(stats.tail_teacher.mean())
    return metrics


def push_metrics(push: Tensor) -> Metrics:
    """Hijack: share of the step's total |push| [N] owned by one token, and by the largest 0.1 % of tokens.

    >>> import torch
    >>> push_metrics(torch.tensor([8.0, -1.0, 1.0, 0.0]))
    {'learn/hijack/max': 0.8, 'learn/hijack/top0.1pct': 0.8}
    """
    size, few = push.abs().double(), max(1, push.numel() // 1000)
    total = size.sum().clamp_min(1e-30)
    top = size.topk(few).values
    return {"learn/hijack/max": float(top[0] / total), "learn/hijack/top0.1pct": float(top.sum() / total)}


def ratio_metrics(log_r: Tensor, config: LearnConfig) -> Metrics:
    """Importance ratios of the tokens, and the divergence estimators from them.

    >>> import torch
    >>> m = ratio_metrics(torch.tensor([0.0, 0.0]), LearnConfig())
    >>> m["learn/ratio/mean"], m["learn/ess_frac"], m["learn/kl_k3"], m["learn/chi2"]
    (1.0, 1.0, 0.0, 0.0)
    """
    r = log_r.exp()
    return {"learn/ratio/mean": float(r.mean()), "learn/ratio/p50": quantile(r, 0.5),
            "learn/ratio/p95": quantile(r, 0.95), "learn/ratio/p99": quantile(r, 0.99),
            "learn/ratio/max": float(r.max()), "learn/ess_frac": ess_frac(r), "learn/kl_k1": float(-log_r.mean()) + 0.0,
            "learn/kl_k3": float(k3(log_r).mean()), "learn/chi2": float((r.square() - 1.0).mean()),
            "learn/capped_frac": _share(r > config.cap)}


MISMATCH = ("learn/mismatch/mean", "learn/mismatch/max")


def mismatch_metrics(log_r: Tensor) -> Metrics:
    """|student_logp - behaviour_logp| of tokens of the present version: how far engine and learner disagree (nats)."""
    if not log_r.numel():
        return {}
    return dict(zip(MISMATCH, (float(log_r.abs().mean()), float(log_r.abs().max())), strict=True))


def mask_metrics(stats: TokenStats) -> Metrics:
    """Share of tokens the ratio correction silences, among positive and among negative signals."""
    up, down = stats.signal > 0, stats.signal < 0
    return {"learn/masked_frac/pos": _share(~stats.mask[up]), "learn/masked_frac/neg": _share(~stats.mask[down])}


def clip_metrics(gap: Tensor, bound: float) -> Metrics:
    """Share of tokens clipped, the bound (nats), and the share of all |gap| that was cut off."""
    size = gap.abs()
    cut = (size - bound).clamp_min(0.0).sum() / size.sum().clamp_min(1e-12)
    return {"learn/adv_clip/frac": _share(size > bound), "learn/adv_clip/bound": bound,
            "learn/adv_clip/mass": float(cut)}


def staleness_metrics(ages: Iterable[int]) -> Metrics:
    """Staleness of all consumed rows (policy versions)."""
    seen = np.array(list(ages))
    return {"replay/staleness/mean": float(seen.mean()), "replay/staleness/p95": float(np.quantile(seen, 0.95)),
            "replay/staleness/max": float(seen.max())}


_COMPONENTS = (("attention", ("attn", "attention")), ("mlp", ("mlp", "expert", "feed_forward")), ("norm", ("norm",)),
               ("embedding", ("embed", "lm_head")))
"""Components of a model by what a parameter's name holds; the first that fits."""


def component(name: str) -> str:
    """Which part of a model a parameter belongs to, ``rest`` for none that is known.

    >>> [component(n) for n in ("model.layers.0.self_attn.q_norm.weight", "model.norm.weight", "model.x")]
    ['attention', 'norm', 'rest']
    """
    return next((part for part, words in _COMPONENTS if any(word in name for word in words)), "rest")


def component_norms(model: Any) -> Metrics:
    """Norm of the gradient of each component, as it stands now."""
    grads: dict[str, list[Tensor]] = defaultdict(list)
    for name, p in model.named_parameters():
        if p.grad is not None:
            grads[component(name)].append(p.grad)
    return {f"learn/grad_norm/{part}": float(whole(torch.nn.utils.get_total_norm(own))) for part, own in grads.items()}


def quantile(values: Tensor, q: float) -> float:
    """Smallest value with at least a share ``q`` of all values at or below it.

    >>> import torch
    >>> quantile(torch.arange(1.0, 101.0), 0.99)
    99.0
    """
    rank = max(1, int(np.ceil(q * values.numel())))
    return float(values.kthvalue(rank).values)


def _share(flags: Tensor) -> float:
    """Share of True, 0 for nothing."""
    return float(flags.float().mean()) if flags.numel() else 0.0
