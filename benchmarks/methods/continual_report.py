"""The continual study in numbers and one figure, from the rows of its table.

    python -m agentsdpo.benchmarks.methods.continual_report

prints the numbers, draws ``docs/images/continual.svg`` and puts the numbers into ``docs/methods/continual.md``.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from agentsdpo.benchmarks.methods.continual_stream import House
from agentsdpo.benchmarks.study import COLUMNS
from agentsdpo.files import write_text
from agentsdpo.plots.style import ROLES, STYLE, svg
from agentsdpo.stats import over_seeds
from agentsdpo.types import Json

EXTRA = ("before", "after", "entropy", "top_share", "invented", "craft", "valid", "gated")
"""Columns of this study. ``before``, ``after``: share of choices that are the rules of the first and of the second
firm; ``entropy``, ``top_share``, ``invented``: how settled choices are; ``craft``: criteria without house rules;
``valid``: calls that could be run; ``gated``: share of tokens that the turn gate left out."""
SCHEMA = pa.schema([*COLUMNS, *(pa.field(name, pa.float64()) for name in EXTRA), pa.field("rows", pa.int64())])
TABLE = Path("docs/results/continual.parquet")
PAGE = Path("docs/methods/continual.md")
Record = dict[str, float | None]
"""Numbers of one run by name."""
MARKS = "<!-- numbers -->", "<!-- end of numbers -->"
"""What stands around the numbers in the page."""
KEPT = 0.95
"""Share of an earlier skill that is to be left."""
BRAKED = "#5b8c5a"
STYLES: dict[str, tuple[str, Any]] = {
    "sdpo-earlier": (ROLES["student"], "-"), "sdpo-earlier-half": (ROLES["student"], (0, (7, 1.5, 1.5, 1.5))),
    "sdpo-earlier-half-x4": (ROLES["teacher"], "-"), "sdpo-earlier-half-x4-4e-4": (ROLES["teacher"], (0, (5, 2))),
    "sft-retries-earlier-half-x4": ("#b85c96", (0, (7, 1.5, 1.5, 1.5))),
    "sdpo-replay": (ROLES["student"], (0, (5, 2))),
    "sdpo-fresh": (ROLES["student"], (0, (1, 1.2))), "sdpo-as-said": (ROLES["hint"], (0, (5, 2))),
    "sft-retries-earlier": ("#b85c96", "-"), "sft-retries": ("#b85c96", (0, (5, 2))),
    "sft-words": (ROLES["behaviour"], "-"),
    "conversations": (BRAKED, (0, (5, 2))), "sdpo-replay-gate": (BRAKED, (0, (7, 1.5, 1.5, 1.5))),
    "sdpo-replay-pull": (BRAKED, (0, (1, 1.2))), "conversations-half-x4-4e-4": (BRAKED, "-")}
"""Colour says what is learnt from (SDPO, second attempts, words), the line what is replayed."""


def read(path: Path) -> list[Json]:
    """Rows of the table; none when there is no file yet."""
    return pq.read_table(path).to_pylist() if path.exists() else []


def ends(rows: Iterable[Json]) -> dict[str, list[Record]]:
    """What each arm came to, one record per seed; see :func:`record`."""
    runs: dict[tuple[str, int], list[Json]] = {}
    for row in rows:
        runs.setdefault((row["arm"], row["seed"]), []).append(row)
    found: dict[str, list[Record]] = {}
    for (arm, _), own in sorted(runs.items(), key=lambda item: (list(STYLES).index(item[0][0]), item[0][1])):
        found.setdefault(arm, []).append(record(own))
    return found


def record(rows: Sequence[Json]) -> Record:
    """Numbers of one run, fractions.

    Returns:
        ``stream``: mean score of the requests, each before it was learnt from; ``learnt``, ``followed``: pass rate on
        unseen clients at the change and at the end, by the rules that held; ``old``: share of choices at the end that
        are the first firm's; ``kept``: mean over earlier skills of what is left of each at the end, none above 1;
        ``worst``: the least of these; ``invented``, ``entropy``: of untaught work, at the end; ``valid``: calls that
        could be run, at the end; and ``first_...`` of the seed model. None where no choice was made.
    """
    last, change = max(row["step"] for row in rows), _change(rows)
    taught, untaught = ({row["step"]: row for row in rows if row["split"] == split} for split in ("taught", "untaught"))
    skills = {split: {row["step"]: skill(row) for row in rows if row["split"] == split}
              for split in {row["split"] for row in rows if row["split"].startswith("skill: ")}}
    left = [min(1.0, values[last] / values[0]) for values in skills.values()]
    valid = [row["valid"] for row in rows if row["step"] == last and row["split"] != "stream"]
    return {"stream": fmean(row["score"] for row in rows if row["split"] == "stream"),
            "learnt": taught[change]["pass"], "followed": taught[last]["pass"], "old": taught[last]["before"],
            "kept": fmean(left), "worst": min(left), "invented": untaught[last]["invented"],
            "entropy": untaught[last]["entropy"], "valid": min(valid), "first_invented": untaught[0]["invented"],
            "first_entropy": untaught[0]["entropy"]}


def _change(rows: Sequence[Json]) -> int:
    """The step at which the rules changed: skills are played there, besides at both ends."""
    return sorted({row["step"] for row in rows if row["split"].startswith("skill: ")})[1]


def skill(row: Json) -> float:
    """The score of an earlier skill: pass rate where the rules are told, else the criteria that need none."""
    return float(row["pass"] if row["split"].startswith("skill: told") else row["craft"])


def lines(rows: Sequence[Json]) -> list[str]:
    """A Markdown table: means over seeds, with the range where there are several."""
    keys = ("stream", "learnt", "followed", "old", "kept", "worst", "valid", "invented", "entropy")
    found = [f"| arm | seeds | {' | '.join(keys)} |", f"|{' --- |' * (len(keys) + 2)}"]
    for arm, seeds in ends(rows).items():
        cells = [_cell([one[key] for one in seeds]) for key in keys]
        found.append(f"| `{arm}` | {len(seeds)} | {' | '.join(cells)} |")
    first = {key: sorted({one[f"first_{key}"] for seeds in ends(rows).values() for one in seeds})
             for key in ("invented", "entropy")}
    shared = [overlap(House.of(seed)) for seed in sorted({row["seed"] for row in rows})]
    return [*found, "", f"In percent. Seed model: invented {_cell(first['invented'])}, entropy "
            f"{_cell(first['entropy'])}. The two firms have {_cell(shared)} of the taught rules in common."]


def overlap(house: House) -> float:
    """Share of the taught rules that are the same before and after the change: what ``old`` is at least, in the end.

    >>> round(overlap(House.of(0)), 2)
    0.33
    """
    return fmean(house.after.firm.rules(kind, "desk-mini")[slot] == option for kind in house.taught
                 for slot, option in house.before.firm.rules(kind, "desk-mini").items())


def put(numbers: Sequence[str], page: str) -> str:
    """A page with the numbers in the place of those it had.

    >>> put(["| new |"], "a\\n<!-- numbers -->\\nold\\n<!-- end of numbers -->\\nb").splitlines()
    ['a', '<!-- numbers -->', '| new |', '<!-- end of numbers -->', 'b']
    """
    head, _, rest = page.partition(MARKS[0])
    return "".join((head, MARKS[0], "\n", "\n".join(numbers), "\n", MARKS[1], rest.partition(MARKS[1])[2]))


def _cell(values: Sequence[float | None]) -> str:
    """Mean and range in percent, over the seeds that have a value: who makes no call chooses nothing.

    >>> _cell([0.5]), _cell([0.5, 0.75]), _cell([None])
    ('50', '62 (50-75)', '–')
    """
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    middle = f"{100 * fmean(known):.0f}"
    low, high = (f"{100 * end:.0f}" for end in (min(known), max(known)))
    return middle if low == high else f"{middle} ({low}-{high})"


@matplotlib.rc_context(STYLE)
def figure(rows: Sequence[Json]) -> Figure:
    """Three panels: rules followed along the stream, earlier skills kept, rules invented for untaught work."""
    drawn = Figure(figsize=(9.6, 8.6), layout="constrained")
    grid = drawn.add_gridspec(2, 2, height_ratios=(1, 1))
    curve, kept, invented = drawn.add_subplot(grid[0, :]), drawn.add_subplot(grid[1, 0]), drawn.add_subplot(grid[1, 1])
    for axes in (curve, kept, invented):
        axes.set_axisbelow(True)
    _curves(curve, rows)
    found = ends(rows)
    _dots(kept, {arm: [one["kept"] for one in seeds] for arm, seeds in found.items()},
          "Earlier skills kept at the end", 100 * KEPT, f"target {100 * KEPT:.0f} %")
    first = fmean(one["first_invented"] or 0.0 for seeds in found.values() for one in seeds)
    _dots(invented, {arm: [one["invented"] for one in seeds] for arm, seeds in found.items()},
          "Choices that became an untaught rule", 100 * first, "seed model")
    invented.set_yticklabels([])
    drawn.legend(*curve.get_legend_handles_labels(), loc="outside lower left", ncols=3, handlelength=2.6)
    return drawn


def _curves(axes: Axes, rows: Sequence[Json]) -> None:
    """Share of choices that follow the rules in force, in two parts: those of either firm, which meet at the change."""
    change = _change(rows)
    for arm, (colour, line) in STYLES.items():
        own = [row for row in rows if row["arm"] == arm and row["split"] == "taught"]
        seeds = sorted({row["seed"] for row in own})
        for firm, part in (("before", [r for r in own if r["step"] <= change]),
                           ("after", [r for r in own if r["step"] >= change])):
            for seed in seeds if len(seeds) > 1 else ():
                _line(axes, {row["step"]: [row[firm]] for row in part if row["seed"] == seed}, color=colour,
                      linestyle=line, linewidth=0.7, alpha=0.4)
            by_step: dict[int, list[float]] = {}
            for row in part:
                by_step.setdefault(row["step"], []).append(row[firm])
            if by_step:
                _line(axes, by_step, color=colour, linestyle=line, linewidth=2.4, marker="o", markersize=3.5,
                      label=f"{arm} ({len(seeds)})" if firm == "before" else None)
    axes.axhline(25, color=ROLES["ink"], linestyle=(0, (6, 3)), linewidth=1.2, label="guessing")
    axes.axvline(change, color=ROLES["ink"], linewidth=1.2)
    axes.annotate("the rules change", (change, 100), (5, -2), textcoords="offset points", fontsize=9)
    axes.set(ylim=(-3, 104), xlabel="steps of 16 requests", ylabel="choices by the rules [%]")
    axes.set_title("Rules in force that are followed, unseen clients (bold: IQM of seeds)")


def _line(axes: Axes, points: Mapping[int, Sequence[float]], **style: Any) -> None:
    steps = sorted(points)
    axes.plot(steps, [100 * over_seeds(points[step]).estimate for step in steps], **style)


def _dots(axes: Axes, values: Mapping[str, Sequence[float | None]], title: str, line: float, words: str) -> None:
    """One row per arm: seeds faint, the interquartile mean with its 95 % interval; no dot for who made no choice."""
    for place, (arm, seeds) in enumerate(values.items()):
        own = [one for one in seeds if one is not None]
        if not own:
            axes.annotate("makes no call", (24, place), va="center", fontsize=9)
            continue
        colour, middle = STYLES[arm][0], over_seeds(own)
        axes.plot([100 * one for one in own], [place] * len(own), "o", color=colour, alpha=0.35, markersize=5)
        if len(own) > 1:
            axes.plot([100 * middle.low, 100 * middle.high], [place, place], color=colour, linewidth=2)
        axes.plot([100 * middle.estimate], [place], "o", color=colour, markersize=8)
    axes.axvline(line, color=ROLES["ink"], linestyle=(0, (6, 3)), linewidth=1.2)
    side = -1 if line > 50 else 1
    axes.annotate(words, (line, len(values) - 0.45), (4 * side, 0), textcoords="offset points", fontsize=9,
                  ha="right" if side < 0 else "left")
    axes.set_yticks(range(len(values)), list(values))
    axes.set(xlim=(-3, 104), ylim=(len(values) - 0.3, -0.6), xlabel="share [%]")
    axes.set_title(title)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--table", type=Path, default=TABLE, help=f"of the study; {TABLE}")
    parser.add_argument("--out", type=Path, default=Path("docs/images/continual.svg"), help="the figure")
    parser.add_argument("--page", type=Path, default=PAGE, help=f"that holds the numbers; {PAGE}")
    args = parser.parse_args(arguments)
    rows = read(args.table)
    for line in lines(rows):
        print(line)  # noqa: T201
    write_text(args.out, svg(figure(rows), "continual") + "\n")
    write_text(args.page, put(lines(rows), args.page.read_text()))


if __name__ == "__main__":
    sys.exit(main())
