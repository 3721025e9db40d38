import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from replay_factories import TOKENIZER, make_branch, make_episode

from agentsdpo.errors import ConfigError, StoreError
from agentsdpo.replay import ReplayConfig, ReplayStore, Sampler, verify
from agentsdpo.types import Episode, Sampling

RNG = np.random.default_rng(0)


def fill(store: ReplayStore, n: int, start: int = 0, **fields: Any) -> None:
    store.append([make_episode(i, episode_id=f"e{i:03d}", size=20, **fields) for i in range(start, start + n)])


def sampler(store: ReplayStore, config: ReplayConfig | None = None, *, seed: int = 0,
            max_staleness: int | None = None) -> Sampler:
    return Sampler(store, config or ReplayConfig(), seed=seed, tokenizer_sha256=TOKENIZER, max_staleness=max_staleness)


def ids(sampler: Sampler, n: int, version: int = 0) -> list[str]:
    return [key.episode_id for key in sampler.draw(n, version)]


def test_uniform_uses_every_branch_once_per_pass(store: ReplayStore) -> None:
    fill(store, 10)
    one, two, other = sampler(store), sampler(store), sampler(store, seed=1)
    drawn = [ids(one, 4) for _ in range(5)]
    assert drawn == [ids(two, 4) for _ in range(5)]
    assert drawn != [ids(other, 4) for _ in range(5)]
    assert set(Counter(sum(drawn, [])).values()) == {2}
    assert all(len(set(batch)) == 4 for batch in drawn)
    assert sorted(ids(one, 99)) == [f"e{i:03d}" for i in range(10)]


def test_the_order_of_passes_differs(store: ReplayStore) -> None:
    fill(store, 12)
    one = sampler(store)
    assert ids(one, 12) != ids(one, 12)


def test_new_branches_join_the_running_pass_at_a_refresh(store: ReplayStore) -> None:
    fill(store, 6)
    one = sampler(store)
    first = ids(one, 3)
    fill(store, 2, start=6)
    assert one.refresh() == 2
    assert one.refresh() == 0
    assert set(first) | set(ids(one, 5)) == {f"e{i:03d}" for i in range(8)}


def test_fifo_and_newest_go_by_arrival(store: ReplayStore) -> None:
    fill(store, 3, version=5)
    old, new = (sampler(store, ReplayConfig(strategy=s)) for s in ("fifo", "newest"))
    fill(store, 3, start=3, version=1)
    old.refresh()
    new.refresh()
    assert ids(old, 4) == ["e000", "e001", "e002", "e003"]
    assert ids(new, 2) == ["e005", "e004"]
    fill(store, 1, start=6)
    new.refresh()
    assert ids(new, 2) == ["e006", "e003"]
    fresh = sampler(store, ReplayConfig(strategy="fifo"))
    assert ids(fresh, 3) == ["e006", "e003", "e004"], "one refresh numbers its rows by version first"


def test_max_uses_sets_branches_aside(store: ReplayStore) -> None:
    fill(store, 3)
    one = sampler(store, ReplayConfig(max_uses=2))
    assert [len(ids(one, 2)) for _ in range(4)] == [2, 2, 2, 0]
    assert one.explain(0)["used_up"] == 3


def test_staleness_counts_from_the_oldest_version_of_the_branch(store: ReplayStore) -> None:
    store.append([make_episode(0, episode_id="mixed", branches=(make_branch(RNG, version=[6, 9]),)),
                  make_episode(1, episode_id="fresh", version=9)])
    one = sampler(store, max_staleness=4)
    assert sorted(ids(one, 2, 10)) == ["fresh", "mixed"]
    assert one.metrics()["replay/staleness/max"] == 4
    assert one.metrics()["replay/version_span"] == 3
    assert ids(one, 2, 11) == ["fresh"]
    assert (one.explain(11)["stale"], one.explain(11)["eligible"]) == (1, 1)
    assert one.metrics()["replay/evicted_frac"] == 0.0, "it was drawn while it was fresh"
    assert ids(one, 2, 14) == []
    late = sampler(store, max_staleness=4)
    assert ids(late, 2, 11) == ["fresh"]
    assert late.metrics()["replay/evicted_frac"] == 0.5
    assert sampler(store).draw(2, 10**6), "no bound"
    with pytest.raises(ConfigError, match="max_staleness is -1"):
        sampler(store, max_staleness=-1)


def unusable() -> dict[str, Episode]:
    """One episode per filter that refuses it."""
    cut = make_branch(RNG, sampling=Sampling(top_k=5))
    raw = make_branch(RNG)
    raw = raw.model_copy(update={"calls": tuple(c.model_copy(update={"logprob_kind": "raw"}) for c in raw.calls)})
    return {"untrainable": make_episode(branches=(make_branch(RNG, kind=4),)),
            "tokenizer": make_episode(tokenizer_sha256="f" * 64),
            "template": make_episode(chat_template_sha256="f" * 64),
            "no_logprob": make_episode(branches=(raw,)), "kept": make_episode(branches=(cut,)),
            "no_version": make_episode(branches=(make_branch(RNG, version=[3, -1]),))}


def test_filters_refuse_and_count(store: ReplayStore) -> None:
    store.append(list(unusable().values()))
    fill(store, 2)
    one = Sampler(store, ReplayConfig(), seed=0, tokenizer_sha256=TOKENIZER, max_staleness=None,
                  chat_template_sha256="b" * 64)
    assert sorted(ids(one, 9)) == ["e000", "e001"]
    assert [row.chat_template_sha256 for row in one.sample(2, 0)] == ["b" * 64] * 2
    counts = one.explain(0)
    assert counts == {"total": 8, "untrainable": 1, "not_allowed": 0, "tokenizer": 1, "template": 1, "no_logprob": 2,
                      "no_version": 1, "where": 0, "open_group": 0, "stale": 0, "used_up": 0, "resting": 0,
                      "eligible": 2, "withheld": 0}
    assert one.metrics()["replay/refused/count"] == 6
    assert one.metrics()["replay/refused/template"] == 1
    with pytest.raises(ConfigError, match="tokenizer and template"):
        sampler(store).load_state_dict(one.state_dict())
    any_tokenizer = Sampler(store, ReplayConfig(), seed=0, tokenizer_sha256=None, max_staleness=None)
    assert any_tokenizer.explain(0)["eligible"] == 4


@pytest.mark.parametrize("before", [False, True], ids=["as written now", "as written before"])
def test_a_call_of_unknown_version_leaves_the_rest_of_its_branch_to_learn_from(
        store: ReplayStore, monkeypatch: pytest.MonkeyPatch, before: bool) -> None:
    branch = make_branch(RNG, turns=3, version=[-1, 3, 5])
    aside = branch.calls[0].model_copy(update={"untrainable_reason": "version_unknown"})
    kinds = branch.token_kind.copy()
    kinds[aside.start:aside.end] = 4
    branch = branch.model_copy(update={"calls": (aside, *branch.calls[1:]), "token_kind": kinds})
    if before:
        monkeypatch.setattr("agentsdpo.record.span_bounds", lambda _: (-1, 5))
    store.append([make_episode(1, episode_id="e", branches=(branch,), group_size=1)])
    monkeypatch.undo()
    one = sampler(store, max_staleness=2)
    assert [row.policy_versions for row in one.sample(1, 5)] == ([] if before else [(3, 5)])
    assert one.explain(6)["no_version" if before else "stale"] == 1
    store.record_policy(3, {})
    store.record_policy(5, {})
    assert verify(store, "deep").ok


def test_one_draw_takes_an_episode_unless_told_otherwise(store: ReplayStore) -> None:
    pair = (make_branch(RNG, branch_id=0), make_branch(RNG, branch_id=1))
    store.append([make_episode(i, episode_id=f"e{i}", branches=pair) for i in range(3)])
    assert [key.branch_id for key in sampler(store).draw(2, 0)] == [0, 1, 0, 1]
    assert len(sampler(store, ReplayConfig(unit="branch")).draw(2, 0)) == 2


def test_episode_units_keep_their_branches_together(store: ReplayStore) -> None:
    def many(name: str, versions: list[int]) -> Episode:
        branches = [make_branch(RNG, version=v, branch_id=b) for b, v in enumerate(versions)]
        branches.append(make_branch(RNG, kind=4, branch_id=len(versions)))
        return make_episode(episode_id=name, branches=tuple(branches))

    store.append([many("a", [5, 6]), many("b", [2, 6]), many("c", [6])])
    one = sampler(store, max_staleness=3)
    keys = one.draw(3, 8)
    assert sorted((key.episode_id, key.branch_id) for key in keys) == [("a", 0), ("a", 1), ("c", 0)]
    assert one.explain(8)["stale"] == 2
    assert one.explain(8)["untrainable"] == 3


@pytest.mark.parametrize("strategy", ["uniform", "fifo", "newest"])
def test_resume_draws_the_same(store: ReplayStore, strategy: str) -> None:
    config = ReplayConfig.model_validate({"strategy": strategy, "max_uses": 3})
    fill(store, 9, version=1)
    one = sampler(store, config, max_staleness=5)
    ids(one, 4, 1)
    fill(store, 4, start=9, version=0)
    one.refresh()
    ids(one, 3, 1)
    state = json.loads(json.dumps(one.state_dict()))
    fill(store, 5, start=13)
    expected = [ids(one, 4, 2), ids(one, 4, 2)]
    one.refresh()
    expected += [ids(one, 4, 2) for _ in range(4)]

    two = sampler(ReplayStore.open(store.root), config, max_staleness=5)
    two.load_state_dict(state)
    seen = [ids(two, 4, 2), ids(two, 4, 2)]
    two.refresh()
    seen += [ids(two, 4, 2) for _ in range(4)]
    assert seen == expected
    assert two.state_dict() == one.state_dict()


def test_a_changed_configuration_refuses_to_load(store: ReplayStore, tmp_path: Path) -> None:
    fill(store, 3)
    state = sampler(store).state_dict()
    for other in (sampler(store, ReplayConfig(max_uses=1)), sampler(store, seed=1), sampler(store, max_staleness=3)):
        with pytest.raises(ConfigError, match="resume with the replay settings"):
            other.load_state_dict(state)
    elsewhere = sampler(ReplayStore.open(tmp_path / "other"))
    with pytest.raises(StoreError):
        elsewhere.load_state_dict(state)


def test_sample_reads_what_draw_names(store: ReplayStore) -> None:
    fill(store, 4)
    rows, keys = sampler(store).sample(3, 0), sampler(store).draw(3, 0)
    assert [row.key for row in rows] == keys
    assert sampler(ReplayStore.open(store.root / "empty")).sample(3, 0) == []
