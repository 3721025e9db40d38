"""Controls on hints: an empty hint changes nothing, a wrong one does, and training does not notice either."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentsdpo.learn.control import control_metrics, derange, wrong_hint_gap
from agentsdpo.learn.learner import Learner
from agentsdpo.learn.presets import resolve
from agentsdpo.learn.rows import TrainRow

FAST = {"teacher": "frozen", "lr": 3e-4}


def batch(make_row: Callable[..., TrainRow], hints: list[tuple[int, ...]]) -> list[TrainRow]:
    return [make_row(seed=i, episode=f"e{i}", hint=hint, prompt=5 + i) for i, hint in enumerate(hints)]


def test_controls_run_on_the_first_step_and_then_every_so_often(tiny_model: Any,
                                                               make_row: Callable[..., TrainRow]) -> None:
    config = resolve("robust", {**FAST, "gate": "off", "veto": None, "control_every": 3})
    learner, rows = Learner(tiny_model, config), batch(make_row, [(30, 31, 32), (40, 41), (50,), (60, 61)])
    seen = [learner.step(rows, 0).metrics for _ in range(5)]
    assert ["hint/empty_gap" in m for m in seen] == ["hint/wrong_gap" in m for m in seen] == [True, False, False, True,
                                                                                             False]
    assert seen[0]["hint/empty_gap"] < 1e-3
    assert seen[0]["hint/wrong_gap"] > 1e-3


def test_controls_leave_the_training_as_it_is(tiny_model: Any, make_row: Callable[..., TrainRow]) -> None:
    other, rows = copy.deepcopy(tiny_model), batch(make_row, [(30, 31, 32), (40, 41)])
    losses = []
    for model, every in ((tiny_model, 1), (other, 0)):
        learner = Learner(model, resolve("sdpopp", {**FAST, "control_every": every}))
        steps = [learner.step(rows, 0).metrics for _ in range(2)]
        losses.append([m["learn/loss"] for m in steps])
        assert ("hint/empty_gap" in steps[1]) == bool(every)
    assert losses[0] == losses[1]
    assert all(torch.equal(p, q) for p, q in zip(tiny_model.parameters(), other.parameters(), strict=True))


def test_no_wrong_gap_without_another_hint_that_fits(tiny_model: Any, make_row: Callable[..., TrainRow]) -> None:
    learner = Learner(tiny_model, resolve("robust", FAST))
    same = learner.admit(batch(make_row, [(30, 31)] * 3), 0).rows
    given = dict(model=tiny_model, teacher=learner.teacher, config=learner.config, seed=0)
    assert set(control_metrics(rows=same, window=4096, **given)) == {"hint/empty_gap"}
    far = learner.admit(batch(make_row, [(30,), (40, 41, 42, 43)]), 0).rows
    assert "hint/wrong_gap" in control_metrics(rows=far, window=4096, **given)
    assert "hint/wrong_gap" not in control_metrics(rows=far, window=len(far[0].ids), **given)


def test_the_wrong_gap_is_per_token(tiny_model: Any, make_row: Callable[..., TrainRow],
                                    plain_logp: Callable[..., Any]) -> None:
    learner = Learner(tiny_model, resolve("robust", FAST))
    (row,) = learner.admit(batch(make_row, [(30, 31)]), 0).rows
    wrong = replace(row, row=replace(row.row, hint_ids=(77, 78, 79)))
    logps = []
    for hint in ([30, 31], [77, 78, 79]):
        whole = plain_logp(tiny_model, torch.tensor([*hint, *row.ids]).numpy())
        logps.append(torch.from_numpy(whole[row.position + len(hint)]))
    expected = float((logps[0] - logps[1]).abs().mean())
    assert wrong_hint_gap(learner.teacher, [(row, wrong)], "cpu") == pytest.approx(expected, abs=1e-4)
    assert wrong_hint_gap(learner.teacher, [(row, row)], "cpu") == 0.0


@given(texts=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=24), seed=st.integers(0, 2**32 - 1))
def test_no_row_is_given_its_own_hint(texts: list[str], seed: int) -> None:
    hints = [(ord(text),) for text in texts]
    order = derange(hints, seed)
    if 2 * max(texts.count(text) for text in texts) > len(texts):
        assert order is None
        return
    assert order is not None
    assert sorted(order) == list(range(len(texts)))
    assert all(texts[row] != texts[other] for row, other in enumerate(order))
    assert order == derange(hints, seed)


def test_pairing_depends_on_the_seed() -> None:
    hints = [(i,) for i in range(12)]
    assert len({tuple(derange(hints, seed) or ()) for seed in range(8)}) > 1
