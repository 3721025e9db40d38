"""The loss alone, on the same random hidden states and heads: ours, dense, and TRL's chunked kernel. For ``fresh.py``.

All give the mean generalised JSD (beta 0.5) of N loss tokens over the whole vocabulary and the gradient of the
student's hidden states and, where it is trainable, of its head.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from agentsdpo.benchmarks.perf.fresh import Work
from agentsdpo.learn.chunked import chunked_loss
from agentsdpo.learn.loss import dense_loss
from agentsdpo.learn.records import Head, LossTerms, LossTokens

BETA = 0.5
_TERMS = LossTerms(divergence=True, token=False, beta=BETA, jsd_scale="raw", support="full")


class _Mean:
    """Every token the same share."""

    turns, teacher = False, False

    def __init__(self, n: int) -> None:
        self.share = 1.0 / n

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor, rows: slice) -> tuple[Tensor, None]:
        """See :class:`~agentsdpo.learn.records.Weigh`."""
        return torch.full_like(student_logp, self.share), None


def _heads(n: int, width: int, vocabulary: int, trainable: bool, dtype: str) -> tuple[Head, Head]:
    g = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    own, other = (torch.randn(n, width, generator=g).to(kind) for _ in range(2))
    weight = torch.randn(vocabulary, width, generator=g).mul_(2.0 / width**0.5).to(kind)
    return Head(own.requires_grad_(), weight.requires_grad_(trainable)), Head(other, weight.detach())


def ours(n: int, width: int, vocabulary: int, trainable: bool, dtype: str) -> Work:
    """The chunked loss of this project."""
    student, teacher = _heads(n, width, vocabulary, trainable, dtype)
    return _stepped(student, lambda: chunked_loss(student, teacher, _tokens(n), _TERMS, _Mean(n))[0])


def own_dense(n: int, width: int, vocabulary: int, trainable: bool, dtype: str) -> Work:
    """The dense loss of this project, which the chunked one is tested against."""
    student, teacher = _heads(n, width, vocabulary, trainable, dtype)
    return _stepped(student, lambda: dense_loss(student, teacher, _tokens(n), _TERMS, _Mean(n))[0])


def trl_dense(n: int, width: int, vocabulary: int, trainable: bool, dtype: str) -> Work:
    """Logits of both sides and TRL's divergence on them, as its SDPOTrainer does in mode ``full_logits``."""
    from trl.experimental.sdpo.loss_utils import compute_full_logit_self_distillation_loss

    student, teacher = _heads(n, width, vocabulary, trainable, dtype)

    def loss() -> Tensor:
        z_s = student.logits()
        with torch.no_grad():
            z_t = teacher.logits()
        return compute_full_logit_self_distillation_loss(z_s.float(), z_t.float(), distillation_alpha=BETA).mean()
    return _stepped(student, loss)


def trl_chunked(n: int, width: int, vocabulary: int, trainable: bool, dtype: str) -> Work:
    """TRL's chunked kernel, in torch as it falls back to without Triton, called as its DistillationTrainer does."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student, teacher = _heads(n, width, vocabulary, trainable, dtype)

    def loss() -> Tensor:
        return ChunkedDivergenceFunction.apply(student.hidden, student.weight, None, teacher.hidden, teacher.weight,
                                               None, BETA)[0].mean()
    return _stepped(student, loss)


def _tokens(n: int) -> LossTokens:
    zero = torch.zeros(n, dtype=torch.int64)
    return LossTokens(tok=zero, weight=torch.full((n,), 1.0 / n), turn=zero, behaviour_logp=torch.zeros(n))


def _stepped(student: Head, loss: Callable[[], Tensor]) -> Work:
    """Forward and backward from no gradient at all."""
    def work() -> float:
        student.hidden.grad = student.weight.grad = None
        value = loss()
        value.backward()
        return float(value.detach())
    return work
