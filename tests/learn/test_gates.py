"""Gates by turn and by branch, the estimators they are made of, and the gap clipper."""

import pytest
import torch

from agentsdpo.learn.clipper import AdvantageClip
from agentsdpo.learn.gates import ess_frac, k3, segment_gate, segment_mean


def test_k3_is_never_negative_and_ess_by_hand() -> None:
    log_r = torch.linspace(-5, 5, 101, dtype=torch.float64)
    assert (k3(log_r) >= 0).all()
    assert k3(torch.zeros(1)).item() == 0.0
    assert k3(torch.tensor([2.0], dtype=torch.float64).log()).item() == pytest.approx(1 - 0.6931471805599453)
    assert ess_frac(torch.tensor([1.0, 3.0])) == pytest.approx(16 / (2 * 10))


def test_a_gate_leaves_other_turns_alone() -> None:
    turn, log_r = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0.0, 0.1, 1.0, 0.0, -12.0])
    assert segment_mean(torch.tensor([1.0, 3.0, 5.0, 5.0, 9.0]), turn).tolist() == [2.0, 2.0, 5.0, 5.0, 9.0]
    assert segment_gate(log_r, turn, gate="k3", c3=0.1).tolist() == [True, True, False, False, False]
    assert segment_gate(log_r, turn, gate="geo", geo=0.1).tolist() == [True, True, False, False, False]
    assert segment_gate(log_r, turn, veto=1e-4).tolist() == [True, True, True, True, False]
    assert segment_gate(log_r, turn).all()


def test_the_geometric_gate_forgives_what_cancels_and_k3_does_not() -> None:
    turn, log_r = torch.zeros(2, dtype=torch.long), torch.tensor([1.0, -1.0])
    assert segment_gate(log_r, turn, gate="geo", geo=0.1).all()
    assert not segment_gate(log_r, turn, gate="k3", c3=0.1).any()


def test_every_gate_is_open_at_ratio_one() -> None:
    log_r, turn = torch.zeros(4), torch.tensor([0, 0, 1, 2])
    assert segment_gate(log_r, turn, gate="k3", c3=1e-9, veto=0.99).all()
    assert segment_gate(log_r, turn, gate="geo", geo=1e-9).all()


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
