"""The studies of methods: real, tiny ones; continued; and what their lines say of known numbers."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agentsdpo.benchmarks.methods import __main__ as methods
from agentsdpo.benchmarks.methods import attempts, episodes, figures
from agentsdpo.benchmarks.study import COLUMNS

pytestmark = pytest.mark.usefixtures("one_thread")

def made(rows: list[dict[str, Any]]) -> pa.Table:
    about = {"study": "s", "preset": "p", "staleness": 0, "env_steps": 0, "wall_s": 1.0, "split": "test_names",
             "decoding": "sampled", "n": 64, "score": 0.5, "commit": "", "hardware": ""}
    return pa.Table.from_pylist([{**about, **row} for row in rows], COLUMNS)


def curve(arm: str, seed: int, rates: dict[int, float]) -> list[dict[str, Any]]:
    return [{"arm": arm, "seed": seed, "step": n // 16, "episodes": n, "pass": rate} for n, rate in rates.items()]


def test_arms_have_the_same_tasks_and_evaluations() -> None:
    robust, grpo = (arm.config(episodes.COMMON, 3) for arm in episodes.MAIN)
    for other in (*episodes.MORE, *episodes.TUNING):
        config = other.config(episodes.COMMON, 3)
        assert (config.group, config.steps, config.eval) == (8, grpo.steps, grpo.eval)
    assert (robust.steps * robust.episodes_per_step, grpo.steps * grpo.episodes_per_step) == (1600, 2048)
    assert robust.eval.every * robust.episodes_per_step == grpo.eval.every * grpo.episodes_per_step
    assert robust.eval.model_copy(update={"every": 5}) == grpo.eval
    assert (robust.group, grpo.group, grpo.replay.unit) == (1, 8, "group")
    assert robust.learn.batch == grpo.learn.batch * grpo.group, "rows of a step"
    assert grpo.hint.sources == ()
    shown = episodes.SHOWN.config(episodes.COMMON, 3)
    alike = ("steps", "episodes_per_step", "staleness", "group", "eval", "replay", "collect", "desk")
    assert all(getattr(shown, name) == getattr(robust, name) for name in alike)
    assert (shown.hint.sources, shown.learn.lr, shown.learn.batch) == (("demo",), robust.learn.lr, robust.learn.batch)
    assert (robust.seed, grpo.learn.lr, grpo.staleness) == (3, 3e-4, 0)


def test_the_episodes_needed_are_those_of_the_first_lasting_success() -> None:
    late, lucky = {0: 0.0, 800: 0.85, 1600: 0.9}, {0: 0.0, 400: 0.8, 800: 0.5, 1600: 0.9}
    both = made(curve("robust", 0, late) + curve("robust", 1, lucky) + curve("grpo", 0, {0: 0.0, 1600: 0.2}))
    robust, grpo, ratio = episodes.lines(both)
    assert robust.startswith("robust     2 seeds  episodes to 80%: 1200 [800, 1600]  after 1600: pass 90.0 %")
    assert "episodes to 80%: not within 1600 in 1 of 1  after 1600: pass 20.0 % [12.0, 31.4], score 50.0 %" in grpo
    assert grpo.endswith("score 50.0 %"), "of one seed no interval of a score is known"
    assert ratio == "grpo / robust: at least 1.3"
    slow = made(curve("robust", 0, late) + curve("grpo", 0, {0: 0.0, 1600: 0.8}))
    assert list(episodes.lines(slow))[-1] == "grpo / robust: 2.0"
    assert len(list(episodes.lines(made(curve("robust", 0, {0: 0.0}) + curve("grpo", 0, {0: 0.0}))))) == 2


def tried(arm: str, task: int, at: int | None, budget: int = 8) -> list[dict[str, Any]]:
    return [{"arm": arm, "seed": task, "step": k, "episodes": k, "n": 1, "pass": float(at is not None and k >= at)}
            for k in range(1, budget + 1)]


def test_discovery_is_the_share_of_tasks_solved_by_then() -> None:
    rows = tried("sdpo", 0, 3) + tried("sdpo", 1, 5) + tried("best_of_k", 0, 8) + tried("best_of_k", 1, None)
    found = attempts.discovery(rows, "sdpo")
    assert [found[k].estimate for k in (2, 3, 4, 5, 8)] == [0.0, 0.5, 0.5, 1.0, 1.0]
    assert attempts.base_success(rows) == pytest.approx(1 / 16)
    said = list(attempts.lines(made(rows)))
    assert said[-1] == "sdpo: 50 % of the tasks, best_of_k's share after 8, by attempt 3"
    assert said[-2] == "one attempt of best_of_k passes in 6.2%"
    assert "50 % [0, 100]" in said[1]
    none = list(attempts.lines(made(tried("sdpo", 0, 3) + tried("best_of_k", 0, None))))
    assert none[-1] == "one attempt of best_of_k passes in 0.0%"


def test_a_try_at_a_task_is_one_row_per_attempt_and_not_repeated(tmp_path: Path) -> None:
    said: list[str] = []
    attempts.run(["best_of_k", "multi_turn"], 1, 3, tmp_path / "t.parquet", said.append)
    rows = pq.read_table(tmp_path / "t.parquet").to_pylist()
    assert [(row["arm"], row["episodes"]) for row in rows] == [(a, k) for a in ("best_of_k", "multi_turn")
                                                               for k in (1, 2, 3)]
    assert all(a["score"] <= b["score"] for a, b in zip(rows[:2], rows[1:3], strict=True)), "the best so far"
    assert len(said) == 2
    attempts.run(["best_of_k", "multi_turn"], 1, 3, tmp_path / "t.parquet", said.append)
    assert len(said) == 2


@pytest.mark.slow
def test_a_quick_study_runs_and_is_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["--quick", "--out", str(tmp_path)]
    episodes.main(wanted)
    said = capsys.readouterr()
    assert "2 of 2: grpo, seed 0" in said.err
    rows = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert {(row["arm"], row["step"], row["episodes"]) for row in rows} == {
        (arm, step, size * step) for arm, size in (("robust", 16), ("grpo", 32)) for step in (0, 1, 2)}
    episodes.main(wanted)
    again = capsys.readouterr()
    assert (again.out, "of 2" in again.err) == (said.out, False)


def test_a_study_that_is_only_read_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there are no results at .*none.parquet: leave out --no-run"):
        episodes.main(["--no-run", "--table", str(tmp_path / "none.parquet")])


def test_figures_show_every_arm_of_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {"attempts": tried("sdpo", 0, 3) + tried("best_of_k", 0, None),
              "episodes": curve("robust", 0, {0: 0.0, 800: 0.9}) + curve("grpo", 0, {0: 0.0, 800: 0.1})
              + curve("robust", 1, {0: 0.0, 800: 0.8})}
    monkeypatch.setattr(figures, "IMAGES", tmp_path)
    paths = [tmp_path / f"methods-{name}.parquet" for name in tables]
    for path, rows in zip(paths, tables.values(), strict=True):
        pq.write_table(made(rows), path)
    monkeypatch.setattr(figures, "FIGURES", dict(zip(paths, figures.FIGURES.values(), strict=True)))
    figures.main()
    found = {name: (tmp_path / f"methods-{name}.svg").read_text() for name in tables}
    assert all(text.startswith("<svg") for text in found.values())
    assert all(words in found["attempts"] for words in ("learns from feedback", "tries again", "on 1 hard tasks"))
    assert all(words in found["episodes"] for words in (">robust<", ">grpo, 1 seed<", "95 % band", ">80 %<", "2 seeds"))
    (tmp_path / "methods-episodes.parquet").unlink()
    (tmp_path / "methods-episodes.svg").unlink()
    figures.main()
    assert not (tmp_path / "methods-episodes.svg").exists()


def test_parts_by_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[Any] = []
    monkeypatch.setattr(methods, "PARTS", {name: lambda words, name=name: told.append((name, words))
                                           for name in methods.PARTS})
    methods.main(["episodes", "--quick"])
    methods.main([])
    assert told == [("episodes", ["--quick"]), ("test_time", []), ("episodes", []), ("continual", [])]
    with pytest.raises(SystemExit):
        methods.main(["wishes"])
    assert "there is no part 'wishes'; the parts are test_time, episodes, continual" in capsys.readouterr().err
