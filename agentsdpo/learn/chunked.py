"""The loss in memory that does not grow with N times V: gradients of the hidden states are formed in the forward.

Replay fixes the loss weights before the backward, so each chunk of rows can go from hidden states to logits, loss,
gradient of the logits and gradient of the hidden states at once, and its logits are never needed again::

    loss = sum_i a_i D_i - b_i log p_i(y_i)        a, b detached, from ``weigh``

Vocabulary products per loss token (``learn/products.py``): student logits, teacher logits, gradient of the hidden
states and, for a trainable head only, gradient of the head. Weights that need log-probs of whole turns cost a frozen
head nothing (rows of the gradient are scaled afterwards) and a trainable one a look ahead at the logits. Products run
in the model's dtype; exp, logsumexp, divergence and gradient of the logits in float32 (float64 in, float64 throughout).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from agentsdpo.learn.divergence import entropy, log_softmax, token_logp, top1_agree
from agentsdpo.learn.products import (
    add_head_gradient,
    hidden_gradient_into,
    keep_freed_memory,
    logits_buffer,
    logits_into,
)
from agentsdpo.learn.records import Head, LossTerms, LossTokens, TokenScores, Weigh
from agentsdpo.learn.slope import divergence_slope, token_slope

Weights = tuple[Tensor | None, Tensor | None]

_CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Logits of one chunk and side: 64 MiB in float32 on a CPU; on a GPU enough rows to keep the products compute-bound."""
_CHUNK_ROWS = {"cpu": (64, 4096), "cuda": (1024, 4096)}
_BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Logits of the rows whose exps and sums are taken together: on a CPU 1 MiB in float32, of which ten fit into its
cache."""


def chunked_loss(student: Head, teacher: Head, tokens: LossTokens, terms: LossTerms, weigh: Weigh, *,
                 chunk: int | None = None) -> tuple[Tensor, TokenScores]:
    """Loss of one micro-batch, differentiable in the student's hidden states and, where it requires it, head.

    Args:
        student: hidden states [N, H] and head [V, H], float32, bfloat16 or float64.
        teacher: same N positions over the same V ids, its own width; no gradient reaches it.
        tokens: the N loss tokens.
        terms: which terms of the loss there are.
        weigh: gives their weights.
        chunk: rows whose logits exist at a time; None chooses by vocabulary and device.

    Returns:
        The scalar loss and what was seen at each token, detached. The gradient is there already: the backward
        multiplies it by the incoming scalar. Under no_grad none is formed.
    """
    run = _Run(student, Head(teacher.hidden.detach(), teacher.weight.detach()), tokens, terms, chunk)
    needs_head = torch.is_grad_enabled() and student.weight.requires_grad
    needs_hidden = torch.is_grad_enabled() and (student.hidden.requires_grad or needs_head)
    with torch.no_grad():
        loss, seen, grad, head_grad = run.go(weigh, needs_hidden, needs_head)
    if needs_hidden:
        loss = _Attach.apply(student.hidden, student.weight, loss, grad, head_grad)
    return loss, seen


class _Attach(torch.autograd.Function):
    """Gives a loss whose gradients are known already its place in the graph."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, loss: Tensor, grad: Tensor,
                head_grad: Tensor | None) -> Tensor:
        """The loss as it is; the gradients wait for the backward."""
        ctx.save_for_backward(grad, head_grad)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients times the incoming scalar."""
        grads = [None if grad is None else (grad if incoming == 1 else grad * incoming.to(grad.dtype))
                 for grad in ctx.saved_tensors]
        return *grads, None, None, None


@dataclass
class _Run:
    """One pass over the loss tokens."""

    student: Head
    teacher: Head
    tokens: LossTokens
    terms: LossTerms
    chunk: int | None

    def __post_init__(self) -> None:
        device, vocabulary = self.student.hidden.device.type, self.student.weight.shape[0]
        device = "cpu" if device == "cpu" else "cuda"
        low, high = _CHUNK_ROWS[device]
        self.chunk = self.chunk or min(high, max(low, _CHUNK_ELEMENTS[device] // vocabulary))
        self.block = max(1, _BLOCK_ELEMENTS[device] // vocabulary)
        self.wide = torch.promote_types(self.student.hidden.dtype, torch.float32)

    def go(self, weigh: Weigh, needs_hidden: bool, needs_head: bool,
           ) -> tuple[Tensor, TokenScores, Tensor | None, Tensor | None]:
        """Loss, scores, gradient of the hidden states and of the head (None where not asked for)."""
        mixed = self.terms.divergence and self.terms.token
        # rows of the gradient can be scaled when all is known, but neither the sum of two kinds of them nor the head's
        later = weigh.turns and not (needs_hidden and (needs_head or mixed))
        ahead = weigh(*self._look_ahead(weigh), slice(None)) if weigh.turns and not later else None
        keep_freed_memory(self.student.hidden.device)
        hidden = torch.empty_like(self.student.hidden) if needs_hidden else None
        head = torch.zeros_like(self.student.weight, dtype=self.wide) if needs_head else None
        seen = TokenScores.empty(len(self.tokens.tok), self.wide, self.student.hidden.device)
        for rows, (z_s, z_t) in self._logits():
            for own in self._blocks(rows):
                local = slice(own.start - rows.start, own.stop - rows.start)
                seen.put(own, self._block(own, z_s[local], z_t[local], weigh, ahead, later, needs_hidden))
            if hidden is not None:
                hidden_gradient_into(hidden[rows], z_s, self.student.weight)
            if head is not None:
                add_head_gradient(head, z_s, self.student.hidden[rows])
        a, b = ahead or weigh(seen.student_logp, seen.teacher_logp, slice(None))
        scale = a if self.terms.divergence else b
        if later and hidden is not None and scale is not None:
            hidden.mul_(scale[:, None])
        loss = seen.student_logp.new_zeros(())
        for weight, value in ((a, seen.divergence), (b, -seen.student_logp)):
            loss = loss if weight is None else loss + (weight * value).sum()
        return loss, seen, hidden, head

    def _logits(self, teacher: bool = True) -> Iterator[tuple[slice, list[Tensor]]]:
        """Chunk after chunk: its rows, and the logits of both sides in a buffer that is used again and written over.

        Sides under one head share a product: twice the rows read the head once.
        """
        n, sides = len(self.tokens.tok), [self.student, self.teacher] if teacher else [self.student]
        one = len(sides) == 2 and _same(self.student.weight, self.teacher.weight)
        rows = min(self.chunk or n, n)
        buffers = [logits_buffer(rows * (1 + one), head.hidden, head.weight) for head in sides[:2 - one]]
        for start in range(0, n, rows):
            own = slice(start, min(start + rows, n))
            hidden = [head.hidden[own] for head in sides]
            hidden = [torch.cat(hidden)] if one else hidden
            found = [logits_into(buffer[:len(h)], h, head.weight)
                     for buffer, h, head in zip(buffers, hidden, sides, strict=False)]
            yield own, list(found[0].chunk(2)) if one else found

    def _blocks(self, rows: slice) -> list[slice]:
        return [slice(at, min(at + self.block, rows.stop)) for at in range(rows.start, rows.stop, self.block)]

    def _block(self, rows: slice, z_s: Tensor, z_t: Tensor, weigh: Weigh, ahead: Weights | None,
               later: bool, needs_hidden: bool) -> TokenScores:
        """Scores of a block of rows; the gradient of its logits takes the place of the student's logits."""
        log_p, log_q = self._log_probs(rows, z_s), self._log_probs(rows, z_t)
        p, q = log_p.exp(), log_q.exp()
        seen, dz = self._scores(rows, log_p, log_q, p, q)
        if not needs_hidden:
            return seen
        a = b = None
        if ahead is not None:
            a, b = (_rows(each, rows) for each in ahead)
        elif not later:
            a, b = weigh(seen.student_logp, seen.teacher_logp, rows)
        slopes = []
        if dz is not None:
            slopes.append(dz if a is None else dz.mul_(a[:, None]))
        if self.terms.token:
            own = token_slope(log_p, self.tokens.tok[rows], _rows(self.tokens.kept, rows), p=p)
            slopes.append(own if b is None else own.mul_(b[:, None]))
        total = slopes[0] if len(slopes) == 1 else slopes[0].add_(slopes[1])
        z_s.copy_(total if self.tokens.temperature is None else total.div_(self.tokens.temperature[rows, None]))
        return seen

    def _log_probs(self, rows: slice, z: Tensor) -> Tensor:
        """Log-probabilities of a block under the temperature of its tokens, in float32 at least."""
        if self.tokens.temperature is not None:
            z = z.to(self.wide) / self.tokens.temperature[rows, None]
        return log_softmax(z)

    def _scores(self, rows: slice, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor,
                ) -> tuple[TokenScores, Tensor | None]:
        """What a block says about its tokens, and the gradient of its divergence where there is one."""
        tok, kept, terms = self.tokens.tok[rows], _rows(self.tokens.kept, rows), self.terms
        nothing = log_p.new_zeros(len(tok))
        value, dz, tail_s, tail_t = nothing, None, nothing, nothing
        if terms.divergence:
            value, dz, tail_s, tail_t = divergence_slope(log_p, log_q, beta=terms.beta, jsd_scale=terms.jsd_scale,
                                                         support=terms.support, top_k=terms.top_k, p=p, q=q)
        return TokenScores(
            student_logp=token_logp(log_p, tok, kept), teacher_logp=token_logp(log_q, tok, kept), divergence=value,
            tail_student=tail_s, tail_teacher=tail_t, entropy_student=entropy(log_p, p),
            entropy_teacher=entropy(log_q, q), top1_agree=top1_agree(log_p, log_q)), dz

    def _look_ahead(self, weigh: Weigh) -> tuple[Tensor, Tensor]:
        """Log-probs of all tokens before any gradient: the teacher's only if weights depend on them, else zeros."""
        mine, theirs = torch.zeros(2, len(self.tokens.tok), dtype=self.wide, device=self.student.hidden.device)
        for rows, sides in self._logits(teacher=weigh.teacher):
            for own in self._blocks(rows):
                tok, kept = self.tokens.tok[own], _rows(self.tokens.kept, own)
                local = slice(own.start - rows.start, own.stop - rows.start)
                logp = [token_logp(self._log_probs(own, z[local]), tok, kept) for z in sides]
                for row, values in zip((mine, theirs), logp, strict=False):
                    row[own] = values
        return mine, theirs


def _rows(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def _same(left: Tensor, right: Tensor) -> bool:
    """Whether two heads are one: the same numbers in the same place."""
    return left.data_ptr() == right.data_ptr() and left.shape == right.shape and left.stride() == right.stride()
