"""The objective: make the unhinted student agree with the hinted teacher on tokens the behaviour policy sampled.

Notation: ``p`` student (current weights, no hint), ``q`` teacher (hint in its context, no gradient), ``mu`` behaviour,
``y`` sampled token, ``A = log q(y) - log p(y)`` the gap, ``r = p(y)/mu(y)`` the ratio, ``g`` the 0/1 turn gate, ``u``
the token weight, ``w`` the weight that holds 1/N and was known before the forward. Sums run over loss tokens.

All forms keep the gradient at the visited states and drop that of the visits, since an exact state weight (a product
of ratios) has unusable variance; bounded staleness and gates stand in for it. Everything that multiplies ``grad`` is
detached, and comes from ``learn/weights.py``. Method: SDPO (2601.20802), off-policy as in Scaling SDPO (field note,
June 2026).
"""

from torch import Tensor

from agentsdpo.learn.config import LearnConfig
from agentsdpo.learn.loss import token_loss
from agentsdpo.learn.records import Head, LossTerms, LossTokens, TokenStats
from agentsdpo.learn.weights import Bounds, Weigher


def objective(student: Head, teacher: Head, tokens: LossTokens, config: LearnConfig,
              bounds: Bounds) -> tuple[Tensor, TokenStats]:
    """The form the configuration names; arguments and results as below."""
    if config.mix != "pure" or config.tau or config.beta_kl:
        return mixed_form(student, teacher, tokens, config, bounds)
    if config.form == "divergence":
        return divergence_form(student, teacher, tokens, config, bounds)
    return sampled_form(student, teacher, tokens, config, bounds)


def divergence_form(student: Head, teacher: Head, tokens: LossTokens, config: LearnConfig,
                    bounds: Bounds) -> tuple[Tensor, TokenStats]:
    """Divergence recomputed over the vocabulary at every visited state::

        L1 = sum_t w_t g_t u_t D_beta(p_t, q_t)

    No ratio: ``D`` does not depend on the sampled token and ``E_mu[r] = 1``, so a ratio would keep the mean and add
    variance. Wrong state weights do not move the optimum of a divergence the student can drive to zero, which is
    why this form tolerates stale data. Equations of ``D`` and its gradient: ``learn/divergence.py``.

    Args:
        student: with gradient.
        teacher: same N positions; no gradient reaches it.
        tokens: targets and weights; behaviour log-probs matter only to gates and diagnostics.
        config: ``beta``, ``jsd_scale``, ``support``, ``top_k``; gate and token weight; ``ratio`` of a prefix.
        bounds: of this step; no ratio of a prefix has one, but a ratio that ``parity`` lets pass may.

    Returns:
        Scalar loss (its sum over micro-batches is the step's loss) and per-token statistics.
    """
    return _loss(student, teacher, tokens, config, bounds, divergence=True, token=False)


def sampled_form(student: Head, teacher: Head, tokens: LossTokens, config: LearnConfig,
                 bounds: Bounds) -> tuple[Tensor, TokenStats]:
    """Policy gradient on the sampled token, with the gap as its advantage::

        Ac_t = clip(A_t, -b, +b)                       A under the current p: nothing cached
        c_t  = sg[min(r_t, C)] M_t                     learn/ratio.py has this and all others; none floors
        L2   = - sum_t w_t g_t u_t c_t Ac_t log p_t(y_t)

    At a fixed state ``E_mu[r (log p - log q) grad log p] = grad KL(p||q)``: without clip and mask it is the reverse-KL
    gradient, so the gap is neither whitened nor centred. A > 0 means the teacher likes ``y`` more, and a descent step
    raises ``log p(y)``.

    Args:
        student: with gradient.
        teacher: same N positions; no gradient reaches it.
        tokens: targets, weights and finite behaviour log-probs.
        config: ``ratio`` and its limits, gate, token weight.
        bounds: of this step, the same in all its micro-batches.

    Returns:
        Scalar loss (its value means little, its gradient is the point) and per-token statistics.
    """
    return _loss(student, teacher, tokens, config, bounds, divergence=False, token=True)


def mixed_form(student: Head, teacher: Head, tokens: LossTokens, config: LearnConfig,
               bounds: Bounds) -> tuple[Tensor, TokenStats]:
    """Either form beside a policy gradient of grades, or with penalties on drift::

        L3 = sum_t w_t (a_t D_t - b_t log p_t(y_t))    a, b: the table of learn/mix.py, times the gate
             + sum_t w_t (tau (log r_t)^2 + beta_kl K3(p_t, p_ref))

    The penalties stand in ``b`` by their gradients: at a sampled token both are functions of ``log p`` alone.

    Args:
        student: with gradient.
        teacher: same N positions; no gradient reaches it.
        tokens: also their advantages, and reference log-probs where ``beta_kl`` is on.
        config: ``mix``, ``mix_weight``, ``tau``, ``beta_kl``, and what the form reads.
        bounds: of this step.

    Returns:
        Scalar loss and per-token statistics.
    """
    divergence = config.form == "divergence"
    token = not divergence or config.mix != "pure" or config.tau > 0.0 or config.beta_kl > 0.0
    return _loss(student, teacher, tokens, config, bounds, divergence=divergence, token=token)


def _loss(student: Head, teacher: Head, tokens: LossTokens, config: LearnConfig, bounds: Bounds, *,
          divergence: bool, token: bool) -> tuple[Tensor, TokenStats]:
    """``sum_t w_t (a_t D_t - b_t log p_t(y_t))`` with one or both of its terms."""
    terms = LossTerms(divergence=divergence, token=token, beta=config.beta, jsd_scale=config.jsd_scale,
                      support=config.support, top_k=config.top_k)
    weigher = Weigher(tokens, config, bounds)
    loss, scores = token_loss(student, teacher, tokens, terms, weigher)
    return loss, weigher.stats(scores)
