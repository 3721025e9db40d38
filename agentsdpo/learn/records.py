"""What passes between the files of the learner. Shapes: N loss tokens of a micro-batch, V ids, H hidden, K kept ids."""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from agentsdpo.learn.divergence import log_softmax


@dataclass(frozen=True)
class Head:
    """Hidden states at the loss positions and the output projection that turns them into logits.

    ``hidden`` [N, H], ``weight`` [V, H]. Logits are formed inside the objective, so that it may chunk them.
    """

    hidden: Tensor
    weight: Tensor

    def log_probs(self, temperature: Tensor | None = None) -> Tensor:
        """Log-probabilities [N, V], float32 at least; ``temperature`` [N] divides the logits."""
        logits = self.logits()
        return log_softmax(logits if temperature is None else logits / temperature[:, None])

    def logits(self) -> Tensor:
        """Logits [N, V]."""
        return self.hidden @ self.weight.t()


@dataclass(frozen=True)
class LossTokens:
    """The tokens that carry loss.

    ``tok`` int64[N] sampled ids; ``weight`` float32[N], all normalisers and factors known before the forward;
    ``turn`` int64[N], one number per turn of the micro-batch; ``behaviour_logp`` float32[N];
    ``temperature`` float32[N] of sampling, None when 1 everywhere; ``kept`` int64[N, K] padded with -1, None when
    nothing was truncated.
    """

    tok: Tensor
    weight: Tensor
    turn: Tensor
    behaviour_logp: Tensor
    temperature: Tensor | None = None
    kept: Tensor | None = None


@dataclass(frozen=True)
class TokenStats:
    """What the objective saw at each loss token; float32[N] or bool[N], detached.

    ``gap`` = teacher_logp - student_logp before clipping, ``used_gap`` after; ``ratio_weight`` multiplies the gap;
    ``mask`` is the PPO mask, ``gate`` the turn gate; ``divergence`` is zero in the sampled form; ``push`` is the
    token's share of the step before ``LossTokens.weight``.
    """

    student_logp: Tensor
    teacher_logp: Tensor
    gap: Tensor
    used_gap: Tensor
    log_ratio: Tensor
    ratio_weight: Tensor
    mask: Tensor
    gate: Tensor
    divergence: Tensor
    push: Tensor
    entropy_student: Tensor
    entropy_teacher: Tensor
    top1_agree: Tensor
    tail_student: Tensor
    tail_teacher: Tensor

    @classmethod
    def cat(cls, parts: list[Self]) -> Self:
        """All micro-batches of a step, one after the other."""
        return cls(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)})
