"""Figures of studies, two runs, tokens and benchmark cards: what they claim, read from their artists and sentences."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agentsdpo import plots
from agentsdpo.errors import RunError
from agentsdpo.plots import card, tables, tokens, versus, words
from agentsdpo.stats import stratified_bootstrap, wilson

HOME = Path(__file__).resolve().parents[2]
TOPS = {"robust-0": (0, 0.9), "robust-16": (16, 0.8), "robust-off": (1_000_000, 0.2), "naive-8": (8, 0.0)}


def study(seeds: int = 3) -> list[dict[str, Any]]:
    """A study with made-up rates: every arm rises in a straight line to its top, seeds a little apart."""
    rows = []
    for arm, (age, top) in TOPS.items():
        for seed in range(seeds):
            for step in range(0, 50, 10):
                for split in ("test_names", "test_world", "test_firm") if step in (0, 40) else ("test_names",):
                    rate = 0.0 if split == "test_firm" else top * step / 40 * (1 - 0.05 * seed)
                    rows.append({"kind": "eval", "study": "s", "arm": arm, "preset": arm.partition("-")[0],
                                 "staleness": age, "seed": seed, "step": step, "episodes": 16 * step,
                                 "wall_s": 1.0 * step, "env_steps": 64 * step, "split": split, "n": 64,
                                 "decoding": "sampled", "pass": round(64 * rate) / 64, "score": 0.5 + 0.5 * rate})
    return rows


def labels(axes: Any) -> dict[str, Any]:
    return dict(zip(axes.get_legend_handles_labels()[1], axes.get_legend_handles_labels()[0], strict=True))


def test_every_kind_of_frame_is_read(tmp_path: Path) -> None:
    pandas, polars = pytest.importorskip("pandas"), pytest.importorskip("polars")
    rows = [{key: value for key, value in row.items() if key != "kind"} for row in study(1)]
    table = pa.Table.from_pylist(rows)
    for frame in (table, pandas.DataFrame(rows), polars.DataFrame(rows), rows):
        assert tables.records(frame) == rows
    pq.write_table(table, tmp_path / "s.parquet")
    assert tables.read_study(tmp_path / "s.parquet") == study(1)
    some = tables.read_study(tmp_path / "s.parquet", ["naive-8"])
    assert some == [row for row in study(1) if row["arm"] == "naive-8"] != []
    with pytest.raises(RunError, match="there is no table of a study at .*; run the study"):
        tables.read_study(tmp_path / "no.parquet")


def test_the_rates_of_a_run_are_those_of_its_summary() -> None:
    run, rows = tables.read_seeds([HOME / "notebooks" / "data" / "demo"])
    for when, step in (("zero_shot", 0), ("final", 70)):
        found = tables.held_out(rows, step=step)
        assert found is not None
        assert found.estimate == pytest.approx(run.summary[f"{when}_pass"])
        assert found[1:] == pytest.approx(run.summary[f"{when}_pass_ci95"])


def test_folders_are_chosen_by_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.setenv("RUN", f"{tmp_path}/a:a")
    assert [path.resolve() for path in tables.chosen("data")] == [tmp_path / "a"] * 2
    monkeypatch.setenv("RUN", "nowhere")
    with pytest.raises(RunError, match="RUN names 'nowhere', and there is no such folder"):
        tables.chosen("data")


def test_runs_become_seeds_and_arms(write_run: Callable[[Path], Path], tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name) for name in "ab"]
    run, rows = tables.read_seeds(folders)
    assert {row["seed"] for row in rows} == {0, 1}, "both say seed 7, so they are counted"
    assert len(rows) == 2 * len(run.main.rows)
    (folders[0] / "arms" / "off-policy" / "config.toml").write_text("staleness = 3\nseed = 5\n")
    arms = tables.arms_of(tables.read_arms(folders[:1]))
    assert list(arms) == ["no-correction-0", "off-policy-3"]
    assert {row["seed"] for row in arms["off-policy-3"]} == {5}


def test_runs_that_were_never_evaluated_are_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 1}\n')
    with pytest.raises(RunError, match=f"no evaluation in {tmp_path}; let a run reach"):
        plots.read_arms([tmp_path])


def test_age_curve_is_the_iqm_of_seeds_and_splits() -> None:
    rows = study()
    axes = plots.age_curve(rows).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "8", "16", "first policy\nonly"]
    line = labels(axes)["robust"].lines[0]
    last = tables.final(tables.arms_of(rows)["robust-16"])
    ends = {seed: [row["pass"] for row in own] for seed, own in last.items()}
    assert ends == {0: [0.796875, 0.796875], 1: [0.765625, 0.765625], 2: [0.71875, 0.71875]}
    assert line.get_ydata()[1] == pytest.approx(100 * stratified_bootstrap(list(ends.values())).estimate)
    assert line.get_color() == plots.ROLES["student"]
    assert labels(axes)["naive"].lines[0].get_color() == plots.ROLES["behaviour"]
    assert axes.get_title("left") == "Held-out tasks, 3 seeds"
    assert "zero-shot 0.0 %" in labels(axes)
    easier = [{**row, "split": split, "pass": 0.5} for row in rows for split in ("val", "train") if row["step"] == 0]
    assert "zero-shot 0.0 %" in labels(plots.age_curve([*rows, *easier]).axes[0]), "that of the held-out splits"


def test_one_seed_has_wilsons_interval() -> None:
    found = tables.held_out(tables.arms_of(study(1))["robust-0"])
    assert found == wilson(2 * 58, 128)


def test_arms_side_by_side_share_their_axes() -> None:
    figure = plots.arm_grid(study(), columns=3)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title("left") for axes in shown] == [f"{arm} (3 seeds)" for arm in (
        "naive-8", "robust-0", "robust-16", "robust-off")]
    assert len({axes.get_ylim() for axes in shown}) == 1
    blue = [line for line in shown[1].get_lines() if line.get_color() == plots.ROLES["student"]]
    assert sorted(line.get_linewidth() for line in blue) == [0.8, 0.8, 0.8, 2.4]


def test_the_answer_on_age_follows_the_rows() -> None:
    told = str(words.age_answer(study()))
    assert "at staleness 0 85.9 %" in told
    assert "from the first policy alone" in told
    assert "`naive`: at staleness 8 0.0 % [0.0, 0.0]" in told
    assert "Seeds an arm: 3" in told
    alike = [row for row in study() if row["arm"] == "robust-0"]
    older = [{**row, "arm": "robust-32", "staleness": 32} for row in alike]
    assert "**Up to staleness 32 it cannot be told" in str(words.age_answer([*alike, *older]))
    first = [{**row, "arm": "robust-off", "staleness": 1_000_000} for row in alike]
    assert "**Even from the first policy alone it cannot" in str(words.age_answer([*alike, *older, *first]))
    worse = [{**row, "pass": 0.5 * row["pass"]} for row in older]
    assert "cannot be told" not in str(words.age_answer([*alike, *worse, *first])), "what lies between can be told"
    assert str(words.age_answer([])) == "No arm of the kind `robust` has finished yet."


def test_runs_of_another_preset_have_an_answer_and_a_blue_line() -> None:
    rows = [{**row, "arm": "grpo-8", "preset": "grpo"} for row in study() if row["arm"] == "naive-8"]
    assert str(words.age_answer(rows)).startswith("`grpo` passes on held-out tasks: at staleness 8 0.0 %")
    line = labels(plots.age_curve(rows).axes[0])["grpo"].lines[0]
    assert line.get_color() == plots.ROLES["student"]


def test_a_first_evaluation_without_a_scored_episode_is_no_zero_shot_line() -> None:
    rows = [{"n": 0, **{key: row[key] for key in row if key not in ("n", "pass", "score")}} if row["step"] == 0 else row
            for row in study()]
    assert not [label for label in labels(plots.age_curve(rows).axes[0]) if "zero-shot" in label]


def test_the_answer_on_learning_follows_the_rows() -> None:
    up, flat = ([row for row in study() if row["arm"] == name] for name in ("robust-0", "naive-8"))
    three = [{**row, "split": "test_period"} for row in up if row["split"] == "test_world"]
    assert str(words.learning_answer([*up, *three])).startswith("**Yes.** The pass rate on held-out clients")
    assert "on unseen clients (`test_names`) and unseen worlds (`test_world`) goes" in str(words.learning_answer(up))
    assert "3 seeds" in str(words.learning_answer(up))
    assert "never taught it goes from 0.0 % to 0.0 %" in str(words.learning_answer(up))
    assert str(words.learning_answer(flat)).startswith("**Not visibly.**")


def test_seeds_that_ended_early_count_in_the_answer_and_end_the_bold_line() -> None:
    """Two of three collapse at step 20 and are stopped: what the third one reaches is not what three reach."""
    rows = [row if row["seed"] == 0 else {**row, "pass": 0.0} for row in study()
            if row["arm"] == "robust-0" and (row["seed"] == 0 or row["step"] <= 20)]
    told = str(words.learning_answer(rows))
    assert told.startswith("**Not visibly.**")
    assert "after 320 to 640 episodes (IQM over 3 seeds" in told
    assert "never taught it goes from 0.0 % to 0.0 %" in told
    curve = [row for row in rows if row["split"] == "test_names"]
    assert [at for at, _ in plots.curve_points(curve, "episodes")] == [0, 160, 320]
    figure = plots.learning_curve(rows, split="test_names")
    thin = [line for line in figure.axes[0].get_lines() if line.get_linewidth() < 1]
    assert max(np.max(line.get_xdata()) for line in thin) == 640
    assert str(words.learning_answer([])) == "Nothing was evaluated yet."


def test_a_world_with_splits_of_its_own_has_answers_too() -> None:
    rows = [{**row, "split": "mine"} for row in study(1) if row["split"] == "test_names"]
    own = [row for row in rows if row["arm"] == "robust-0"]
    assert str(words.learning_answer(own)) == (
        "**Yes.** The pass rate on `mine` goes from 0.0 % [0.0, 5.7] to 90.6 % [81.0, 95.6] after 640 episodes (n = 64 "
        "episodes, one seed, Wilson's 95 % interval).")
    assert "`robust` passes on held-out tasks: at staleness 0 90.6 %" in str(words.age_answer(rows))
    assert "on mine [%]" in plots.arm_grid(rows).get_supylabel()


# ------------------------------------------------------------------------------------------------------- two runs


def test_two_runs_have_a_colour_and_a_band_each(arm_rows: Callable[..., list[dict[str, Any]]]) -> None:
    runs = {"new": arm_rows(0, steps=40), "old": arm_rows(1, steps=40, scale=0.5)}
    axes = versus.versus_curve(runs, split="val").axes[0]
    found = labels(axes)
    assert found["new"].get_color() == plots.ROLES["student"]
    assert found["old"].get_color() == plots.ROLES["behaviour"]
    assert {"95 % interval, new", "95 % interval, old", "oracle 100 %"} <= set(found)
    panel = next(one for one in plots.PANELS if one.name == "gap")
    assert versus.leading(panel).label == "mean size"
    drawn = versus.versus_panel(panel, runs)
    assert drawn is not None
    assert {"new", "old"} <= set(labels(drawn.axes[0]))
    assert "no gap" in labels(drawn.axes[0])
    assert versus.versus_panel(panel, {**runs, "old": []}) is None
    loss = versus.versus_panel(next(one for one in plots.PANELS if one.name == "loss"), runs)
    assert loss is not None
    assert set(labels(loss.axes[0])) == {"new", "old"}, "the first step of one is no baseline of the other"


# --------------------------------------------------------------------------------------------------------- tokens


def token(turn: int, place: int, gap: float, *, hint: str = "its own hint", episode: str = "e", text: str = "usd",
          best: str = "") -> dict[str, Any]:
    return {"episode": episode, "task": "t", "branch": 0, "turn": turn, "place": place, "token": 10 * turn + place,
            "text": text, "part": "value", "hint": hint, "gap": gap, "weight": abs(gap), "teacher_best": best or text}


def test_the_heat_map_holds_means() -> None:
    rows = [token(0, 1, -2.0), token(0, 1, -1.0, episode="f"), token(1, 0, 0.5)]
    figure = plots.gap_heatmap([*rows, *[{**row, "hint": "no hint", "gap": 0.0} for row in rows]])
    first = np.ma.asarray(figure.axes[0].collections[0].get_array()).reshape(2, 2)
    assert first[0, 1] == -1.5
    assert first[1, 0] == 0.5
    assert np.isnan(first.filled(np.nan)[0, 0])
    assert [axes.get_title("left") for axes in figure.axes[:2]] == ["The teacher reads its own hint",
                                                                    "The teacher reads no hint"]


def test_the_strip_shows_text_and_wishes() -> None:
    rows = [token(0, 0, 0.0, text="a b\n"), token(0, 1, -2.0, best="m_usd"), token(1, 0, 0.1, text="x" * 150)]
    axes = plots.attribution_strip(rows).axes[0]
    shown = [text.get_text() for text in axes.texts]
    assert shown == ["turn 0", "a\u00a0b↵", "usd", "m_usd", "turn 1", "x" * 150]
    assert len(axes.patches) == 2
    widths = [patch.get_width() for patch in axes.patches]  # pyright: ignore[reportAttributeAccessIssue]
    assert widths == [3, 150]


def test_shares_and_controls() -> None:
    own = [token(0, 0, -2.0, best="m_usd"), token(0, 1, 0.0, text="a"), token(0, 0, -1.0, episode="f", best="eur")]
    wrong = [{**row, "hint": "other", "teacher_best": "m_usd", "gap": -0.5} for row in own]
    kept = tokens.corrections_kept(tokens.by_hint([*own, *wrong]))
    assert kept["its own hint"].estimate == 1.0
    assert kept["other"].estimate == 0.5
    assert tokens.episode_means(own) == {"e": 1.0, "f": 1.0}
    told = str(words.hint_answer([*own, *wrong]))
    assert "another token in **2 of 3** places" in told
    assert "Other hints ask for much the same" in told
    many = [token(i, 0, -1.0, episode=str(i), best="eur") for i in range(30)]
    for share, verdict in ((6, "Most of the corrections are the hint's own"), (24, "Other hints ask for much the")):
        other = [{**row, "hint": "other", "teacher_best": "eur" if row["turn"] < share else "usd"} for row in many]
        assert verdict in str(words.hint_answer([*many, *other])), share
    table = str(words.wishes([*own, *wrong])).splitlines()
    assert table[2] == "| t | 0 | `usd` | `m_usd` | `m_usd` |"
    assert len(plots.hint_control([*own, *wrong]).axes) == 2
    bars = plots.loss_by_part(own).axes[0].patches
    assert [bar.get_width() for bar in bars] == [100, 100]  # pyright: ignore[reportAttributeAccessIssue]


# ----------------------------------------------------------------------------------------------------------- card


def test_the_card_shows_the_report() -> None:
    reports = {name: plots.read_bench(HOME / "notebooks" / "data" / "bench" / name) for name in ("before", "after")}
    axes = plots.pass_curve(reports).axes[0]
    found = labels(axes)["after, pass^k (all of k)"].lines[0]
    known = reports["after"]["overall"]["conditional"]
    assert list(found.get_xdata()) == [1, 2, 4, 8]
    assert list(found.get_ydata()) == pytest.approx([100 * known[key]["value"] for key in ("pass@1", "pass^2", "pass^4",
                                                                                         "pass^8")])
    table, shown, names = card.criteria_table(reports["before"])
    assert table.shape == (24, 8) == (len(shown), len(names))
    axes = plots.criteria_matrix(reports["before"], tasks=5).axes[0]
    hardest = [tick.get_text() for tick in axes.get_yticklabels()]
    assert len(hardest) == 5
    assert table[shown.index(hardest[0])].mean() == table.mean(axis=1).min()
    unjudged = {"tasks": [{"task_id": name, "criteria": {"file": met}} for name, met in (("n", [0, 0]), ("t", [1, 2]))]}
    lines = plots.criteria_matrix(unjudged).axes[0].get_yticklabels()
    assert [tick.get_text() for tick in lines] == ["t", "n"], "what was not judged stands last"
    told = str(words.card_answer(reports))
    assert told.startswith(f"**after passes {100 * known['pass@1']['value']:.1f} %")
    assert "Missed most: `figure`, `unit`, `file`, `notify`, `answer`, met in 99.5 % of attempts." in told
    assert "| seed | 0 | 0 |" in str(words.card_stamps(reports))
    with pytest.raises(RunError, match="write it with: agentsdpo bench report"):
        plots.read_bench(HOME / "docs")


def test_criteria_that_no_two_tasks_share_are_numbered() -> None:
    report = plots.read_bench(HOME / "notebooks" / "data" / "bench" / "after")
    for i, task in enumerate(report["tasks"]):
        task["criteria"] = {f"ver_{i}_{k}": [k % 2, 2] for k in range(3 + i % 2)}
    table, _, names = card.criteria_table(report)
    assert names == ["1", "2", "3", "4"]
    assert table.shape == (24, 4)
    assert table[1].tolist() == [0.0, 0.5, 0.0, 0.5]
    assert np.isnan(table[0, 3])
    assert "ver_" not in str(words.card_answer({"after": report})), "which of 84 was missed most says nothing"
