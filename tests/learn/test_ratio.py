"""Ratios on hand-made numbers: quadrants, equality at one, gates by turn, the gap clipper."""

import pytest
import torch

from agentsdpo.learn.ratio import (
    AdvantageClip,
    ess_frac,
    k3,
    log_ratio,
    ppo_mask,
    ratio_weight,
    turn_gate,
    turn_mean,
)

KNOBS = {"cap": 2.0, "eps_lo": 0.2, "eps_hi": 0.2}


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
def test_ppo_mask_has_the_gradient_of_the_min_clip_surrogate(r: float, gap: float) -> None:
    log_r = torch.tensor([r], dtype=torch.float64).log()
    weight, _ = ratio_weight("ppo", log_r.exp(), torch.tensor([gap]), **KNOBS)
    assert -(weight.item() * gap) == pytest.approx(surrogate_gradient(log_r.item(), 0.0, gap), abs=1e-12)


def test_the_cap_alters_negative_gaps_alone() -> None:
    r, up, down = torch.tensor([0.5, 1.1, 5.0]), torch.ones(3), -torch.ones(3)
    loose = {**KNOBS, "cap": 1000.0}
    assert torch.equal(ratio_weight("ppo", r, up, **KNOBS)[0], ratio_weight("ppo", r, up, **loose)[0])
    assert ratio_weight("ppo", r, down, **KNOBS)[0].tolist() == [0.0, pytest.approx(1.1), 2.0]
    assert ratio_weight("ppo", r, down, **loose)[0].tolist() == [0.0, pytest.approx(1.1), 5.0]


def test_ppo_mask_in_four_quadrants() -> None:
    mask = ppo_mask(torch.tensor([1.3, 1.3, 0.7, 0.7]), torch.tensor([1.0, -1.0, 1.0, -1.0]), eps_lo=0.2, eps_hi=0.2)
    assert mask.tolist() == [False, True, True, False]


def test_every_mode_is_bit_equal_at_ratio_one() -> None:
    r, gap = torch.ones(4), torch.tensor([1.0, -1.0, 0.0, 3.0])
    weights = [ratio_weight(mode, r, gap, **KNOBS)[0] for mode in ("none", "is", "tis", "ppo")]
    assert all(torch.equal(weights[0], other) for other in weights[1:])


def test_nothing_is_ever_floored() -> None:
    r = torch.tensor([1e-6])
    for mode in ("is", "tis", "ppo"):
        assert ratio_weight(mode, r, torch.ones(1), **KNOBS)[0].item() == pytest.approx(1e-6)


def test_expected_ratio_under_the_behaviour_policy_is_one() -> None:
    g = torch.Generator().manual_seed(0)
    p, mu = (torch.randn(7, generator=g, dtype=torch.float64).softmax(-1) for _ in range(2))
    assert float((mu * log_ratio(p.log(), mu.log()).exp()).sum()) == pytest.approx(1.0, abs=1e-12)


def test_log_ratio_is_bounded_and_detached() -> None:
    x = torch.tensor([0.0, -900.0], requires_grad=True)
    got = log_ratio(x, torch.tensor([-900.0, 0.0]))
    assert got.tolist() == [20.0, -20.0]
    assert not got.requires_grad


def test_k3_is_never_negative_and_ess_by_hand() -> None:
    log_r = torch.linspace(-5, 5, 101, dtype=torch.float64)
    assert (k3(log_r) >= 0).all()
    assert k3(torch.zeros(1)).item() == 0.0
    assert k3(torch.tensor([2.0], dtype=torch.float64).log()).item() == pytest.approx(1 - 0.6931471805599453)
    assert ess_frac(torch.tensor([1.0, 3.0])) == pytest.approx(16 / (2 * 10))


def test_a_turn_gate_leaves_other_turns_alone() -> None:
    turn, log_r = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0.0, 0.1, 1.0, 0.0, -12.0])
    assert turn_mean(torch.tensor([1.0, 3.0, 5.0, 5.0, 9.0]), turn).tolist() == [2.0, 2.0, 5.0, 5.0, 9.0]
    assert turn_gate(log_r, turn, c3=0.1, veto=None).tolist() == [True, True, False, False, False]
    assert turn_gate(log_r, turn, c3=None, veto=1e-4).tolist() == [True, True, True, True, False]
    assert turn_gate(log_r, turn, c3=None, veto=None).all()


def test_clipper_first_bound_is_of_this_batch_and_later_ones_of_the_past() -> None:
    clip = AdvantageClip(kappa=3.0, decay=0.9)
    assert clip.needs_first_mean
    assert clip.bound(first_mean=2.0) == 6.0
    clip.update(total=20.0, count=10)
    assert not clip.needs_first_mean
    assert clip.bound() == pytest.approx(6.0)
    assert clip.bound(first_mean=1e9) == clip.bound(), "the batch at hand must not move its own bound"
    clip.update(total=5.0, count=10)
    assert clip.bound() == pytest.approx(3.0 * (0.9 * 0.2 + 0.1 * 0.5) / (1 - 0.81))


def test_clipper_survives_a_resume() -> None:
    clip, again = AdvantageClip(3.0, 0.99), AdvantageClip(3.0, 0.99)
    for total in (1.0, 7.0, 0.3):
        clip.update(total, 3)
    again.load_state_dict(clip.state_dict())
    assert (again.bound(), again.step) == (clip.bound(), 3)
