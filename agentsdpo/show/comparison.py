"""Two runs on one page: what differs in their settings, what came out of each, and whether the two can be told apart.

Rates are compared as independent ones (:func:`agentsdpo.stats.difference`). What both did not record is named, and what
makes the comparison unfair (another evaluation, another machine) stands above the numbers.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from agentsdpo import formats
from agentsdpo.files import write_out
from agentsdpo.results import SPLIT_WORDS, arm_rate, evals, headline_split, rate, split_words
from agentsdpo.runfolder import Arm, RunData, parsed, read_run
from agentsdpo.settings_io import flat
from agentsdpo.show.console import clean
from agentsdpo.show.pages import Picture, missing_words, picture, render
from agentsdpo.show.report import COSTS, PROVENANCE, plain, record_of
from agentsdpo.stats import Interval, difference
from agentsdpo.types import Json

_IGNORED = ("name",)
"""Settings that may differ without making a difference."""


def compare(a: Path | str, b: Path | str) -> Json:
    """Numbers of two runs, the main arm of each, as JSON; rates and differences are ``[estimate, low, high]``, None
    where one is not known or the two are of different tasks.

    Returns:
        ``a``, ``b`` (name, folder and arm), ``verdict``, ``warnings``, ``rates``, ``splits`` (final pass rates) and
        ``settings`` (those that differ).

    Raises:
        RunError: one of the folders is not a run, or one of its files is broken.
    """
    runs = _named(read_run(a), read_run(b))
    return _numbers(runs, _content(runs))


def _numbers(runs: Mapping[str, RunData], content: Json) -> Json:
    about = {key: {"name": name, "run": str(run.path), "arm": run.main.name}
             for key, (name, run) in zip("ab", runs.items(), strict=True)}
    return {**about, "verdict": content["verdict"], "warnings": content["warnings"],
            **{key: [_as_json(row) for row in content[key]] for key in ("rates", "splits")},
            "settings": [dict(zip(("key", "a", "b"), row, strict=True)) for row in content["settings"]]}


def write_comparison(a: Path | str, b: Path | str, out: Path | str | None = None) -> tuple[Path, Json]:
    """Write a page about two runs, ``A/compare-<B>.html`` when no other place is given.

    Returns:
        Where it is, and what :func:`compare` returns.

    Raises:
        RunError: as :func:`compare`.
    """
    runs = _named(read_run(a), read_run(b))
    (first, second), content = runs, _content(runs)
    place = Path(out) if out else Path(a) / f"compare-{Path(b).resolve().name}.html"
    write_out(place, render("compare.html", title=f"{first} against {second}", a=first, b=second,
                            missing_words=missing_words, **content, **_pictures(runs)))
    return place, _numbers(runs, content)


def print_comparison(found: Json) -> None:
    """The numbers of :func:`compare` as a table on stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for i, name in enumerate(("pass", found["a"]["name"], found["b"]["name"], "difference [points]")):
        table.add_column(Text(clean(name)), justify="right" if i else "left", overflow="fold")
    for row in [*found["rates"], *found["splits"]]:
        cells = [" ".join((formats.percent(one[0]), _ends(one))).strip() if one else formats.MISSING
                 for one in (row["a"], row["b"])]
        gap = row["difference"]
        table.add_row(*map(Text, (clean(row["name"]), *cells, f"{100 * gap[0]:+.1f} {_ends(gap)}" if gap else "")))
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    for words in found["warnings"]:
        console.print(Text(clean(f"note: {words}")))
    for row in found["settings"]:
        console.print(Text(clean(f"{row['key']}: {row['a']} against {row['b']}")))
    console.print(Text(clean(found["verdict"]), style="bold"))


def _ends(found: list[float]) -> str:
    return formats.interval(Interval(*(math.nan if part is None else part for part in found)))


def _named(a: RunData, b: RunData) -> dict[str, RunData]:
    """Both runs under names that differ: as much of the ends of their paths as that takes, else A and B."""
    paths = [run.path.resolve().parts for run in (a, b)]
    for i in range(1, max(map(len, paths)) + 1):
        first, second = (str(Path(*parts[-i:])) for parts in paths)
        if first != second:
            return {first: a, second: b}
    return {"A": a, "B": b}


# --------------------------------------------------------------------------------------------------------- numbers


def _content(runs: Mapping[str, RunData]) -> Json:
    """What the page says in words and numbers."""
    a, b = runs.values()
    arms = a.main, b.main
    rates = {when: [arm_rate(arm, when) for arm in arms] for when in ("zero_shot", "final")}
    apart = _apart(runs)
    rows = [_row(f"{when.replace('_', '-')} pass", *found) for when, found in rates.items()]
    return {
        "verdict": apart or _verdict(runs, *rates["final"]), "warnings": list(_warnings(a, b)),
        "settings": _settings(a, b), "rates": [{**row, "difference": None} for row in rows] if apart else rows,
        "splits": [_split_row(name, arms) for name in _splits(arms[0]) if name in _splits(arms[1])],
        "costs": [[words, *(shown(record_of(arm).get(key)) for arm in arms)] for key, words, shown in COSTS],
        "provenance": _provenance(a, b)}


def _as_json(row: Json) -> Json:
    """A row of rates as JSON: intervals as lists, what is not known as None."""
    return {key: [None if math.isnan(part) else part for part in value] if isinstance(value, Interval) else value
            for key, value in row.items()}


def _row(words: str, a: Interval | None, b: Interval | None) -> Json:
    return {"name": words, "words": "", "a": a, "b": b, "difference": difference(a, b) if a and b else None}


def _split_row(name: str, arms: tuple[Arm, Arm]) -> Json:
    a, b = (rate(_splits(arm)[name], "final") for arm in arms)
    return {**_row(name, a, b), "words": SPLIT_WORDS.get(name, "")}


def _splits(arm: Arm) -> Mapping[str, Json]:
    return arm.summary.get("splits") or {}


def _apart(runs: Mapping[str, RunData]) -> str:
    """That the pass rates of two runs speak of different splits, in a sentence; empty where they do not."""
    told = {name: split_words(run.main.summary) for name, run in runs.items()}
    if not all(told.values()) or len(set(told.values())) == 1:
        return ""
    return (f"The pass rates are of different tasks ({'; '.join(f'{name}: {split}' for name, split in told.items())}), "
            "so they cannot be held against each other: compare the splits that both played.")


def _verdict(names: Iterable[str], a: Interval | None, b: Interval | None) -> str:
    """Whether the two can be told apart, in a sentence."""
    if a is None or b is None:
        return "One of the runs has no final pass rate yet, so the two cannot be held against each other."
    (name_a, name_b), gap = names, difference(a, b)
    points = f"{100 * gap.estimate:+.1f} points [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]"
    if math.isnan(gap.low):
        return f"{name_a} minus {name_b}: {100 * gap.estimate:+.1f} points, of unknown certainty."
    if gap.low > 0 or gap.high < 0:
        better, worse = (name_a, name_b) if gap.low > 0 else (name_b, name_a)
        return f"{better} passes more often than {worse}: {name_a} minus {name_b} is {points}."
    return f"The two cannot be told apart: {name_a} minus {name_b} is {points}."


def _settings(a: RunData, b: RunData) -> list[tuple[str, str, str]]:
    """Settings of the main arms that both have and that differ: key, value in A, value in B."""
    mine, other = _set(a), _set(b)
    return [(key, str(value), str(other[key])) for key, value in mine.items()
            if key in other and value != other[key] and key not in _IGNORED]


def _set(run: RunData) -> Json:
    """Settings of the main arm by dotted key."""
    return flat(parsed(run.main.config or run.config, run.path))


def _warnings(a: RunData, b: RunData) -> Iterator[str]:
    """What makes the two unlike in more than what was tried."""
    for name, run in (("The first", a), ("The second", b)):
        if not run.summary:
            yield f"{name} run has not finished: its numbers are as far as it got."
    sizes = [{(row.get("split"), row.get("n")) for row in evals(run.main.rows)} for run in (a, b)]
    if all(sizes) and not sizes[0] & sizes[1]:
        yield "The two were evaluated on other splits or other numbers of episodes."
    if lone := _set(a).keys() ^ _set(b).keys():
        many = f"{len(lone)} settings are" if len(lone) > 1 else "One setting is"
        yield f"{many} stored with one of the two alone: {', '.join(sorted(lone)[:5])}" + (
            ", ..." if len(lone) > 5 else ".")
    machines = [plain(run.summary.get("hardware")) for run in (a, b)]
    if all(machines) and machines[0] != machines[1]:
        yield f"They ran on different machines ({machines[0]}; {machines[1]}): wall clocks cannot be compared."
    commits = [str(run.summary.get("commit") or "") for run in (a, b)]
    if all(commits) and commits[0] != commits[1]:
        yield f"They ran with different code: commit {commits[0][:7]} and {commits[1][:7]}."


def _provenance(a: RunData, b: RunData) -> list[tuple[str, str, str]]:
    def told(run: RunData, key: str) -> str:
        return plain(run.summary[key]) if run.summary.get(key) is not None else formats.MISSING

    return [(key, told(a, key), told(b, key)) for key in PROVENANCE
            if {told(a, key), told(b, key)} != {formats.MISSING}]


# -------------------------------------------------------------------------------------------------------- pictures


def _pictures(runs: Mapping[str, RunData]) -> Json:
    """Curves, splits and diagnostics of both, and the names of those that one of them lacks."""
    from agentsdpo.plots import panels, versus

    rows = {name: run.main.rows for name, run in runs.items()}
    curves, missing = _curves(rows)
    found: list[Picture] = []
    for panel in panels.PANELS:
        figure = versus.versus_panel(panel, rows)
        if figure is None:
            missing.append(versus.leading(panel).key)
        else:
            title = f"{panel.title}: {versus.leading(panel).label}" if len(panel.series) > 1 else panel.title
            found.append(picture(figure, f"panel-{panel.name}", f"{title}, both runs", title))
    splits = {name: _splits(run.main) for name, run in runs.items()}
    drawn = None
    if set.intersection(*map(set, splits.values())):
        drawn = picture(versus.versus_splits(splits), "splits", "Final pass rate of both runs on each split", wide=True)
    return {"curves": curves, "diagnostics": found, "missing": missing, "splits_picture": drawn}


def _curves(rows: Mapping[str, Any]) -> tuple[list[Picture], list[str]]:
    """Pass rate and score of the split that both runs followed."""
    from agentsdpo import plots
    from agentsdpo.plots import versus

    known = [{row["split"] for row in evals(own)} for own in rows.values()]
    split = headline_split([row for own in rows.values() for row in evals(own) if row["split"] in known[0] & known[1]])
    pictures, missing = [], []
    for value, x in [("pass", x) for x in ("episodes", "env_steps", "wall_s")] + [("score", "episodes")]:
        words = f"{plots.VALUES[value][0]} against {plots.AXES[x]}"
        points = [plots.curve_points(evals(own, split, "sampled"), x, value) for own in rows.values()]
        if split is None or not all(points):
            missing.append(words)
            continue
        figure = versus.versus_curve(rows, split=split, x=x, value=value)
        pictures.append(picture(figure, f"{value}-{x}", f"{words.capitalize()} on {split}, both runs"))
    return pictures, missing
