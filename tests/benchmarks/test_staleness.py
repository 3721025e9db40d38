"""The staleness study: a real, tiny one; stopped and continued; and what its lines say of known curves."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agentsdpo.benchmarks.staleness import __main__ as staleness
from agentsdpo.benchmarks.staleness.report import results
from agentsdpo.benchmarks.study import COLUMNS, ENDED, Arm, is_done, run_study, table, write_table
from agentsdpo.errors import LearnError
from agentsdpo.learn.config import LearnConfig
from agentsdpo.stats import wilson


def row(arm: str, seed: int, step: int, rate: float, *, split: str = "test_names", score: float = 0.6,
        decoding: str = "sampled") -> dict[str, object]:
    return {"study": "staleness", "arm": arm, "preset": "robust", "staleness": 0, "seed": seed, "step": step,
            "episodes": 16 * step, "env_steps": 0, "wall_s": 1.0, "split": split, "decoding": decoding, "n": 64,
            "pass": rate, "score": score, "commit": "", "hardware": ""}


def differing(one: LearnConfig, other: LearnConfig) -> set[str]:
    return {key for key in LearnConfig.model_fields if getattr(one, key) != getattr(other, key)}


def made(*rows: dict[str, object]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), COLUMNS)


@pytest.mark.slow
def test_a_quick_study_runs_ends_and_is_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["--quick", "--arms", "robust-off", "naive-8", "--seeds", "1", "--out", str(tmp_path)]
    staleness.main(wanted)
    said = capsys.readouterr()
    assert "2 of 2: naive-8, seed 0" in said.err
    assert "robust-off" in said.out
    found = pq.read_table(tmp_path / "results.parquet")
    assert set(zip(found["arm"].to_pylist(), found["step"].to_pylist(), strict=True)) == {
        (arm, step) for arm in ("robust-off", "naive-8") for step in (0, 2, 4)}
    assert not (tmp_path / "naive-8" / "0" / "replay").exists()
    staleness.main(wanted)
    again = capsys.readouterr()
    assert "of 2" not in again.err
    assert again.out == said.out
    elsewhere = [*wanted[:-1], str(tmp_path / "other"), "--table", str(tmp_path / "results.parquet")]
    staleness.main(elsewhere)
    again = capsys.readouterr()
    assert "of 2" not in again.err, "another machine goes on from the table"
    assert again.out == said.out


def test_every_arm_can_be_configured_and_differs_from_the_others() -> None:
    told = {name: arm.config(staleness.COMMON, 0).model_dump_json(exclude={"name"})
            for name, arm in staleness.ARMS.items()}
    assert len(set(told.values())) == len(told)
    naive, full = (staleness.ARMS[name].config(staleness.COMMON, 0).learn for name in ("naive-8", "sdpopp-8-1e-4"))
    assert differing(naive, full) == {"ratio", "adv_clip"}, "at one rate"
    for name, base, keys in (("is-8", "naive-8", {"ratio"}), ("tis-8", "naive-8", {"ratio"}),
                             ("reverse-16", "robust-16", {"beta"}), ("ungated-64", "robust-64", {"gate", "veto"})):
        one, other = (staleness.ARMS[arm].config(staleness.COMMON, 0).learn for arm in (name, base))
        assert differing(one, other) == keys, f"{name} is {base} with one thing changed"


def test_the_lines_tell_a_collapse_from_a_slow_start_and_pair_seeds() -> None:
    ends = [row(arm, seed, 20, rate + seed / 100, score=score) for arm, rate, score in (
        ("robust-0", 0.9, 0.95), ("robust-16", 0.8, 0.9), ("naive-8", 0.0, 0.2)) for seed in range(3)]
    starts = [row(arm, seed, step, 0.01) for arm in ("robust-0", "robust-16", "naive-8") for seed in range(3)
              for step in ((0, 10) if arm != "naive-8" else (0,))]
    dead = [row("naive-8", seed, 10, 0.3 if seed == 0 else 0.0, score=0.7 if seed == 0 else 0.1) for seed in range(3)]
    found = {result.arm: result for result in results(made(*starts, *ends, *dead))}
    assert found["robust-0"].collapsed == found["robust-16"].collapsed == 0
    assert found["naive-8"].collapsed == 2  # the third fell only at its last point
    assert found["robust-0"].difference is None
    difference = found["robust-16"].difference
    assert difference is not None
    assert [round(x, 3) for x in difference] == [-0.1, -0.1, -0.1]
    assert round(found["robust-0"].passed.estimate, 3) == 0.91


def test_greedy_rows_and_the_control_stay_out_of_the_headline() -> None:
    found, = results(made(row("robust-0", 0, 0, 0.0), row("robust-0", 0, 10, 0.5),
                          row("robust-0", 0, 10, 1.0, decoding="greedy"),
                          row("robust-0", 0, 10, 0.25, split="test_firm"), row("robust-0", 0, 10, 0.7, split="val")))
    assert (found.passed.estimate, found.greedy, found.control) == (0.5, 1.0, 0.25)
    assert found.passed == wilson(32, 64), "of one seed, over its episodes"


def test_a_seed_that_ended_early_counts_with_the_last_rate_it_had_and_has_collapsed() -> None:
    whole = [row("robust-0", 0, step, 0.8, split=split, score=0.9) for step in (0, 20)
             for split in ("test_names", "test_world")]
    dead = [row("robust-0", 1, 0, 0.0), row("robust-0", 1, 0, 0.1, split="test_world"), row("robust-0", 1, 10, 0.2)]
    found, = results(made(*whole, *dead))
    assert (found.seeds, found.collapsed) == (2, 1)
    assert found.passed.estimate == pytest.approx(0.5)


def test_what_is_no_collapse_is_raised_and_not_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise LearnError("no row can be drawn", fix="see the store")

    monkeypatch.setattr("agentsdpo.benchmarks.study.train", broken)
    with pytest.raises(LearnError, match="no row can be drawn"):
        run_study([staleness.ARMS["robust-0"]], staleness.COMMON, [0], tmp_path)
    assert not is_done(tmp_path / "robust-0" / "0")


def test_results_of_other_seeds_stay_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "results.parquet"
    write_table(made(row("a", 0, 0, 0.1), row("a", 1, 0, 0.2)), path)
    write_table(made(row("a", 1, 0, 0.3)), path)
    kept = pq.read_table(path).to_pylist()
    assert [(one["seed"], one["pass"]) for one in kept] == [(0, 0.1), (1, 0.3)]


def test_a_run_in_which_every_row_is_gated_away_ends_early_and_is_a_result(tmp_path: Path) -> None:
    wild = Arm("wild", ("preset=naive", "learn.lr=1.0", "learn.grad_clip=1e6", "learn.veto=0.999",
                        "staleness=1000000", "learn.max_staleness=none", "episodes_per_step=2", "learn.batch=2",
                        "collect.max_tokens=8", *staleness.QUICK, "steps=30"))
    run_study([wild], staleness.COMMON, [0], tmp_path)
    folder = tmp_path / "wild" / "0"
    assert "8 steps in a row had nothing to train on" in (folder / ENDED).read_text()
    assert is_done(folder)
    assert set(table("wild", tmp_path)["step"].to_pylist()) < set(range(0, 30, 2))
