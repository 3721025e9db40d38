"""The table of a study: where each run was made, and columns of a study's own."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from agentsdpo.benchmarks.study import COLUMNS, in_table, table, write_table
from agentsdpo.provenance import describe_environment, hardware
from agentsdpo.types import Json


def finished(folder: Path, seed: int, *starts: Json) -> None:
    """What is left of a run that came to its end."""
    folder = folder / "a" / str(seed)
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(f'name = "a"\npreset = "robust"\nseed = {seed}\nstaleness = 3\n')
    (folder / "environment.json").write_text(json.dumps(starts))
    (folder / "metrics.jsonl").write_text('{"kind": "eval", "step": 5, "split": "val", "pass": 0.5}\n')
    (folder / "FINISHED").touch()


def test_the_machine_is_the_one_that_ran_not_the_one_that_sums_up(tmp_path: Path) -> None:
    here = describe_environment()
    assert here["hardware"] == hardware()
    old = {name: value for name, value in here.items() if name != "hardware"}
    finished(tmp_path, 0, {**here, "hardware": "a phone, 8 cores"})
    finished(tmp_path, 1, {**here, "hardware": "a phone, 8 cores"}, {**here, "hardware": "a clock, 1 cores"})
    finished(tmp_path, 2, {**old, "platform": "Linux-6.1"})
    found = {row["seed"]: row["hardware"] for row in table("s", tmp_path).to_pylist()}
    assert found == {0: "a phone, 8 cores", 1: "a clock, 1 cores; a phone, 8 cores", 2: "Linux-6.1"}


def test_a_table_may_have_columns_of_its_own_and_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    schema = pa.schema([*COLUMNS, pa.field("craft", pa.float64())])
    path = tmp_path / "new" / "t.parquet"
    assert in_table(path) == set()
    for seed in (1, 0):
        row = {"arm": "a", "seed": seed, "step": 0, "split": "val", "decoding": "sampled", "craft": seed / 4}
        write_table(pa.Table.from_pylist([row], schema), path)
    assert [(row["seed"], row["craft"]) for row in pq.read_table(path).to_pylist()] == [(0, 0.0), (1, 0.25)]
    assert in_table(path) == {("a", 0), ("a", 1)}
