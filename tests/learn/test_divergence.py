"""Divergences against autograd-free closed forms in float64, tails, supports, scales, kept sets."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentsdpo.learn.divergence import between, buckets, divergence, log_softmax, support_ids, token_logp


def pair(n: int = 5, v: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, v, generator=g, dtype=torch.float64).requires_grad_(True)
    return z, (2 * torch.randn(n, v, generator=g, dtype=torch.float64)).log_softmax(-1)


def closed_gradient(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """dD/dz of the specification, section 2.1, raw scale."""
    if beta == 0.0:
        return p - q
    mixed = (1 - beta) * p + beta * q
    c = p.log() - q.log() if beta == 1.0 else (1 - beta) * (p.log() - mixed.log())
    return p * (c - (p * c).sum(-1, keepdim=True))


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_gradient_is_the_closed_form(beta: float) -> None:
    z, log_q = pair()
    log_p = z.log_softmax(-1)
    d = divergence(log_p, log_q, beta=beta, jsd_scale="raw").value
    (grad,) = torch.autograd.grad(d.sum(), z)
    torch.testing.assert_close(grad, closed_gradient(log_p.exp().detach(), log_q.exp(), beta), atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.2, 0.5, 1.0])
def test_value_is_the_textbook_sum(beta: float) -> None:
    z, log_q = pair(seed=1)
    p, q = z.softmax(-1).detach(), log_q.exp()
    m = {0.0: p, 1.0: q}.get(beta, (1 - beta) * p + beta * q)
    kl_qm, kl_pm = (q * (q / m).log()).sum(-1), (p * (p / m).log()).sum(-1)
    expected = {0.0: kl_qm, 1.0: kl_pm}.get(beta, beta * kl_qm + (1 - beta) * kl_pm)
    got = divergence(p.log(), log_q, beta=beta, jsd_scale="raw").value
    torch.testing.assert_close(got, expected, atol=1e-14, rtol=1e-12)
    assert (got >= 0).all()


def test_unit_scale_meets_both_kls_and_raw_does_not() -> None:
    z, log_q = pair(seed=2)
    log_p = z.detach().log_softmax(-1)
    for end in (0.0, 1.0):
        near = abs(end - 1e-6)
        whole = between(log_p, log_q, beta=end)
        torch.testing.assert_close(between(log_p, log_q, beta=near, jsd_scale="unit"), whole, rtol=1e-4, atol=1e-6)
        assert (between(log_p, log_q, beta=near, jsd_scale="raw") < 1e-3 * whole).all()


def test_equal_distributions_have_no_divergence_and_no_gradient() -> None:
    z, _ = pair()
    for beta in (0.0, 0.5, 1.0):
        for support in ("full", "union"):
            d = divergence(z.log_softmax(-1), z.detach().log_softmax(-1), beta=beta, support=support, top_k=3).value
            (grad,) = torch.autograd.grad(d.sum(), z)
            assert d.abs().max() < 1e-14
            assert grad.abs().max() < 1e-14


@pytest.mark.parametrize("support", ["student", "teacher", "union"])
def test_buckets_sum_to_one_and_never_exceed_the_full_divergence(support: str) -> None:
    z, log_q = pair(n=40, v=30, seed=3)
    log_p = z.detach().log_softmax(-1)
    for beta in (0.0, 0.4, 1.0):
        full, last = divergence(log_p, log_q, beta=beta).value, torch.zeros(40, dtype=torch.float64)
        for k in (1, 4, 12, 30):
            ids, absent = support_ids(log_p, log_q, support, k)  # type: ignore[arg-type]
            for side in (log_p, log_q):
                torch.testing.assert_close(buckets(side, ids, absent).exp().sum(-1), torch.ones(40).double())
            got = divergence(log_p, log_q, beta=beta, support=support, top_k=k).value  # type: ignore[arg-type]
            assert (got <= full + 1e-12).all()
            if support != "union":  # nested supports: a finer partition never loses divergence
                assert (got >= last - 1e-12).all()
            last = got
        torch.testing.assert_close(last, full, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_whole_vocabulary_as_support_has_the_full_gradient(beta: float) -> None:
    z, log_q = pair(v=9)
    full = torch.autograd.grad(divergence(z.log_softmax(-1), log_q, beta=beta).value.sum(), z)[0]
    for k in (9, 64):
        d = divergence(z.log_softmax(-1), log_q, beta=beta, support="union", top_k=k)
        torch.testing.assert_close(torch.autograd.grad(d.value.sum(), z)[0], full, atol=1e-13, rtol=1e-10)
        assert d.tail_student.max() < 1e-40


def test_bucket_gradient_is_the_closed_form_of_the_kernel() -> None:
    """dz_i = g_i - p_i G inside the support, p_i (g_tail / p_tail - G) outside; forward KL has g_b = -q_b."""
    z, log_q = pair(n=1, v=8, seed=5)
    d = divergence(z.log_softmax(-1), log_q, beta=0.0, support="teacher", top_k=3)
    (grad,) = torch.autograd.grad(d.value.sum(), z)
    p, q = z.softmax(-1).detach()[0], log_q.exp()[0]
    inside = torch.zeros(8, dtype=torch.bool)
    inside[q.topk(3).indices] = True
    tail_q, tail_p, total = q[~inside].sum(), p[~inside].sum(), -1.0
    expected = torch.where(inside, -q - p * total, p * (-tail_q / tail_p - total))
    torch.testing.assert_close(grad[0], expected, atol=1e-14, rtol=1e-12)


def test_the_tail_keeps_its_gradient_when_the_support_holds_nearly_everything() -> None:
    z = torch.tensor([[30.0, 0.0, -1.0]], dtype=torch.float32, requires_grad=True)
    log_q = torch.tensor([[0.6, 0.3, 0.1]]).log()
    d = divergence(z.log_softmax(-1), log_q, beta=0.0, support="student", top_k=1)
    assert d.value.item() == pytest.approx(0.6 * torch.tensor(0.6).log().item() + 0.4 * (torch.tensor(0.4).log().item()
                                           + 30.0 - torch.tensor(1.0 + torch.e**-1).log().item()), rel=1e-5)
    (grad,) = torch.autograd.grad(d.value.sum(), z)
    torch.testing.assert_close(grad[0, 0].item(), 0.4, atol=1e-5, rtol=0.0)
    assert grad[0, 1] < grad[0, 2] < 0


def test_only_the_teacher_side_of_a_union_may_repeat() -> None:
    log_p = torch.tensor([[0.5, 0.3, 0.1, 0.1]]).log()
    ids, absent = support_ids(log_p, log_p, "union", 2)
    assert ids.tolist() == [[0, 1, 0, 1]]
    assert absent.tolist() == [[False, False, True, True]]


def test_half_precision_logits_are_widened_before_the_softmax() -> None:
    assert log_softmax(torch.zeros(1, 4, dtype=torch.bfloat16)).dtype == torch.float32


def test_kept_sets_renormalise_where_sampling_was_truncated() -> None:
    log_p = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]], dtype=torch.float64).log().requires_grad_(True)
    tok, kept = torch.tensor([1, 1]), torch.tensor([[0, 1, -1], [-1, -1, -1]])
    got = token_logp(log_p, tok, kept)
    torch.testing.assert_close(got.exp().detach(), torch.tensor([0.375, 0.3], dtype=torch.float64))
    (grad,) = torch.autograd.grad(got.sum(), log_p)
    assert torch.isfinite(grad).all()


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 5), v=st.integers(2, 24), k=st.integers(1, 30), beta=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
       support=st.sampled_from(["full", "student", "teacher", "union"]), seed=st.integers(0, 999),
       sharp=st.sampled_from([0.1, 1.0, 8.0]), dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
def test_every_divergence_is_one_whatever_its_shape_support_and_type(
        n: int, v: int, k: int, beta: float, support: Any, seed: int, sharp: float, dtype: torch.dtype) -> None:
    """Finite, not negative, at most the full one, zero tails where everything is inside, and a gradient that sums to 0.

    The last says that adding a constant to all logits of a token changes nothing.
    """
    g = torch.Generator().manual_seed(seed)
    z = (sharp * torch.randn(n, v, generator=g)).to(dtype).requires_grad_(True)
    log_p, log_q = log_softmax(z), log_softmax((sharp * torch.randn(n, v, generator=g)).to(dtype))
    d = divergence(log_p, log_q, beta=beta, support=support, top_k=k)
    full = divergence(log_p.detach(), log_q, beta=beta).value
    slack = 1e-9 if dtype == torch.float64 else 1e-4
    assert d.value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.isfinite(d.value).all()
    assert (d.value.detach() >= -slack).all()
    assert (d.value.detach() <= full + slack * (1.0 + full)).all()
    for tail in (d.tail_student, d.tail_teacher):
        assert ((tail >= 0.0) & (tail <= 1.0 + slack)).all()
        assert k < v or tail.max() < 1e-30
    (grad,) = torch.autograd.grad(d.value.sum(), z)
    assert torch.isfinite(grad).all()
    torch.testing.assert_close(grad.double().sum(-1), torch.zeros(n).double(), rtol=0.0,
                               atol=0.2 if dtype == torch.bfloat16 else 1e-5)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 6), beta=st.sampled_from([0.0, 0.5, 1.0]), seed=st.integers(0, 999),
       mask=st.lists(st.booleans(), min_size=6, max_size=6))
def test_masked_tokens_get_no_gradient_and_do_not_change_that_of_others(
        rows: int, beta: float, seed: int, mask: list[bool]) -> None:
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, 9, generator=g, dtype=torch.float64).requires_grad_(True)
    log_q = torch.randn(rows, 9, generator=g, dtype=torch.float64).log_softmax(-1)
    keep = torch.tensor(mask[:rows])

    def gradient(weight: Tensor) -> Tensor:
        d = divergence(z.log_softmax(-1), log_q, beta=beta, support="union", top_k=3).value
        return torch.autograd.grad((weight * d).sum(), z)[0]

    whole, masked = gradient(torch.ones(rows).double()), gradient(keep.double())
    assert torch.equal(masked[~keep], torch.zeros_like(masked[~keep]))
    assert torch.equal(masked[keep], whole[keep])


@pytest.mark.parametrize("support", ["full", "student", "teacher", "union"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.7, 1.0])
def test_a_real_step_lowers_the_divergence_and_a_flipped_sign_raises_it(beta: float, support: Any) -> None:
    z, log_q = pair(n=20, v=12, seed=7)

    def value(logits: Tensor) -> Tensor:
        return divergence(logits.log_softmax(-1), log_q, beta=beta, support=support, top_k=4).value

    before = value(z)
    (grad,) = torch.autograd.grad(before.sum(), z)
    assert (value(z.detach() - 0.01 * grad) < before.detach()).all()
    assert (value(z.detach() + 0.01 * grad) > before.detach()).all()
