"""The objective itself: sign, exact expectations, gates, detachment, golden values per preset."""

from collections.abc import Callable
from dataclasses import replace
from math import exp, inf, log
from typing import Any

import pytest
import torch
from torch import Tensor

from agentsdpo.learn.config import LearnConfig
from agentsdpo.learn.presets import PRESETS, TOY, resolve
from agentsdpo.learn.ratio import RATIOS
from agentsdpo.learn.records import Head, LossTokens
from agentsdpo.learn.sdpo import divergence_form, objective, sampled_form
from agentsdpo.learn.weights import Bounds

FULL = LearnConfig(support="full", gate="off")
SAMPLED = LearnConfig(form="sampled", ratio="ppo")


def run(student: Head, teacher: Head, tokens: LossTokens, config: LearnConfig,
        bound: float = inf) -> tuple[Tensor, Any]:
    return objective(student, teacher, tokens, config, Bounds(gap=bound))


def logp_after_step(student: Head, loss: Tensor, tok: Tensor, lr: float = 0.05) -> Tensor:
    (grad,) = torch.autograd.grad(loss, student.hidden, retain_graph=True)
    return (student.hidden - lr * grad).detach().log_softmax(-1).gather(1, tok[:, None])[:, 0]


def raises_what_the_teacher_likes(before: Tensor, after: Tensor, gap: Tensor) -> bool:
    return bool((torch.sign(after - before) == torch.sign(gap)).all())


@pytest.mark.parametrize("name", ["sampled", "forward_kl", "reverse_kl", "jsd"])
def test_a_step_moves_the_sampled_token_towards_the_teacher_and_a_flipped_sign_fails(
        name: str, make_heads: Callable[..., Any]) -> None:
    config = {"sampled": SAMPLED, "forward_kl": FULL, "reverse_kl": FULL.model_copy(update={"beta": 1.0}),
              "jsd": FULL.model_copy(update={"beta": 0.5})}[name]
    student, teacher, tokens = make_heads(n=64, v=2)  # two ids: every form must agree on the direction
    loss, stats = run(student, teacher, tokens, config)
    after = logp_after_step(student, loss, tokens.tok)
    assert raises_what_the_teacher_likes(stats.student_logp, after, stats.gap)
    flipped = logp_after_step(student, -loss, tokens.tok)
    assert not raises_what_the_teacher_likes(stats.student_logp, flipped, stats.gap)


def test_expectation_over_actions_is_the_reverse_kl_gradient_under_any_behaviour(
        make_heads: Callable[..., Any]) -> None:
    config, v = LearnConfig(form="sampled", ratio="is"), 7
    for seed in (0, 1):
        student, teacher, _ = make_heads(n=1, v=v, seed=3)
        mu = torch.randn(v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(-1)
        wide = Head(student.hidden.expand(v, -1), student.weight)
        tokens = LossTokens(tok=torch.arange(v), weight=mu, turn=torch.arange(v), behaviour_logp=mu.log())
        loss, _ = sampled_form(wide, Head(teacher.hidden.expand(v, -1), teacher.weight), tokens, config, Bounds())
        (got,) = torch.autograd.grad(loss, student.hidden)
        one = LossTokens(tok=torch.zeros(1, dtype=torch.long), weight=torch.ones(1).double(),
                         turn=torch.zeros(1, dtype=torch.long), behaviour_logp=torch.zeros(1).double())
        exact, _ = divergence_form(student, teacher, one, FULL.model_copy(update={"beta": 1.0}), Bounds())
        (expected,) = torch.autograd.grad(exact, student.hidden)
        torch.testing.assert_close(got, expected, atol=1e-14, rtol=1e-12)


def test_the_bound_of_a_step_holds_for_a_ratio_on_a_divergence_too(make_heads: Callable[..., Any]) -> None:
    student, teacher, tokens = make_heads(n=6)
    tokens = replace(tokens, behaviour_logp=tokens.behaviour_logp - torch.linspace(-1.0, 1.0, 6).double())
    config = LearnConfig(ratio="m2po", support="full", cap=100.0, parity=True)
    _, stats = objective(student, teacher, tokens, config, Bounds(m2=0.5))
    harmful = stats.log_ratio * stats.gap > 0
    assert harmful.any()
    assert torch.equal(stats.mask, ~(harmful & (stats.log_ratio.abs() > 0.5)))
    assert not stats.mask.all()


def test_a_detached_divergence_as_advantage_would_teach_nothing(make_heads: Callable[..., Any]) -> None:
    """Why the divergence form must differentiate: a score that does not depend on the action has no gradient."""
    student, _, _ = make_heads(n=1, v=9)
    log_p = student.hidden.log_softmax(-1)
    loss = -(log_p.exp().detach() * 1.7 * log_p).sum()
    (grad,) = torch.autograd.grad(loss, student.hidden)
    assert grad.abs().max() < 1e-15


def test_all_ratio_modes_agree_where_the_ratio_is_one(make_heads: Callable[..., Any]) -> None:
    grads = []
    for mode in RATIOS:
        student, teacher, tokens = make_heads()
        config = LearnConfig.model_validate({"form": "sampled", "ratio": mode, "parity": True})
        loss, stats = sampled_form(student, teacher, tokens, config, Bounds())
        assert torch.equal(stats.log_ratio, torch.zeros(6).double())
        grads.append(torch.autograd.grad(loss, student.hidden)[0])
    assert all(torch.equal(grads[0], other) for other in grads[1:])


def test_no_gradient_reaches_the_teacher_or_the_weights_of_the_objective(make_heads: Callable[..., Any]) -> None:
    for config in (FULL, SAMPLED, LearnConfig(top_k=3)):
        student, teacher, tokens = make_heads()
        shared = torch.eye(11, dtype=torch.float64).requires_grad_(True)
        live = Head(teacher.hidden.clone().requires_grad_(True), shared)
        loss, stats = run(Head(student.hidden, torch.eye(11, dtype=torch.float64)), live, tokens, config)
        loss.backward()
        assert live.hidden.grad is None
        assert shared.grad is None
        assert not any(getattr(stats, name).requires_grad for name in vars(stats))


def test_the_gap_is_clipped_at_the_bound_but_reported_whole(make_heads: Callable[..., Any]) -> None:
    student, teacher, tokens = make_heads()
    _, stats = sampled_form(student, teacher, tokens, SAMPLED, Bounds(gap=0.5))
    assert stats.used_gap.abs().max() == 0.5 < stats.gap.abs().max()
    assert torch.equal(stats.push, stats.used_gap)


@pytest.mark.parametrize("form", ["divergence", "sampled"])
def test_a_gated_turn_loses_its_gradient_and_no_other_does(form: str, make_heads: Callable[..., Any]) -> None:
    plain = FULL if form == "divergence" else LearnConfig(form="sampled")
    gated = LearnConfig(**{**plain.model_dump(), "gate": "k3", "c3": 0.1, "veto": 1e-4})
    student, teacher, tokens = make_heads()
    shift = torch.tensor([0.0, 0.0, 2.0, 0.0, 12.0, 0.0]).double()  # turns are pairs: the 2nd and 3rd are off
    tokens = replace(tokens, behaviour_logp=tokens.behaviour_logp + shift)
    free = torch.autograd.grad(run(student, teacher, tokens, plain)[0], student.hidden)[0]
    loss, stats = run(student, teacher, tokens, gated)
    grad = torch.autograd.grad(loss, student.hidden)[0]
    assert stats.gate.tolist() == [True, True, False, False, False, False]
    assert torch.equal(grad[2:], torch.zeros_like(grad[2:]))
    assert torch.equal(grad[:2], free[:2]), "a gate must not amplify the rest"


def test_the_divergence_form_ignores_the_token_ratio(make_heads: Callable[..., Any]) -> None:
    student, teacher, tokens = make_heads()
    unlogged = replace(tokens, behaviour_logp=torch.full((6,), float("nan")).double())
    assert torch.equal(run(student, teacher, tokens, FULL)[0], run(student, teacher, unlogged, FULL)[0])


def test_temperature_scales_both_sides(make_heads: Callable[..., Any]) -> None:
    student, teacher, tokens = make_heads()
    warm = replace(tokens, temperature=torch.full((6,), 2.0).double())
    halved = (Head(student.hidden / 2, student.weight), Head(teacher.hidden / 2, teacher.weight))
    assert torch.equal(run(student, teacher, warm, FULL)[0], run(*halved, tokens, FULL)[0])


def fixed_heads() -> tuple[Head, Head, LossTokens]:
    """Five tokens over seven ids, written as sines so that no generator's stream is involved."""
    grid = torch.arange(35, dtype=torch.float64).reshape(5, 7)
    eye, tok = torch.eye(7, dtype=torch.float64), torch.tensor([0, 3, 6, 2, 5])
    student, shift = Head((2 * torch.sin(grid)).requires_grad_(True), eye), torch.tensor([0.0, 0.3, -0.4, 0.1, -0.1])
    behaviour = student.hidden.detach().log_softmax(-1).gather(1, tok[:, None])[:, 0] + shift
    tokens = LossTokens(tok=tok, weight=torch.full((5,), 0.2, dtype=torch.float64),
                        turn=torch.tensor([0, 0, 1, 1, 2]), behaviour_logp=behaviour,
                        branch=torch.tensor([0, 0, 0, 0, 1]), age=torch.tensor([2, 2, 1, 1, 0]),
                        advantage=torch.tensor([1.5, 1.5, 1.5, 1.5, -0.5], dtype=torch.float64),
                        reference_logp=behaviour - 0.2)
    return student, Head(2 * torch.cos(1.3 * grid), eye), tokens


GOLDEN = {
    "conversations": (1.654491, 0.282999),
    "grpo": (2.842985, 0.514906),
    "naive": (5.202260, 0.978810),
    "opd_grpo": (5.338193, 1.060260),
    "parity_lasgroup": (0.240496, 0.043918),
    "parity_openclaw": (5.202260, 0.978810),
    "parity_openclaw_topk": (1.219048, 0.146953),
    "parity_trl": (4.257955, 0.831261),
    "robust": (1.656956, 0.282961),
    "safe_agent": (4.264916, 0.772454),
    "sampled_tis": (2.584886, 0.544356),
    "sdft": (1.171705, 0.141782),
    "sdpo": (1.404474, 0.266138),
    "sdpopp": (2.495207, 0.560182),
    "test_time": (1.404474, 0.266138),
}
"""Loss and gradient norm on :func:`fixed_heads` at bound 1.5 (top_k 3 where a support is used), to six decimals."""


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_golden_loss_per_preset(name: str) -> None:
    config = resolve(name, {**TOY[name], "top_k": 3})
    student, teacher, tokens = fixed_heads()
    loss, _ = run(student, teacher, tokens, config, 1.5 if config.adv_clip else inf)
    (grad,) = torch.autograd.grad(loss, student.hidden)
    assert (loss.item(), grad.norm().item()) == pytest.approx(GOLDEN[name], abs=5e-7)


def logps(student: Head, teacher: Head, tokens: LossTokens) -> list[tuple[float, float, float]]:
    """Student, teacher and behaviour log-prob of each sampled token, as plain numbers."""
    p, q = student.hidden.detach().log_softmax(-1), teacher.hidden.log_softmax(-1)
    mu = tokens.behaviour_logp.tolist()
    return [(p[i, y].item(), q[i, y].item(), mu[i]) for i, y in enumerate(tokens.tok.tolist())]


def clipped(gap: float) -> float:
    return max(-1.5, min(1.5, gap))


def test_golden_sdpopp_by_hand() -> None:
    """Written out token by token, independent of the code under test."""
    total = 0.0
    for p, q, mu in logps(*fixed_heads()):
        gap, r = q - p, exp(p - mu)
        blocked = (gap > 0 and r > 1.2) or (gap < 0 and r < 0.8)
        total -= 0.0 if blocked else 0.2 * min(r, 2.0) * clipped(gap) * p
    assert total == pytest.approx(GOLDEN["sdpopp"][0], abs=5e-7)


def test_golden_sampled_tis_by_hand() -> None:
    total = 0.0
    for p, q, mu in logps(*fixed_heads()):
        gap, r = q - p, exp(p - mu)
        total -= 0.2 * (min(r, 2.0) if gap >= 0 else min(r, 1.0)) * clipped(gap) * p
    assert total == pytest.approx(GOLDEN["sampled_tis"][0], abs=5e-7)


def test_golden_safe_agent_by_hand() -> None:
    """The grade's advantage under the PPO mask, its size changed by the gap, and the pull of tau."""
    student, teacher, tokens = fixed_heads()
    total = 0.0
    for (p, q, mu), advantage in zip(logps(student, teacher, tokens), tokens.advantages.tolist(), strict=True):
        gap, r = q - p, exp(p - mu)
        blocked = (advantage > 0 and r > 1.28) or (advantage < 0 and r < 0.8)
        sign = 1.0 if advantage > 0 else -1.0
        credit = advantage * max(0.5, min(1.5, 1.0 + sign * clipped(gap)))
        total -= 0.2 * ((0.0 if blocked else min(r, 3.0) * credit) - 2e-3 * (p - mu)) * p
    assert total == pytest.approx(GOLDEN["safe_agent"][0], abs=5e-7)


def blocked_by_ppo(signal: float, r: float) -> bool:
    return (signal > 0 and r > 1.28) or (signal < 0 and r < 0.8)


def test_golden_grpo_and_opd_grpo_by_hand() -> None:
    """The grade's advantage alone; and beside it the gap with a ratio of its own, since its sign may be another."""
    student, teacher, tokens = fixed_heads()
    grade = both = 0.0
    for (p, q, mu), advantage in zip(logps(student, teacher, tokens), tokens.advantages.tolist(), strict=True):
        gap, r = q - p, exp(p - mu)
        own = 0.0 if blocked_by_ppo(advantage, r) else min(r, 3.0) * advantage
        grade -= 0.2 * own * p
        both -= 0.2 * (own + (0.0 if blocked_by_ppo(gap, r) else min(r, 3.0) * clipped(gap))) * p
    assert grade == pytest.approx(GOLDEN["grpo"][0], abs=5e-7)
    assert both == pytest.approx(GOLDEN["opd_grpo"][0], abs=5e-7)


def test_golden_sdpo_by_hand() -> None:
    """Reverse KL over the student's top 3 and one tail; test_time is the same on a smaller support."""
    student, teacher, _ = fixed_heads()
    p, q = student.hidden.detach().softmax(-1), teacher.hidden.softmax(-1)
    total = 0.0
    for i in range(5):
        chosen = p[i].topk(3).indices.tolist()
        rest = [j for j in range(7) if j not in chosen]
        pairs = [(p[i, j].item(), q[i, j].item()) for j in chosen]
        pairs.append((p[i, rest].sum().item(), q[i, rest].sum().item()))
        total += 0.2 * sum(a * log(a / b) for a, b in pairs)
    assert total == pytest.approx(GOLDEN["sdpo"][0], abs=5e-7)


@pytest.mark.parametrize("name", ["opd_grpo", "safe_agent"])
def test_tokens_without_a_hint_learn_from_the_grade_alone(name: str) -> None:
    student, teacher, tokens = fixed_heads()
    config = resolve(name, {**TOY[name], "tau": 0.0, "gate": "off", "veto": None})
    bare = replace(tokens, hinted=torch.tensor([False] * 5))
    loss, stats = run(student, teacher, bare, config, 1.5)
    grades, _ = run(student, teacher, tokens, resolve("grpo", TOY["grpo"]))
    assert loss.item() == pytest.approx(grades.item(), abs=1e-9)
    assert stats.gap.abs().max() == 0
    some = replace(tokens, hinted=torch.tensor([True, True, True, True, False]))
    assert run(student, teacher, some, config, 1.5)[0].item() != pytest.approx(loss.item(), abs=1e-3)
    blend = resolve("robust", {"mix": "blend", "gate": "off", "veto": None})
    half, whole = (run(student, teacher, each, blend)[0].item() for each in (bare, tokens))
    assert half == pytest.approx(0.5 * policy_gradient_loss(student, teacher, tokens), abs=1e-9)
    assert whole != pytest.approx(half, abs=1e-3)


def policy_gradient_loss(student: Head, teacher: Head, tokens: LossTokens) -> float:
    """Without any ratio."""
    return run(student, teacher, tokens, resolve("grpo", {"ratio": "none"}))[0].item()


def test_golden_conversations_by_hand() -> None:
    """Forward KL over the union of both top 3 and one tail, and the pull to the initial weights."""
    student, teacher, tokens = fixed_heads()
    p, q = student.hidden.detach().softmax(-1), teacher.hidden.softmax(-1)
    total = 0.0
    for i, (logp, _, mu) in enumerate(logps(student, teacher, tokens)):
        chosen = sorted({*p[i].topk(3).indices.tolist(), *q[i].topk(3).indices.tolist()})
        rest = [j for j in range(7) if j not in chosen]
        pairs = [(p[i, j].item(), q[i, j].item()) for j in chosen]
        pairs.append((p[i, rest].sum().item(), q[i, rest].sum().item()))
        total += 0.2 * sum(b * log(b / a) for a, b in pairs if b > 0)
        total += 0.2 * 0.01 * (1.0 - exp((mu - 0.2) - logp)) * logp
    assert total == pytest.approx(GOLDEN["conversations"][0], abs=5e-7)
