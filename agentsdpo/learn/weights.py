"""The weights of the loss, from the log-probs of the sampled tokens: pure functions of [N] tensors, all detached.

Whatever the objective, its loss is ``sum_t w_t (a_t D_t - b_t log p_t(y_t))``: ``w`` holds the shares known before the
forward (``learn/prior.py``), ``a`` and ``b`` what follows from scores: ratio correction, gates, clipped gap, step
weights, mix. This file puts them together; each part stands where it can be read alone.
"""

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from agentsdpo.errors import LearnError
from agentsdpo.learn import mix as mixing
from agentsdpo.learn.config import LearnConfig
from agentsdpo.learn.gates import segment_gate, segment_mean
from agentsdpo.learn.ratio import SEGMENTED, SIGNED, Evidence, Limits, correct, log_ratio, prefix_min
from agentsdpo.learn.records import LossTokens, TokenScores, TokenStats

SOD_CAP = 1.2
"""Largest step weight of :func:`sod`."""


def sod(gap: Tensor, turn: Tensor, branch: Tensor) -> Tensor:
    """Step weight ``min((d_1 + 1e-6)/(d_k + 1e-6), 1.2)``, ``d_k = mean over turn k of |gap|`` (SOD, 2605.07725).

    Turns on which the teacher disagrees more than on the first one of the branch (a bad call came before, so that the
    teacher is no longer to be trusted) count less. 1 on the first turn.

    Args:
        gap: [N], nats.
        turn: int64[N], growing within a branch.
        branch: int64[N].

    >>> sod(torch.tensor([1.0, -2.0, 0.1]), torch.tensor([0, 1, 2]), torch.tensor([0, 0, 0]))
    tensor([1.0000, 0.5000, 1.2000])
    """
    apart = segment_mean(gap.abs(), turn)
    size = int(branch.max()) + 1 if branch.numel() else 0
    opening = turn.new_zeros(size).scatter_reduce(0, branch, turn, "amin", include_self=False)[branch]
    first = turn == opening
    base = segment_mean(apart * first, branch) / segment_mean(first.to(gap.dtype), branch)
    weight = ((base + 1e-6) / (apart + 1e-6)).clamp_max(SOD_CAP)
    return torch.where(first, torch.ones_like(weight), weight)


def sdar(gap: Tensor, slope: float) -> Tensor:
    """Gate ``sigmoid(slope * gap)``: listen to the teacher where it likes the token more than the student (2605.15155).

    >>> sdar(torch.tensor([0.0, 2.0]), 1.0)
    tensor([0.5000, 0.8808])
    """
    return torch.sigmoid(slope * gap)


@dataclass(frozen=True)
class Bounds:
    """What is fixed once per optimiser step, the same in all its micro-batches; infinity is off.

    ``gap``: largest |gap|, nats; ``m2``: largest ``|log r|`` of a harmful token (:func:`~.ratio.m2po_bound`).
    """

    gap: float = inf
    m2: float = inf


@dataclass(frozen=True)
class Weights:
    """``a`` and ``b`` of the loss without ``w``, None for a term it does not have, and what they are made of, [N]."""

    divergence: Tensor | None
    token: Tensor | None
    gap: Tensor
    used_gap: Tensor
    signal: Tensor
    log_ratio: Tensor
    ratio_weight: Tensor
    mask: Tensor
    gate: Tensor


def weigh(student_logp: Tensor, teacher_logp: Tensor, tokens: LossTokens, config: LearnConfig,
          bounds: Bounds) -> Weights:
    """All weights of some loss tokens.

    Args:
        student_logp: log-probs of the sampled tokens [N], detached.
        teacher_logp: [N]; not read where :func:`reads_teacher` is False.
        tokens: the same N tokens; whole turns and branches where :func:`reads_turns` is True.
        config: of the objective.
        bounds: of this optimiser step.
    """
    gap = teacher_logp - student_logp
    gap = gap if tokens.hinted is None else gap * tokens.hinted
    log_r = log_ratio(student_logp, tokens.behaviour_logp)
    used = gap.clamp(-bounds.gap, bounds.gap)
    gate = segment_gate(log_r, tokens.turn if config.gate_unit == "turn" else tokens.branches, gate=config.gate,
                        c3=config.c3, geo=config.geo, veto=config.veto)
    u = _token_weight(gap, tokens, config)
    limits = Limits(eps_lo=config.eps_lo, eps_hi=config.eps_hi, cap=config.cap, m2=bounds.m2)

    def corrected(signal: Tensor) -> Tensor:
        return correct(config.ratio, Evidence(log_r, signal, student_logp, tokens.behaviour_logp, tokens.turn,
                                              tokens.branches, tokens.ages), limits)

    pure, divergence = config.mix == "pure", config.form == "divergence"
    signal = gap if pure else tokens.advantages
    if pure and divergence and config.ratio == "minpro":
        ratio = prefix_min(log_r, tokens.branches)  # a divergence weighs the state alone: the prefix without the token
    else:
        ratio = corrected(signal)
    distil = None if divergence else u * (ratio if pure else corrected(gap)) * used
    a, b = _mixed(config, ratio, distil, u, used, tokens)
    a, b = (None if each is None else gate * each for each in (a, b))
    for pull in _penalties(student_logp, log_r, tokens, config):
        b = pull if b is None else b + pull
    return Weights(divergence=a, token=b, gap=gap, used_gap=used, signal=signal, log_ratio=log_r, ratio_weight=ratio,
                   mask=ratio != 0, gate=gate)


def _token_weight(gap: Tensor, tokens: LossTokens, config: LearnConfig) -> Tensor:
    """``u`` of the configuration."""
    if config.token_weight == "sod":
        return sod(gap, tokens.turn, tokens.branches)
    return sdar(gap, config.sdar_slope) if config.token_weight == "sdar" else torch.ones_like(gap)


def _mixed(config: LearnConfig, ratio: Tensor, distil: Tensor | None, u: Tensor, used: Tensor,
           tokens: LossTokens) -> tuple[Tensor | None, Tensor | None]:
    """``a`` and ``b`` before the gate: the table of ``learn/mix.py``; ``distil`` is ``u c' A`` of the sampled form."""
    if config.mix == "pure":
        return (ratio * u, None) if distil is None else (None, distil)
    policy = ratio * tokens.advantages
    if config.mix == "grade":
        return None, policy
    if config.mix == "credit":
        return None, ratio * mixing.credit(tokens.advantages, used)
    share = 1.0 - config.mix_weight if config.mix == "blend" else 1.0
    if distil is None:
        return config.mix_weight * (u if tokens.hinted is None else u * tokens.hinted), share * policy
    return None, share * policy + config.mix_weight * distil


def _penalties(student_logp: Tensor, log_r: Tensor, tokens: LossTokens, config: LearnConfig) -> list[Tensor]:
    """Weights of ``-log p`` of the regularisers that are on; they hold for all loss tokens, gated or not."""
    found = [mixing.drift_penalty(log_r, config.tau)] if config.tau else []
    if config.beta_kl:
        if tokens.reference_logp is None:
            raise LearnError(f"learn.beta_kl is {config.beta_kl} but the tokens have no reference log-probs",
                             fix="score them under the initial weights first (LossTokens.reference_logp)")
        found.append(mixing.reference_penalty(student_logp, tokens.reference_logp, config.beta_kl))
    return found


def reads_turns(config: LearnConfig) -> bool:
    """Whether a weight depends on other tokens than its own, so that whole turns and branches are needed at once."""
    return config.gate != "off" or config.veto is not None or config.ratio in SEGMENTED or config.token_weight == "sod"


def reads_teacher(config: LearnConfig) -> bool:
    """Whether weights depend on the teacher's log-probs of the sampled tokens: by the gap, or by its sign alone."""
    signed = config.mix == "pure" and config.ratio in SIGNED
    return config.form == "sampled" or config.token_weight != "off" or signed


class Weigher:
    """The weights of one micro-batch, as the loss asks for them.

    Args:
        tokens: its N loss tokens.
        config: of the objective.
        bounds: of this optimiser step.
    """

    def __init__(self, tokens: LossTokens, config: LearnConfig, bounds: Bounds) -> None:
        self.tokens, self.config, self.bounds = tokens, config, bounds
        self.turns, self.teacher = reads_turns(config), reads_teacher(config)

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor, rows: slice) -> tuple[Tensor | None, Tensor | None]:
        """``w a`` and ``w b`` of the tokens in ``rows``; see :class:`~agentsdpo.learn.records.Weigh`."""
        part = self.tokens.at(rows)
        found = weigh(student_logp, teacher_logp, part, self.config, self.bounds)
        a, b = (None if each is None else part.weight * each for each in (found.divergence, found.token))
        return a, b

    def stats(self, scores: TokenScores) -> TokenStats:
        """Everything a step can say about its tokens, from what the loss saw."""
        found = weigh(scores.student_logp, scores.teacher_logp, self.tokens, self.config, self.bounds)
        push = torch.zeros_like(found.gap) if found.token is None else found.token
        if found.divergence is not None:
            push = push + found.divergence * scores.divergence
        return TokenStats(gap=found.gap, used_gap=found.used_gap, signal=found.signal, log_ratio=found.log_ratio,
                          ratio_weight=found.ratio_weight, mask=found.mask, gate=found.gate, push=push, **vars(scores))
