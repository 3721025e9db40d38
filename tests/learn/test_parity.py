"""Against TRL 1.16: equal where it is right, and where it is not, what differs and that ours is the exact one.

TRL's helpers are called as its trainer calls them; how the trainer sums them (mean over the tokens of a row, then over
rows; ratio times whatever the token's loss is) is written out in :func:`trl_mean`.
"""

import os
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from agentsdpo.learn.config import LearnConfig
from agentsdpo.learn.divergence import between, buckets, divergence, support_ids
from agentsdpo.learn.presets import resolve
from agentsdpo.learn.prior import shares
from agentsdpo.learn.records import Head, LossTokens
from agentsdpo.learn.sdpo import objective
from agentsdpo.learn.weights import Bounds

N, V = 12, 40
ROWS = torch.tensor([0] * 3 + [1] * 9)
"""Two rows of unequal length: what tells a mean over tokens from a mean of means."""


@pytest.fixture(scope="module")
def trl() -> Iterator[ModuleType]:
    """TRL's loss helpers, imported without its notice that they are experimental."""
    before = os.environ.get("TRL_EXPERIMENTAL_SILENCE")
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.sdpo import loss_utils
    yield loss_utils
    if before is None:
        del os.environ["TRL_EXPERIMENTAL_SILENCE"]


def logits(seed: int = 0, *, sharp: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits with gradient, teacher logits, sampled ids."""
    g = torch.Generator().manual_seed(seed)
    student, teacher = (sharp * torch.randn(N, V, generator=g, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(True), teacher, torch.randint(0, V, (N,), generator=g)


def tokens_of(student: Tensor, tok: Tensor, *, weight: Tensor | None = None, shift: Tensor | None = None) -> LossTokens:
    """Loss tokens in the two rows, sampled by a policy whose log-probs are off the student's by ``shift``."""
    logp = student.detach().log_softmax(-1).gather(1, tok[:, None])[:, 0]
    alike = torch.full((N,), 1.0 / N, dtype=torch.float64)
    return LossTokens(tok=tok, weight=alike if weight is None else weight, turn=ROWS, branch=ROWS,
                      behaviour_logp=logp if shift is None else logp + shift)


def ours(config: LearnConfig, student: Tensor, teacher: Tensor, tokens: LossTokens) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the logits."""
    eye = torch.eye(V, dtype=torch.float64)
    loss, _ = objective(Head(student, eye), Head(teacher, eye), tokens, config, Bounds())
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def trl_mean(per_token: Tensor) -> Tensor:
    """Mean over the tokens of a row, then over rows, as ``SDPOTrainer`` takes it whatever ``loss_type`` says."""
    mask = torch.zeros(2, 9, dtype=per_token.dtype)
    mask[0, :3], mask[1] = 1.0, 1.0
    padded = torch.stack([torch.cat([per_token[:3], per_token.new_zeros(6)]), per_token[3:]])
    return ((padded * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()


def branch_weight() -> Tensor:
    ids = ROWS.numpy()
    return torch.from_numpy(shares("branch", turn=ids, branch=ids, episode=ids))


# ------------------------------------------------------------------------------------------------------ they agree


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_full_vocabulary_divergences_agree(beta: float, trl: ModuleType) -> None:
    student, teacher, _ = logits()
    theirs = trl.compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=beta)
    mine = divergence(student.log_softmax(-1), teacher.log_softmax(-1), beta=beta, jsd_scale="raw").value
    torch.testing.assert_close(mine, theirs, atol=1e-13, rtol=1e-11)
    left, right = (torch.autograd.grad(each.sum(), student)[0] for each in (mine, theirs))
    torch.testing.assert_close(left, right, atol=1e-13, rtol=1e-11)


@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_top_k_with_a_tail_agrees_while_the_tail_holds_mass(beta: float, k: int, trl: ModuleType) -> None:
    student, teacher, _ = logits(1)
    theirs = trl.compute_topk_self_distillation_loss(student, teacher, distillation_topk=k, distillation_alpha=beta,
                                                     distillation_add_tail=True)
    d = divergence(student.log_softmax(-1), teacher.log_softmax(-1), beta=beta, jsd_scale="raw", support="student",
                   top_k=k)
    assert d.tail_student.min() > 1e-6
    torch.testing.assert_close(d.value, theirs, atol=1e-9, rtol=1e-7)
    left, right = (torch.autograd.grad(each.sum(), student)[0] for each in (d.value, theirs))
    torch.testing.assert_close(left, right, atol=1e-9, rtol=1e-6)


def test_top_k_without_a_tail_is_what_renormalised_buckets_give(trl: ModuleType) -> None:
    """Not offered here; the formula is reproduced to show that it is the tail alone that differs."""
    student, teacher, _ = logits(2)
    theirs = trl.compute_topk_self_distillation_loss(student, teacher, distillation_topk=6, distillation_alpha=1.0,
                                                     distillation_add_tail=False)
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    ids, absent = support_ids(log_p, log_q, "student", 6)
    p, q = (buckets(side, ids, absent)[:, :-1].log_softmax(-1) for side in (log_p, log_q))
    torch.testing.assert_close(between(p, q, beta=1.0), theirs, atol=1e-13, rtol=1e-11)


def test_the_sampled_token_agrees_in_value_and_gradient(trl: ModuleType) -> None:
    student, teacher, tok = logits(3)
    config = LearnConfig(form="sampled")
    theirs = trl.compute_sampled_token_self_distillation_loss(student, teacher, tok, distillation_alpha=1.0)
    loss, grad = ours(config, student, teacher, tokens_of(student, tok))
    torch.testing.assert_close(loss, theirs.mean().detach(), atol=1e-14, rtol=1e-12)
    torch.testing.assert_close(grad, torch.autograd.grad(theirs.mean(), student)[0], atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("cap", [1.0, 2.0])
def test_the_truncated_ratio_agrees_on_the_sampled_token(cap: float, trl: ModuleType) -> None:
    student, teacher, tok = logits(4)
    tokens = tokens_of(student, tok, shift=torch.linspace(-2, 2, N).double())
    per_token = trl.compute_sampled_token_self_distillation_loss(student, teacher, tok, distillation_alpha=1.0)
    logp = student.log_softmax(-1).gather(1, tok[:, None])[:, 0]
    theirs = trl.apply_importance_sampling_clipping(per_token, logp, tokens.behaviour_logp, cap).mean()
    loss, grad = ours(LearnConfig(form="sampled", ratio="tis", cap=cap), student, teacher, tokens)
    torch.testing.assert_close(loss, theirs.detach(), atol=1e-14, rtol=1e-12)
    torch.testing.assert_close(grad, torch.autograd.grad(theirs, student)[0], atol=1e-14, rtol=1e-12)


def test_the_preset_parity_trl_is_trl_s_default_loss(trl: ModuleType) -> None:
    """Sampled token, truncated at 2, mean of a row, then of rows."""
    student, teacher, tok = logits(5)
    tokens = tokens_of(student, tok, weight=branch_weight(), shift=torch.linspace(-2, 2, N).double())
    per_token = trl.compute_sampled_token_self_distillation_loss(student, teacher, tok, distillation_alpha=1.0)
    logp = student.log_softmax(-1).gather(1, tok[:, None])[:, 0]
    theirs = trl_mean(trl.apply_importance_sampling_clipping(per_token, logp, tokens.behaviour_logp, 2.0))
    loss, grad = ours(resolve("parity_trl"), student, teacher, tokens)
    torch.testing.assert_close(loss, theirs.detach(), atol=1e-14, rtol=1e-12)
    torch.testing.assert_close(grad, torch.autograd.grad(theirs, student)[0], atol=1e-14, rtol=1e-12)


def test_the_preset_parity_lasgroup_is_its_formula(trl: ModuleType) -> None:
    """Raw JSD 0.5 on the student's top-k and a tail, times min(r, 2), mean over tokens; TRL has the same helpers."""
    student, teacher, tok = logits(6)
    tokens = tokens_of(student, tok, shift=torch.linspace(-2, 2, N).double())
    per_token = trl.compute_topk_self_distillation_loss(student, teacher, distillation_topk=10, distillation_alpha=0.5,
                                                        distillation_add_tail=True)
    logp = student.log_softmax(-1).gather(1, tok[:, None])[:, 0]
    theirs = trl.apply_importance_sampling_clipping(per_token, logp, tokens.behaviour_logp, 2.0).mean()
    loss, grad = ours(resolve("parity_lasgroup", {"top_k": 10}), student, teacher, tokens)
    torch.testing.assert_close(loss, theirs.detach(), atol=1e-8, rtol=1e-7)
    torch.testing.assert_close(grad, torch.autograd.grad(theirs, student)[0], atol=1e-8, rtol=1e-6)


def test_the_presets_parity_openclaw_are_their_formulas(trl: ModuleType) -> None:
    student, teacher, tok = logits(7)
    tokens = tokens_of(student, tok, weight=branch_weight(), shift=torch.linspace(-2, 2, N).double())
    logp, teacher_logp = (z.log_softmax(-1).gather(1, tok[:, None])[:, 0] for z in (student, teacher))
    gap = (teacher_logp - logp).detach()
    fresh = (logp - logp.detach()).exp()  # against a recompute right before the only step: identically 1
    theirs = trl_mean(-torch.minimum(fresh * gap, fresh.clamp(0.8, 1.2) * gap))
    _, grad = ours(resolve("parity_openclaw"), student, teacher, tokens)
    torch.testing.assert_close(grad, torch.autograd.grad(theirs, student)[0], atol=1e-14, rtol=1e-12)
    k = 10  # the top-k script: reverse KL on the teacher's ids and a tail bucket
    ids = teacher.topk(k, -1).indices
    p, q = (trl.add_tail_bucket(z.log_softmax(-1).gather(1, ids)) for z in (student, teacher))
    theirs = trl_mean(trl.compute_divergence(p, q, 1.0))
    loss, grad = ours(resolve("parity_openclaw_topk", {"top_k": k}), student, teacher, tokens)
    torch.testing.assert_close(loss, theirs.detach(), atol=1e-8, rtol=1e-7)
    torch.testing.assert_close(grad, torch.autograd.grad(theirs, student)[0], atol=1e-8, rtol=1e-6)


# ----------------------------------------------------------------------------------------------------- they differ


def test_trl_s_clamped_tail_bounds_the_loss_and_pushes_no_mass_back_into_the_tail(trl: ModuleType) -> None:
    """The student holds all but 2e-9 in its top id; the teacher wants 0.4 elsewhere."""
    student = torch.tensor([[20.0, 0.0, -4.0, -4.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.6, 0.3, 0.05, 0.05]], dtype=torch.float64).log()
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    exact, mine = (divergence(log_p, log_q, beta=0.0, support=support, top_k=1)  # type: ignore[arg-type]
                   for support in ("full", "student"))
    theirs = trl.compute_topk_self_distillation_loss(student, teacher, distillation_topk=1, distillation_alpha=0.0,
                                                     distillation_add_tail=True)
    wanted, own, other = (torch.autograd.grad(each, student, retain_graph=True)[0][0]
                          for each in (exact.value.sum(), mine.value.sum(), theirs.sum()))
    assert wanted[0].item() == pytest.approx(0.4, abs=1e-6), "mass must leave the top id at this rate"
    assert own[0].item() == pytest.approx(0.4, abs=1e-6)
    assert abs(other[0].item()) < 1e-6, "TRL's clamp at log-mass -1e-7 takes the gradient away"
    assert mine.value.item() <= exact.value.item()
    assert theirs.item() < mine.value.item() - 1.0, "and its value understates the divergence"


def test_a_ratio_on_a_divergence_keeps_the_mean_and_only_adds_variance(trl: ModuleType) -> None:
    """Over all ids a behaviour policy could have sampled at one state, exactly."""
    g = torch.Generator().manual_seed(8)
    z, teacher, mu = (torch.randn(1, V, generator=g, dtype=torch.float64) for _ in range(3))
    p, mu = z.log_softmax(-1)[0], mu.log_softmax(-1)[0]
    d = divergence(z.log_softmax(-1), teacher.log_softmax(-1), beta=0.0).value.expand(V)
    theirs = trl.apply_importance_sampling_clipping(d, p, mu, 1e9)
    mean = (mu.exp() * theirs).sum()
    torch.testing.assert_close(mean, d[0], atol=1e-13, rtol=1e-12)
    assert (mu.exp() * (theirs - mean).square()).sum() > 0.1 * d[0].square()
    capped = (mu.exp() * trl.apply_importance_sampling_clipping(d, p, mu, 2.0)).sum()
    assert capped < 0.95 * d[0], "capped at 2, it is biased as well"


def test_a_mean_of_means_weighs_tokens_of_short_rows_more(trl: ModuleType) -> None:
    """Three tokens in one row, nine in the other: TRL gives each of the three 3 times the weight."""
    per_token = torch.arange(float(N), dtype=torch.float64, requires_grad=True)
    (weight,) = torch.autograd.grad(trl_mean(per_token), per_token)
    torch.testing.assert_close(weight, branch_weight())
    assert weight[0] == pytest.approx(3 * weight[-1].item())
    ids = ROWS.numpy()
    everywhere: Any = {"turn": ids, "branch": ids, "episode": ids * 0}
    assert set(shares("token", **everywhere)) == {1 / N}
    assert set(shares("episode", **everywhere)) == {1 / N}, "two branches of one episode share its weight by tokens"


def test_renormalised_top_k_falls_by_moving_mass_out_of_the_support_and_ours_does_not(trl: ModuleType) -> None:
    teacher = torch.tensor([[4.0, 3.0, 2.0, -6.0, -6.0]], dtype=torch.float64)
    honest, cheat = (torch.tensor([z]).double() for z in ([3.0, 3.0, 3.0, -6.0, -6.0], [4.0, 3.0, 2.0, 1.9, 1.9]))
    losses = []
    for student in (honest, cheat):
        theirs = trl.compute_topk_self_distillation_loss(student, teacher, distillation_topk=3, distillation_alpha=1.0,
                                                         distillation_add_tail=False).item()
        mine = divergence(student.log_softmax(-1), teacher.log_softmax(-1), beta=1.0, support="student",
                          top_k=3).value.item()
        losses.append((theirs, mine))
    assert losses[1][0] < 1e-12 < losses[0][0], "TRL calls the cheat perfect"
    assert losses[1][1] > losses[0][1], "with the tail it is the worse one"
