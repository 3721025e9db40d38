"""Readers that know nothing of this package: the recipes of FORMAT.md word for word, and a reader written from it."""

import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from independent_reader import read
from replay_factories import make_episode

from agentsdpo.replay import Key, ReplayStore, compact, evict, fold, gc, pin, recover
from agentsdpo.replay.format_md import TEXT
from agentsdpo.replay.spool import Spool
from agentsdpo.types import Episode


def episodes() -> list[Episode]:
    return [make_episode(i, episode_id=f"e{i}", group_id=f"g{i}", group_size=1, size=40, version=i) for i in range(6)]


@pytest.fixture(scope="module", params=["fresh", "maintained"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store called STORE: as appended, or with rows hidden, moved and left over twice."""
    root = tmp_path_factory.mktemp(request.param)
    store = ReplayStore.open(root / "STORE")
    for episode in episodes():
        store.append([episode])
    store.add_rewards({"e1": 0.25, "e2": 0.75})
    store.add_rewards({"e1": 0.125})
    store.close()
    if request.param == "maintained":
        evict(store, [Key("e3", 0, 0)], reason="test")
        compact(store)
        evict(store, [Key("e4", 0, 0)], reason="test")
        store.append([make_episode(9, episode_id="e9", group_id="g9", group_size=1, size=40)])
        shutil.copy(next((root / "STORE").glob("data/2*/*.parquet")), root / "STORE/data/compact/orphan.parquet")
    fold(store)
    return root


def test_format_md_names_whatever_lies_in_a_store(tmp_path: Path) -> None:
    store = ReplayStore.open(tmp_path / "STORE", reserve_bytes=4096)
    store.append(episodes())
    store.add_rewards({"e1": 0.25})
    store.record_policy(0, {"weights_id": "w"})
    pin(store, "reader", store.snapshot())
    assert Spool(store).begin({"episode_id": "e9"}) is not None
    orphan = next(store.root.glob("data/2*/*.parquet"))
    orphan.with_name(f"{store.writer_id}-orphan.parquet").write_bytes(orphan.read_bytes())
    store.close()
    assert recover(store).count("lost") == 1
    gc(store)
    fold(store)
    names = {path.name for path in store.root.iterdir()}
    assert {"spool", "lost+found", "quarantine", "pins", "clock", "reserve.bin"} <= names
    table = {cell.partition("/")[0] for cell in re.findall(r"`([^`|]+)`", TEXT.partition("## Read it")[0])}
    assert names - {"FORMAT.md"} <= table


def expected(folder: Path) -> dict[str, Any]:
    """Token ids and log-probs by episode, of the rows that count."""
    return {row.key.episode_id: row.branch for row in ReplayStore.open(folder / "STORE").branches()}


def blocks(heading: str) -> str:
    """The indented lines below a line of FORMAT.md."""
    found = re.search(rf"^{re.escape(heading)}[^\n]*\n\n((?:    [^\n]*\n|\n)+)", TEXT, re.M)
    assert found, heading
    return "\n".join(line[4:] for line in found[1].splitlines())


def same(rows: list[dict[str, Any]], want: dict[str, Any]) -> None:
    assert sorted(row["episode_id"] for row in rows) == sorted(want)
    for row in rows:
        branch = want[row["episode_id"]]
        np.testing.assert_array_equal(np.asarray(row["token_ids"]), branch.token_ids)
        np.testing.assert_array_equal(np.asarray(row["logprobs"], np.float32), branch.logprobs)
        np.testing.assert_array_equal(np.asarray(row["token_kind"]), branch.token_kind)
        assert [call["end"] for call in row["calls"]] == [call.end for call in branch.calls]


def test_what_the_recipes_are_measured_by(folder: Path) -> None:
    names = sorted(expected(folder))
    assert names == (["e0", "e1", "e2", "e5", "e9"] if "maintained" in folder.name else [f"e{i}" for i in range(6)])


def test_duckdb(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    duckdb = pytest.importorskip("duckdb")
    monkeypatch.chdir(folder)
    statements = [part for part in re.sub("--[^\n]*", "", blocks("DuckDB:")).split(";") if part.strip()]
    results = []
    with duckdb.connect() as connection:
        for statement in statements:
            cursor = connection.execute(statement)
            names = [column[0] for column in cursor.description or ()]
            results.append([dict(zip(names, row, strict=True)) for row in cursor.fetchall()])
    glob, _, _, _, _, rows, rewards = results
    assert {row["episode_id"] for row in glob} >= set(expected(folder))
    same(rows, expected(folder))
    assert {row["episode_id"]: row["reward"] for row in rewards} == {"e1": 0.125, "e2": 0.75}


@pytest.mark.parametrize("reader", ["Polars:", "pandas:"])
def test_frames(folder: Path, reader: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip(reader.rstrip(":").lower())
    (tmp_path / "recipe.py").write_text(blocks(reader))
    monkeypatch.chdir(folder)
    rows = runpy.run_path(str(tmp_path / "recipe.py"))["rows"]
    same(rows.to_dicts() if hasattr(rows, "to_dicts") else rows.to_dict("records"), expected(folder))


def test_datasets(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(folder)
    live = sorted({row.path for row in ReplayStore.open("STORE").snapshot().rows.values()})
    want = expected(folder)
    for files, streaming in (("STORE/data/*/*.parquet", False), ([f"STORE/{path}" for path in live], True)):
        rows = list(datasets.load_dataset("parquet", data_files=files, split="train", streaming=streaming,
                                          cache_dir=str(tmp_path)))
        assert {row["episode_id"] for row in rows} >= set(want)
        first = {row["episode_id"]: row for row in rows}
        same([first[name] for name in want], want)


def test_to_polars(folder: Path) -> None:
    polars = pytest.importorskip("polars")
    frame = ReplayStore.open(folder / "STORE").to_polars("reward < 0.5")
    assert frame.filter(polars.col("episode_id") == "e1")["reward"].to_list() == [0.125]
    same(frame.to_dicts(), {name: row for name, row in expected(folder).items()
                            if name in frame["episode_id"].to_list()})


def test_an_independent_reader(folder: Path) -> None:
    rows = read(folder / "STORE")
    same(list(rows.values()), expected(folder))
    assert {key[0]: row["reward"] for key, row in rows.items() if key[0] in ("e1", "e2")} == {"e1": 0.125, "e2": 0.75}
    text = Path(__file__).with_name("independent_reader.py").read_text()
    assert "agentsdpo" not in text
