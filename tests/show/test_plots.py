"""What the figures claim, read from their artists."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from agentsdpo import plots
from agentsdpo.plots import panels
from agentsdpo.results import evals
from agentsdpo.runfolder import read_run
from agentsdpo.stats import stratified_bootstrap, wilson

Rows = Callable[..., list[dict[str, Any]]]
Summary = Callable[[float, float], dict[str, Any]]


def lines(figure: Figure) -> dict[str, Line2D]:
    """Lines of the only axes by their legend label."""
    return {str(line.get_label()): line for line in axes_of(figure).get_lines()}


def xs(line: Line2D) -> list[float]:
    return [float(x) for x in np.asarray(line.get_xdata())]


def ys(line: Line2D) -> list[float]:
    return [float(y) for y in np.asarray(line.get_ydata())]


def axes_of(figure: Figure) -> Axes:
    return figure.axes[0]


def test_learning_curve_shows_the_evaluations_and_both_baselines(arm_rows: Rows) -> None:
    rows = arm_rows(0, steps=60)
    figure = plots.learning_curve(rows, x="episodes", split="val", baseline=0.0078)
    found, expected = lines(figure), evals(rows, "val", "sampled")
    assert xs(found["sampled"]) == [row["episodes"] for row in expected]
    assert ys(found["sampled"]) == pytest.approx([100 * row["pass"] for row in expected])
    assert ys(found["zero-shot 0.8 %"]) == pytest.approx([0.78, 0.78])
    assert set(ys(found["oracle 100 %"])) == {100}
    assert found["sampled"].get_color() == plots.ROLES["student"]
    assert found["training episodes"].get_color() == plots.ROLES["behaviour"]
    assert found["greedy"].get_linestyle() == "--"
    assert len(xs(found["training episodes"])) == 60
    words = [text.get_text() for text in axes_of(figure).texts]
    assert words == ["n = 128 episodes per evaluation, 1 seed"]


def test_one_seed_has_the_wilson_band(arm_rows: Rows) -> None:
    rows = arm_rows(0, steps=20)
    figure = plots.learning_curve(rows, split="val", baseline=0.0)
    corners = np.asarray(axes_of(figure).collections[0].get_paths()[0].vertices)
    last = evals(rows, "val", "sampled")[-1]
    low, high = wilson(128 * last["pass"], 128)[1:]
    ends = sorted({round(float(y), 6) for x, y in corners if x == last["episodes"]})
    assert ends == pytest.approx([100 * low, 100 * high], abs=1e-4)


def test_several_seeds_are_thin_and_their_iqm_is_bold(arm_rows: Rows) -> None:
    rows = [{**row, "seed": seed} for seed in range(4) for row in arm_rows(seed, steps=40, scale=1 - 0.1 * seed)]
    figure = plots.learning_curve(rows, split="val", baseline=0.0, below="staleness 4")
    blue = [line for line in axes_of(figure).get_lines() if line.get_color() == plots.ROLES["student"]]
    thin = [line for line in blue if line.get_linewidth() < 1]
    assert len(thin) == 8
    last = [row["pass"] for row in evals(rows, "val", "sampled") if row["step"] == 40]
    iqm = lines(figure)["sampled, IQM"]
    assert ys(iqm)[-1] == pytest.approx(100 * stratified_bootstrap(last).estimate)
    assert iqm.get_linewidth() > 2
    assert "4 seeds; staleness 4" in axes_of(figure).texts[0].get_text()


@pytest.mark.parametrize(("longest", "label", "last"),
                         [(100.0, "wall clock [s]", 100.0), (600.0, "wall clock [min]", 10.0)])
def test_wall_clock_states_its_unit(longest: float, label: str, last: float) -> None:
    rows = [{"kind": "eval", "split": "val", "step": i, "pass": 0.5, "n": 8, "wall_s": i * longest} for i in (0, 1)]
    figure = plots.learning_curve(rows, x="wall_s", split="val")
    assert axes_of(figure).get_xlabel() == label
    assert xs(lines(figure)["sampled"])[-1] == last


def test_split_bars_show_every_rate_with_its_interval(arm_summary: Summary) -> None:
    splits = arm_summary(1.0, 4.0)["splits"]
    figure = plots.split_bars(splits)
    axes = axes_of(figure)
    widths = [patch.get_width() for patch in axes.patches]  # pyright: ignore[reportAttributeAccessIssue]
    assert widths == pytest.approx([0.78] * 4 + [93.0, 88.0, 42.0, 1.0])
    whiskers = [path.get_segments() for path in axes.collections]  # pyright: ignore[reportAttributeAccessIssue]
    ends = [sorted(float(x) for x, _ in segment) for segment in whiskers[1]]
    assert ends[0] == pytest.approx([88.0, 97.0])
    assert ends[2] == pytest.approx([100 * end for end in wilson(0.42 * 128, 128)[1:]])
    labels = [tick.get_text() for tick in axes.get_yticklabels()]
    assert labels[3] == "test_firm (n = 128)\nuntaught firm (control)"
    diamonds = lines(figure)["final, greedy"]
    assert xs(diamonds) == pytest.approx([99.0, 94.0, 48.0, 7.0])


def test_split_bars_of_several_seeds_stand_for_all_of_them(arm_rows: Rows) -> None:
    runs = [[{**row, "seed": seed} for row in arm_rows(seed, scale=0.6 + 0.1 * seed)] for seed in range(4)]
    found = plots.by_split([row for rows in runs for row in rows])
    last = [row for rows in runs for row in rows if row["kind"] == "eval" and row["step"] == 120]
    for split in ("val", "test_names"):
        rates = [row["pass"] for row in last if (row["split"], row["decoding"]) == (split, "sampled")]
        expected = stratified_bootstrap(rates)
        assert found[split]["final_pass"] == expected.estimate
        assert found[split]["final_ci95"] == [expected.low, expected.high]
        greedy = [row["pass"] for row in last if (row["split"], row["decoding"]) == (split, "greedy")]
        assert found[split]["final_greedy_pass"] == pytest.approx(sum(greedy) / 4)
    end = next(row for row in runs[0] if row["kind"] == "eval" and row["step"] == 120)
    assert plots.by_split(runs[0])["val"]["final_ci95"] == list(wilson(round(end["pass"] * end["n"]), end["n"])[1:])


def test_split_bars_leave_out_what_is_missing() -> None:
    figure = plots.split_bars({"val": {"final_pass": 0.5}, "test_n": {}})
    widths = [patch.get_width() for patch in axes_of(figure).patches]  # pyright: ignore[reportAttributeAccessIssue]
    assert widths == [50.0]


def test_arms_comparison_names_staleness(arm_summary: Summary) -> None:
    figure = plots.arms_comparison({"fresh": arm_summary(1.0, 0.0), "stale": {"final_pass": 0.5, "staleness": 16.0}})
    labels = [tick.get_text() for tick in axes_of(figure).get_yticklabels()]
    assert labels == ["fresh\nstaleness 0.0", "stale\nstaleness 16.0"]


@pytest.mark.parametrize("panel", panels.PANELS, ids=lambda panel: panel.name)
def test_every_panel_has_a_baseline_and_its_data(panel: panels.Panel, arm_rows: Rows) -> None:
    rows = arm_rows(0, steps=8)
    figure = panels.diagnostic(rows, panel)
    assert figure is not None
    found = lines(figure)
    drawn = {one.label for one in panel.recorded(rows)}
    assert drawn <= set(found)
    assert len(found) > len(drawn)
    for one in panel.recorded(rows):
        assert ys(found[one.label]) == [row[one.key] for row in rows if row["kind"] == "step"]
        assert found[one.label].get_color() == plots.ROLES[one.role]
    assert len({(one.role, str(one.style)) for one in panel.series}) == len(panel.series), "lines can be told apart"


def test_a_panel_without_data_is_none_and_gaps_stay_gaps() -> None:
    panel = panels.PANELS[0]
    assert panels.diagnostic([{"kind": "step", "step": 1}], panel) is None
    means = [1.0, float("nan"), 3.0]
    rows = [{"kind": "step", "step": i, "replay/staleness/mean": mean} for i, mean in enumerate(means)]
    figure = panels.diagnostic(rows, panel)
    assert figure is not None
    values = ys(lines(figure)["mean"])
    assert values[0] == 1.0
    assert np.isnan(values[1])
    assert values[2] == 3.0


@pytest.mark.parametrize("losses", [[0.5], [0.5, None, 0.25, None, 0.125]])
def test_a_step_between_skipped_ones_is_a_dot(losses: list[float | None]) -> None:
    rows = [{"kind": "step", "step": i + 1, "learn/loss": loss} for i, loss in enumerate(losses)]
    figure = panels.diagnostic(rows, next(p for p in panels.PANELS if p.name == "loss"))
    assert figure is not None
    (dots,) = [line for line in axes_of(figure).get_lines() if line.get_marker() == "."]
    assert ys(dots) == [loss for loss in losses if loss is not None]
    figure.draw_without_rendering()
    assert all(tick == round(tick) for tick in axes_of(figure).get_xticks())


def test_the_gap_alarm_is_a_tenth_of_the_first_step() -> None:
    rows = [{"kind": "step", "step": i, "learn/gap/abs": value} for i, value in enumerate([0.8, 0.4])]
    figure = panels.diagnostic(rows, next(p for p in panels.PANELS if p.name == "gap"))
    assert figure is not None
    assert ys(lines(figure)["alarm: 10 % of the first"]) == pytest.approx([0.08, 0.08])


def test_svg_is_repeatable_prefixed_and_transparent(run_dir: Path) -> None:
    def draw() -> str:
        return plots.svg(plots.arms_comparison({arm.name: arm.summary for arm in read_run(run_dir).arms}), "arms")

    text = draw()
    assert text == draw()
    assert text.startswith("<svg")
    assert text.endswith("</svg>")
    assert all(name.startswith("arms-") for name in re.findall(r'\bid="([^"]+)"', text))
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(re.findall(r'\bid="([^"]+)"', text))
    assert "no-correction" in text
    assert "#ffffff" not in text
    assert "xlink" not in text
    assert "metadata" not in text


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "$\\frac{", "a & b"])
def test_names_are_text_in_figures(name: str, arm_summary: Summary) -> None:
    record: dict[str, Any] = arm_summary(1.0, 4.0)
    text = plots.svg(plots.arms_comparison({name: record, "other": record}), "arms")
    assert "<script" not in text
    assert name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") in text


def test_two_ends_of_greedy_decoding_are_markers_not_a_line(arm_rows: Rows) -> None:
    rows = [row for row in arm_rows(0, steps=60) if row.get("decoding") != "greedy" or row["step"] in (0, 60)]
    greedy = lines(plots.learning_curve(rows, split="val", baseline=0.0))["greedy"]
    assert greedy.get_linestyle() == "None"
    assert len(xs(greedy)) == 2
    several = [{**row, "seed": seed} for seed in (0, 1) for row in rows]
    drawn = axes_of(plots.learning_curve(several, split="val", baseline=0.0)).lines
    assert not [line for line in drawn if line.get_linestyle() == "--" and line.get_linewidth() < 1]


@pytest.mark.parametrize(("top", "scale"), [(1.02, "linear"), (20.0, "log")])
def test_the_ratio_axis_is_logarithmic_only_when_it_spreads(top: float, scale: str) -> None:
    rows = [{"kind": "step", "step": i, "learn/ratio/max": value} for i, value in enumerate([1.0, top])]
    figure = panels.diagnostic(rows, next(p for p in panels.PANELS if p.name == "ratio"))
    assert figure is not None
    assert axes_of(figure).get_yscale() == scale


@pytest.mark.parametrize("norms", [[1.0, 3.0, 400.0], [1.0, 1e2, 1e8], [1.0, 1e-18, 1e6], [0.0, 1.0, 900.0]])
def test_a_run_that_explodes_has_an_axis_with_numbers(norms: list[float]) -> None:
    rows = [{"kind": "step", "step": i, "learn/grad_norm": value} for i, value in enumerate(norms)]
    figure = panels.diagnostic(rows, next(p for p in panels.PANELS if p.name == "grad_norm"))
    assert figure is not None
    axes = axes_of(figure)
    low, high = axes.get_ylim()
    assert axes.get_yscale() == "log"
    assert high < 1e3 * max(norms)
    assert low > 1e-3 * min(norm for norm in norms if norm)
    assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 3


def test_the_panels_of_a_long_run_stay_small() -> None:
    rng = np.random.default_rng(0)
    keys = [one.key for one in next(p for p in panels.PANELS if p.name == "ratio").series]
    rows = [{"kind": "step", "step": i, **dict(zip(keys, 1 + rng.random(len(keys)), strict=True))}
            for i in range(20_000)]
    rows[12_345]["learn/ratio/p99"] = 7.0
    figure = panels.diagnostic(rows, next(p for p in panels.PANELS if p.name == "ratio"))
    assert figure is not None
    edge = np.asarray(axes_of(figure).collections[0].get_paths()[0].vertices)
    assert edge[:, 1].max() == 7.0
    assert len(edge) < 2100
