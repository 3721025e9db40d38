"""Real steps of a small model on every axis: presets, splits into micro-batches, sign of a mix with grades."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from agentsdpo.errors import LearnError
from agentsdpo.learn.batch import microbatches
from agentsdpo.learn.learner import Learner
from agentsdpo.learn.model import scores
from agentsdpo.learn.presets import PRESETS, TOY, resolve
from agentsdpo.learn.records import sampled_logp
from agentsdpo.learn.rows import TrainRow
from agentsdpo.metrics import check_keys
from agentsdpo.types import VersionSpan

TURNS = ((4, 3), (3, 2), (2, 1))


@pytest.fixture
def graded(make_row: Callable[..., TrainRow], record: Callable[..., TrainRow], tiny_model: Any) -> list[TrainRow]:
    """Six attempts at two tasks, recorded near the model, of three turns and two versions each."""
    rows = [record(tiny_model, make_row(seed=i, episode=f"e{i}", prompt=5 + 3 * i, turns=TURNS, versions=(0, 1, 1),
                                        hint=tuple(range(30 + i, 40 + i)))) for i in range(6)]
    rng = np.random.default_rng(0)
    for i, row in enumerate(rows):
        noise = rng.normal(0.0, 0.05, len(row.branch.logprobs)).astype(np.float32)
        moved = np.minimum(row.branch.logprobs + noise, np.float32(-1e-6))
        branch = row.branch.model_copy(update={"logprobs": moved})
        tool = np.zeros(len(moved), bool)
        tool[-6:] = True
        rows[i] = replace(row, branch=branch, score=(i % 3) / 2, group=f"g{i // 3}", tool=tool)
    return rows


def of_version_one(row: TrainRow) -> TrainRow:
    """The row as if one version had sampled all of it."""
    calls = tuple(call.model_copy(update={"versions": (VersionSpan(version=1, start=0, end=call.end - call.start),)})
                  for call in row.branch.calls)
    return replace(row, branch=row.branch.model_copy(update={"calls": calls}))


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_takes_steps(preset: str, tiny_model: Any, graded: list[TrainRow]) -> None:
    learner = Learner(tiny_model, resolve(preset, TOY[preset]))
    before = torch.cat([p.detach().ravel() for p in tiny_model.parameters()])
    if learner.config.max_staleness == 0:
        graded = [of_version_one(row) for row in graded]
    reports = [learner.step(graded, version=1) for _ in range(2)]
    for report in reports:
        check_keys(report.metrics, "step")
        assert all(np.isfinite(value) for value in report.metrics.values())
    contrast = 4 if learner.config.mix in ("credit", "grade") else 6
    assert reports[-1].n_trained == contrast, "of three attempts in a group, the middling one has no advantage"
    assert reports[-1].refused == ({"no_contrast": 2} if contrast == 4 else {})
    assert not torch.equal(torch.cat([p.detach().ravel() for p in tiny_model.parameters()]), before)


@pytest.mark.parametrize("fields", [
    {"form": "sampled", "ratio": "m2po", "m2_budget": 1e-3},
    {"form": "sampled", "ratio": "gspo", "eps_lo": 1e-2, "eps_hi": 1e-2, "token_weight": "sod"},
    {"form": "sampled", "ratio": "minpro", "normaliser": "turn", "staleness_decay": 0.5},
    {"form": "sampled", "ratio": "decoupled", "mix": "credit", "tau": 1e-3, "tool_weight": 2.0},
    {"ratio": "seq_tis", "mix": "blend", "advantage": "reinforce", "beta_kl": 0.1, "skip_first": 1},
    {"ratio": "turn_geo", "token_weight": "sdar", "gate": "geo", "gate_unit": "branch", "normaliser": "branch"},
    {"ratio": "dppo", "mix": "add", "teacher": "trust_region", "normaliser": "constant", "loss_tokens": 99},
], ids=lambda fields: "-".join(str(value) for value in fields.values()))
def test_a_step_does_not_depend_on_its_split_into_micro_batches(
        fields: dict[str, Any], tiny_model: Any, graded: list[TrainRow]) -> None:
    start = {name: p.detach().clone() for name, p in tiny_model.named_parameters()}
    seen, counts = [], []
    for tokens in (10_000, 48):
        tiny_model.load_state_dict({**start, "lm_head.weight": start["model.embed_tokens.weight"]})
        config = resolve("robust", {"gate": "off", "veto": None, "lr": 3e-4, "forward_tokens": tokens, **fields})
        learner = Learner(tiny_model, config)
        reports = [learner.step(graded, version=1).metrics for _ in range(2)]
        counts.append(reports[0]["learn/microbatches"])
        seen.append([m[key] for m in reports for key in ("learn/loss", "learn/grad_norm", "learn/gap/abs")])
    assert counts[0] == 1 < counts[1]
    assert seen[1] == pytest.approx(seen[0], rel=5e-4, abs=1e-6)


def test_grades_decide_the_direction_of_a_step(tiny_model: Any, graded: list[TrainRow]) -> None:
    """With the credit of grades, tokens of good attempts become likelier and those of bad ones less so."""
    learner = Learner(tiny_model, resolve("safe_agent", {"lr": 3e-5, "tau": 0.0}))
    (micro,) = microbatches(learner.admit(graded, 1).rows, learner.config, learner.cost)
    advantage = micro.tokens.advantages

    def logp() -> torch.Tensor:
        with torch.no_grad():
            return sampled_logp(scores(tiny_model, micro.student, micro.student_pos), micro.tokens)

    before = logp()
    learner.step(graded, version=1)
    moved = logp() - before
    assert float((moved * advantage).sum()) > 0
    assert set(advantage.sign().tolist()) == {1.0, -1.0}


def test_a_step_without_any_contrast_is_refused_with_its_count(tiny_model: Any, graded: list[TrainRow]) -> None:
    learner = Learner(tiny_model, resolve("safe_agent", TOY["safe_agent"]))
    with pytest.raises(LearnError, match="'no_contrast': 6.*graded alike"):
        learner.step([replace(row, score=1.0) for row in graded], version=1)


def test_without_hints_a_mix_learns_from_grades_and_the_pure_objective_nothing(tiny_model: Any,
                                                                               graded: list[TrainRow]) -> None:
    bare = [replace(row, hint_ids=None) if i % 2 else row for i, row in enumerate(graded)]
    report = Learner(tiny_model, resolve("opd_grpo", TOY["opd_grpo"])).step(bare, version=1)
    assert report.refused == {"no_contrast": 1}, "of the middling ones, which have no advantage, that without a hint"
    assert report.n_trained == 5
    gaps = dict(zip([row.episode_id for row, _ in report.gaps], [gap for _, gap in report.gaps], strict=True))
    assert {name for name, gap in gaps.items() if gap == 0.0} == {"e3", "e5"}
    pure = Learner(tiny_model, resolve("robust", TOY["robust"])).step(bare, version=1)
    assert pure.refused == {"no_hint": 3}


def test_the_gap_bound_is_of_the_tokens_that_have_a_gap(tiny_model: Any, graded: list[TrainRow]) -> None:
    """Rows without a hint leave it where it was: counted in, a step of them alone cut all gaps of the next to 0."""
    config = resolve("opd_grpo", {"lr": 1e-6, "control_every": 0})
    bare = [replace(row, hint_ids=None) for row in graded]
    alone, mixed = Learner(copy.deepcopy(tiny_model), config), Learner(tiny_model, config)
    mixed.step(bare, version=1)
    expected = alone.step(graded[:1] + graded[-1:], version=1).metrics["learn/adv_clip/bound"]
    for rows in (graded[:1] + bare[1:5] + graded[-1:], bare[:5] + graded[-1:]):
        found = mixed.step(rows, version=1).metrics["learn/adv_clip/bound"]
        assert found == pytest.approx(expected, rel=0.05)


def test_grades_that_are_all_alike_teach_nothing_whatever_their_mean_rounds_to(
        tiny_model: Any, graded: list[TrainRow]) -> None:
    learner = Learner(tiny_model, resolve("grpo", {"advantage": "reinforce", "weight_decay": 0.1}))
    with pytest.raises(LearnError, match="'no_contrast': 3"):
        learner.step([replace(row, score=0.1) for row in graded[:3]], version=1)


def test_grpo_asks_no_teacher(tiny_model: Any, graded: list[TrainRow]) -> None:
    class Nobody:
        def scores(self, batch: Any) -> Any:
            raise AssertionError("a teacher was asked")

        def after_step(self, student: Any) -> None:
            pass

    learner = Learner(tiny_model, resolve("grpo", TOY["grpo"]), teacher=Nobody())  # type: ignore[arg-type]
    report = learner.step([replace(row, hint_ids=None) for row in graded], version=1)
    assert (report.n_trained, report.metrics["learn/gap/abs"]) == (4, 0.0)
    assert "hint/empty_gap" not in report.metrics


def test_staleness_decays_the_weight_of_each_turn_by_its_own_age(tiny_model: Any, graded: list[TrainRow]) -> None:
    learner = Learner(tiny_model, resolve("conversations", TOY["conversations"]))
    (micro,) = microbatches(learner.admit(graded, 3).rows, learner.config, learner.cost)
    old, new = micro.tokens.ages == 3, micro.tokens.ages == 2
    assert (int(old.sum()), int(new.sum())) == (24, 30)
    per_turn = {a: float(micro.tokens.weight[micro.tokens.ages == a].sum()) for a in (3, 2)}
    assert per_turn[3] == pytest.approx(0.97**3 / 3, rel=1e-5), "one turn in three is 3 versions old"
    assert per_turn[2] == pytest.approx(0.97**2 * 2 / 3, rel=1e-5)
