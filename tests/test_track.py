"""The metrics file, its table, and the run folder."""

import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest

from agentsdpo import config as settings
from agentsdpo import metrics, runfolder
from agentsdpo.errors import ConfigError, RunError
from agentsdpo.runfolder import open_run
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


def test_a_run_holds_its_settings_commit_and_versions(tmp_path: Path) -> None:
    config = settings.load(sets=["steps=3", "learn.max_staleness=none"])
    folder = open_run(tmp_path / "runs" / "a", config)
    assert settings.load(folder.config) == config
    found = json.loads((folder.path / "environment.json").read_text())
    assert found["packages"]["numpy"] == np.__version__
    assert folder.config.read_text().startswith(f"# agentsdpo {found['agentsdpo']}, commit ")
    assert not folder.finished


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    config = settings.load()
    folder = open_run(tmp_path / "a", config)
    with pytest.raises(RunError, match=r"a holds a stopped run; choose another --out, or go on with it by --resume"):
        open_run(tmp_path / "a", config)
    folder.finish()
    with pytest.raises(RunError, match="holds a finished run"):
        open_run(tmp_path / "a", config)


def test_resume_wants_the_same_settings_except_the_length(tmp_path: Path) -> None:
    config = settings.load(sets=["steps=3"])
    with pytest.raises(RunError, match="holds no run to resume"):
        open_run(tmp_path / "a", config, resume=True)
    open_run(tmp_path / "a", config).finish()
    longer = open_run(tmp_path / "a", settings.load(sets=["steps=5"]), resume=True)
    assert not longer.finished
    assert settings.load(longer.config).steps == 5
    with pytest.raises(RunError, match=r"was started with learn.lr = 0.0006, resuming asks for 0.001 \(and 1 more\);"):
        open_run(tmp_path / "a", settings.load(sets=["learn.lr=1e-3", "eval.every=2"]), resume=True)


def test_commit_marks_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "agentsdpo"
    package.mkdir()
    file = package / "runfolder.py"
    file.write_text("a = 1\n")
    monkeypatch.setattr(runfolder, "__file__", str(file))
    assert runfolder.git_commit() is None, "not a checkout"
    for arguments in (["init", "-q"], ["add", "-A"], ["-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "m"]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    commit = runfolder.git_commit()
    assert commit
    assert len(commit) == 40
    file.write_text("a = 2\n")
    assert runfolder.git_commit() == commit + "+changes"
