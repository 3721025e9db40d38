"""Ratio corrections on hand-made numbers: quadrants, equality at one, expectations, masks, whole turns and branches."""

from math import inf, log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentsdpo.learn.ratio import (
    RATIOS,
    SEGMENTED,
    Evidence,
    Limits,
    correct,
    decoupled,
    dppo,
    gspo,
    log_ratio,
    m2po,
    m2po_bound,
    minpro,
    ppo,
    ppo_mask,
    prefix_min,
    seq_mis,
    seq_tis,
    topr,
    turn_geo,
)

EPS = {"eps_lo": 0.2, "eps_hi": 0.2}


def evidence(log_r: Tensor, signal: Tensor | None = None, *, student: float = -1.0) -> Evidence:
    """Tokens of one turn and branch, 4 versions old."""
    whole = torch.zeros(len(log_r), dtype=torch.long)
    logp = torch.full_like(log_r, student)
    return Evidence(log_r=log_r, signal=torch.ones_like(log_r) if signal is None else signal, student_logp=logp,
                    behaviour_logp=logp - log_r, turn=whole, branch=whole, age=whole + 4)


def surrogate_gradient(logp: float, behaviour: float, gap: float) -> float:
    """d/dlogp of PPO's ``-min(r A, clip(r) A)``."""
    x = torch.tensor(logp, dtype=torch.float64, requires_grad=True)
    r = (x - behaviour).exp()
    loss = -torch.minimum(r * gap, r.clamp(0.8, 1.2) * gap)
    loss.backward()
    assert x.grad is not None
    return x.grad.item()


@pytest.mark.parametrize("r", [0.5, 0.9, 1.0, 1.1, 1.5, 1.9])
@pytest.mark.parametrize("gap", [0.7, -0.7])
def test_ppo_has_the_gradient_of_the_min_clip_surrogate(r: float, gap: float) -> None:
    log_r = torch.tensor([r], dtype=torch.float64).log()
    weight = ppo(log_r.exp(), torch.tensor([gap]), cap=2.0, **EPS)
    assert -(weight.item() * gap) == pytest.approx(surrogate_gradient(log_r.item(), 0.0, gap), abs=1e-12)


def test_the_dual_clip_alters_negative_signals_alone() -> None:
    r, up, down = torch.tensor([0.5, 1.1, 5.0]), torch.ones(3), -torch.ones(3)
    assert torch.equal(ppo(r, up, cap=2.0, **EPS), ppo(r, up, cap=1000.0, **EPS))
    assert ppo(r, down, cap=2.0, **EPS).tolist() == [0.0, pytest.approx(1.1), 2.0]
    assert ppo(r, down, cap=1000.0, **EPS).tolist() == [0.0, pytest.approx(1.1), 5.0]


def test_ppo_mask_in_four_quadrants() -> None:
    mask = ppo_mask(torch.tensor([1.3, 1.3, 0.7, 0.7]), torch.tensor([1.0, -1.0, 1.0, -1.0]), **EPS)
    assert mask.tolist() == [False, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(RATIOS))
def test_every_correction_is_bit_equal_to_one_at_ratio_one(name: str, dtype: torch.dtype) -> None:
    x = evidence(torch.zeros(5, dtype=dtype), torch.tensor([1.0, -1.0, 0.0, 3.0, -9.0], dtype=dtype))
    for limits in (Limits(), Limits(eps_lo=3e-4, eps_hi=4e-4, cap=1.0, m2=0.0)):
        weight = correct(name, x, limits)
        assert torch.equal(weight, torch.ones(5, dtype=dtype))
        assert weight.dtype == dtype


@pytest.mark.parametrize("name", sorted(set(RATIOS) - {"clamp", "none", "topr"}))
def test_nothing_but_the_parity_clamp_is_floored(name: str) -> None:
    """A token the student has abandoned keeps a weight near 0 (``topr`` is 1 on positives by definition)."""
    for sign in (1.0, -1.0):
        x = evidence(torch.tensor([log(1e-6)]), torch.tensor([sign]))
        assert correct(name, x, Limits()).item() <= 1e-6 * 1.001 or name in {"minpro", "decoupled"}
    assert correct("clamp", evidence(torch.tensor([log(1e-6)])), Limits()).item() == pytest.approx(0.8)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(-6, 6), st.floats(-3, 3)), min_size=1, max_size=12),
       st.sampled_from(sorted(RATIOS)))
def test_weights_are_finite_never_negative_and_capped(pairs: list[tuple[float, float]], name: str) -> None:
    log_r, signal = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    weight = correct(name, evidence(log_r, signal), Limits(cap=2.0))
    assert torch.isfinite(weight).all()
    assert (weight >= 0).all()
    if name not in {"is", "icepop", "dppo", "decoupled", "minpro", "gspo", "clamp", "cispo"}:
        assert (weight <= 2.0 + 1e-12).all()
    assert not weight.requires_grad


def test_expected_ratio_under_the_behaviour_policy_is_one_and_truncation_only_lowers_it() -> None:
    g = torch.Generator().manual_seed(0)
    p, mu = (torch.randn(7, generator=g, dtype=torch.float64).softmax(-1) for _ in range(2))
    log_r = log_ratio(p.log(), mu.log())
    ids = torch.arange(7)
    x = Evidence(log_r, torch.ones(7).double(), p.log(), mu.log(), ids, ids, torch.ones(7).long())
    assert float((mu * correct("is", x, Limits())).sum()) == pytest.approx(1.0, abs=1e-12)
    for name in ("tis", "mis", "icepop", "ppo", "dppo", "cispo", "m2po"):
        assert float((mu * correct(name, x, Limits(cap=1.5, m2=0.1))).sum()) <= 1.0 + 1e-12


def test_log_ratio_is_bounded_and_detached() -> None:
    x = torch.tensor([0.0, -900.0], requires_grad=True)
    got = log_ratio(x, torch.tensor([-900.0, 0.0]))
    assert got.tolist() == [20.0, -20.0]
    assert not got.requires_grad


def test_topr_tapers_negatives_alone() -> None:
    r = torch.tensor([0.5, 3.0, 0.5, 3.0])
    assert topr(r, torch.tensor([1.0, 1.0, -1.0, -1.0])).tolist() == [1.0, 1.0, 0.5, 1.0]


def test_dppo_looks_at_probabilities_not_ratios() -> None:
    mu, p = torch.tensor([1e-4, 0.5, 0.5, 0.9]), torch.tensor([1e-2, 0.75, 0.75, 0.6])
    weight = dppo(p / mu, torch.tensor([1.0, 1.0, -1.0, -1.0]), p.log(), mu.log(), **EPS)
    assert weight.tolist() == [pytest.approx(100.0), 0.0, 1.5, 0.0]


def test_decoupled_is_ppo_while_nothing_lies_between_behaviour_and_student() -> None:
    log_r, sign = torch.linspace(-1, 1, 9), torch.tensor([1.0, -1.0] * 4 + [1.0])
    fresh = decoupled(log_r, sign, torch.ones(9).long(), cap=5.0, **EPS)
    assert torch.equal(fresh, ppo(log_r.exp(), sign, cap=1000.0, **EPS))
    old = decoupled(torch.tensor([1.0, 1.0, 3.0]), torch.tensor([1.0, 1.0, -1.0]), torch.tensor([2, 10, 10]), cap=5.0,
                    **EPS)
    # S = 2: p/prox = e^0.5 is outside; S = 10: e^0.1 is inside, prox/mu = e^0.9; last: prox/mu = e^2.7 above the cap
    assert old.tolist() == [0.0, pytest.approx(torch.e), 0.0]


def test_m2po_keeps_the_longest_run_of_harmful_tokens_within_the_budget() -> None:
    log_r, sign = torch.tensor([0.1, -0.3, 0.5, 2.0, -4.0]), torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0])
    bound = m2po_bound(log_r, sign, budget=0.04)  # harmful: 0.1, 0.3, 0.5, 2.0; mean of squares 0.01, 0.05, ...
    assert bound == pytest.approx(0.1)
    assert m2po(log_r, sign, bound=bound, cap=3.0).tolist() == pytest.approx([1.105171, 0, 0, 0, 0.0183156], abs=1e-6)
    assert m2po_bound(log_r, sign, budget=0.06) == pytest.approx(0.3)
    assert m2po_bound(log_r, sign, budget=9.0) == inf
    assert m2po_bound(log_r, sign, budget=1e-9) == 0.0
    assert m2po_bound(torch.tensor([-1.0]), torch.ones(1), budget=1e-9) == inf, "nothing harmful, nothing masked"


def test_turn_and_branch_corrections_by_hand_and_by_segment() -> None:
    log_r = torch.tensor([0.2, 0.4, -0.6, 1.0, 3.0])
    turn, branch = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 0, 0, 1, 1])
    e = torch.e
    assert turn_geo(log_r, turn, cap=5.0).tolist() == pytest.approx([e**0.3, e**0.3, e**-0.6, 5.0, 5.0])
    assert seq_tis(log_r, branch, cap=10.0).tolist() == pytest.approx([1.0] * 3 + [10.0] * 2)
    assert seq_mis(log_r, branch, cap=10.0).tolist() == pytest.approx([1.0] * 3 + [0.0] * 2)
    assert prefix_min(log_r, branch).tolist() == pytest.approx([1.0, e**0.2, e**0.2, 1.0, e])
    assert minpro(log_r, branch, cap=5.0).tolist() == pytest.approx([e**0.2, e**0.6, e**-0.4, e, 5.0 * e])
    narrow = gspo(log_r, torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0]), branch, **EPS)
    assert narrow.tolist() == pytest.approx([1.0] * 3 + [0.0, e**2])


def test_the_length_trap_of_products_and_what_escapes_it() -> None:
    log_r, one = torch.full((100,), log(1.1)), torch.zeros(100, dtype=torch.long)
    assert seq_tis(log_r, one, cap=1e9)[0].item() == pytest.approx(13780.6, rel=1e-3)
    assert turn_geo(log_r, one, cap=1e9)[0].item() == pytest.approx(1.1, rel=1e-5)
    assert minpro(log_r, one, cap=1e9).max().item() == pytest.approx(1.21, rel=1e-5)


@pytest.mark.parametrize("name", sorted(set(RATIOS) - SEGMENTED))
def test_token_corrections_do_not_look_at_their_neighbours(name: str) -> None:
    log_r, sign = torch.tensor([0.3, -0.5, 1.7, 0.05]), torch.tensor([1.0, -1.0, -1.0, 1.0])
    whole = correct(name, evidence(log_r, sign), Limits(m2=0.4))
    alone = [correct(name, evidence(log_r[i:i + 1], sign[i:i + 1]), Limits(m2=0.4)) for i in range(4)]
    assert torch.equal(whole, torch.cat(alone))
