"""Merge, fork, split and diff: by key, byte for byte, safe to repeat, groups whole."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from replay_factories import make_episode
from test_replay_cli import content, document, good, lines, refused

from agentsdpo.errors import CorruptionError, StoreError
from agentsdpo.replay import Key, ReplayConfig, ReplayStore, compact
from agentsdpo.replay.upkeep import combine
from agentsdpo.types import Hint, StopReason

POLICY = {"weights_id": "w", "tokenizer_sha256": "t" * 64, "chat_template_sha256": "c", "vocab_size": 10}


@pytest.fixture
def source(shared: Path, tmp_path: Path) -> Path:
    return shutil.copytree(shared, tmp_path / "source")


def hashes(root: Path) -> dict[Key, tuple[str, str]]:
    rows = ReplayStore.open(root, create=False).snapshot().rows
    return {key: (row.tokens_sha256, row.content_sha256) for key, row in rows.items()}


def stored(root: Path) -> list[dict[str, Any]]:
    """Every column of every row, as written."""
    view = ReplayStore.open(root, create=False).snapshot()
    return [{k: repr(v) for k, v in row.items()} for row in view.stored(view.keys()).to_pylist()]


def test_merge_copies_every_byte_of_a_row_and_repeats_to_nothing(source: Path, tmp_path: Path) -> None:
    into = tmp_path / "into"
    first = document("merge", into, source)["sources"][0]
    assert (first["copied"], first["episodes"], first["same"]) == (6, 5, 0)
    assert hashes(into) == hashes(source)
    assert stored(into) == stored(source)
    before = {name for name in content(into) if name.startswith("data/")}
    second = document("merge", into, source)["sources"][0]
    assert (second["copied"], second["same"]) == (0, 6)
    assert {name for name in content(into) if name.startswith("data/")} == before


def test_a_dry_run_changes_nothing_and_makes_nothing(source: Path, tmp_path: Path) -> None:
    good("init", tmp_path / "into")
    before = content(tmp_path)
    assert document("merge", tmp_path / "into", source, "--dry-run")["sources"][0]["copied"] == 6
    assert content(tmp_path) == before
    refused(4, "merge", tmp_path / "none", source, "--dry-run")
    refused(4, "merge", tmp_path / "into2", tmp_path / "none")
    assert not (tmp_path / "into2").exists()


def test_merge_takes_whole_groups(source: Path, tmp_path: Path) -> None:
    good("merge", tmp_path / "into", source, "--where", "episode_id == 'cccc-3'")
    assert {key.episode_id for key in hashes(tmp_path / "into")} == {"cccc-3", "cccc-4"}


def test_other_content_under_one_key_is_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    into = ReplayStore.open(tmp_path / "into")
    into.append([make_episode(99, episode_id="dddd-5")])
    before = content(tmp_path / "into")
    said = refused(1, "merge", tmp_path / "into", source)
    assert "branch dddd-5/0/0 has content" in said
    assert content(tmp_path / "into") == before


def test_what_was_hidden_there_stays_hidden_and_is_not_copied_again(source: Path, tmp_path: Path) -> None:
    into = tmp_path / "into"
    good("merge", into, source)
    good("rm", into, "dddd-5", "--yes")
    before = content(into)
    report = document("merge", into, source)["sources"][0]
    assert (report["copied"], report["same"], report["hidden"]) == (0, 5, 1)
    assert content(into) == before


def test_a_salvaged_row_gives_way_to_the_whole_one(source: Path, tmp_path: Path) -> None:
    episode = ReplayStore.open(source).episode("cccc-4")
    part = make_episode(8, episode_id="cccc-4", group_id="g-c", stop_reason=StopReason.MAX_TURNS)
    into = ReplayStore.open(tmp_path / "into")
    into.append([part], salvaged=True)
    assert combine.merge(into, ReplayStore.open(source)).copied == 6
    assert into.episode("cccc-4").stop_reason == episode.stop_reason
    said = ReplayStore.open(tmp_path / "said")
    said.append([part], salvaged=True)
    for reward in (0.1, 0.2):
        said.add_rewards({"cccc-4": reward})
    ReplayStore.open(source).add_rewards({"cccc-4": 0.9})
    assert combine.merge(said, ReplayStore.open(source)).late == 1
    assert said.episode("cccc-4").reward == 0.9, "what was said of the half is not said of the whole"
    worse = ReplayStore.open(tmp_path / "worse")
    worse.append([part], salvaged=True)
    assert combine.merge(into, worse).older == 1


def test_policies_come_along_and_must_agree(source: Path, tmp_path: Path) -> None:
    a, into = ReplayStore.open(source), ReplayStore.open(tmp_path / "into")
    a.record_policy(9, POLICY)
    (a.root / "policies" / ".DS_Store").write_bytes(b"\0")
    assert combine.merge(into, a).policies == 5
    assert ReplayStore.open(tmp_path / "into").policy(9) == POLICY
    other = ReplayStore.open(tmp_path / "other")
    other.record_policy(9, POLICY | {"weights_id": "v"})
    other.append([make_episode(77)])
    with pytest.raises(StoreError, match="policy version 9 has weights_id 'v'"):
        combine.merge(into, other)
    assert len(into) == 6


def test_late_values_come_along_with_their_revisions(source: Path, tmp_path: Path) -> None:
    a, into = ReplayStore.open(source), ReplayStore.open(tmp_path / "into")
    a.add_rewards({"aaaa-1": 0.1}, author="x")
    a.add_rewards({"aaaa-1": 0.9}, author="y")
    a.add_labels({"dddd-5": "good"})
    key = Key("dddd-5", 0, 0)
    a.add_hints({key: Hint(text="late", source="user", author="me")})
    row = a.snapshot().read([key])[0]
    a.add_relogprobs({key: row.branch.logprobs - np.float32(1)}, policy_version=4, trainer_id="teacher")
    assert combine.merge(into, a).late == 4
    view = into.snapshot()
    assert view.read([Key("aaaa-1", 0, 0)])[0].reward == 0.9
    late = view.read([key])[0]
    assert (late.label, late.hint and late.hint.text) == ("good", "late")
    assert np.array_equal(view.relogprobs(key)[4, "teacher"], row.branch.logprobs - np.float32(1), equal_nan=True)
    assert combine.merge(into, a).late == 0
    into.add_rewards({"aaaa-1": 0.5})
    assert combine.merge(into, a).late == 0
    assert into.snapshot().read([Key("aaaa-1", 0, 0)])[0].reward == 0.5


def test_a_group_that_was_closed_by_name_stays_closed(source: Path, tmp_path: Path) -> None:
    ReplayStore.open(source).close_group("g-c", ["cccc-3"])
    closed = ReplayConfig(group_mode="closed")
    for _ in range(2):
        good("merge", tmp_path / "into", source)
        into = ReplayStore.open(tmp_path / "into")
        assert into.fold().closures == {"g-c": ["cccc-3"]}
        assert into.sampler(closed).explain(9) == ReplayStore.open(source).sampler(closed).explain(9)
    assert sum(op["op"] == "group_close" for path in into.root.glob("log/*/*.json")
               for op in json.loads(path.read_text())["ops"]) == 1, "once is enough"


def test_damage_is_never_copied(source: Path, tmp_path: Path) -> None:
    path = max((source / "data").rglob("*.parquet"))
    data = bytearray(path.read_bytes())
    data[len(data) // 8] ^= 16
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptionError):
        combine.merge(ReplayStore.open(tmp_path / "into"), ReplayStore.open(source))


def test_fork_shares_bytes_and_then_goes_its_own_way(source: Path, tmp_path: Path) -> None:
    ReplayStore.open(source).record_policy(9, POLICY)
    ReplayStore.open(source).add_labels({"aaaa-1": "x"})
    report = document("fork", source, tmp_path / "fork")
    assert report["branches"] == 6
    assert report["linked"] == report["files"] == 9
    assert hashes(tmp_path / "fork") == hashes(source)
    assert json.loads((tmp_path / "fork/STORE.json").read_text())["store_id"] != json.loads(
        (source / "STORE.json").read_text())["store_id"]
    assert lines("ls", tmp_path / "fork", "--where", "label == 'x'")
    again = document("fork", source, tmp_path / "fork")
    assert again | {"linked": 0} == report | {"linked": 0}
    ReplayStore.open(tmp_path / "fork").append([make_episode(50, episode_id="only-here")])
    assert len(hashes(source)) == 6
    assert document("diff", source, tmp_path / "fork")["counts"] == {"only_a": 0, "only_b": 1, "same": 6, "other": 0}
    assert "history of its own" in refused(1, "fork", source, tmp_path / "fork")


def test_a_fork_that_was_cut_off_is_finished(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agentsdpo.replay.storage import storage_for
    from agentsdpo.replay.upkeep import fork

    compact(ReplayStore.open(source))  # streams in an archive, a stream of maintenance
    monkeypatch.setattr(fork, "_create", lambda *_: (_ for _ in ()).throw(OSError("cut off")))
    with pytest.raises(OSError, match="cut off"):
        fork.fork(ReplayStore.open(source), storage_for(tmp_path / "fork"))
    assert len(ReplayStore.open(tmp_path / "fork")) == 0
    monkeypatch.undo()
    assert fork.fork(ReplayStore.open(source), storage_for(tmp_path / "fork")).branches == 6
    assert hashes(tmp_path / "fork") == hashes(source)


def test_fork_refuses_a_folder_of_something_else(source: Path, tmp_path: Path) -> None:
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "file").write_text("x")
    refused(1, "fork", source, tmp_path / "busy")


def test_diff_names_every_difference(source: Path, tmp_path: Path) -> None:
    other = ReplayStore.open(tmp_path / "other")
    other.append([make_episode(1, episode_id="dddd-5"), make_episode(2, episode_id="extra")])
    found = lines("diff", source, tmp_path / "other")
    assert {row["where"] for row in found} == {"only_a", "only_b", "other"}
    assert {"key": "dddd-5/0/0", "where": "other"} in found
    assert {"key": "extra/0/0", "where": "only_b"} in found
    assert document("diff", source, source)["differences"] == []


def test_split_by_column_keeps_everything_once(source: Path, tmp_path: Path) -> None:
    parts = document("split", source, tmp_path / "out", "--by", "env")["parts"]
    assert [(row["part"], row["copied"]) for row in parts] == [("desk", 4), ("other", 2)]
    assert hashes(tmp_path / "out" / "desk") | hashes(tmp_path / "out" / "other") == hashes(source)
    assert [row["copied"] for row in document("split", source, tmp_path / "out", "--by", "env")["parts"]] == [0, 0]
    assert "has both" in refused(2, "split", source, tmp_path / "x", "--by", "policy_version")
    assert not (tmp_path / "x").exists()


def test_split_by_shares_is_the_same_for_ever_and_keeps_groups_whole(tmp_path: Path) -> None:
    store = ReplayStore.open(tmp_path / "s")
    store.append([make_episode(i, episode_id=f"e-{i}", group_id=f"g-{i // 2}", size=8) for i in range(200)])
    good("split", tmp_path / "s", tmp_path / "out", "--parts", "train=0.8,val=0.2", "--seed", "1")
    train, val = hashes(tmp_path / "out/train"), hashes(tmp_path / "out/val")
    assert len(train) + len(val) == 200
    assert 20 <= len(val) <= 60
    groups = [{int(key.episode_id[2:]) // 2 for key in part} for part in (train, val)]
    assert not groups[0] & groups[1]
    view = store.snapshot()
    again = combine.parts_by_share(view, {"train": 0.8, "val": 0.2}, 1, view.keys())
    assert sorted(again["val"]) == sorted(val)
    assert sorted(combine.parts_by_share(view, {"train": 0.8, "val": 0.2}, 2, view.keys())["val"]) != sorted(val)


def test_split_refuses_what_is_not_clear(source: Path, tmp_path: Path) -> None:
    to = tmp_path / "out"
    assert "--by or --parts" in refused(2, "split", source, to)
    assert "--by or --parts" in refused(2, "split", source, to, "--by", "env", "--parts", "a=1")
    for text in ("a", "a=x", "a=0.5", "a=1.5,b=-0.5", "a=nan,b=0.1", ""):
        assert "--parts" in refused(2, "split", source, to, "--parts", text)
    assert "name of a folder" in refused(2, "split", source, to, "--parts", "../x=1")
    assert not to.exists()
