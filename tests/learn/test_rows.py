"""Which rows may train: staleness, licences, hints, and every way a behaviour log-prob can be unusable."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from agentsdpo.errors import TokenizerMismatch, TrainForbidden
from agentsdpo.learn.config import LearnConfig
from agentsdpo.learn.presets import resolve
from agentsdpo.learn.rows import Admission, TrainRow, admit
from agentsdpo.types import Sampling

ROBUST, BLOG = resolve("robust"), resolve("sdpopp")


def take(rows: list[TrainRow], version: int = 0, config: LearnConfig = ROBUST, window: int = 10_000) -> Admission:
    return admit(rows, version, config, window=window, vocab_size=300)


def with_logp(row: TrainRow, value: float, at: slice = slice(None)) -> TrainRow:
    """The row as a careless importer would have built it: checks of the record skipped."""
    logp = row.branch.logprobs.copy()
    where = np.flatnonzero(row.branch.token_kind == 1)[at]
    logp[where] = value
    return replace(row, branch=row.branch.model_copy(update={"logprobs": logp}))


def test_staleness_k_is_in_and_k_plus_one_is_out(make_row: Callable[..., TrainRow]) -> None:
    row = make_row(versions=(5, 5))
    assert len(take([row], version=13).rows) == 1
    out = take([row, make_row(versions=(6, 6))], version=14)
    assert (len(out.rows), out.evicted, out.staleness) == (1, 1, [9, 8])


def test_a_branch_of_several_versions_is_as_stale_as_its_oldest(make_row: Callable[..., TrainRow]) -> None:
    assert take([make_row(versions=(9, 4))], version=9).rows[0].staleness == 5
    assert take([make_row(versions=(4, 9))], version=13).evicted == 1


def test_time_in_a_queue_counts(make_row: Callable[..., TrainRow]) -> None:
    row = make_row(versions=(3, 3))
    assert [take([row], version=v).evicted for v in (3, 11, 12)] == [0, 0, 1]
    assert take([row], version=1000, config=ROBUST.model_copy(update={"max_staleness": None})).evicted == 0


@pytest.mark.parametrize("config", [ROBUST, BLOG, resolve("naive"), resolve("sdft")])
@pytest.mark.parametrize(("reason", "spoil"), [
    ("nan", lambda make: with_logp(make(), np.nan, slice(1, 2))),
    ("sentinel", lambda make: with_logp(make(), -9999.0, slice(1, 2))),
    ("positive", lambda make: with_logp(make(), 0.5, slice(0, 1))),
    ("raw", lambda make: make(kind="raw")),
    ("no_logprob", lambda make: make(kind="none")),
    ("unknown", lambda make: make(kind="unknown")),
    ("tempered", lambda make: make(kind="tempered", sampling=Sampling(top_p=0.9))),
    ("no_hint", lambda make: make(hint=None)),
    ("no_hint", lambda make: make(hint=())),
    ("no_tokens", lambda make: make(turns=((0, 3),))),
    ("version_unknown", lambda make: make(versions=(0, -1))),
    ("version_ahead", lambda make: make(versions=(3, 3))),
    ("version_ahead", lambda make: make(versions=(0, 2))),
    ("truncated", lambda make: make(sampling=Sampling(top_p=0.8))),
    ("greedy", lambda make: make(sampling=Sampling(temperature=0.0))),
])
def test_each_fault_is_refused_under_its_own_name(
        reason: str, spoil: Callable[[Any], TrainRow], config: LearnConfig, make_row: Callable[..., TrainRow]) -> None:
    out = take([spoil(make_row), make_row()], version=1, config=config)
    assert dict(out.refused) == {reason: 1}
    assert len(out.rows) == 1


@pytest.mark.parametrize("fields", [{}, {"sampling": Sampling(top_k=1), "kept": True}])
def test_whole_turns_may_be_certain(fields: dict[str, Any], make_row: Callable[..., TrainRow]) -> None:
    """A confident small model reaches 0.0 in float32, and the only token of a kept set has no other log-prob."""
    assert not take([with_logp(make_row(**fields), 0.0)]).refused


def test_tempered_log_probs_are_exact_without_a_filter(make_row: Callable[..., TrainRow]) -> None:
    assert len(take([make_row(kind="tempered", sampling=Sampling(temperature=0.7))]).rows) == 1


@pytest.mark.parametrize("config", [ROBUST, BLOG, resolve("sdft")])
def test_kept_sets_are_those_of_the_loss_tokens_whatever_the_objective(
        config: LearnConfig, make_row: Callable[..., TrainRow]) -> None:
    whole = take([make_row(sampling=Sampling(top_p=0.8), kept=True)], config=config).rows[0]
    assert whole.kept is not None
    assert [sorted(ids) for ids in whole.kept] == [sorted({5, i}) for i in whole.ids[whole.position].tolist()]


def test_a_row_longer_than_the_window_is_refused_whole(make_row: Callable[..., TrainRow]) -> None:
    row = make_row()  # 6 + 4 + 3 + 3 tokens up to the last loss token, 3 of the hint
    assert len(take([row], window=19).rows) == 1
    assert dict(take([row], window=18).refused) == {"window": 1}


def test_masked_forced_and_tool_tokens_carry_no_loss(make_row: Callable[..., TrainRow]) -> None:
    row = make_row()
    kinds = row.branch.token_kind.copy()
    kinds[6:8] = 4
    masked = replace(row, branch=row.branch.model_copy(update={"token_kind": kinds}))
    assert take([masked]).rows[0].position.tolist() == [8, 9, 13, 14, 15]


def test_forbidden_data_stops_the_step(make_row: Callable[..., TrainRow]) -> None:
    with pytest.raises(TrainForbidden, match="must not be trained on"):
        take([make_row(), replace(make_row(), train_allowed=False)])


def test_one_batch_has_one_tokenizer_and_no_foreign_ids(make_row: Callable[..., TrainRow]) -> None:
    with pytest.raises(TokenizerMismatch, match="2 values of tokenizer_sha256"):
        take([make_row(), replace(make_row(), tokenizer_sha256="b")])
    with pytest.raises(TokenizerMismatch, match="holds id 300"):
        take([make_row(hint=(300,))])


def test_a_row_of_one_turn_is_scored_there_alone(make_row: Callable[..., TrainRow]) -> None:
    row = make_row(seed=0, turns=((3, 2), (4, 1), (5, 0)), versions=(0, 0, 0))
    (whole,), (second,) = (take([replace(row, turns=turns)]).rows for turns in (None, frozenset([1])))
    call = row.branch.calls[1]
    assert second.position.tolist() == list(range(call.start, call.end))
    assert len(second.ids) == call.end, "nothing behind the turn is read"
    assert set(second.turn.tolist()) == {1}
    assert len(whole.position) == 12
    assert take([replace(row, turns=frozenset([7]))]).refused == {"no_tokens": 1}
