"""Flipped bits, missing files, killed and concurrent writers, readers that are not ours."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from replay_factories import make_episode

from agentsdpo.errors import CorruptionError, StoreError
from agentsdpo.replay import ReplayStore

CHILD = Path(__file__).parent / "replay_writer.py"


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> ReplayStore:
    store = ReplayStore.open(tmp_path_factory.mktemp("filled") / "store")
    store.append([make_episode(i, size=40) for i in range(3)])
    store.append([make_episode(9, size=40)])
    return store


def everything(root: Path) -> list[bytes]:
    """What a learner sees of a store, as bytes."""
    view = ReplayStore.open(root, create=False).snapshot()
    return [row.branch.token_ids.tobytes() + row.branch.token_kind.tobytes() + row.branch.logprobs.tobytes()
            + repr((row.key, row.branch.calls, row.hint, row.grade, row.policy_versions)).encode()
            for row in view.read(view.keys())]


def flip(path: Path, at: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize("part", ["data", "footer", "log"])
def test_flipped_bits_are_never_silent(filled: ReplayStore, tmp_path: Path, part: str) -> None:
    truth, rng = everything(filled.root), random.Random(part)
    pattern = "log/*/*.json" if part == "log" else "data/*/*.parquet"
    detected = 0
    for i in range(50):
        root = tmp_path / str(i)
        shutil.copytree(filled.root, root)
        path = rng.choice(sorted(root.glob(pattern)))
        size = path.stat().st_size
        footer = int.from_bytes(path.read_bytes()[-8:-4], "little") + 8 if part != "log" else 0
        at = rng.randrange(size - footer, size) if part == "footer" else rng.randrange(size - footer)
        flip(path, at, rng.randrange(8))
        try:
            seen, message = everything(root), path.name
        except StoreError as error:
            seen, message, detected = truth, str(error), detected + 1
        assert seen == truth, f"bit {at} of {path} changed what was read"
        assert path.name in message
    assert detected == 50 if part != "data" else detected > 10  # the rest hit columns and indexes a learner never reads


def test_page_damage_names_file_row_group_and_branch(filled: ReplayStore, tmp_path: Path) -> None:
    root = tmp_path / "store"
    shutil.copytree(filled.root, root)
    view = ReplayStore.open(root).snapshot()
    key = view.keys()[0]
    import pyarrow.parquet as pq
    path = root / view.located(key).path
    group = pq.ParquetFile(path).metadata.row_group(0)
    column = next(group.column(i) for i in range(group.num_columns)
                  if group.column(i).path_in_schema == "token_ids.list.element")
    flip(path, column.data_page_offset + column.total_compressed_size - 3, 4)
    with pytest.raises(CorruptionError) as caught:
        view.tokens([key])
    assert all(word in str(caught.value) for word in (path.name, "row group 0", str(key)))
    with pytest.raises(CorruptionError) as caught:
        view.read([key])
    assert all(word in str(caught.value) for word in (path.name, "row group 0", str(key)))


def test_missing_and_shortened_files_are_named(filled: ReplayStore, tmp_path: Path) -> None:
    root = tmp_path / "store"
    shutil.copytree(filled.root, root)
    first = sorted(root.glob("log/*/*.json"))[1]
    saved = first.read_bytes()
    first.unlink()
    with pytest.raises(CorruptionError, match="lacks entry 1"):
        ReplayStore.open(root).snapshot()
    first.write_bytes(saved)
    data = ReplayStore.open(root).snapshot()
    path = root / data.located(data.keys()[0]).path
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CorruptionError, match="bytes, .* were written"):
        everything(root)
    path.unlink()
    with pytest.raises(CorruptionError, match="is missing though the log names it"):
        everything(root)


def test_other_readers_read_it_directly(filled: ReplayStore) -> None:
    """DuckDB, Polars and pandas see ids, NaN log-probs and nested spans as they are."""
    duckdb, polars, pandas = (pytest.importorskip(name) for name in ("duckdb", "polars", "pandas"))
    view, glob = filled.snapshot(), str(filled.root / "data" / "*" / "*.parquet")
    want = {row.key.episode_id: row.branch for row in view.read(view.keys())}
    rows = duckdb.sql(f"SELECT episode_id, token_ids, logprobs, calls[1].versions[1].version FROM '{glob}'").fetchall()
    frames = [{row[0]: (row[1], row[2]) for row in rows}]
    frame = polars.read_parquet(glob)
    frames.append({r["episode_id"]: (r["token_ids"], r["logprobs"]) for r in frame.iter_rows(named=True)})
    table = pandas.read_parquet(filled.root / "data")
    frames.append({r.episode_id: (r.token_ids, r.logprobs) for r in table.itertuples()})
    for seen in frames:
        assert seen.keys() == want.keys()
        for name, (ids, logps) in seen.items():
            assert np.array_equal(np.array(ids), want[name].token_ids)
            assert np.array_equal(np.array(logps, np.float32), want[name].logprobs, equal_nan=True)
    assert {row[3] for row in rows} == {0}


def test_the_duckdb_recipe_of_format_md_finds_committed_files(filled: ReplayStore, tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    root = tmp_path / "STORE"
    shutil.copytree(filled.root, root)
    orphan = next(root.glob("data/*/*.parquet"))
    shutil.copy(orphan, orphan.with_name("orphan.parquet"))
    lines = (root / "FORMAT.md").read_text().split("-- committed files alone\n")[1].split("\n\n")[0]
    statements = lines.replace("STORE/", f"{root}/").split(";")
    connection = duckdb.connect()
    connection.execute(statements[0])
    assert connection.execute(statements[1]).fetchall() == [(4,)]


# ------------------------------------------------------------------------------------------- processes and kills


class Nursery:
    """A process that imported everything once and forks writers on demand."""

    def __init__(self) -> None:
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        self.process = subprocess.Popen([sys.executable, str(CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env=env)
        assert self._out.readline() == "ready\n"

    @property
    def _out(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    def start(self, root: Path, acks: Path, seed: int, rounds: int) -> int:
        """Fork a writer of ``rounds`` appends; returns its process id."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seed} {rounds} {acks} {root}\n")
        self.process.stdin.flush()
        return int(self._out.readline())

    def wait(self, pid: int) -> None:
        """Until the nursery has reaped that child."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"wait {pid}\n")
        self.process.stdin.flush()
        assert self._out.readline() == "gone\n"

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(10)
        self._out.close()


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


def acked(path: Path) -> set[str]:
    """Whole lines only: a kill may cut the last one."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return {line for line in lines if line.endswith("\n")}


def test_two_writers_at_once_lose_nothing(tmp_path: Path, nursery: Nursery) -> None:
    root, acks = tmp_path / "store", [tmp_path / "a", tmp_path / "b"]
    pids = [nursery.start(root, ack, seed, 8) for seed, ack in enumerate(acks)]
    for pid in pids:
        nursery.wait(pid)
    view = ReplayStore.open(root, create=False).snapshot()
    assert len(view.read(view.keys())) == 16
    assert {key.episode_id + "\n" for key in view.keys()} == acked(acks[0]) | acked(acks[1])  # noqa: SIM118
    assert len(list((root / "log").iterdir())) == 2


def test_killed_writers_lose_nothing_acknowledged(tmp_path: Path, nursery: Nursery) -> None:
    root, rng = tmp_path / "store", random.Random(0)
    reader, total = ReplayStore.open(root), 0
    for i in range(10):
        ack = tmp_path / f"ack{i}"
        pid = nursery.start(root, ack, i, 10_000)
        deadline = time.monotonic() + 60
        while not acked(ack) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.06))
        os.kill(pid, signal.SIGKILL)
        nursery.wait(pid)
        live = reader.snapshot()
        assert acked(ack) <= {key.episode_id + "\n" for key in live.keys()}  # noqa: SIM118
        total += len(acked(ack))
    view = ReplayStore.open(root).snapshot()
    assert len(view.read(view.keys())) == len(view) >= total >= 10
    assert view.id == reader.snapshot().id
    assert len(list(root.glob("data/*/*.parquet"))) <= len(view) + 10
