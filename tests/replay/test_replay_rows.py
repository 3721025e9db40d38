import dataclasses
import hashlib
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_factories import make_branch, make_episode, same_branch, same_episode

from agentsdpo.errors import CorruptionError, RowError, TrainForbidden
from agentsdpo.replay import SCHEMA, Row, to_episode, to_rows
from agentsdpo.replay.canonical import content_sha256, tokens_sha256
from agentsdpo.replay.rules import check_episode, check_vocabulary
from agentsdpo.replay.schema import conform
from agentsdpo.types import Branch, Call, Episode, Grade, Sampling, StopReason, VersionSpan

RNG = np.random.default_rng(0)
TRUNCATED = Sampling(top_k=3)


def kept(branch: Branch, sets: list[list[int]]) -> Branch:
    """The branch with these kept sets (validation skipped, as an array changed in place would)."""
    flat = np.array([i for one in sets for i in one], np.int32)
    return branch.model_copy(update={"kept_ids": flat, "kept_counts": np.array([len(s) for s in sets], np.int32)})


def with_kept(branch: Branch) -> Branch:
    sampled = branch.token_ids[np.isin(branch.token_kind, (1, 4, 5))]
    return kept(branch, [sorted({int(t), 0, 999}) for t in sampled])


def fork(parent: Branch, at: int, branch_id: int = 1, **fields: Any) -> Branch:
    """A child that repeats ``parent`` up to ``at`` and adds two sampled tokens."""
    ids = np.concatenate([parent.token_ids[:at], np.array([5, 6], np.int32)])
    kinds = np.array([0] * at + [1, 1], np.uint8)
    logps = np.array([np.nan] * at + [-0.5, -0.5], np.float32)
    call = Call(call_id="c", turn=0, start=at, end=at + 2, finish_reason="stop", sampling=Sampling(),
                prompt_sha256=hashlib.sha256(ids[:at].tobytes()).hexdigest(),
                versions=(VersionSpan(version=3, start=0, end=2),))
    values: dict[str, Any] = dict(parent_branch_id=parent.branch_id, fork_at=at, fork_reason="compaction") | fields
    return Branch(branch_id=branch_id, token_ids=ids, token_kind=kinds, logprobs=logps, calls=(call,), **values)


def test_round_trip_with_everything_set() -> None:
    parent = with_kept(make_branch(RNG, version=[3, 7], sampling=TRUNCATED))
    episode = make_episode(branches=(parent, fork(parent, 10)), stop_reason=StopReason.MAX_TURNS, attempt=2)
    assert same_episode(episode, to_episode(to_rows([episode])))


def test_times_of_calls_come_back_and_are_no_content() -> None:
    plain = make_episode(1)
    (branch,) = plain.branches
    begun = datetime(2026, 11, 22, 12, 0, 0, 250_000, tzinfo=UTC)
    calls = tuple(call.model_copy(update={"t_request": begun + i * timedelta(seconds=5),
                                          "t_done": begun + i * timedelta(seconds=5) + timedelta(seconds=2)})
                  for i, call in enumerate(branch.calls))
    timed = plain.model_copy(update={"branches": (branch.model_copy(update={"calls": calls}),)})
    table = to_rows([timed])
    assert (table["t_start"][0].as_py(), table["t_end"][0].as_py()) == (begun, calls[-1].t_done)
    assert [(call.t_request, call.t_done) for call in to_episode(table).branches[0].calls] == [
        (call.t_request, call.t_done) for call in calls]
    assert table["content_sha256"].equals(to_rows([plain])["content_sha256"])


def test_round_trip_with_nothing_set() -> None:
    empty = Branch(token_ids=np.zeros(0, np.int32), token_kind=np.zeros(0, np.uint8), logprobs=np.zeros(0, np.float32))
    episode = Episode(episode_id="e", task_id="t", env_id="desk", branches=(empty,), train_allowed=True,
                      stop_reason=StopReason.ENGINE_ERROR)
    table = to_rows([episode])
    assert same_episode(episode, to_episode(table))
    row = table.to_pylist()[0]
    assert (row["status"], row["trainable"], row["untrainable_reason"]) == ("aborted", False, "engine_error")
    assert (row["policy_version_min"], row["reward_status"], row["kept_ids"]) == (-1, "none", None)


def test_scalar_columns_follow_from_the_branch() -> None:
    branch = make_branch(RNG, turns=3, version=[5, 4, 9], size=60)
    row = to_rows([make_episode(branches=(branch,), stop_reason=StopReason.MAX_TOOL_CALLS)], "w").to_pylist()[0]
    assert (row["policy_version_min"], row["policy_version_max"], row["policy_version_start"]) == (4, 9, 5)
    assert (row["n_tokens"], row["n_sampled"], row["n_trainable"], row["n_calls"], row["n_turns"]) == (60, 30, 30, 3, 3)
    assert (row["status"], row["stop_reason"], row["reward"], row["writer_id"]) == (
        "truncated", "max_tool_calls", 0.5, "w")
    assert (row["logprob_kind"], row["kept_set"], row["calls"][0]["lp_exact"]) == ("processed", "not_needed", True)


def test_nan_is_canonical_and_negative_zero_survives() -> None:
    branch = make_branch(RNG, size=8, turns=1)
    odd = branch.logprobs.copy()
    odd.view(np.uint32)[0] = 0xFFC12345
    odd[-1] = -0.0
    table = to_rows([make_episode(branches=(branch.model_copy(update={"logprobs": odd}),))])
    bits = table["logprobs"].chunk(0).values.to_numpy().view(np.uint32)
    assert (bits[:4] == 0x7FC00000).all()
    assert bits[-1] == 0x80000000


def test_hashes_are_those_of_the_format() -> None:
    """Golden values: a change here is a change of the format."""
    ids, kinds = np.array([7, 8, 2**31 - 1], np.int32), np.array([0, 1, 1], np.uint8)
    logps = np.array([np.nan, -0.5, 0.0], np.float32)
    tokens = tokens_sha256(ids, kinds, logps, None, None)
    raw = (b"\1\3\0\0\0" + ids.tobytes() + b"\1\3\0\0\0" + kinds.tobytes() + b"\1\3\0\0\0"
           + b"\0\0\xc0\x7f" + logps[1:].tobytes() + b"\0\0")
    assert tokens == hashlib.sha256(raw).digest()
    calls = b"\1\0\0\0" + b"\x07\0\0\0call_id\1\2\0\0\0c0" + b"\5\0\0\0start\1\1\0\0\0"
    assert content_sha256(tokens, {"call_id": ["c0"], "start": [1]}, 1) == hashlib.sha256(tokens + calls).digest()
    assert content_sha256(tokens, {"call_id": ["c0"], "start": [1], "turn": [None]}, 1) == content_sha256(
        tokens, {"start": [1], "call_id": ["c0"]}, 1)


@st.composite
def branches(draw: st.DrawFn) -> Branch:
    """Any branch the types allow: calls of 0-5 tokens, mixed versions, kinds 1, 4 and 5, kept sets or none."""
    ids: list[int] = []
    kinds: list[int] = []
    logps: list[float] = []
    calls, counts, support = [], [], []
    cut = draw(st.booleans())
    token = st.integers(0, 2**31 - 1)
    for turn in range(draw(st.integers(0, 4))):
        for _ in range(draw(st.integers(0, 5))):
            ids.append(draw(token))
            kinds.append(draw(st.sampled_from([0, 2, 3])))
            logps.append(np.nan)
        start, n = len(ids), draw(st.integers(0, 5))
        for _ in range(n):
            ids.append(draw(token))
            kinds.append(draw(st.sampled_from([1, 4, 5])))
            logps.append(np.nan if kinds[-1] == 5 else draw(st.floats(-999, 0, width=32)))
            extra = draw(st.sets(token, min_size=1, max_size=3)) - {ids[-1]} if draw(st.booleans()) else set()
            support += sorted(extra | {ids[-1]}) if extra else []
            counts.append(len(extra) + 1 if extra else 0)
        edge, seed = draw(st.integers(0, n)), draw(st.integers(0, 2**63 - 1))
        spans = [(a, b) for a, b in ((0, edge), (edge, n)) if b > a] or [(0, 0)] * (n > 0)
        calls.append(Call(
            call_id=draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=5)), turn=turn, start=start,
            end=start + n, prompt_sha256="", finish_reason="stop",
            sampling=Sampling(temperature=draw(st.floats(0, 2)), top_k=draw(st.integers(0, 50)), seed=seed),
            versions=tuple(VersionSpan(version=draw(st.integers(-1, 2**40)), start=a, end=b) for a, b in spans),
            logprob_kind=draw(st.sampled_from(["processed", "tempered", "raw", "unknown", "none"])),
            untrainable_reason=draw(st.sampled_from([None, "kind_raw"]))))
    return Branch(token_ids=np.array(ids, np.int32), token_kind=np.array(kinds, np.uint8),
                  logprobs=np.array(logps, np.float32), calls=tuple(calls),
                  kept_ids=np.array(support, np.int32) if cut else None,
                  kept_counts=np.array(counts, np.int32) if cut else None)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(branches(), min_size=1, max_size=3))
def test_any_branch_round_trips(many: list[Branch]) -> None:
    episodes = [make_episode(i, branches=(branch,), vocab_size=0) for i, branch in enumerate(many)]
    for episode in episodes:
        check_episode(episode)
    table = to_rows(episodes)
    table.validate(full=True)
    for i, episode in enumerate(episodes):
        assert same_episode(episode, to_episode(table.slice(i, 1)))


BASE = make_branch(RNG, turns=1, size=6, sampling=TRUNCATED)
PARENT = make_branch(RNG, size=40)


@pytest.mark.parametrize(("episode", "words"), [
    (make_episode(branches=(BASE,), train_allowed=False), "train_allowed=False"),
    (make_episode(branches=(BASE, BASE)), "branch ids [0, 0]"),
    (make_episode(branches=(BASE,), grade=Grade(results=(), mean=float("nan"), passed=None)), "reward nan"),
    (make_episode(branches=(BASE,), vocab_size=1), "the vocabulary has 1 ids"),
    (make_episode(branches=(BASE.model_copy(update={"kept_ids": BASE.token_ids}),)), "only one of"),
    (make_episode(branches=(kept(BASE, [[1]] * 2),)), "2 kept counts"),
    (make_episode(branches=(kept(BASE, [[1, 0, int(t)] for t in BASE.token_ids[3:]]),)), "do not ascend"),
    (make_episode(branches=(kept(BASE, [[int(t) + 1] for t in BASE.token_ids[3:]]),)), "outside its own kept set"),
    (make_episode(branches=(kept(BASE, [[int(t)] for t in BASE.token_ids[3:]]),)), "log-prob other than 0"),
    (make_episode(branches=(PARENT, fork(PARENT, 5, parent_branch_id=7))), "not an earlier branch"),
    (make_episode(branches=(PARENT, fork(make_branch(RNG, size=40), 5))), "differs from its parent"),
    (make_episode(branches=(PARENT, fork(PARENT, 5, fork_at=6))), "differs from its parent"),
    (make_episode(branches=(PARENT, fork(PARENT, 7, fork_at=None).model_copy(
        update={"fork_at": 40, "token_ids": PARENT.token_ids, "token_kind": PARENT.token_kind,
                "logprobs": PARENT.logprobs, "calls": PARENT.calls}))), "sampled tokens before"),
    (make_episode(branches=(BASE.model_copy(update={"calls": (BASE.calls[0].model_copy(
        update={"prompt_sha256": "0" * 64}),)}),)), "another prompt"),
])
def test_row_rules_refuse(episode: Episode, words: str) -> None:
    with pytest.raises((RowError, TrainForbidden)) as caught:
        check_episode(episode)
    assert words in str(caught.value)
    assert episode.episode_id in str(caught.value)
    assert ";" in str(caught.value), "says no fix"


def test_arrays_changed_in_place_are_caught() -> None:
    episode = make_episode()
    episode.branches[0].logprobs[0] = 0.0
    with pytest.raises(RowError, match=f"episode {episode.episode_id}: token 0 of kind 0 carries a log-prob"):
        check_episode(episode)


def test_row_rules_accept_forks_and_kept_sets() -> None:
    check_episode(make_episode(branches=(PARENT, fork(PARENT, 10), fork(PARENT, 0, 2, fork_reason="subagent"))))
    check_episode(make_episode(branches=(with_kept(BASE),)))
    check_vocabulary(BASE, 0)


@pytest.mark.parametrize("fields", [{"metadata": {"x": float("inf")}}, {"metadata": {"x": object()}},
                                    {"task_id": "\ud800"}, {"group_size": 2**31}])
def test_what_cannot_be_stored_is_a_row_error(fields: dict[str, Any]) -> None:
    with pytest.raises(RowError, match="cannot be stored|does not fit"):
        to_rows([make_episode(**fields)])


def test_untrainable_rows_say_why() -> None:
    def reason(branch: Branch, **fields: Any) -> str:
        return to_rows([make_episode(branches=(branch,), **fields)])["untrainable_reason"][0].as_py()

    raw = make_branch(RNG, kind=5)
    greedy = tuple(call.model_copy(update={"untrainable_reason": "greedy"}) for call in raw.calls)
    marked = raw.model_copy(update={"calls": greedy})
    assert reason(raw) == "no_logprobs"
    assert reason(marked) == "greedy"
    assert reason(make_branch(RNG, kind=4)) == "masked_by_policy"
    assert reason(make_branch(RNG)) is None


def test_unknown_columns_are_ignored_and_missing_ones_null() -> None:
    episode = make_episode()
    table = to_rows([episode])
    later = table.append_column("invented_later", pa.array([1])).drop_columns(["engine_version", "tools_json"])
    calls = table["calls"].chunk(0)
    names = [f.name for f in calls.values.type if f.name != "spec_decode"]
    children = [calls.values.field(n) for n in names] + [pa.nulls(len(calls.values), pa.int8())]
    struct = pa.StructArray.from_arrays(children, names=[*names, "new_field"])
    later = later.set_column(later.schema.get_field_index("calls"), "calls",
                             pa.ListArray.from_arrays(calls.offsets, struct))
    assert conform(later).schema.equals(SCHEMA)
    assert same_episode(to_episode(later), episode)
    for name in set(SCHEMA.names) - {"logprobs"}:
        assert conform(later)[name].equals(table[name]), name
    with pytest.raises(CorruptionError, match="column task_id"):
        conform(table.set_column(table.schema.get_field_index("task_id"), "task_id", pa.array([[1]])))


def test_row_is_what_the_learner_needs() -> None:
    assert {f.name for f in dataclasses.fields(Row)} >= {"key", "branch", "hint", "grade", "reward", "policy_versions",
                                                         "task_id", "tokenizer_sha256", "train_allowed"}
    assert same_branch(BASE, BASE)
    assert not same_branch(BASE, PARENT)


def test_the_bare_name_is_refused_and_the_package_is_light() -> None:
    root = Path(__file__).parents[2]
    bare = subprocess.run([sys.executable, "-c", "import replay"], cwd=root, capture_output=True, text=True,
                          check=False)
    assert "write `import agentsdpo.replay`" in bare.stderr
    code = "import sys, agentsdpo.replay, agentsdpo.replay.config; sys.exit('pyarrow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, env={**os.environ, "PYTHONPATH": str(root)})
