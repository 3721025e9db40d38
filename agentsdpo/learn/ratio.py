"""Corrections of the importance ratio by name: pure functions of per-token tensors float[N], all detached.

``r = p(y)/mu(y)`` is student over behaviour policy, ``A`` the signal whose sign counts (the gap, or an advantage of
grades). Each function gives the weight of ``A grad log p``. At ``r = 1`` all are exactly 1; a weight of 0 is a mask;
none but ``clamp``, which is there to reproduce a published flaw, floors a ratio: a floor keeps pushing tokens the
student has abandoned. Thresholds are settings of the same names.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from agentsdpo.learn.gates import segment_mean, segment_sum


def log_ratio(student_logp: Tensor, behaviour_logp: Tensor) -> Tensor:
    """``log r`` clipped to [-20, 20]. Shape [N], no gradient."""
    return (student_logp.detach() - behaviour_logp).clamp(-20.0, 20.0)


# ----------------------------------------------------------------------------------------------- one token at a time


def tis(r: Tensor, *, cap: float) -> Tensor:
    """Truncated importance sampling ``min(r, cap)``; cap 2 in verl, slime, TRL and lasgroup/SDPO, 5 in CLaaS.

    >>> tis(torch.tensor([0.5, 9.0]), cap=2.0)
    tensor([0.5000, 2.0000])
    """
    return r.clamp_max(cap)


def topr(r: Tensor, signal: Tensor) -> Tensor:
    """1 where A >= 0, ``min(r, 1)`` where A < 0: negatives taper (TOPR, 2503.14286, there per sequence).

    >>> topr(torch.tensor([9.0, 9.0, 0.5]), torch.tensor([1.0, -1.0, -1.0]))
    tensor([1.0000, 1.0000, 0.5000])
    """
    return torch.where(signal < 0, r.clamp_max(1.0), torch.ones_like(r))


def tis_topr(r: Tensor, signal: Tensor, *, cap: float) -> Tensor:
    """``min(r, cap)`` where A >= 0, ``min(r, 1)`` where A < 0: truncation above, tapered negatives as in TOPR.

    >>> tis_topr(torch.tensor([9.0, 9.0]), torch.tensor([1.0, -1.0]), cap=2.0)
    tensor([2., 1.])
    """
    return torch.where(signal < 0, r.clamp_max(1.0), r.clamp_max(cap))


def ppo_mask(r: Tensor, signal: Tensor, *, eps_lo: float, eps_hi: float) -> Tensor:
    """Sign-aware mask bool[N], False where the update has already gone far enough (1707.06347, equation 7).

    ``M = 0`` if (A > 0 and r > 1+eps_hi) or (A < 0 and r < 1-eps_lo), else 1: the gradient of
    ``-min(r A, clip(r, 1-eps_lo, 1+eps_hi) A)`` is ``-M r A grad log p``.

    >>> ppo_mask(torch.tensor([1.5, 1.5, 0.5, 0.5]), torch.tensor([1.0, -1.0, 1.0, -1.0]), eps_lo=0.2, eps_hi=0.2)
    tensor([False,  True,  True, False])
    """
    gone_up = (signal > 0) & (r > 1.0 + eps_hi)
    gone_down = (signal < 0) & (r < 1.0 - eps_lo)
    return ~(gone_up | gone_down)


def ppo(r: Tensor, signal: Tensor, *, eps_lo: float, eps_hi: float, cap: float) -> Tensor:
    """``min(r, cap) M`` with the mask of :func:`ppo_mask`: PPO's clipped surrogate, and its dual clip.

    As long as cap >= 1 + eps_hi the cap acts on A < 0 alone (1912.09729). 0.2/0.2 in PPO, 0.2/0.28 in DAPO; dual clip
    3 in verl, 10 in DAPO.

    >>> ppo(torch.tensor([1.5, 9.0]), torch.tensor([1.0, -1.0]), eps_lo=0.2, eps_hi=0.2, cap=2.0)
    tensor([0., 2.])
    """
    return r.clamp_max(cap) * ppo_mask(r, signal, eps_lo=eps_lo, eps_hi=eps_hi)


def clamp(r: Tensor, *, eps_lo: float, eps_hi: float) -> Tensor:
    """``clip(r, 1-eps_lo, 1+eps_hi)``: parity only (0.8/1.4 in a public reproduction); its floor is wrong.

    >>> clamp(torch.tensor([0.0, 9.0]), eps_lo=0.2, eps_hi=0.4)
    tensor([0.8000, 1.4000])
    """
    return r.clamp(1.0 - eps_lo, 1.0 + eps_hi)


def cispo(r: Tensor, *, eps_hi: float) -> Tensor:
    """``min(r, 1+eps_hi)``, never masked (CISPO, 2506.13585, without its unused lower bound).

    >>> cispo(torch.tensor([0.5, 9.0]), eps_hi=0.28)
    tensor([0.5000, 1.2800])
    """
    return r.clamp_max(1.0 + eps_hi)


def icepop(r: Tensor, *, eps_lo: float, eps_hi: float) -> Tensor:
    """``r`` if it lies in ``[1-eps_lo, 1+eps_hi]``, else 0, whatever the sign (IcePop; bounds 0.5 and 5 there).

    >>> icepop(torch.tensor([0.4, 0.6, 5.5]), eps_lo=0.5, eps_hi=4.0)
    tensor([0.0000, 0.6000, 0.0000])
    """
    return r * ((r >= 1.0 - eps_lo) & (r <= 1.0 + eps_hi))


def mis(r: Tensor, *, cap: float) -> Tensor:
    """Masked importance sampling: ``r`` up to the cap, 0 above it, where :func:`tis` would truncate (verl, slime).

    >>> mis(torch.tensor([0.4, 5.5]), cap=2.0)
    tensor([0.4000, 0.0000])
    """
    return r * (r <= cap)


def dppo(r: Tensor, signal: Tensor, student_logp: Tensor, behaviour_logp: Tensor, *, eps_lo: float,
         eps_hi: float) -> Tensor:
    """``r``, masked where ``p - mu`` (not the ratio) has gone far enough: kinder to rare tokens (prime-rl, 0.2/0.2).

    ``M = 0`` if (A > 0 and p-mu > eps_hi) or (A < 0 and p-mu < -eps_lo).

    >>> p, mu = torch.tensor([0.5, 0.01]), torch.tensor([0.1, 0.001])
    >>> dppo(p / mu, torch.ones(2), p.log(), mu.log(), eps_lo=0.2, eps_hi=0.2)
    tensor([ 0.0000, 10.0000])
    """
    moved = student_logp.exp() - behaviour_logp.exp()
    return r * ~(((signal > 0) & (moved > eps_hi)) | ((signal < 0) & (moved < -eps_lo)))


def decoupled(log_r: Tensor, signal: Tensor, age: Tensor, *, eps_lo: float, eps_hi: float, cap: float) -> Tensor:
    """Decoupled PPO: ``prox/mu`` (0 above the cap) times PPO of ``p/prox`` (AReaL, 2505.24298; cap 5).

    The proximal policy is the version before the learner's, between behaviour policy and student on a log scale
    (AReaL's ``loglinear``): ``log prox = log mu + a (log p - log mu)``, ``a = (S-1)/S``, S the token's staleness;
    at S <= 1 it is ``mu`` itself, and this is PPO.

    Args:
        log_r: [N].
        signal: [N], its sign counts.
        age: staleness of each token, int64[N].
        eps_lo, eps_hi: PPO interval of ``p/prox``.
        cap: largest ``prox/mu``.

    >>> decoupled(torch.tensor([1.0, 4.0]), torch.ones(2), torch.tensor([8, 8]), eps_lo=0.2, eps_hi=0.2, cap=5.0)
    tensor([2.7183, 0.0000])
    """
    share = (age.to(log_r.dtype) - 1.0).clamp_min(0.0) / age.to(log_r.dtype).clamp_min(1.0)
    behind, ahead = (share * log_r).exp(), ((1.0 - share) * log_r).exp()
    return behind * (behind <= cap) * ahead * ppo_mask(ahead, signal, eps_lo=eps_lo, eps_hi=eps_hi)


def m2po_bound(log_r: Tensor, signal: Tensor, *, budget: float) -> float:
    """Largest ``|log r|`` a harmful token may have so that the mean ``(log r)^2`` of those kept stays in the budget.

    Harmful: moved further in the direction the signal pushes (A > 0 and r > 1, or A < 0 and r < 1). One bound for a
    whole step, from all its tokens (M2PO, 2510.01161; budget 0.04 there). 0 keeps none, infinity all.

    >>> round(m2po_bound(torch.tensor([0.1, 0.2, 0.9, -2.0]), torch.ones(4), budget=0.04), 6)
    0.2
    """
    squares = log_r[(log_r * signal) > 0].square().double().sort().values
    if not squares.numel():
        return float("inf")
    mean = squares.cumsum(0) / torch.arange(1, len(squares) + 1, device=squares.device)
    kept = int((mean <= budget).sum())  # means of a sorted sequence never fall
    return float("inf") if kept == len(squares) else float(squares[kept - 1].sqrt()) if kept else 0.0


def m2po(log_r: Tensor, signal: Tensor, *, bound: float, cap: float) -> Tensor:
    """``min(r, cap)``, 0 for harmful tokens with ``|log r|`` above the bound of :func:`m2po_bound`.

    >>> m2po(torch.tensor([0.1, 0.9]), torch.ones(2), bound=0.2, cap=3.0)
    tensor([1.1052, 0.0000])
    """
    slack = 1.0 + 1e-6  # the token that set the bound must pass it, in float32 too
    return log_r.exp().clamp_max(cap) * ~(((log_r * signal) > 0) & (log_r.abs() > bound * slack))


# ------------------------------------------------------------------------------------------- whole turns and branches


def turn_geo(log_r: Tensor, turn: Tensor, *, cap: float) -> Tensor:
    """``min(exp(mean of log r over the turn), cap)`` (ST-PPO's turn level). Shapes float[N], int64[N] to float[N].

    >>> turn_geo(torch.tensor([0.0, 0.2, 9.0]), torch.tensor([0, 0, 1]), cap=2.0)
    tensor([1.1052, 1.1052, 2.0000])
    """
    return segment_mean(log_r, turn).exp().clamp_max(cap)


def gspo(log_r: Tensor, signal: Tensor, branch: Tensor, *, eps_lo: float, eps_hi: float) -> Tensor:
    """``s = exp(mean of log r over the branch)``, with the mask of PPO on ``s`` (GSPO-token, 2507.18071).

    Bounds 3e-4/4e-4 there: a mean over a sequence moves far less than a ratio of one token.

    >>> gspo(torch.tensor([1e-4, 1e-4, 0.1]), torch.ones(3), torch.tensor([0, 0, 1]), eps_lo=3e-4, eps_hi=4e-4)
    tensor([1.0001, 1.0001, 0.0000])
    """
    s = segment_mean(log_r, branch).exp()
    return s * ppo_mask(s, signal, eps_lo=eps_lo, eps_hi=eps_hi)


def prefix_min(log_r: Tensor, branch: Tensor) -> Tensor:
    """``min_{j<t} r_j`` over the branch, 1 for its first token: a prefix weight that cannot explode (2601.22718).

    Args:
        log_r: [N], tokens in order, those of a branch side by side.
        branch: int64[N].

    >>> prefix_min(torch.tensor([0.5, 0.2, 0.4, 3.0]).log(), torch.tensor([0, 0, 0, 1]))
    tensor([1.0000, 0.5000, 0.2000, 1.0000])
    """
    parts = log_r.split(torch.unique_consecutive(branch, return_counts=True)[1].tolist())
    before = [torch.cat([part.new_zeros(1), part[:-1].cummin(0).values]) for part in parts]
    return torch.cat(before).exp() if before else log_r.exp()


def minpro(log_r: Tensor, branch: Tensor, *, cap: float) -> Tensor:
    """``min(r_t, cap) min_{j<t} r_j``: the prefix product of the exact weight by its smallest factor (2601.22718).

    >>> minpro(torch.tensor([0.5, 9.0]).log(), torch.tensor([0, 0]), cap=2.0)
    tensor([0.5000, 1.0000])
    """
    return prefix_min(log_r, branch) * log_r.exp().clamp_max(cap)


def seq_tis(log_r: Tensor, branch: Tensor, *, cap: float) -> Tensor:
    """``min(prod r, cap)`` over the branch: for study. A product grows with length: ``1.1**100`` is 13 780.

    >>> seq_tis(torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0, 0, 1]), cap=2.0)
    tensor([2., 2., 1.])
    """
    return segment_sum(log_r, branch).exp().clamp_max(cap)


def seq_mis(log_r: Tensor, branch: Tensor, *, cap: float) -> Tensor:
    """``prod r`` over the branch up to the cap, 0 above it: for study, as :func:`seq_tis`.

    >>> seq_mis(torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0, 0, 1]), cap=2.0)
    tensor([0., 0., 1.])
    """
    product = segment_sum(log_r, branch).exp()
    return torch.where(product <= cap, product, torch.zeros_like(product))


# --------------------------------------------------------------------------------------------------------- by name


@dataclass(frozen=True)
class Evidence:
    """What a correction may look at, [N] each: ``age`` is int64 staleness; ``turn`` and ``branch`` number segments."""

    log_r: Tensor
    signal: Tensor
    student_logp: Tensor
    behaviour_logp: Tensor
    turn: Tensor
    branch: Tensor
    age: Tensor


@dataclass(frozen=True)
class Limits:
    """Thresholds: PPO interval, cap, and the step's bound of :func:`m2po_bound`."""

    eps_lo: float = 0.2
    eps_hi: float = 0.2
    cap: float = 2.0
    m2: float = float("inf")


RATIOS: dict[str, Callable[[Evidence, Limits], Tensor]] = {
    "none": lambda x, k: torch.ones_like(x.log_r),
    "is": lambda x, k: x.log_r.exp(),
    "tis": lambda x, k: tis(x.log_r.exp(), cap=k.cap),
    "topr": lambda x, k: topr(x.log_r.exp(), x.signal),
    "tis_topr": lambda x, k: tis_topr(x.log_r.exp(), x.signal, cap=k.cap),
    "ppo": lambda x, k: ppo(x.log_r.exp(), x.signal, eps_lo=k.eps_lo, eps_hi=k.eps_hi, cap=k.cap),
    "clamp": lambda x, k: clamp(x.log_r.exp(), eps_lo=k.eps_lo, eps_hi=k.eps_hi),
    "cispo": lambda x, k: cispo(x.log_r.exp(), eps_hi=k.eps_hi),
    "icepop": lambda x, k: icepop(x.log_r.exp(), eps_lo=k.eps_lo, eps_hi=k.eps_hi),
    "mis": lambda x, k: mis(x.log_r.exp(), cap=k.cap),
    "dppo": lambda x, k: dppo(x.log_r.exp(), x.signal, x.student_logp, x.behaviour_logp, eps_lo=k.eps_lo,
                              eps_hi=k.eps_hi),
    "decoupled": lambda x, k: decoupled(x.log_r, x.signal, x.age, eps_lo=k.eps_lo, eps_hi=k.eps_hi, cap=k.cap),
    "m2po": lambda x, k: m2po(x.log_r, x.signal, bound=k.m2, cap=k.cap),
    "minpro": lambda x, k: minpro(x.log_r, x.branch, cap=k.cap),
    "turn_geo": lambda x, k: turn_geo(x.log_r, x.turn, cap=k.cap),
    "gspo": lambda x, k: gspo(x.log_r, x.signal, x.branch, eps_lo=k.eps_lo, eps_hi=k.eps_hi),
    "seq_tis": lambda x, k: seq_tis(x.log_r, x.branch, cap=k.cap),
    "seq_mis": lambda x, k: seq_mis(x.log_r, x.branch, cap=k.cap),
}
"""Every correction by the name ``learn.ratio`` gives it."""

SEGMENTED = frozenset({"minpro", "turn_geo", "gspo", "seq_tis", "seq_mis"})
"""Corrections that read other tokens than their own: they need a whole turn or branch at once."""

SIGNED = frozenset({"topr", "tis_topr", "ppo", "dppo", "decoupled", "m2po", "gspo"})
"""Corrections that go by the sign of the signal."""

MASKING = frozenset({"ppo", "icepop", "mis", "dppo", "decoupled", "m2po", "gspo", "seq_mis"})
"""Corrections that may give a token no weight at all."""


def correct(name: str, evidence: Evidence, limits: Limits) -> Tensor:
    """Weight float[N] of the correction ``name``; 0 where it masks.

    >>> one = torch.zeros(2)
    >>> x = Evidence(one, one + 1, one, one, *[torch.zeros(2, dtype=torch.long)] * 3)
    >>> {tuple(correct(name, x, Limits()).tolist()) for name in RATIOS}
    {(1.0, 1.0)}
    """
    return RATIOS[name](evidence, limits)
