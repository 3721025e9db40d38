"""The loss of one micro-batch, dense or chunked: the same numbers and gradients, whichever is smaller.

    loss = sum_i a_i D_i - b_i log p_i(y_i)

The dense form keeps the logits of both sides, and autograd's copies of them, until the backward. It stands for few
tokens under a trainable head, where the gradient of the head would take more than those logits, and as the reference
the chunked form is compared with.
"""

import torch
from torch import Tensor

from agentsdpo.learn.chunked import chunked_loss
from agentsdpo.learn.divergence import divergence, entropy, token_logp, top1_agree
from agentsdpo.learn.records import Head, LossTerms, LossTokens, TokenScores, Weigh


def token_loss(student: Head, teacher: Head, tokens: LossTokens, terms: LossTerms, weigh: Weigh, *,
               dense_below: int | None = None) -> tuple[Tensor, TokenScores]:
    """Loss and scores of one micro-batch; arguments as in :func:`~agentsdpo.learn.chunked.chunked_loss`.

    Args:
        student, teacher, tokens, terms, weigh: see there.
        dense_below: loss tokens below which a trainable head takes the dense form; None is a sixteenth of its width,
            where the two took equal time and memory (width 1,024, 151,936 ids). A frozen head is always chunked, and
            so is one in half precision: autograd's logits would be rounded to it, by 0.06 at a logit of 20.
    """
    wide = torch.promote_types(student.hidden.dtype, torch.float32) == student.hidden.dtype
    trainable = torch.is_grad_enabled() and student.weight.requires_grad
    if trainable and wide and len(tokens.tok) < (student.hidden.shape[1] // 16 if dense_below is None else dense_below):
        return dense_loss(student, teacher, tokens, terms, weigh)
    return chunked_loss(student, teacher, tokens, terms, weigh)


def dense_loss(student: Head, teacher: Head, tokens: LossTokens, terms: LossTerms,
               weigh: Weigh) -> tuple[Tensor, TokenScores]:
    """The loss on whole [N, V] logits, differentiated by autograd."""
    with torch.no_grad():
        log_q = teacher.log_probs(tokens.temperature)
    log_p = student.log_probs(tokens.temperature)
    logp, teacher_logp = (token_logp(side, tokens.tok, tokens.kept) for side in (log_p, log_q))
    a, b = weigh(logp.detach(), teacher_logp, slice(None))
    zero = torch.zeros_like(teacher_logp)
    loss, value, tails = zero.sum(), zero, (zero, zero)
    if a is not None:
        d = divergence(log_p, log_q, beta=terms.beta, jsd_scale=terms.jsd_scale, support=terms.support,
                       top_k=terms.top_k)
        loss, value, tails = (a * d.value).sum(), d.value.detach(), (d.tail_student, d.tail_teacher)
    if b is not None:
        loss = loss - (b * logp).sum()
    own = log_p.detach()
    return loss, TokenScores(
        student_logp=logp.detach(), teacher_logp=teacher_logp, divergence=value, tail_student=tails[0],
        tail_teacher=tails[1], entropy_student=entropy(own), entropy_teacher=entropy(log_q),
        top1_agree=top1_agree(own, log_q))
