"""The divergence or the gap beside a policy gradient of grades: pure functions of [N] tensors, all detached.

With ``G`` the advantage of the episode's grade (``learn/prior.py``), ``A`` the clipped gap, ``D`` the divergence,
``c`` the ratio correction of ``G`` and ``c'`` that of ``A``, the weight ``b`` of ``-log p`` and ``a`` of ``D`` are

::

    pure     b = c' A                          or  a = 1
    blend    b = (1-w) c G + w c' A            or  b = (1-w) c G,  a = w
    add      b = c G + w c' A                  or  b = c G,        a = w
    credit   b = c G clip(1 + sign(G) A, 0.5, 1.5)
    grade    b = c G

left for the sampled-token form, right for the divergence form. ``blend`` is TRL's weighted sum, ``add`` OpenClaw's;
``add`` with the token weight ``sdar`` is distillation gated by the gap under a policy gradient that stays in charge
(SDAR, 2605.15155); ``credit`` lets the grade decide the direction and the gap only the size (after SGCD, 2606.12634);
``grade`` asks no teacher: GRPO (2402.03300). A row without a hint has ``A = 0`` and ``a = 0`` in all of them but
``pure``, which has no use for it: what is left is the policy gradient.
"""

from typing import Literal

import torch
from torch import Tensor

Mix = Literal["pure", "blend", "add", "credit", "grade"]

CREDIT = (0.5, 1.5)
"""Least and largest factor by which the gap may change a token's credit."""
LIKED = 10.0
"""Most that a token may be likelier under the initial weights than under the student, as the pull to them counts it."""


def credit(advantage: Tensor, gap: Tensor) -> Tensor:
    """``G clip(1 + sign(G) A, 0.5, 1.5)``: never of another sign than the advantage of the grade.

    >>> credit(torch.tensor([2.0, 2.0, -2.0]), torch.tensor([0.25, -9.0, 0.25])).tolist()
    [2.5, 1.0, -1.5]
    """
    return advantage * (1.0 + advantage.sign() * gap).clamp(*CREDIT)


def blend(policy: Tensor, distil: Tensor, weight: float) -> Tensor:
    """``(1-w) G + w A`` of two weights of ``-log p``.

    >>> blend(torch.tensor([1.0]), torch.tensor([3.0]), 0.25).tolist()
    [1.5]
    """
    return torch.lerp(policy, distil, weight)


def drift_penalty(log_r: Tensor, tau: float) -> Tensor:
    """Weight of ``-log p`` whose gradient is that of ``tau (log r)^2``: ``-2 tau log r`` (prime-rl, tau 1e-3).

    >>> drift_penalty(torch.tensor([0.5, -0.5]), 1e-3).tolist()
    [-0.0010000000474974513, 0.0010000000474974513]
    """
    return -2.0 * tau * log_r


def reference_penalty(student_logp: Tensor, reference_logp: Tensor, beta_kl: float) -> Tensor:
    """Weight of ``-log p`` whose gradient is that of ``beta_kl K3``, ``K3 = x - 1 - log x``, ``x = ref/p``.

    ``d K3 / d log p = 1 - x`` (GRPO, 2402.03300): pulls down what the student likes more than the initial weights do.
    ``x`` counts as :data:`LIKED` at most: on-policy its mean is 1, but of a token that an older policy sampled and the
    student no longer says it has no bound, and one such token would be the whole step.

    >>> reference_penalty(torch.tensor([0.5, 1e-6]).log(), torch.tensor([0.25, 0.5]).log(), 0.01)
    tensor([-0.0050,  0.0900])
    """
    return -beta_kl * (1.0 - (reference_logp - student_logp).exp().clamp(max=LIKED))
