"""Weights of the loss: mixes, step weights, penalties and gates, by hand, by autograd and by a real step."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentsdpo.errors import LearnError
from agentsdpo.learn.config import LearnConfig
from agentsdpo.learn.diagnostics import step_metrics
from agentsdpo.learn.ratio import RATIOS
from agentsdpo.learn.records import Head, LossTokens
from agentsdpo.learn.sdpo import objective
from agentsdpo.learn.weights import Bounds, Weigher, sdar, sod, weigh

PURE = {"divergence": LearnConfig(support="full"), "sampled": LearnConfig(form="sampled", ratio="ppo")}


def loss_and_grad(heads: tuple[Head, Head, LossTokens], config: LearnConfig,
                  bounds: Bounds | None = None) -> tuple[Tensor, Tensor]:
    student, teacher, tokens = heads
    loss, stats = objective(student, teacher, tokens, config, bounds or Bounds())
    assert not any(getattr(stats, name).requires_grad for name in vars(stats))
    return loss.detach(), torch.autograd.grad(loss, student.hidden)[0]


def graded(heads: tuple[Head, Head, LossTokens], *, shift: float = 0.3) -> tuple[Head, Head, LossTokens]:
    """With advantages of both signs and a behaviour policy a little off."""
    student, teacher, tokens = heads
    n = len(tokens.tok)
    return student, teacher, replace(
        tokens, advantage=torch.linspace(-1.0, 1.2, n).double(), branch=torch.arange(n) // 4,
        behaviour_logp=tokens.behaviour_logp + shift * torch.sin(torch.arange(n).double()))


def policy_gradient(heads: tuple[Head, Head, LossTokens], config: LearnConfig) -> Tensor:
    """Gradient of PPO's surrogate on the advantages of grades, by autograd."""
    student, _, tokens = heads
    logp = student.hidden.log_softmax(-1).gather(1, tokens.tok[:, None])[:, 0]
    r, g = (logp - tokens.behaviour_logp).exp(), tokens.advantages
    surrogate = torch.minimum(r * g, r.clamp(1 - config.eps_lo, 1 + config.eps_hi) * g)
    return torch.autograd.grad(-(tokens.weight * surrogate).sum(), student.hidden)[0]


@pytest.mark.parametrize("form", ["divergence", "sampled"])
@pytest.mark.parametrize("mix", ["blend", "add"])
def test_a_mix_is_the_sum_of_its_parts(form: str, mix: str, make_heads: Callable[..., Any]) -> None:
    ratio: dict[str, Any] = {"ratio": "ppo", "cap": 1000.0}
    config = LearnConfig.model_validate({**PURE[form].model_dump(), **ratio, "mix": mix, "mix_weight": 0.3})
    heads = graded(make_heads(n=16))
    _, got = loss_and_grad(heads, config)
    distil = PURE[form].model_copy(update={"cap": 1000.0})
    share = 0.7 if mix == "blend" else 1.0
    expected = share * policy_gradient(heads, config) + 0.3 * loss_and_grad(heads, distil)[1]
    torch.testing.assert_close(got, expected, atol=1e-15, rtol=1e-12)


def test_reshaped_credit_never_turns_the_direction_of_the_grade(make_heads: Callable[..., Any]) -> None:
    config = LearnConfig(form="sampled", mix="credit", ratio="is")
    heads = graded(make_heads(n=64, v=5))
    found = objective(*heads, config, Bounds(gap=3.0))[1]
    advantage = heads[2].advantages
    assert (found.push.sign() == advantage.sign()).all()
    size = (found.push / (found.ratio_weight * advantage))
    assert size.min().item() == pytest.approx(0.5)
    assert size.max().item() == pytest.approx(1.5)
    agrees = (found.used_gap.sign() == advantage.sign())
    assert (size[agrees] >= 1.0).all()
    assert (size[~agrees] <= 1.0).all()


@pytest.mark.parametrize("mix", ["pure", "blend", "add", "credit"])
@pytest.mark.parametrize("name", sorted(RATIOS))
def test_a_real_step_follows_the_signal_whatever_the_correction(
        name: str, mix: str, make_heads: Callable[..., Any]) -> None:
    """Two ids, so that every loss agrees on the direction; grade and gap of the same sign, so that mixes do too."""
    config = LearnConfig.model_validate({"form": "sampled", "ratio": name, "mix": mix, "parity": True})
    student, teacher, tokens = make_heads(n=32, v=2)
    sides = [head.hidden.detach().log_softmax(-1).gather(1, tokens.tok[:, None])[:, 0] for head in (student, teacher)]
    gap = sides[1] - sides[0]
    tokens = replace(tokens, advantage=gap.sign())
    for flip in (1.0, -1.0):
        loss, _ = objective(student, teacher, tokens, config, Bounds())
        (grad,) = torch.autograd.grad(flip * loss, student.hidden)
        after = (student.hidden - 0.05 * grad).detach().log_softmax(-1).gather(1, tokens.tok[:, None])[:, 0]
        assert bool(((after - sides[0]).sign() == flip * gap.sign()).all())


def test_the_penalties_have_the_gradients_of_their_formulas(make_heads: Callable[..., Any]) -> None:
    student, teacher, tokens = graded(make_heads(n=10))
    reference = tokens.behaviour_logp - 0.4
    tokens = replace(tokens, reference_logp=reference)
    logp = student.hidden.log_softmax(-1).gather(1, tokens.tok[:, None])[:, 0]
    x = (reference - logp).exp()
    by_hand = (tokens.weight * (0.1 * (logp - tokens.behaviour_logp).square() + 0.2 * (x - 1.0 - x.log()))).sum()
    expected = torch.autograd.grad(by_hand, student.hidden)[0]
    for form, plain in PURE.items():
        on = plain.model_copy(update={"tau": 0.1, "beta_kl": 0.2})
        heads = (student, teacher, tokens)
        got = loss_and_grad(heads, on)[1] - loss_and_grad(heads, plain)[1]
        torch.testing.assert_close(got, expected, atol=1e-15, rtol=1e-11, msg=form)
    with pytest.raises(LearnError, match="no reference log-probs"):
        loss_and_grad((student, teacher, replace(tokens, reference_logp=None)), on)


def test_penalties_hold_on_gated_turns_too(make_heads: Callable[..., Any]) -> None:
    student, teacher, tokens = make_heads(n=6)
    tokens = replace(tokens, behaviour_logp=tokens.behaviour_logp + 9.0)
    config = LearnConfig(form="sampled", ratio="tis", gate="k3", tau=1e-3)
    _, stats = objective(student, teacher, tokens, config, Bounds())
    assert not stats.gate.any()
    assert (stats.push > 0).all(), "the student has fallen behind: it is pulled back up"


def test_sod_by_hand_over_two_branches() -> None:
    gap = torch.tensor([0.4, -0.6, 2.0, -0.1, 0.3, 0.9])
    turn, branch = torch.tensor([0, 0, 1, 2, 3, 4]), torch.tensor([0, 0, 0, 0, 1, 1])
    assert sod(gap, turn, branch).tolist() == pytest.approx([1.0, 1.0, 0.25, 1.2, 1.0, 1 / 3], rel=1e-5)
    assert torch.equal(sod(torch.zeros(6), turn, branch), torch.ones(6)), "no gap anywhere: nothing to weigh by"


@pytest.mark.parametrize("weight", ["sod", "sdar"])
@pytest.mark.parametrize("form", ["divergence", "sampled"])
def test_step_weights_scale_rows_of_the_gradient(form: str, weight: str, make_heads: Callable[..., Any]) -> None:
    heads = graded(make_heads(n=12))
    student, teacher, tokens = heads
    plain = loss_and_grad(heads, PURE[form])[1]
    got = loss_and_grad(heads, PURE[form].model_copy(update={"token_weight": weight, "sdar_slope": 2.0}))[1]
    gap = objective(student, teacher, tokens, PURE[form], Bounds())[1].gap
    u = sod(gap, tokens.turn, tokens.branches) if weight == "sod" else sdar(gap, 2.0)
    torch.testing.assert_close(got, u[:, None] * plain, atol=1e-16, rtol=1e-12)


@pytest.mark.parametrize("ratio", ["turn_geo", "minpro"])
def test_a_prefix_weight_of_the_divergence_leaves_the_sampled_token_out(
        ratio: str, make_heads: Callable[..., Any]) -> None:
    heads = graded(make_heads(n=8))
    plain = loss_and_grad(heads, PURE["divergence"])[1]
    config = PURE["divergence"].model_copy(update={"ratio": ratio, "cap": 1000.0})
    got = loss_and_grad(heads, config)[1]
    weight = objective(*heads, config, Bounds())[1].ratio_weight
    torch.testing.assert_close(got, weight[:, None] * plain, atol=1e-16, rtol=1e-12)
    if ratio == "minpro":
        assert weight[0] == weight[4] == 1.0, "a branch begins without a past"


CONFIGS: list[dict[str, Any]] = [
    {}, {"form": "sampled", "ratio": "ppo"}, {"form": "sampled", "ratio": "dppo", "mix": "credit"},
    {"mix": "add", "ratio": "decoupled", "token_weight": "sdar"}, {"form": "sampled", "ratio": "m2po", "tau": 1e-3}]


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 9), cut=st.integers(0, 9), which=st.sampled_from(range(len(CONFIGS))),
       dtype=st.sampled_from([torch.float32, torch.float64]))
def test_weights_of_a_part_are_the_part_of_the_weights(n: int, cut: int, which: int, dtype: torch.dtype) -> None:
    """What lets the chunked loss ask for them chunk by chunk."""
    g = torch.Generator().manual_seed(n)
    student, teacher, behaviour = (-torch.rand(n, generator=g, dtype=dtype) for _ in range(3))
    tokens = LossTokens(tok=torch.zeros(n, dtype=torch.long), weight=torch.rand(n, generator=g, dtype=dtype),
                        turn=torch.arange(n), behaviour_logp=behaviour, age=torch.arange(n),
                        advantage=torch.randn(n, generator=g, dtype=dtype))
    weigher = Weigher(tokens, LearnConfig.model_validate(CONFIGS[which]), Bounds(gap=0.3, m2=0.2))
    assert not weigher.turns
    whole = weigher(student, teacher, slice(None))
    parts = [weigher(student[rows], teacher[rows], rows) for rows in (slice(0, cut), slice(cut, n))]
    for one, (left, right) in zip(whole, zip(*parts, strict=True), strict=True):
        assert (one is None) == (left is None)
        if one is not None:
            assert torch.equal(one, torch.cat([left, right]))
            assert one.dtype == dtype


@pytest.mark.parametrize(("fields", "turns", "teacher"), [
    ({}, False, False), ({"gate": "k3"}, True, False), ({"veto": 1e-4}, True, False),
    ({"ratio": "minpro"}, True, False), ({"ratio": "ppo", "parity": True}, False, True),
    ({"ratio": "tis", "parity": True, "veto": 1e-4}, True, False),
    ({"form": "sampled"}, False, True), ({"token_weight": "sdar"}, False, True), ({"token_weight": "sod"}, True, True),
    ({"form": "sampled", "ratio": "gspo"}, True, True), ({"mix": "add", "ratio": "ppo"}, False, False)])
def test_what_the_weights_need_to_see(fields: dict[str, Any], turns: bool, teacher: bool) -> None:
    tokens = LossTokens(tok=torch.zeros(1).long(), weight=torch.ones(1), turn=torch.zeros(1).long(),
                        behaviour_logp=torch.zeros(1))
    weigher = Weigher(tokens, LearnConfig.model_validate(fields), Bounds())
    assert (weigher.turns, weigher.teacher) == (turns, teacher)


def test_a_correction_of_grades_is_counted_by_the_sign_of_the_advantage(make_heads: Callable[..., Any]) -> None:
    student, _, tokens = graded(make_heads(n=16), shift=3.0)
    config = LearnConfig(form="sampled", mix="grade", ratio="ppo")
    _, stats = objective(student, Head(student.hidden.detach(), student.weight.detach()), tokens, config, Bounds())
    assert not stats.gap.any(), "nobody reads a hint"
    metrics = step_metrics(stats, torch.zeros(16, dtype=torch.int64), config, None)
    for name, own in (("pos", tokens.advantages > 0), ("neg", tokens.advantages < 0)):
        assert metrics[f"learn/masked_frac/{name}"] == pytest.approx(float((~stats.mask[own]).float().mean()))
        assert metrics[f"learn/masked_frac/{name}"] > 0


def test_gates_by_branch_take_the_whole_branch(make_heads: Callable[..., Any]) -> None:
    student, _, tokens = graded(make_heads(n=8), shift=0.0)
    tokens = replace(tokens, behaviour_logp=tokens.behaviour_logp + torch.tensor([0.0] * 7 + [12.0]).double())
    logp = student.hidden.detach().log_softmax(-1).gather(1, tokens.tok[:, None])[:, 0]
    config = LearnConfig(gate="k3", veto=1e-4)
    by_turn = weigh(logp, logp, tokens, config, Bounds()).gate
    by_branch = weigh(logp, logp, tokens, config.model_copy(update={"gate_unit": "branch"}), Bounds()).gate
    assert by_turn.tolist() == [True] * 6 + [False] * 2
    assert by_branch.tolist() == [True] * 4 + [False] * 4
