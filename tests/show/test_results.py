"""What is taken from rows and summaries."""

import json
from pathlib import Path

import pytest

from agentsdpo import results
from agentsdpo.config import RunConfig
from agentsdpo.runfolder import Arm, open_run, read_run
from agentsdpo.stats import wilson


def test_rows_of_a_run_are_told_apart(run_dir: Path) -> None:
    main = read_run(run_dir).main
    assert len(results.steps(main.rows)) == 60
    assert len(results.evals(main.rows, "val", "greedy")) == 4
    assert results.headline_split(main.rows) == "test_names"
    assert results.zero_shot(main, "test_names") == 0.0
    assert results.zero_shot(main, "test_period") == 0.0078


def test_missing_ends_of_an_interval_are_computed_from_n() -> None:
    assert results.rate({"final_pass": 0.5, "n": 64}, "final") == wilson(32, 64)
    record = {"split": "val", "final_pass": 0.5, "zero_shot_pass": 0.25,
              "splits": {"val": {"final_pass": 0.5, "zero_shot_pass": 0.25, "n": 64}}}
    assert results.arm_rate(Arm("a", "", (), record), "zero_shot") == wilson(16, 64)


def test_a_split_is_named_by_the_summary_and_never_guessed_by_its_rate() -> None:
    record = {"final_pass": 0.5, "splits": {"test_firm": {"final_pass": 0.5, "n": 64}}}
    assert results.summary_split(record) is None
    found = results.arm_rate(Arm("a", "", (), record), "final")
    assert found
    assert found.low != found.low, "no ends are borrowed from a split that happens to have the same rate"


@pytest.mark.parametrize("how", ["page", "terminal"])
def test_the_pooled_headline_is_named(run_dir: Path, capsys: pytest.CaptureFixture[str], how: str) -> None:
    from agentsdpo.show.console import print_summary
    from agentsdpo.show.report import write_report

    path = run_dir / "summary.json"
    summary = json.loads(path.read_text())
    summary["arms"] = {"off-policy": {**summary["arms"]["off-policy"], "split": "held-out"}}
    path.write_text(json.dumps({**summary, "split": "held-out"}))
    if how == "page":
        text = write_report(run_dir).read_text()
    else:
        print_summary(json.loads(path.read_text()))
        text = capsys.readouterr().out
    assert "held-out clients, worlds and periods, pooled" in text


def test_an_unfinished_arm_says_how_far_it_got() -> None:
    rows = ({"kind": "eval", "step": 0, "episodes": 0, "wall_s": 1.0}, {"kind": "step", "step": 4, "episodes": 128})
    assert results.reached(Arm("a", "", rows, {})) == {"steps": 4, "episodes": 128, "wall_s": 1.0}
    assert results.reached(Arm("a", "", (), {})) == {}


def test_an_evaluation_that_came_late_does_not_say_how_far_a_run_got(tmp_path: Path) -> None:
    open_run(tmp_path / "r", RunConfig(steps=4)).finish()
    late = [{"kind": "step", "step": 4, "episodes": 128, "wall_s": 9.0},
            {"kind": "eval", "step": 2, "split": "val", "decoding": "sampled", "episodes": 64, "wall_s": 5.0}]
    (tmp_path / "r" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in late))
    record = results.record_of_run(tmp_path / "r")
    assert (record["steps"], record["episodes"], record["wall_s"]) == (4, 128, 9.0)
