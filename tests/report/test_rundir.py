"""Reading run folders, whole and broken."""

import json
from pathlib import Path

import pytest

from agentsdpo import rundir
from agentsdpo.errors import RunError
from agentsdpo.stats import wilson


def test_a_finished_run_is_read_whole(run_dir: Path) -> None:
    run = rundir.read_run(run_dir)
    assert [arm.name for arm in run.arms] == ["off-policy", "no-correction"]
    assert run.main.name == "off-policy"
    assert "max_staleness" in run.config
    assert "lr" in run.main.config
    assert len(rundir.steps(run.main.rows)) == 60
    assert len(rundir.evals(run.main.rows, "val", "greedy")) == 4
    assert rundir.headline_split(run.main.rows) == "test_names"
    assert rundir.zero_shot(run.main, "test_names") == 0.0
    assert rundir.zero_shot(run.main, "test_period") == 0.0078


def test_a_killed_run_is_read_without_its_torn_line(bare_run: Path) -> None:
    run = rundir.read_run(bare_run)
    assert (run.summary, run.config, len(run.main.rows)) == ({}, "", 1)


def test_a_broken_middle_line_is_named(bare_run: Path) -> None:
    path = bare_run / "arms" / "only" / "metrics.jsonl"
    path.write_text('{"kind": "step"}\nnonsense\n{"kind": "step"}\n')
    with pytest.raises(RunError, match="line 2 of 3"):
        rundir.read_run(bare_run)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="neither summary.json nor"):
        rundir.read_run(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_broken_summary_is_named(run_dir: Path, text: str) -> None:
    (run_dir / "summary.json").write_text(text)
    with pytest.raises(RunError, match="summary.json"):
        rundir.read_run(run_dir)


def test_an_arm_name_in_the_summary_is_never_a_path(run_dir: Path) -> None:
    (run_dir.parent / "metrics.jsonl").write_text('{"kind": "step", "step": 1}\n')
    (run_dir / "summary.json").write_text(json.dumps({"arms": {"../..": {"final_pass": 0.5}}}))
    outside = [arm for arm in rundir.read_run(run_dir).arms if arm.name == "../.."]
    assert outside[0].rows == ()


def test_missing_ends_of_an_interval_are_computed_from_n() -> None:
    assert rundir.rate({"final_pass": 0.5, "n": 64}, "final") == wilson(32, 64)
    record = {"final_pass": 0.5, "zero_shot_pass": 0.25, "splits": {"val": {"final_pass": 0.5, "zero_shot_pass": 0.25,
                                                                            "n": 64}}}
    assert rundir.arm_rate(rundir.Arm("a", "", (), record), "zero_shot") == wilson(16, 64)


def test_an_unfinished_arm_says_how_far_it_got() -> None:
    rows = ({"kind": "eval", "step": 0, "episodes": 0, "wall_s": 1.0}, {"kind": "step", "step": 4, "episodes": 128})
    assert rundir.reached(rundir.Arm("a", "", rows, {})) == {"steps": 4, "episodes": 128, "wall_s": 1.0}
    assert rundir.reached(rundir.Arm("a", "", (), {})) == {}
