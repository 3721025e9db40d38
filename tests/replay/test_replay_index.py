"""The side index: others can read it, and nobody misses it."""

import sqlite3
from pathlib import Path

import pytest
from replay_factories import TOKENIZER, make_episode

from agentsdpo.errors import StoreError
from agentsdpo.replay import Key, ReplayConfig, ReplayStore, Sampler
from agentsdpo.replay.sampling.index import SideIndex, Use


def sampler(store: ReplayStore, index: SideIndex | None) -> Sampler:
    return Sampler(store, ReplayConfig(strategy="prioritised"), seed=0, tokenizer_sha256=TOKENIZER,
                   max_staleness=None, index=index)


@pytest.fixture
def full(store: ReplayStore) -> ReplayStore:
    store.append([make_episode(i, episode_id=f"e{i}", size=20) for i in range(5)])
    return store


def test_uses_and_priorities_can_be_read_by_others(full: ReplayStore, tmp_path: Path) -> None:
    index = SideIndex(tmp_path / "side.sqlite", full.about["store_id"])
    one = sampler(full, index)
    drawn = one.draw(3, 0)
    one.update_priorities({drawn[0]: 5.0})
    seen = SideIndex(tmp_path / "side.sqlite", full.about["store_id"]).read()
    assert set(seen) == set(drawn)
    assert seen[drawn[0]] == Use(drawn.count(drawn[0]), max(i for i, key in enumerate(drawn) if key == drawn[0]), 5.0)
    assert {use.priority for key, use in seen.items() if key != drawn[0]} == {1.0}


def test_deleting_it_changes_no_draw(full: ReplayStore, tmp_path: Path) -> None:
    index = SideIndex(tmp_path / "side.sqlite", full.about["store_id"])
    plain, told = sampler(full, None), sampler(full, index)
    for step in range(6):
        assert plain.draw(3, 0) == told.draw(3, 0)
        for one in (plain, told):
            one.update_priorities({Key(f"e{step % 5}", 0, 0): 1.0 + step})
        if step == 3:
            index.path.unlink()
            told.draw(0, 0)
            plain.draw(0, 0)
            assert len(index.read()) == 5, "all of it is written anew"
    state = told.state_dict()
    before, _ = index.read(), index.path.unlink()
    again = sampler(full, SideIndex(index.path, full.about["store_id"]))
    again.load_state_dict(state)
    assert SideIndex(index.path, full.about["store_id"]).read() == before
    assert again.draw(4, 0) == plain.draw(4, 0)


@pytest.mark.parametrize("content", [b"", b"no database", b"SQLite format 3\0" + bytes(5000)])
def test_a_damaged_file_is_made_anew(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "side.sqlite"
    path.write_bytes(content)
    index = SideIndex(path, "store")
    assert index.read() == {}
    index.put([(Key("e", 0, 0), Use(1, 0, 1.0))])
    assert SideIndex(path, "store").read() == {Key("e", 0, 0): Use(1, 0, 1.0)}
    assert SideIndex(path, "another").read() == {}, "an index belongs to one store"


def test_a_file_that_cannot_be_used_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="delete it"):
        SideIndex(tmp_path / "no" / "folder" / "side.sqlite", "store")
    index = SideIndex(tmp_path / "side.sqlite", "store")
    with sqlite3.connect(index.path) as connection:
        connection.execute("DROP TABLE branch")
    connection.close()
    with pytest.raises(StoreError, match="no such table"):
        index.read()
    with pytest.raises(StoreError, match="no such table"):
        index.put([(Key("e", 0, 0), Use(1, 0, 1.0))])
