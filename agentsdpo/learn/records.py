"""What passes between the files of the learner. Shapes: N loss tokens of a micro-batch, V ids, H hidden, K kept ids."""

from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from agentsdpo.learn.divergence import Scale, Support, log_softmax, token_logp
from agentsdpo.learn.products import logits_buffer, logits_into


def whole(tensor: Tensor) -> Tensor:
    """A tensor as one process alone would have it, where processes hold parts of it; all of them must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """The other way round: a whole tensor as the parts that ``like`` has. A single number stays whole."""
    if not isinstance(like, DTensor) or not tensor.dim():
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements)


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
        """Logits [N, V]; where no gradient is asked for, in the dtype in which the chunked loss takes them."""
        if torch.is_grad_enabled() and (self.hidden.requires_grad or self.weight.requires_grad):
            return self.hidden @ self.weight.t()
        return logits_into(logits_buffer(len(self.hidden), self.hidden, self.weight), self.hidden, self.weight)


@dataclass(frozen=True)
class LossTokens:
    """The tokens that carry loss.

    ``tok`` int64[N] sampled ids; ``weight`` float32[N], all normalisers and factors known before the forward;
    ``turn`` int64[N], one number per turn of the micro-batch; ``behaviour_logp`` float32[N];
    ``temperature`` float32[N] of sampling, None when 1 everywhere; ``kept`` int64[N, K] padded with -1, None when
    nothing was truncated; ``branch`` int64[N], one number per branch of the micro-batch, side by side, None for one
    branch; ``age`` int64[N] staleness of each token, None for 0; ``advantage`` float32[N] of its episode's grade, None
    for 0; ``reference_logp`` float32[N] under the initial weights without hint, None when nothing asks for it;
    ``hinted`` bool[N], whether the teacher read a hint, None where it always did.
    """

    tok: Tensor
    weight: Tensor
    turn: Tensor
    behaviour_logp: Tensor
    temperature: Tensor | None = None
    kept: Tensor | None = None
    branch: Tensor | None = None
    age: Tensor | None = None
    advantage: Tensor | None = None
    reference_logp: Tensor | None = None
    hinted: Tensor | None = None

    def at(self, rows: slice) -> Self:
        """The tokens of some rows."""
        parts: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: value[rows] for name, value in parts.items() if value is not None})

    @property
    def branches(self) -> Tensor:
        """``branch``, zeros for None."""
        return torch.zeros_like(self.turn) if self.branch is None else self.branch

    @property
    def ages(self) -> Tensor:
        """``age``, zeros for None."""
        return torch.zeros_like(self.turn) if self.age is None else self.age

    @property
    def advantages(self) -> Tensor:
        """``advantage``, zeros for None."""
        return torch.zeros_like(self.weight) if self.advantage is None else self.advantage


def sampled_logp(head: Head, tokens: LossTokens, *, rows: int = 256) -> Tensor:
    """Log-probs [N] of the sampled tokens under a head without gradient, ``rows`` of logits at a time."""
    parts = [tokens.at(slice(at, at + rows)) for at in range(0, len(tokens.tok), rows)]
    hidden = head.hidden.split(rows)
    return torch.cat([token_logp(Head(h, head.weight).log_probs(part.temperature), part.tok, part.kept)
                      for h, part in zip(hidden, parts, strict=True)])


@dataclass(frozen=True)
class LossTerms:
    """Which of the two terms ``sum_i a_i D_i - b_i log p_i(y_i)`` a loss has, and what ``D`` is."""

    divergence: bool
    token: bool
    beta: float = 0.0
    jsd_scale: Scale = "unit"
    support: Support = "full"
    top_k: int = 64


class Weigh(Protocol):
    """Weights of the loss tokens from their log-probs. Everything it returns is detached.

    ``turns``: a weight depends on other tokens than its own, so all log-probs are needed before the first weight.
    ``teacher``: weights depend on the teacher's log-probs.
    """

    turns: bool
    teacher: bool

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor, rows: slice) -> tuple[Tensor | None, Tensor | None]:
        """``a`` and ``b`` of the tokens in ``rows``, [n] each; None for a term the loss does not have.

        Args:
            student_logp: [n] log-probs of the sampled tokens, detached.
            teacher_logp: [n]; zeros when ``teacher`` is False and ``turns`` is True.
            rows: which of the micro-batch's tokens they are; all of them when ``turns`` is True.
        """
        ...


@dataclass(frozen=True)
class TokenScores:
    """What the two distributions say about each loss token, before any weight; [N], detached, in nats where they are.

    ``divergence`` and the masses off the support are zero in a loss without the divergence term.
    """

    student_logp: Tensor
    teacher_logp: Tensor
    divergence: Tensor
    tail_student: Tensor
    tail_teacher: Tensor
    entropy_student: Tensor
    entropy_teacher: Tensor
    top1_agree: Tensor

    @classmethod
    def empty(cls, n: int, dtype: torch.dtype, device: torch.device) -> Self:
        """Room for ``n`` tokens. Taken once: small results kept between large temporaries would fragment the heap."""
        return cls(**{f.name: torch.empty(n, dtype=torch.bool if f.name == "top1_agree" else dtype, device=device)
                      for f in fields(cls)})

    def put(self, rows: slice, part: Self) -> None:
        """Write the scores of the tokens in ``rows``."""
        for f in fields(self):
            getattr(self, f.name)[rows] = getattr(part, f.name)


@dataclass(frozen=True)
class TokenStats:
    """What the objective saw at each loss token; float32[N] or bool[N], detached.

    ``gap`` = teacher_logp - student_logp before clipping, ``used_gap`` after; ``signal`` is what the ratio goes by, the
    gap or in a mix the advantage; ``ratio_weight`` multiplies it; ``mask`` is the PPO mask, ``gate`` the turn gate;
    ``divergence`` is zero in the sampled form; ``push`` is the token's share of the step before ``LossTokens.weight``.
    """

    student_logp: Tensor
    teacher_logp: Tensor
    gap: Tensor
    used_gap: Tensor
    signal: Tensor
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

    def none(self) -> Self:
        """Of no tokens."""
        return replace(self, **{f.name: getattr(self, f.name)[:0] for f in fields(self)})

    @classmethod
    def cat(cls, parts: list[Self]) -> Self:
        """All micro-batches of a step, one after the other."""
        return cls(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)})
