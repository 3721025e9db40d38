"""Late hints, rewards, labels and log-probs: the highest revision counts, and only for the content it was meant for."""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_factories import make_branch, make_episode

from agentsdpo.errors import ConfigError, CorruptionError, RowError, StoreError
from agentsdpo.replay import Key, ReplayStore, fold, verify
from agentsdpo.replay.example import branch, episode, example
from agentsdpo.replay.overlay import Late, Overlays, Slot
from agentsdpo.types import CriterionResult, Grade, Hint

E0 = Key("e-0", 0, 0)
GRADE = Grade.of([CriterionResult(id="unit", score=0.75)], feedback="nearly")


def rewards(store: ReplayStore) -> list[float | None]:
    return store.snapshot().scalars()["reward"].to_pylist()


def test_a_late_reward_shows_everywhere() -> None:
    store = example()
    old = store.snapshot()
    store.add_rewards({"e-0": GRADE}, author="judge", status="provisional")
    assert rewards(store) == [0.75, 0.5, 1.0]
    assert old.scalars()["reward"].to_pylist() == [0.0, 0.5, 1.0], "a snapshot does not change"
    table = store.to_arrow("reward == 0.75")
    assert table.select(["episode_id", "reward", "reward_status"]).to_pylist() == [
        {"episode_id": "e-0", "reward": 0.75, "reward_status": "provisional"}]
    assert Grade.model_validate_json(table["rewards_json"][0].as_py()) == GRADE
    (row,) = store.branches("reward_status == 'provisional'")
    assert (row.reward, row.grade, row.key) == (0.75, GRADE, E0)
    assert store.episode("e-0").grade == GRADE
    again = ReplayStore.open(store.root)
    assert rewards(again) == [0.75, 0.5, 1.0]
    assert again.snapshot(at=old.vector).scalars()["reward"].to_pylist() == [0.0, 0.5, 1.0]


def test_branches_can_be_asked_for_by_when_they_were_stored() -> None:
    store = example()
    first = store.snapshot().scalars()["t_stored"].to_pylist()
    assert all(abs(time.time() - at.timestamp()) < 60 for at in first)
    store.append([episode(7)])
    assert store.to_arrow(f"t_stored > '{max(first).isoformat()}'")["episode_id"].to_pylist() == ["e-7"]
    assert sorted({row.key.episode_id for row in store.branches(f"t_stored <= '{max(first).isoformat()}'")}) == [
        "e-0", "e-1", "e-2"]


def test_a_bare_number_is_a_grade_without_criteria() -> None:
    store = example()
    store.add_rewards({E0: 2, "e-1": Grade(results=(), mean=None, passed=None)})
    assert store.episode("e-0").reward == 2.0
    assert store.snapshot().scalars()["reward_status"].to_pylist() == ["final", "none", "final"]
    assert [row.reward for row in store.branches()] == [2.0, None, 1.0]


def test_a_late_reward_leaves_what_the_grader_said() -> None:
    store = example()
    (stored,) = store.branches("episode_id == 'e-0'")
    assert stored.grade is not None
    results = stored.grade.results
    assert results, "the example is graded"
    for late, want in ((0.25, Grade(results=results, mean=0.25, passed=None)),
                       (Grade(results=(), mean=1.0, passed=None, feedback="thanks"),
                        Grade(results=results, mean=1.0, passed=None, feedback="thanks")),
                       (GRADE, GRADE)):
        store.add_rewards({"e-0": late})
        (row,) = store.branches("episode_id == 'e-0'")
        assert (row.reward, row.grade, store.episode("e-0").grade) == (want.mean, want, want)
        assert Grade.model_validate_json(store.to_arrow("episode_id == 'e-0'")["rewards_json"][0].as_py()) == want


def test_an_episode_id_means_all_branches_of_its_latest_attempt(store: ReplayStore) -> None:
    rng = np.random.default_rng(0)
    pair = (make_branch(rng, branch_id=0), make_branch(rng, branch_id=1))
    store.append([make_episode(0, episode_id="e", branches=pair),
                  make_episode(1, episode_id="e", attempt=1, branches=pair)])
    store.add_labels({"e": "second"})
    assert [row.key for row in store.branches("label == 'second'")] == [Key("e", 0, 1), Key("e", 1, 1)]
    assert [(e.episode_id, e.attempt) for e in store.episodes("label is None")] == [("e", 0)]


def test_the_highest_revision_wins_whatever_is_read_first() -> None:
    store = example()
    store.add_labels({"e-0": "one"}, author="a")
    other = ReplayStore.open(store.root)
    other.add_labels({"e-0": "two", "e-1": "x"})
    store.add_labels({"e-0": "three"})
    assert [row.label for row in store.branches()] == ["three", "x", None]
    assert [row.label for row in other.branches()] == ["three", "x", None]
    found = [pq.read_table(path).to_pylist() for path in sorted(store.root.glob("overlay/label/*.parquet"))]
    assert [[(row["revision"], row["value"]) for row in rows if row["episode_id"] == "e-0"] for rows in found] == [
        [(1, '"one"')], [(2, '"two"')], [(3, '"three"')]]


@settings(max_examples=50)
@given(st.permutations([Late(revision, f"overlay/label/{name}.parquet", 0, "", f"{revision}{name}")
                        for revision, name in ((1, "a"), (2, "b"), (2, "c"), (1, "d"))]))
def test_ties_go_to_the_later_file(order: list[Late]) -> None:
    files = {late.path: pa.table({
        "episode_id": ["e-0"], "branch_id": [0], "attempt": [0], "call_id": pa.array([None], pa.string()),
        "target_sha256": [b""], "revision": [late.revision], "value": [late.value]}) for late in order}
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr("agentsdpo.replay.overlay.read", lambda storage, op: files[op["path"]])
        overlays = Overlays(example().storage)
        for late in order:
            overlays = overlays.read({"label": [{"kind": "label", "path": late.path}]})
    assert overlays.latest[Slot("label", E0)].value == "2c"


@pytest.mark.parametrize("kind", ["hint", "reward", "label", "relogprob"])
def test_a_value_for_other_content_is_an_error(kind: str) -> None:
    store = example()
    store.add_hints({"e-0": Hint(text="late", source="user", author="me")})
    store.add_rewards({"e-0": 0.5})
    store.add_labels({"e-0": "x"})
    store.add_relogprobs({E0: np.zeros(12, np.float32)}, policy_version=3, trainer_id="t")
    view = store.snapshot()
    slot = Slot(kind, E0, "3/t" if kind == "relogprob" else "")
    view.late = replace(view.late, latest={**view.late.latest,
                                             slot: view.late.latest[slot]._replace(target_sha256="0" * 64)})
    with pytest.raises(CorruptionError, match=f"a {kind} in overlay/{kind}/.* targets content 000000000000"):
        view.relogprobs(E0) if kind == "relogprob" else view.read([E0])
    if kind in ("reward", "label"):
        with pytest.raises(CorruptionError, match="targets content"):
            view.scalars()


@pytest.mark.parametrize("folded", [False, True])
def test_what_was_said_of_a_salvaged_row_falls_away_with_it(folded: bool) -> None:
    """A crash left half an episode, somebody graded that, and then the whole episode came after all."""
    store, whole = example(), episode(2).model_copy(update={"episode_id": "e-9"})
    other = ReplayStore.open(store.root)
    store.append([whole.model_copy(update={"branches": (branch(0),)})], salvaged=True)
    store.add_rewards({"e-9": 0.25, "e-0": 0.75})
    store.add_labels({"e-9": "half"})
    store.add_hints({"e-9": Hint(text="late", source="user", author="me")})
    view, key = store.snapshot(), Key("e-9", 0, 0)
    assert [(row.reward, row.label) for row in other.snapshot().read([key])] == [(0.25, "half")]
    store.append([whole])
    if folded:
        fold(store)
    for reader in (store, other, ReplayStore.open(store.root)):
        row = reader.snapshot().read([key])[0]
        assert (row.reward, row.label, row.hint) == (1.0, None, whole.hint)
        assert reader.snapshot().keys("reward == 0.75 or label == 'half'") == [Key("e-0", 0, 0)]
        assert reader.episode("e-9").reward == 1.0
    assert [row.label for row in ReplayStore.open(store.root).snapshot(at=view.vector).read([key])] == ["half"]
    assert not [problem for problem in verify(store, "deep").problems if "never recorded" not in problem.what]
    store.add_rewards({"e-9": 0.5})
    assert [row.reward for row in ReplayStore.open(store.root).snapshot().read([key])] == [0.5]


def test_log_probs_of_trainers_are_kept_apart() -> None:
    store = example()
    first, second = (np.linspace(-1, -2, 12, dtype=np.float32) * k for k in (1, 2))
    first[3] = np.nan
    store.add_relogprobs({E0: first}, policy_version=3, trainer_id="a/b")
    store.add_relogprobs({E0: second}, policy_version=4, trainer_id="a/b")
    found = ReplayStore.open(store.root).snapshot().relogprobs(E0)
    assert set(found) == {(3, "a/b"), (4, "a/b")}
    np.testing.assert_array_equal(found[3, "a/b"], first)
    np.testing.assert_array_equal(found[4, "a/b"], second)
    store.add_relogprobs({E0: second}, policy_version=3, trainer_id="a/b")
    np.testing.assert_array_equal(store.snapshot().relogprobs(E0)[3, "a/b"], second)
    assert store.snapshot().relogprobs(Key("e-1", 0, 0)) == {}
    assert next(store.branches()).branch.logprobs[0] != second[0], "what was sampled stays what it was"


def test_what_cannot_be_said_later() -> None:
    store = example()
    with pytest.raises(RowError, match="reward of e-0 is nan"):
        store.add_rewards({"e-0": float("nan")})
    with pytest.raises(StoreError, match="no episode 'nobody'"):
        store.add_rewards({"nobody": 1.0})
    with pytest.raises(StoreError, match="not part of this snapshot"):
        store.add_labels({Key("e-0", 7, 0): "x"})
    with pytest.raises(RowError, match="0 characters"):
        store.add_labels({"e-0": ""})
    for bad in (np.zeros(11), np.full(12, 0.5), np.full(12, -np.inf)):
        with pytest.raises(RowError, match="the branch has 12 tokens"):
            store.add_relogprobs({E0: bad}, policy_version=1, trainer_id="t")
    store.add_labels({})
    assert not list(store.root.glob("overlay/*/*"))


def test_a_swapped_overlay_is_found() -> None:
    store = example()
    store.add_labels({"e-0": "x"})
    (path,) = store.root.glob("overlay/label/*.parquet")
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(CorruptionError, match="not the file that was committed"):
        ReplayStore.open(store.root).snapshot()
    path.unlink()
    with pytest.raises(CorruptionError, match="missing"):
        ReplayStore.open(store.root).snapshot()


def test_asking_the_store() -> None:
    store = example()
    assert store.snapshot().keys("reward > 0") == [Key("e-1", 0, 0), Key("e-2", 0, 0)]
    assert store.to_arrow("reward > 5").num_rows == 0
    assert store.to_arrow("reward > 5").schema.names[-2:] == ["label", "t_stored"]
    assert [e.episode_id for e in store.episodes()] == ["e-0", "e-1", "e-2"]
    with pytest.raises(ConfigError, match="did you mean reward"):
        store.branches("rewardd > 0")
    empty = ReplayStore.open(store.root / "empty")
    assert (list(empty.branches("reward > 0")), empty.to_arrow().num_rows) == ([], 0)


@pytest.mark.parametrize(("fields", "said"), [
    ({}, "says nothing"), ({"text": " \n"}, "says nothing"),
    ({"turns": ((0, "a"), (1, " "))}, "says nothing of turn 1"),
    ({"turns": ((-1, "a"),)}, "speaks of turn -1"), ({"turns": ((2, "a"), (2, "b"))}, "speaks of turn 2 twice"),
    ({"text": "a", "placement": "turn_local"}, "does not say which turn"),
    ({"text": "a", "scope": "turn"}, "does not say which turn")])
def test_a_hint_that_no_teacher_could_read_is_refused(fields: dict[str, Any], said: str) -> None:
    store = example()
    with pytest.raises(RowError, match=f"the hint of e-0 {said}"):
        store.add_hints({"e-1": Hint(text="fine", source="user", author="me"),
                         "e-0": Hint(source="user", author="me", **fields)})
    assert store.episode("e-1").hint == episode(1).hint, "nothing is added"


def test_lone_surrogates_in_a_hint_become_question_marks() -> None:
    store = example()
    store.add_hints({"e-0": Hint(text="a\ud800", turns=((0, "b\udfff"),), source="user", author="me\ud800")})
    hint = store.episode("e-0").hint
    assert hint is not None
    assert (hint.text, hint.turns, hint.author) == ("a?", ((0, "b?"),), "me?")
