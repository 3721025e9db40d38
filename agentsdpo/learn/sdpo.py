"""The objective: make the unhinted student agree with the hinted teacher on tokens the behaviour policy sampled.

Notation: ``p`` student (current weights, no hint), ``q`` teacher (hint in its context, no gradient), ``mu`` behaviour,
``y`` sampled token, ``A = log q(y) - log p(y)`` the gap, ``r = p(y)/mu(y)`` the ratio, ``g`` the 0/1 turn gate,
``w`` the weight that holds 1/N and was known before the forward. Sums run over loss tokens.

Both forms keep the gradient at the visited states and drop that of the visits, since an exact state weight (a product
of ratios) has unusable variance; bounded staleness and gates stand in for it. Everything that multiplies ``grad`` is
detached. Method: SDPO (2601.20802), off-policy as in Scaling SDPO (field note, June 2026).
"""

import torch
from torch import Tensor

from agentsdpo.learn import ratio as ratios
from agentsdpo.learn.config import LearnConfig
from agentsdpo.learn.divergence import divergence, entropy, token_logp, top1_agree
from agentsdpo.learn.records import Head, LossTokens, TokenStats


def divergence_form(student: Head, teacher: Head, tokens: LossTokens, config: LearnConfig) -> tuple[Tensor, TokenStats]:
    """Divergence recomputed over the vocabulary at every visited state::

        L1 = sum_t w_t g_t D_beta(p_t, q_t)

    No ratio: ``D`` does not depend on the sampled token and ``E_mu[r] = 1``, so a ratio would keep the mean and add
    variance. Wrong state weights do not move the optimum of a divergence the student can drive to zero, which is
    why this form tolerates stale data. Equations of ``D`` and its gradient: ``learn/divergence.py``.

    Args:
        student: with gradient.
        teacher: same N positions; no gradient reaches it.
        tokens: targets and weights; behaviour log-probs matter only to gates and diagnostics.
        config: ``beta``, ``jsd_scale``, ``support``, ``top_k``, ``gate``, ``c3``, ``veto``.

    Returns:
        Scalar loss (its sum over micro-batches is the step's loss) and per-token statistics.
    """
    log_p, log_q = _distributions(student, teacher, tokens)
    d = divergence(log_p, log_q, beta=config.beta, jsd_scale=config.jsd_scale, support=config.support,
                   top_k=config.top_k)
    student_logp, teacher_logp = token_logp(log_p.detach(), tokens.tok, tokens.kept), _teacher_logp(log_q, tokens)
    log_r = ratios.log_ratio(student_logp, tokens.behaviour_logp)
    gate = _gate(log_r, tokens.turn, config)
    loss = (tokens.weight * gate * d.value).sum()
    gap, value = teacher_logp - student_logp, d.value.detach()
    return loss, TokenStats(
        student_logp=student_logp, teacher_logp=teacher_logp, gap=gap, used_gap=gap, log_ratio=log_r,
        ratio_weight=torch.ones_like(gap), mask=torch.ones_like(gate), gate=gate, divergence=value, push=gate * value,
        tail_student=d.tail_student, tail_teacher=d.tail_teacher, **_shape_stats(log_p.detach(), log_q))


def sampled_form(student: Head, teacher: Head, tokens: LossTokens, config: LearnConfig,
                 bound: float) -> tuple[Tensor, TokenStats]:
    """Policy gradient on the sampled token, with the gap as its advantage::

        Ac_t = clip(A_t, -b, +b)                       A under the current p: nothing cached
        w'_t = sg[min(r_t, C)] M_t                     learn.ratio picks the factors; never floored
        L2   = - sum_t w_t g_t w'_t Ac_t log p_t(y_t)

    At a fixed state ``E_mu[r (log p - log q) grad log p] = grad KL(p||q)``: without clip and mask it is the reverse-KL
    gradient, so the gap is neither whitened nor centred. A > 0 means the teacher likes ``y`` more, and a descent step
    raises ``log p(y)``.

    Args:
        student: with gradient.
        teacher: same N positions; no gradient reaches it.
        tokens: targets, weights and finite behaviour log-probs.
        config: ``ratio``, ``cap``, ``eps_lo``, ``eps_hi``, ``gate``, ``c3``, ``veto``.
        bound: largest |gap| of this step (nats), the same in all its micro-batches; infinity is off.

    Returns:
        Scalar loss (its value means little, its gradient is the point) and per-token statistics.
    """
    log_p, log_q = _distributions(student, teacher, tokens)
    logp, teacher_logp = token_logp(log_p, tokens.tok, tokens.kept), _teacher_logp(log_q, tokens)
    student_logp = logp.detach()
    gap = teacher_logp - student_logp
    log_r = ratios.log_ratio(student_logp, tokens.behaviour_logp)
    weight, mask = ratios.ratio_weight(config.ratio, log_r.exp(), gap, cap=config.cap, eps_lo=config.eps_lo,
                                       eps_hi=config.eps_hi)
    gate, used = _gate(log_r, tokens.turn, config), gap.clamp(-bound, bound)
    push = gate * weight * used
    loss = -(tokens.weight * push * logp).sum()
    nothing = torch.zeros_like(gap)
    return loss, TokenStats(
        student_logp=student_logp, teacher_logp=teacher_logp, gap=gap, used_gap=used, log_ratio=log_r,
        ratio_weight=weight, mask=mask, gate=gate, divergence=nothing, push=push,
        tail_student=nothing, tail_teacher=nothing, **_shape_stats(log_p.detach(), log_q))


def _distributions(student: Head, teacher: Head, tokens: LossTokens) -> tuple[Tensor, Tensor]:
    """Log-probabilities of both sides under the same sampling temperature; the teacher's without gradient."""
    with torch.no_grad():
        log_q = teacher.log_probs(tokens.temperature)
    return student.log_probs(tokens.temperature), log_q


def _teacher_logp(log_q: Tensor, tokens: LossTokens) -> Tensor:
    """``log q(y)`` over the same kept ids as the student's."""
    return token_logp(log_q, tokens.tok, tokens.kept)


def _gate(log_r: Tensor, turn: Tensor, config: LearnConfig) -> Tensor:
    """The 0/1 turn gate of the configuration, bool[N]."""
    return ratios.turn_gate(log_r, turn, c3=config.c3 if config.gate == "k3" else None, veto=config.veto)


def _shape_stats(log_p: Tensor, log_q: Tensor) -> dict[str, Tensor]:
    """Entropies and agreement of the two distributions."""
    return {"entropy_student": entropy(log_p), "entropy_teacher": entropy(log_q),
            "top1_agree": top1_agree(log_p, log_q)}
