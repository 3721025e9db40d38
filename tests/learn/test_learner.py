"""Whole optimiser steps on a tiny model: what moves, what is refused, what is reported."""

import asyncio
import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from agentsdpo.collect.branch import BranchBuilder
from agentsdpo.collect.inprocess import InProcessEngine
from agentsdpo.errors import LearnError, ModelError, NothingToLearn
from agentsdpo.learn.chunked import chunked_loss
from agentsdpo.learn.control import empty_hint_gap
from agentsdpo.learn.learner import Learner
from agentsdpo.learn.loss import dense_loss
from agentsdpo.learn.model import prepare_model, scores
from agentsdpo.learn.presets import resolve
from agentsdpo.learn.rows import TrainRow
from agentsdpo.learn.weights import Bounds
from agentsdpo.metrics import check_keys
from agentsdpo.types import Sampling, TokenKind

FAST = {"teacher": "frozen", "lr": 3e-4}


def batch_of(make_row: Callable[..., TrainRow], record: Callable[..., TrainRow], model: Any, n: int = 5,
             **fields: Any) -> list[TrainRow]:
    """Rows of different lengths whose behaviour log-probs are those of ``model`` itself."""
    return [record(model, make_row(seed=i, episode=f"e{i}", prompt=5 + 3 * i, hint=tuple(range(30 + i, 40 + i)),
                                   **fields)) for i in range(n)]


def weights(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().ravel() for p in model.parameters()])


@pytest.mark.parametrize("preset", ["robust", "sdpopp", "naive", "sdft"])
def test_ratios_are_one_at_staleness_zero(preset: str, tiny_model: Any, make_row: Callable[..., TrainRow],
                                          record: Callable[..., TrainRow]) -> None:
    """Behaviour log-probs come from a plain forward with all logits; the learner's own path must agree."""
    rows = batch_of(make_row, record, tiny_model)
    report = Learner(tiny_model, resolve(preset, FAST)).step(rows, version=0)
    m = report.metrics
    assert m["learn/ratio/mean"] == pytest.approx(1.0, abs=1e-5)
    assert m["learn/ratio/max"] == pytest.approx(1.0, abs=1e-4)
    assert m["learn/mismatch/max"] < 1e-4
    assert m["learn/ess_frac"] == pytest.approx(1.0, abs=1e-5)
    assert (report.n_trained, report.n_tokens, report.refused, report.evicted) == (5, 35, {}, 0)
    assert all(isinstance(value, float) and np.isfinite(value) for value in m.values())


@pytest.mark.parametrize("preset", ["robust", "sdpopp"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_one_step_raises_what_the_teacher_likes_and_a_flipped_sign_lowers_it(
        preset: str, sign: float, tiny_model: Any, make_row: Callable[..., TrainRow],
        record: Callable[..., TrainRow], monkeypatch: pytest.MonkeyPatch) -> None:
    """The gap, weighted by itself, must shrink: sum over tokens of gap * change of log p is positive."""
    learner = Learner(tiny_model, resolve(preset, {**FAST, "lr": 3e-5, "adv_clip": None}))
    rows = batch_of(make_row, record, tiny_model)
    honest = Learner.objective

    def maybe_flipped(self: Learner, batch: Any, bounds: Bounds) -> Any:
        loss, stats = honest(self, batch, bounds)
        return sign * loss, stats

    monkeypatch.setattr(Learner, "objective", maybe_flipped)
    from agentsdpo.learn.batch import microbatches
    (micro,) = microbatches(learner.admit(rows, 0).rows, learner.config, learner.cost)

    def student_logp() -> torch.Tensor:
        with torch.no_grad():
            head = scores(tiny_model, micro.student, micro.student_pos)
            return head.log_probs().gather(1, micro.tokens.tok[:, None])[:, 0]

    with torch.no_grad():
        gap = honest(learner, micro, Bounds())[1].gap
    before = student_logp()
    learner.step(rows, version=0)
    assert sign * float((gap * (student_logp() - before)).sum()) > 0


def test_forward_kl_training_closes_the_gap(tiny_model: Any, make_row: Callable[..., TrainRow],
                                            record: Callable[..., TrainRow]) -> None:
    learner = Learner(tiny_model, resolve("robust", {**FAST, "lr": 1e-3, "gate": "off", "veto": None}))
    rows = batch_of(make_row, record, tiny_model)
    losses = [learner.step(rows, version=0).metrics["learn/loss"] for _ in range(8)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("preset", ["robust", "sdpopp"])
def test_loss_gradient_and_clipper_do_not_depend_on_the_split(
        preset: str, tiny_model: Any, make_row: Callable[..., TrainRow], record: Callable[..., TrainRow]) -> None:
    rows = batch_of(make_row, record, tiny_model)
    start = {name: p.detach().clone() for name, p in tiny_model.named_parameters()}
    seen = []
    for tokens in (10_000, 80, 40):
        tiny_model.load_state_dict({**start, "lm_head.weight": start["model.embed_tokens.weight"]})
        learner = Learner(tiny_model, resolve(preset, {**FAST, "forward_tokens": tokens}))
        reports = [learner.step(rows, version=0).metrics for _ in range(2)]
        clip = learner.clipper.state_dict() if learner.clipper else {}
        seen.append([*(m["learn/loss"] for m in reports), *(m["learn/grad_norm"] for m in reports),
                     *(m.get("learn/adv_clip/bound", 0.0) for m in reports), *clip.values()])
    assert seen[1] == pytest.approx(seen[0], rel=2e-4)
    assert seen[2] == pytest.approx(seen[0], rel=2e-4)


def test_a_branch_longer_than_a_forward_is_left_out_counted_and_warned_of(
        tiny_model: Any, make_row: Callable[..., TrainRow], record: Callable[..., TrainRow],
        caplog: pytest.LogCaptureFixture) -> None:
    rows = batch_of(make_row, record, tiny_model)
    lengths = [len(row.branch.token_ids) + len(row.hint_ids or ()) for row in rows]
    longest = max(range(len(rows)), key=lengths.__getitem__)
    others = [row for i, row in enumerate(rows) if i != longest]
    fits = max(len(row.branch.token_ids) + len(row.hint_ids or ()) for row in others)
    assert fits < lengths[longest]
    alone = Learner(copy.deepcopy(tiny_model), resolve("robust", FAST)).step(others, version=0)
    report = Learner(tiny_model, resolve("robust", {**FAST, "forward_tokens": fits})).step(rows, version=0)
    assert (report.refused, report.metrics["replay/refused/window"]) == ({"window": 1}, 1.0)
    assert report.metrics["learn/loss"] == pytest.approx(alone.metrics["learn/loss"], rel=1e-5)
    assert f"1 of {len(rows)} branches are not learnt from: with their hint they are longer than the {fits} tok" \
        in caplog.text


def test_a_branch_longer_than_a_sliding_window_is_left_out_as_well(
        tiny_model: Any, make_row: Callable[..., TrainRow], record: Callable[..., TrainRow]) -> None:
    """It ended the run when it was drawn, and whenever that was resumed."""
    rows = batch_of(make_row, record, tiny_model)
    shape = {**tiny_model.config.to_dict(), "layer_types": None, "sliding_window": 36, "max_window_layers": 1}
    model = type(tiny_model)(type(tiny_model.config)(**{**shape, "use_sliding_window": True})).eval()
    model.load_state_dict(tiny_model.state_dict())
    assert set(model.config.layer_types) == {"full_attention", "sliding_attention"}
    report = Learner(model, resolve("robust", FAST)).step(rows, version=0)
    assert (report.n_trained, report.refused) == (4, {"window": 1})


def test_the_gap_bound_excludes_the_batch_at_hand_after_the_first_step(
        tiny_model: Any, make_row: Callable[..., TrainRow], record: Callable[..., TrainRow]) -> None:
    learner = Learner(tiny_model, resolve("sdpopp", FAST))
    rows = batch_of(make_row, record, tiny_model)
    first = learner.step(rows, 0).metrics
    assert first["learn/adv_clip/bound"] == pytest.approx(3 * first["learn/gap/abs"], rel=1e-5)
    second = learner.step(rows[:1], 0).metrics
    assert second["learn/adv_clip/bound"] == pytest.approx(3 * first["learn/gap/abs"], rel=1e-5)
    third = learner.step(rows, 0).metrics
    assert third["learn/adv_clip/bound"] != pytest.approx(second["learn/adv_clip/bound"], rel=1e-6)


@pytest.mark.parametrize("preset", ["robust", "sdpopp"])
def test_an_empty_hint_has_no_gap_and_no_gradient(preset: str, tiny_model: Any, make_row: Callable[..., TrainRow],
                                                  record: Callable[..., TrainRow]) -> None:
    from agentsdpo.learn.batch import microbatches
    learner = Learner(tiny_model, resolve(preset, FAST))
    rows = learner.admit(batch_of(make_row, record, tiny_model), 0).rows
    bare = [replace(row, row=replace(row.row, hint_ids=())) for row in rows]
    assert empty_hint_gap(tiny_model, rows, learner.config) < 1e-5
    for micro in microbatches(bare, learner.config, learner.cost):
        loss, stats = learner.objective(micro, Bounds())
        loss.backward()
        assert stats.gap.abs().max() < 1e-4
    norm = torch.cat([p.grad.ravel() for p in learner.parameters if p.grad is not None]).norm()
    assert norm < 1e-4


def test_stale_rows_are_evicted_and_counted(tiny_model: Any, make_row: Callable[..., TrainRow],
                                            record: Callable[..., TrainRow]) -> None:
    learner = Learner(tiny_model, resolve("sdpopp", FAST))
    old, new = batch_of(make_row, record, tiny_model, 2), batch_of(make_row, record, tiny_model, 2, versions=(4, 3))
    report = learner.step([*old, *new, replace(new[0], hint_ids=None)], version=4)
    assert (report.n_trained, report.evicted, report.refused) == (2, 2, {"no_hint": 1})
    assert report.metrics["replay/staleness/max"] == 4.0
    assert report.metrics["replay/refused/no_hint"] == 1.0
    assert "learn/mismatch/mean" not in report.metrics, "no row is of the present version"
    with pytest.raises(LearnError, match="2 evicted as staler than 3"):
        learner.step(old, version=4)


def test_a_loss_that_is_not_finite_changes_nothing(tiny_model: Any, make_row: Callable[..., TrainRow],
                                                   record: Callable[..., TrainRow]) -> None:
    learner = Learner(tiny_model, resolve("sdpopp", FAST))
    rows = batch_of(make_row, record, tiny_model)
    learner.step(rows, 0)
    with torch.no_grad():
        learner.teacher.model.lm_head.weight[7] = float("nan")  # type: ignore[attr-defined]
    before, clip = weights(tiny_model), learner.clipper.state_dict() if learner.clipper else None
    with pytest.raises(LearnError, match="loss of step 2 is nan"):
        learner.step(rows, 0)
    assert torch.equal(weights(tiny_model), before)
    assert learner.clipper is not None
    assert learner.clipper.state_dict() == clip
    assert learner.step_count == 1
    assert all(p.grad is None for p in learner.parameters)


@pytest.mark.parametrize("preset", ["robust", "sdpopp"])
def test_a_batch_without_one_open_token_is_refused(preset: str, tiny_model: Any, make_row: Callable[..., TrainRow],
                                                   record: Callable[..., TrainRow]) -> None:
    learner = Learner(tiny_model, resolve(preset, {**FAST, "gate": "k3", "veto": None}))
    rows = [replace(row, branch=row.branch.model_copy(update={"logprobs": row.branch.logprobs - 5.0}))
            for row in batch_of(make_row, record, tiny_model)]
    before = weights(tiny_model)
    with pytest.raises(LearnError, match="all 35 loss tokens of step 1 are masked"):
        learner.step(rows, 0)
    assert torch.equal(weights(tiny_model), before)


def test_a_step_whose_tokens_all_weigh_nothing_is_none(tiny_model: Any, make_row: Callable[..., TrainRow],
                                                       record: Callable[..., TrainRow]) -> None:
    """Otherwise the optimiser's momentum and decay move the weights, and the step counts as learnt."""
    learner = Learner(tiny_model, resolve("robust", {**FAST, "tool_weight": 0.0, "weight_decay": 0.1}))
    rows = batch_of(make_row, record, tiny_model)

    def with_tools(calls: bool) -> list[TrainRow]:
        return [replace(row, tool=np.full(len(row.branch.token_ids), calls)) for row in rows]

    learner.step(with_tools(False), 0)
    before = weights(tiny_model)
    with pytest.raises(NothingToLearn, match="the gradient of step 2 is 0") as caught:
        learner.step(with_tools(True), 0)
    assert (caught.value.reason, learner.step_count) == ("no_gradient", 1)
    assert torch.equal(weights(tiny_model), before)


def test_dropout_is_off_on_both_sides(tiny_model: Any, make_row: Callable[..., TrainRow],
                                      record: Callable[..., TrainRow]) -> None:
    for layer in tiny_model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    rows = batch_of(make_row, record, tiny_model)
    tiny_model.train()
    learner = Learner(tiny_model, resolve("robust", {**FAST, "lr": 1e-8}))
    tiny_model.train()
    losses = {learner.step(rows, 0).metrics["learn/loss"] for _ in range(2)}
    assert max(losses) == pytest.approx(min(losses), rel=1e-4)


@pytest.mark.parametrize("preset", ["robust", "sdpopp", "naive", "sdft"])
@pytest.mark.parametrize("sampling", [Sampling(temperature=0.7, max_tokens=9), Sampling(top_k=5, max_tokens=9),
                                      Sampling(temperature=0.7, top_p=0.8, max_tokens=9)])
def test_what_the_engine_sampled_has_ratio_one(preset: str, sampling: Sampling, tiny_model: Any,
                                               make_row: Callable[..., TrainRow]) -> None:
    """From the engine's own draws, tempered and truncated, through branch and batch to the step's metrics."""
    engine = InProcessEngine(copy.deepcopy(tiny_model), 1022, max_slots=2, window=256)

    def play(seed: int) -> TrainRow:
        builder = BranchBuilder()
        for turn in range(2):
            builder.context(range(20 + seed, 40 + seed + turn), TokenKind.TOOL if turn else TokenKind.CONTEXT)
            own = sampling.model_copy(update={"seed": 10 * seed + turn})
            builder.completion(asyncio.run(engine.complete(builder.ids, own, session=f"{seed}")), own, turn=turn)
        return TrainRow(branch=builder.finish()[0], hint_ids=(7, 8, 9), episode_id=f"{seed}", train_allowed=True)

    report = Learner(tiny_model, resolve(preset, FAST)).step([play(seed) for seed in range(4)], version=0)
    assert report.refused == {}
    assert report.n_tokens == 72
    m = report.metrics
    assert m["learn/ratio/mean"] == pytest.approx(1.0, abs=1e-4)
    assert m["learn/ratio/max"] == pytest.approx(1.0, abs=1e-3)
    assert m["learn/mismatch/max"] < 1e-3


def test_a_gradient_that_is_not_finite_changes_nothing(tiny_model: Any, make_row: Callable[..., TrainRow],
                                                       record: Callable[..., TrainRow]) -> None:
    learner = Learner(tiny_model, resolve("sdpopp", {**FAST, "teacher": "ema"}))
    rows = batch_of(make_row, record, tiny_model)
    learner.step(rows, 0)
    assert learner.clipper is not None
    moments = {id(p): {k: v.clone() for k, v in state.items()} for p, state in learner.optimizer.state.items()}
    before, clip = weights(tiny_model), learner.clipper.state_dict()
    teacher = {name: p.clone() for name, p in learner.teacher.state_dict().items()}
    hook = learner.parameters[3].register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(LearnError, match=r"gradient norm of step 2 is (nan|inf), nothing was updated"):
        learner.step(rows, 0)
    hook.remove()
    assert torch.equal(weights(tiny_model), before)
    assert (learner.step_count, learner.clipper.state_dict()) == (1, clip)
    assert all(torch.equal(p, teacher[name]) for name, p in learner.teacher.state_dict().items())
    for p, state in learner.optimizer.state.items():
        assert all(torch.equal(value, moments[id(p)][key]) for key, value in state.items())
    assert all(p.grad is None for p in learner.parameters)
    learner.step(rows, 0)


class Scaled(torch.nn.Module):
    """A model that halves its logits, as some do for the sake of their initialisation."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def get_output_embeddings(self) -> Any:
        return self.inner.get_output_embeddings()

    def get_decoder(self) -> Any:
        return self.inner.get_decoder()

    def set_attn_implementation(self, name: str) -> None:
        self.inner.set_attn_implementation(name)

    def forward(self, **inputs: Any) -> Any:
        out = self.inner(**inputs)
        out.logits = out.logits / 2
        return out


def test_a_model_that_shapes_its_logits_is_refused(tiny_model: Any) -> None:
    prepare_model(tiny_model)
    with pytest.raises(ModelError, match="logits differ from its last hidden states"):
        Learner(Scaled(tiny_model), resolve("robust", FAST))
    tiny_model.config.final_logit_softcapping = 30.0
    with pytest.raises(ModelError, match="caps its logits"):
        Learner(tiny_model, resolve("robust", FAST))


class Leaky(Scaled):
    """A model that does not hand keyword arguments on to its attention, or carries a state along the row."""

    def get_decoder(self) -> Any:
        decoder = self.inner.get_decoder()
        return lambda input_ids, position_ids, segments, use_cache: decoder(
            input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**inputs)


def test_a_model_whose_packed_branches_see_each_other_is_refused(tiny_model: Any) -> None:
    with pytest.raises(ModelError, match="the logits of two branches in one row differ by"):
        Learner(Leaky(tiny_model), resolve("robust", FAST))


@pytest.mark.parametrize("preset", ["robust", "sdpopp", "sdft"])
def test_steps_of_the_chunked_loss_are_those_of_the_dense_one(
        preset: str, tiny_model: Any, make_row: Callable[..., TrainRow], record: Callable[..., TrainRow],
        monkeypatch: pytest.MonkeyPatch) -> None:
    rows = batch_of(make_row, record, tiny_model)
    ends, norms = [], []
    for form in (chunked_loss, dense_loss):
        monkeypatch.setattr("agentsdpo.learn.sdpo.token_loss", form)
        model = copy.deepcopy(tiny_model)
        learner = Learner(model, resolve(preset, {**FAST, "adv_clip": None} if preset != "sdpopp" else FAST))
        norms.append([learner.step(rows, 0).metrics["learn/grad_norm"] for _ in range(3)])
        ends.append(weights(model))
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    torch.testing.assert_close(ends[0], ends[1], atol=2e-5, rtol=0.0)


def test_preset_metrics_are_those_that_apply(tiny_model: Any, make_row: Callable[..., TrainRow],
                                             record: Callable[..., TrainRow]) -> None:
    rows = batch_of(make_row, record, tiny_model, 2)
    keys = {preset: set(Learner(tiny_model, resolve(preset, FAST)).step(rows, 0).metrics)
            for preset in ("robust", "sdpopp", "naive")}
    check_keys(set().union(*keys.values()), "step")
    clip = {f"learn/adv_clip/{stat}" for stat in ("frac", "bound", "mass")}
    mask = {f"learn/masked_frac/{stat}" for stat in ("pos", "neg", "S0", "unnamed")}
    assert keys["sdpopp"] - keys["naive"] == clip | mask
    spread = {f"learn/divergence/{stat}" for stat in ("mean", "p95", "max", "mean/S0", "mean/unnamed")}
    assert keys["robust"] - keys["naive"] == {"learn/tail_mass/student", "learn/tail_mass/teacher"} | spread
