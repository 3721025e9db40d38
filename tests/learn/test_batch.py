"""Packing, alignment, normalisers, and that nothing but loss tokens gets a gradient."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from agentsdpo.errors import HintError, LearnError
from agentsdpo.learn import batch as batching
from agentsdpo.learn.batch import collate, loss_weights, microbatches, teacher_ids
from agentsdpo.learn.config import LearnConfig
from agentsdpo.learn.learner import Learner
from agentsdpo.learn.model import prepare_model, scores
from agentsdpo.learn.pack import RowCost
from agentsdpo.learn.presets import resolve
from agentsdpo.learn.rows import LossRow, TrainRow, admit
from agentsdpo.learn.weights import Bounds

CONFIG = resolve("robust", {"lr": 1e-4})
WHOLE = LearnConfig(normaliser="token")
COST = RowCost(linear=100.0, quadratic=1.0)
LENGTHS = [((4, 3), (3, 2)), ((9, 1),), ((2, 2), (5, 9), (3, 1)), ((1, 0),)]


def admitted(rows: list[TrainRow], config: Any = CONFIG) -> list[LossRow]:
    return admit(rows, 0, config, window=4096, vocab_size=448).rows


def ragged(make_row: Callable[..., TrainRow], **fields: Any) -> list[TrainRow]:
    return [make_row(seed=i, turns=turns, versions=(0,) * len(turns), episode=f"e{i}", prompt=4 + 7 * i, **fields)
            for i, turns in enumerate(LENGTHS)]


def test_packed_branches_equal_one_row_at_a_time(
        tiny_model: Any, make_row: Callable[..., TrainRow], plain_logp: Callable[..., np.ndarray]) -> None:
    rows = admitted(ragged(make_row))
    (micro,) = microbatches(rows, WHOLE, COST)
    assert micro.student.segments.lengths == tuple(len(row.ids) for row in rows)
    sides = [(micro.student, micro.student_pos, [(row.ids, row.position) for row in rows]),
             (micro.teacher, micro.teacher_pos,
              [(teacher_ids(row), row.position + len(row.row.hint_ids or ())) for row in rows])]
    expected = [np.concatenate([plain_logp(tiny_model, ids)[at] for ids, at in alone]) for _, _, alone in sides]
    prepare_model(tiny_model)
    for (row, at, _), plain in zip(sides, expected, strict=True):
        with torch.no_grad():
            got = scores(tiny_model, row, at).log_probs().gather(1, micro.tokens.tok[:, None])[:, 0]
        np.testing.assert_allclose(got.numpy(), plain, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("hint", [(9,), (9, 8, 7), tuple(range(20, 120))])
@pytest.mark.parametrize("hint_at", [0, 3, 6, 13])
def test_alignment_at_every_placement_and_hint_length(
        hint: tuple[int, ...], hint_at: int, make_row: Callable[..., TrainRow]) -> None:
    (row,) = admitted([make_row(hint=hint, hint_at=hint_at)])
    micro = collate([row], [np.ones(len(row.position), np.float32)])
    assert micro.teacher.ids[0].tolist() == [*row.ids[:hint_at], *hint, *row.ids[hint_at:]]
    student, teacher = micro.student.ids.ravel(), micro.teacher.ids.ravel()
    assert torch.equal(student[micro.student_pos + 1], micro.tokens.tok)
    assert torch.equal(teacher[micro.teacher_pos + 1], micro.tokens.tok)
    hinted = row.position >= hint_at
    assert ((micro.teacher_pos - micro.student_pos).numpy()[hinted] == len(hint)).all()


def test_a_misaligned_row_is_an_error(make_row: Callable[..., TrainRow], monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = admitted([make_row()])
    monkeypatch.setattr(batching, "teacher_position", lambda row: row.position + 2)
    with pytest.raises(HintError, match="the teacher's"):
        collate([row], [np.ones(len(row.position), np.float32)])


def test_a_hint_behind_the_last_loss_token_is_an_error(make_row: Callable[..., TrainRow]) -> None:
    with pytest.raises(HintError, match="behind the last loss token"):
        collate(admitted([make_row(hint_at=16)]), [np.ones(7, np.float32)])


def test_microbatches_hold_every_row_once_within_the_budget(make_row: Callable[..., TrainRow]) -> None:
    rows = admitted(ragged(make_row) * 3)
    parts = microbatches(rows, LearnConfig(normaliser="token", forward_tokens=100), COST)
    assert len(parts) > 1
    assert sum(len(part.student.segments.lengths) for part in parts) == len(rows)
    assert all(part.teacher.ids.numel() <= 100 for part in parts)
    assert sum(float(part.tokens.weight.sum()) for part in parts) == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(LearnError, match="a branch has .* tokens with its hint but learn.forward_tokens is 20"):
        microbatches(rows, LearnConfig(forward_tokens=20), COST)
    with pytest.raises(LearnError, match="no row is left"):
        microbatches([], WHOLE, COST)


def test_turn_numbers_do_not_meet_across_rows(make_row: Callable[..., TrainRow]) -> None:
    (micro,) = microbatches(admitted(ragged(make_row)), WHOLE, COST)
    pairs = set(zip(micro.seg.tolist(), micro.tokens.turn.tolist(), strict=True))
    assert len(pairs) == len(set(micro.tokens.turn.tolist())) == sum(map(len, LENGTHS))


def test_normalisers_share_the_step_between_equals(make_row: Callable[..., TrainRow]) -> None:
    rows = admitted([make_row(episode="a"), make_row(episode="b", turns=((10, 1), (4, 1))), make_row(episode="b")])

    def shares(**fields: Any) -> list[list[float]]:
        return [np.unique(part).tolist() for part in loss_weights(rows, LearnConfig(**fields))]

    near = pytest.approx
    assert shares(normaliser="token") == [[near(1 / 28)]] * 3
    assert shares(normaliser="episode") == [[near(1 / 14)], [near(1 / 42)], [near(1 / 42)]]
    assert shares(normaliser="branch") == [[near(1 / 21)], [near(1 / 42)], [near(1 / 21)]]
    assert shares(normaliser="turn") == [[near(1 / 24), near(1 / 18)], [near(1 / 60), near(1 / 24)],
                                         [near(1 / 24), near(1 / 18)]]
    assert shares(normaliser="constant", loss_tokens=50) == [[near(1 / 50)]] * 3


def test_what_is_drawn_twice_counts_twice(make_row: Callable[..., TrainRow]) -> None:
    a, b = make_row(episode="a"), make_row(episode="b")
    rows = admitted([a, b, replace(b, draw=1)])
    for normaliser in ("episode", "branch"):
        assert [part.sum() for part in loss_weights(rows, LearnConfig(normaliser=normaliser))] == [
            pytest.approx(1 / 3)] * 3


def test_rows_of_single_turns_are_one_branch(make_row: Callable[..., TrainRow]) -> None:
    a, b = make_row(episode="a"), make_row(episode="b")
    rows = admitted([a, replace(b, turns=frozenset({0})), replace(b, turns=frozenset({1}), hint_ids=(7,))])
    whole, *parts = (part.sum() for part in loss_weights(rows, LearnConfig(normaliser="branch")))
    assert (whole, sum(parts)) == (pytest.approx(1 / 2), pytest.approx(1 / 2))


def test_the_weight_of_a_draw_is_on_all_tokens_of_its_row(make_row: Callable[..., TrainRow]) -> None:
    rows = ragged(make_row)
    even = loss_weights(admitted(rows), CONFIG)
    drawn = loss_weights(admitted([replace(row, weight=0.5 if i == 2 else 1.0) for i, row in enumerate(rows)]), CONFIG)
    for i, (mine, theirs) in enumerate(zip(drawn, even, strict=True)):
        np.testing.assert_array_equal(mine, theirs * np.float32(0.5 if i == 2 else 1.0))


def test_factors_known_beforehand_do_not_change_the_shares_of_others(make_row: Callable[..., TrainRow]) -> None:
    row = make_row(versions=(3, 1))
    tool = np.zeros(len(row.branch.token_ids), bool)
    tool[7:9] = True
    (row,) = admit([replace(row, tool=tool)], 3, resolve(), window=1000, vocab_size=300).rows
    plain = loss_weights([row], LearnConfig())[0]
    assert row.age.tolist() == [0, 0, 0, 0, 2, 2, 2]
    assert (loss_weights([row], LearnConfig(tool_weight=3.0))[0] / plain).tolist() == [1, 3, 3, 1, 1, 1, 1]
    assert (loss_weights([row], LearnConfig(skip_first=1))[0] / plain).tolist() == [0, 1, 1, 1, 0, 1, 1]
    decayed = loss_weights([row], LearnConfig(staleness_decay=0.5))[0] / plain
    assert decayed.tolist() == [1, 1, 1, 1, 0.25, 0.25, 0.25]
    with pytest.raises(LearnError, match="tool calls of episode"):
        loss_weights([replace(row, row=replace(row.row, tool=None))], LearnConfig(tool_weight=3.0))


def test_grades_become_advantages_and_rows_without_one_are_refused(make_row: Callable[..., TrainRow]) -> None:
    config = LearnConfig(form="sampled", mix="credit", ratio="ppo")
    rows = [replace(make_row(episode=name), score=score, group="g") for name, score in (("a", 1.0), ("b", 0.0))]
    found = admit([*rows, make_row(episode="c")], 0, config, window=1000, vocab_size=300)
    assert [row.advantage for row in found.rows] == pytest.approx([0.70701, -0.70701], abs=1e-4)
    assert found.refused == {"unscored": 1}
    (micro,) = microbatches(found.rows, config, COST)
    assert micro.tokens.advantages.sign().tolist() == [1] * 7 + [-1] * 7


def test_an_episode_in_several_branches_has_the_gradient_of_one(
        tiny_model: Any, make_row: Callable[..., TrainRow]) -> None:
    """A branch that holds the same tokens but trains only some of its turns, per turn: the pieces add up."""
    whole, other = make_row(seed=1, turns=((4, 3), (3, 2), (5, 1)), versions=(0, 0, 0)), make_row(seed=2, episode="f")
    pieces = []
    for call in whole.branch.calls:
        kinds = np.where(whole.branch.token_kind == 1, 4, whole.branch.token_kind).astype(np.uint8)
        kinds[call.start:call.end] = 1
        pieces.append(replace(whole, branch=whole.branch.model_copy(update={"token_kind": kinds})))
    config = resolve("sdft", {"lr": 1e-4})
    grads = []
    for rows in ([whole, other], [*pieces, other]):
        learner = Learner(tiny_model, config)
        for micro in microbatches(admitted(rows, config), LearnConfig(), COST):
            learner.objective(micro, Bounds(gap=1.0))[0].backward()
        grads.append(torch.cat([p.grad.ravel() for p in learner.parameters if p.grad is not None]))
        tiny_model.zero_grad()
    torch.testing.assert_close(grads[0], grads[1], atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("preset", ["robust", "sdpopp"])
def test_only_positions_that_predict_a_loss_token_get_a_gradient(
        preset: str, tiny_model: Any, make_row: Callable[..., TrainRow]) -> None:
    config = resolve(preset, {"lr": 1e-4, "teacher": "frozen", "gate": "off", "veto": None, "top_k": 8})
    learner = Learner(tiny_model, config)
    (micro,) = microbatches(admitted(ragged(make_row, logp=-6.0), config), config, COST)
    seen: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        output.last_hidden_state.retain_grad()
        seen.append(output.last_hidden_state)

    handle = tiny_model.get_decoder().register_forward_hook(keep)
    loss = learner.objective(micro, Bounds(gap=5.0))[0]
    handle.remove()
    loss.backward()
    assert seen[-1].grad is not None
    moved = seen[-1].grad.abs().sum(-1).ravel() > 0
    expected = torch.zeros_like(moved)
    expected[micro.student_pos] = True
    assert torch.equal(moved & ~expected, torch.zeros_like(moved))
    assert (moved & expected).sum() > 0.5 * expected.sum()
