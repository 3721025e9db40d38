"""Late values in the folded snapshot: a store with many of them opens by reading one file, and says the same."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_replay_maintain import age, filled

from agentsdpo.replay import Key, ReplayStore, fold, overlay, verify
from agentsdpo.replay.overlay import Overlays
from agentsdpo.replay.upkeep.maintain import commit
from agentsdpo.replay.upkeep.reclaim import gc
from agentsdpo.types import Hint


@pytest.fixture
def said(tmp_path: Path) -> tuple[ReplayStore, list[Key]]:
    """Four episodes of which something of every kind is said, some of it twice."""
    store, keys = filled(tmp_path / "s")
    for text in ("first", "second"):
        store.add_hints({keys[0]: Hint(text=text, source="criteria", author="grader")})
    store.add_rewards({keys[1]: 0.5})
    store.add_labels({keys[2]: "good"})
    rows = store.snapshot().rows
    for version in {version for row in rows.values() for version in range(row.version_min, row.version_max + 1)}:
        store.record_policy(version, {"weights_id": "w"})
    n = rows[keys[3]].n_tokens
    store.add_relogprobs({keys[3]: np.full(n, -0.5, np.float32)}, policy_version=3, trainer_id="t")
    return store, keys


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the overlays that are read."""
    seen, real = list[str](), overlay.read

    def read(storage: Any, op: dict[str, Any]) -> Any:
        seen.append(op["path"])
        return real(storage, op)

    monkeypatch.setattr(overlay, "read", read)
    return seen


def told(store: ReplayStore) -> list[Any]:
    """All that is said of the rows."""
    view = store.snapshot()
    return [(row.key, row.hint, row.reward, row.label) for row in view.read(sorted(view.rows))]


def test_a_folded_snapshot_spares_the_overlays_and_says_what_they_say(said: tuple[ReplayStore, list[Key]],
                                                                      reads: list[str]) -> None:
    store, keys = said
    before, at = told(store), store.snapshot().vector
    fold(store)
    reads.clear()
    fresh = ReplayStore.open(store.root)
    assert (told(fresh), reads) == (before, [])
    (again,) = fresh.snapshot().relogprobs(keys[3]).values()
    assert (set(again.tolist()), len(reads)) == ({-0.5}, 1), "arrays stay where they are"
    store.add_hints({keys[0]: Hint(text="third", source="criteria", author="grader")})
    reads.clear()
    newer = ReplayStore.open(store.root)
    assert (told(newer)[0][1].text, len(reads)) == ("third", 1), "and what came after"
    assert told(newer)[1:] == before[1:]
    assert [row.hint for row in newer.snapshot(at=at).read(keys[:1])] == [before[0][1]]
    assert verify(newer, "deep").ok


def test_the_late_values_go_with_their_snapshot(said: tuple[ReplayStore, list[Key]]) -> None:
    store, keys = said
    fold(store)
    store.add_labels({keys[2]: "better"})
    latest = fold(store)
    age(store.root, "snap/*")
    gc(store)
    assert {path.name for path in store.root.glob("snap/*.parquet")} == {
        Path(latest).name, Path(latest).stem + "-late.parquet"}
    assert told(ReplayStore.open(store.root))[2][3] == "better"


@pytest.mark.parametrize("how", ["changed", "gone"])
def test_damaged_late_values_are_passed_over(said: tuple[ReplayStore, list[Key]], how: str) -> None:
    store, _ = said
    before = told(store)
    path = store.root / fold(store)
    path = path.with_name(path.stem + "-late.parquet")
    if how == "gone":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.warns(RuntimeWarning, match="late values beside the folded snapshot .* are damaged, all overlays are"):
        assert told(ReplayStore.open(store.root)) == before
    (problem,) = verify(store, "fast").problems
    assert (problem.path, problem.fix) == ("snap", "write a new one: agentsdpo replay snapshot")
    with pytest.warns(RuntimeWarning, match="are damaged"):
        fold(store)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert told(ReplayStore.open(store.root)) == before
    assert verify(store, "deep").ok


def test_late_values_of_an_overlay_that_was_given_up_are_not_kept(said: tuple[ReplayStore, list[Key]]) -> None:
    store, keys = said
    fold(store)
    (path,) = store.root.glob("overlay/label/*")
    commit(store, lambda _: [{"op": "gc", "paths": [str(path.relative_to(store.root))]}])
    path.unlink()
    fresh = ReplayStore.open(store.root)
    assert [row.label for row in fresh.snapshot().read(keys[2:3])] == [None]
    assert told(fresh)[0][1].text == "second"


def test_late_values_that_are_not_those_of_the_overlays_are_found(said: tuple[ReplayStore, list[Key]],
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = said
    real = Overlays.read

    def wrong(self: Overlays, *rest: Any) -> Overlays:
        found = real(self, *rest)
        changed = {slot: late._replace(value='"other"') if slot.kind == "label" else late
                   for slot, late in found.latest.items()}
        return Overlays(found.storage, changed, found.files)

    with monkeypatch.context() as patch:
        patch.setattr(Overlays, "read", wrong)
        fold(store)
    assert verify(store, "full").ok
    (problem,) = verify(store, "deep").problems
    assert problem.what == "the folded snapshot says other late values than the overlays"
    fold(store, anew=True)
    assert verify(store, "deep").ok


def test_a_damaged_overlay_does_not_keep_a_store_from_being_folded(said: tuple[ReplayStore, list[Key]]) -> None:
    store, _ = said
    next(store.root.glob("overlay/reward/*")).write_bytes(b"damaged")
    fold(store)
    assert not list(store.root.glob("snap/*-late.parquet"))
    assert not verify(store, "full").ok
