"""The metrics file and its table."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from agentsdpo import metrics
from agentsdpo.errors import ConfigError
from agentsdpo.track import MetricsWriter, read_metrics


def test_lines_are_on_disk_at_once_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write("step", 1, {"learn/loss": np.float32(0.25), "learn/grad_norm": math.inf, "seed": 3})
        writer.write("eval", 1, {"split": "val", "decoding": "greedy", "pass": math.nan, "n": 128})
        rows = read_metrics(path)
    assert [row["kind"] for row in rows] == ["step", "eval"]
    assert rows[0]["learn/loss"] == 0.25
    assert rows[0]["learn/grad_norm"] is None
    assert rows[1]["pass"] is None
    assert all(row["wall_s"] >= 0 for row in rows)
    assert "NaN" not in path.read_text()
    assert "Infinity" not in path.read_text()


def test_resume_drops_later_lines_and_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"kind": "step", "step": step, "wall_s": 10.0 * step, "learn/loss": 1.0} for step in range(1, 6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "st')
    with MetricsWriter(path, resume_step=3) as writer:
        assert writer.wall_s >= 30.0, "time goes on from where the kept lines end"
        writer.write("step", 4, {"learn/loss": 2.0})
    rows = read_metrics(path)
    assert [(row["step"], row["learn/loss"]) for row in rows] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]
    assert rows[-1]["wall_s"] >= 30.0


def test_resume_keeps_each_evaluation_once(tmp_path: Path) -> None:
    """A run may be killed after the evaluation of a checkpoint's step and before, or in the middle of it."""
    path = tmp_path / "metrics.jsonl"

    def line(kind: str, step: int, value: float, **more: object) -> dict[str, object]:
        return {"kind": kind, "step": step, "wall_s": value, **more}

    lines = [line("step", 3, 1.0), line("eval", 3, 2.0, split="val", decoding="sampled"),
             line("eval", 3, 3.0, split="val", decoding="greedy"),
             line("eval", 3, 4.0, split="val", decoding="sampled"), line("step", 3, 5.0),
             line("eval", 3, 6.0, split="val", decoding="sampled", hinted=True),
             line("step", 4, 7.0), line("eval", 4, 8.0, split="val", decoding="sampled")]
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    with MetricsWriter(path, resume_step=3) as writer:
        assert [row["wall_s"] for row in writer.rows] == [1.0, 2.0, 3.0, 6.0]
    assert tuple(read_metrics(path)) == writer.rows
    with MetricsWriter(path) as writer:
        assert writer.rows == ()


def test_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "step", "step": 1, "wall_s": 1}\n')
    MetricsWriter(path).close()
    assert read_metrics(path) == []


@pytest.mark.parametrize("key", ["learn/los", "learn/ratio/p42", "gap", "split", "replay/refused/a/b", "hint/"])
def test_key_outside_the_table_is_refused(tmp_path: Path, key: str) -> None:
    with MetricsWriter(tmp_path / "m.jsonl") as writer, pytest.raises(ConfigError, match="not in the table of metrics"):
        writer.write("step", 1, {key: 1.0})
    assert read_metrics(tmp_path / "m.jsonl") == []


def test_table_is_complete_and_says_everything_once() -> None:
    keys = [key for metric in metrics.TABLE for key in metric.spelt_out()]
    assert len(keys) == len(set(keys))
    for metric in metrics.TABLE:
        assert metric.unit
        assert metric.meaning
    metrics.check_keys([key.replace("*", "reason") for key in keys], "step")
