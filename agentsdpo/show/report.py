"""One self-contained page about a run, and the curve for a README.

``report.html`` needs no network and no script: figures are inline SVG, the content policy forbids everything but the
page's own styles, and every text that comes from files is escaped. Light and dark follow the reader's system; the
figures take their colours from the page by role. What was not recorded is named, never drawn as zero.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agentsdpo import formats
from agentsdpo.files import write_out
from agentsdpo.results import (
    CONTROL_SPLIT,
    SPLIT_WORDS,
    arm_rate,
    eval_interval,
    evals,
    headline_split,
    rate,
    reached,
    split_words,
    staleness_words,
    summary_split,
    zero_shot,
)
from agentsdpo.runfolder import Arm, RunData, read_run
from agentsdpo.show.pages import Picture, missing_words, picture, render
from agentsdpo.stats import difference
from agentsdpo.types import Json

PROVENANCE = ("command", "commit", "seed", "hardware")
"""Keys of the summary that say where the run comes from, in the order shown."""
COSTS = (("steps", "optimiser steps", formats.number), ("episodes", "episodes", formats.number),
         ("wall_s", "wall clock", formats.duration), ("peak_rss_mib", "peak memory [MiB]", formats.number))
"""Keys, words and formats of what an arm cost."""


def write_report(run_dir: Path | str, out: Path | str | None = None) -> Path:
    """Write ``report.html`` into a run folder, or another file, for one arm or several, finished or not.

    Returns:
        The path written.

    Raises:
        RunError: the folder is not a run, or one of its files is broken.
    """
    run = read_run(run_dir)
    place = Path(out) if out else run.path / "report.html"
    return write_out(place, render("report.html", **_page(run)))


def readme_curve(run_dir: Path | str, out: Path | str) -> Path:
    """Write one SVG: pass rate on held-out names against episodes, zero-shot line, staleness stated.

    It stands alone on light and on dark pages. Other arms of the run are thin grey lines.

    Raises:
        RunError: the folder is not a run, or holds no evaluation.
    """
    from agentsdpo import plots
    from agentsdpo.errors import RunError

    run = read_run(run_dir)
    arm, split = run.main, headline_split(run.main.rows)
    if split is None:
        raise RunError(f"{run.path} has no evaluation in arm {arm.name!r}",
                       fix="let the run reach its zero-shot evaluation first")
    others = {other.name: other.rows for other in run.arms if other is not arm and evals(other.rows, split)}
    figure = plots.learning_curve(arm.rows, split=split, baseline=zero_shot(arm, split), context=others,
                                  size=(7.6, 4.2), below=staleness_words(arm))
    path = Path(out)
    return write_out(path, plots.svg(figure, "curve") + "\n")


# ------------------------------------------------------------------------------------------------ page content


def _page(run: RunData) -> dict[str, Any]:
    """Everything the template prints."""
    main, split = run.main, headline_split(run.main.rows)
    curves, no_curves = _curves(run, split)
    costs = [cost for cost in COSTS if any(formats.is_number(record_of(arm).get(cost[0])) for arm in run.arms)]
    splits = main.summary.get("splits") or {}
    diagnostics = [(arm.name, *_diagnostics(arm, i)) for i, arm in enumerate(_main_first(run))]
    return {
        "title": run.path.resolve().name, "roles": ("student", "teacher", "behaviour", "hint"),
        "provenance": [(key, plain(run.summary[key])) for key in PROVENANCE if run.summary.get(key) is not None],
        "unstated": [key for key in PROVENANCE if run.summary.get(key) is None],
        "configs": _configs(run),
        "main": _arm_row(main, costs), "staleness_words": staleness_words(main), "finished": bool(run.summary),
        "arms": [_arm_row(arm, costs) for arm in run.arms], "costs": [words for _, words, _ in costs],
        "missing_words": missing_words,
        "curves": curves, "missing_curves": no_curves, "evaluations": _evaluations(main),
        "arms_picture": _arms_picture(run), "splits": [_split_row(name, splits[name]) for name in splits],
        "splits_picture": _splits_picture(splits), "control": _control(main), "diagnostics": diagnostics,
    }


def _configs(run: RunData) -> list[tuple[str, str]]:
    """The settings of each arm by name, and those of the run unless they are an arm's."""
    of_arms = [(arm.name, arm.config) for arm in run.arms if arm.config]
    own = bool(run.config) and run.config not in [text for _, text in of_arms]
    return [("run", run.config)] * own + of_arms


def _main_first(run: RunData) -> list[Arm]:
    return [run.main, *(arm for arm in run.arms if arm is not run.main)]


def plain(value: Any) -> str:
    """A value of the summary as one readable line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {plain(part)}" for key, part in value.items() if part is not None)
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return str(value)


def record_of(arm: Arm) -> Json:
    """An arm's summary, with what its rows say where it has none."""
    return {**reached(arm), **arm.summary}


def _arm_row(arm: Arm, costs: Sequence[tuple[str, str, Callable[[Any], str]]]) -> Json:
    """One line of the headline table."""
    record, split = record_of(arm), summary_split(arm.summary)
    of_split = (record.get("splits") or {}).get(split) or {}
    before, after = arm_rate(arm, "zero_shot"), arm_rate(arm, "final")
    return {
        "name": arm.name, "split": split_words(arm.summary), "n": record.get("n"),
        "before": before, "after": after, "gain": _gain(before, after),
        "greedy": record.get("final_greedy_pass", of_split.get("final_greedy_pass")),
        "staleness": record.get("staleness"),
        "costs": [formatted(record.get(key)) for key, _, formatted in costs],
    }


def _split_row(name: str, record: Json) -> Json:
    before, after = rate(record, "zero_shot"), rate(record, "final")
    return {"name": name, "words": SPLIT_WORDS.get(name, ""), "n": record.get("n"), "before": before, "after": after,
            "gain": _gain(before, after), "greedy_before": record.get("zero_shot_greedy_pass"),
            "greedy": record.get("final_greedy_pass")}


def _gain(before: Any, after: Any) -> str:
    """Percentage points gained, with a sign; a dash when either end is missing."""
    return f"{100 * (after.estimate - before.estimate):+.1f}" if before and after else formats.MISSING


def _control(arm: Arm) -> str:
    """What the untaught firm says about leaks, in a sentence, and whether there is a gain to speak of."""
    record = (arm.summary.get("splits") or {}).get(CONTROL_SPLIT)
    before, after = (rate(record, "zero_shot"), rate(record, "final")) if record else (None, None)
    if not before or not after:
        return (f"The control split {CONTROL_SPLIT} (a firm whose rules were never taught) was not evaluated, "
                "so nothing here rules out that a gain comes from elsewhere than the taught rules.")
    words = f"{formats.percent(before.estimate)} before and {formats.percent(after.estimate)} after training"
    moved = difference(after, before)
    if moved.low > 0:
        return (f"Warning: the pass rate on the untaught firm rose above zero-shot, {words}. Its rules were never "
                "taught, so look for a leak before trusting a gain elsewhere.")
    gain = ("The gain elsewhere is what was learned, not a habit that fits any firm." if _gained(arm) else
            "No gain is shown elsewhere: the final pass rate is not above the zero-shot one beyond chance.")
    if moved.high < 0:
        return (f"The pass rate on the untaught firm fell below zero-shot, {words}: training took away some of what "
                f"the policy could do before. {gain}")
    return (f"The untaught firm cannot be told from its zero-shot level, {words}, as it must be: its rules were never "
            f"taught. {gain}")


def _gained(arm: Arm) -> bool:
    """Whether the final pass rate lies above the zero-shot one, by the interval of their difference."""
    before, after = arm_rate(arm, "zero_shot"), arm_rate(arm, "final")
    return before is not None and after is not None and difference(after, before).low > 0


def _evaluations(arm: Arm) -> list[Json]:
    """Every evaluation as a line of numbers, the text twin of the curves."""
    return [{**{key: row.get(key) for key in ("step", "split", "decoding", "n", "episodes", "score")},
             "rate": row.get("pass"), "interval": eval_interval(row)} for row in evals(arm.rows)]


# ---------------------------------------------------------------------------------------------------- pictures


def _curves(run: RunData, split: str | None) -> tuple[list[Picture], list[str]]:
    """Pass rate and score against what was spent, and the ones that could not be drawn."""
    from agentsdpo import plots

    arm, pictures, missing = run.main, [], []
    others = {other.name: other.rows for other in run.arms if other is not arm and evals(other.rows, split)}
    wanted = [("pass", x) for x in ("episodes", "env_steps", "wall_s")] + [("score", "episodes")]
    for value, x in wanted:
        if split is None or not plots.curve_points(evals(arm.rows, split), x, value):
            missing.append(f"{plots.VALUES[value][0]} against {plots.AXES[x]}")
            continue
        figure = plots.learning_curve(arm.rows, x=x, split=split, value=value, context=others,
                                      baseline=zero_shot(arm, split, value), size=(5.6, 3.9))
        caption = f"{plots.VALUES[value][0].capitalize()} on {split} against {plots.AXES[x]}, arm {arm.name}"
        pictures.append(picture(figure, f"{value}-{x}", caption))
    return pictures, missing


def _splits_picture(splits: Mapping[str, Json]) -> Picture | None:
    from agentsdpo import plots

    drawn = {name: record for name, record in splits.items() if rate(record, "zero_shot") or rate(record, "final")}
    if not drawn:
        return None
    return picture(plots.split_bars(drawn), "splits", "Zero-shot against final pass rate of each split", wide=True)


def _arms_picture(run: RunData) -> Picture | None:
    from agentsdpo import plots

    drawn = {arm.name: arm.summary for arm in run.arms if rate(arm.summary, "final")}
    if len(drawn) < 2:
        return None
    return picture(plots.arms_comparison(drawn), "arms", "Pass rate of each arm before and after", wide=True)


def _diagnostics(arm: Arm, index: int) -> tuple[list[Picture], list[str]]:
    """The panels of one arm, and the keys of those without data."""
    from agentsdpo.plots import panels

    pictures: list[Picture] = []
    missing: list[str] = []
    for panel in panels.PANELS:
        figure = panels.diagnostic(arm.rows, panel)
        if figure is None:
            missing += [series.key for series in panel.series]
        else:
            pictures.append(picture(figure, f"{panel.name}-{index}", f"{panel.title}, arm {arm.name}", panel.title))
    return pictures, missing
