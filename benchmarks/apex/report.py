"""Reports: ``report.json``, ``report.md``, ``report.html`` with a page per episode, and a table in the terminal."""

import json
import os
from pathlib import Path

from agentsdpo.benchmarks.apex import pages
from agentsdpo.benchmarks.apex.compare import compare_runs
from agentsdpo.benchmarks.apex.episode import grade_file
from agentsdpo.benchmarks.apex.pages import ends, money, points, visible
from agentsdpo.benchmarks.apex.runfolder import BenchFolder
from agentsdpo.benchmarks.apex.summary import summarise
from agentsdpo.files import write_text
from agentsdpo.formats import duration, interval, number, percent
from agentsdpo.stats import Interval
from agentsdpo.types import Json


def make_report(folder: BenchFolder, against: BenchFolder | None = None, *, force: bool = False) -> Json:
    """Write all reports of a run into its folder; returns what ``report.json`` holds.

    Args:
        folder: of the run, finished or not.
        against: another run, for the ``comparison`` block.
        force: compare runs that were not made alike.

    Raises:
        NotComparable: see :func:`agentsdpo.benchmarks.apex.compare.compare_runs`.
        RunError: records are damaged.
    """
    run = summarise(folder)
    comparison = compare_runs(folder, against, force=force) if against else None
    run["comparison"] = comparison
    write_text(folder.report("report.json"), json.dumps(run, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(folder.report("report.md"), markdown(run))
    for record in folder.records():
        place = folder.episode(record.task_id, record.attempt)
        page = place / "episode.html"
        shown = (place / "trajectory.json", grade_file(place, record.grading), folder.path / "gradings.json")
        if not _newer(page, *shown):
            text = pages.episode_page(folder, record)
            if text is not None:
                page.write_text(text, encoding="utf-8", errors="replace")  # made again from the files if it is lost
    html = pages.report_page(folder, run, comparison)
    write_text(folder.report("report.html"), html.encode("utf-8", "replace").decode())
    return run


def _newer(page: Path, *sources: Path) -> bool:
    """Whether the page was written after everything it shows."""
    times = [os.stat(path).st_mtime_ns for path in (page, *sources) if path.exists()]
    return page.exists() and times[0] >= max(times)


def lines(run: Json) -> list[tuple[str, ...]]:
    """The table of numbers: metric, conditional with interval, strict with interval."""
    overall = run["overall"]
    strict = overall["strict"]
    rows = [(name, percent(found["partial"]), _ends(found), percent(strict[name]["partial"]), _ends(strict[name]))
            for name, found in overall["conditional"].items()]
    for name, found in run["references"].items():
        rows.append((f"pass@1 {visible(name)}", percent(found["pass@1"]["partial"]), _ends(found["pass@1"]), "", ""))
    return rows


def _ends(found: Json) -> str:
    """The interval, and of how many tasks where some have too few attempts."""
    if found["partial"] is None:
        return "null"
    words = interval(Interval(found["partial"], found["low"], found["high"]))
    return words if found["value"] is not None else f"{words} null, {found['n_tasks']}/{found['of_tasks']}"


def markdown(run: Json) -> str:
    """``report.md``: what a pull request or a message needs."""
    overall, first = run["overall"], run["overall"]["conditional"]["pass@1"]
    head = ["| metric | conditional | 95 % interval | strict | 95 % interval |", "|---|---|---|---|---|"]
    table = [f"| {' | '.join(_cell(part) for part in row)} |" for row in lines(run)]
    text = [f"# {_cell(run['benchmark'])} · {_cell(run['agent']['name'])}", "",
            *(f"**{_cell(line)}**\n" for line in run["warnings"]), *head, *table, "",
            f"{overall['n_scored']} of {run['n_asked']} attempts scored on {overall['n_tasks']} tasks in "
            f"{overall['n_worlds']} worlds. A second such run would have to differ by {points(first['detectable'])} in "
            "pass@1 to be told apart (two-sided 5 %, power 80 %, unpaired).", ""]
    if run["domains"]:
        text += ["| domain | tasks | pass@1 | mean score |", "|---|---|---|---|"]
        text += [f"| {_cell(name)} | {one['n_tasks']} | {percent(one['conditional']['pass@1']['partial'])} "
                 f"{ends(one['conditional']['pass@1'])} | {percent(one['conditional']['mean_score']['partial'])} |"
                 for name, one in run["domains"].items()] + [""]
    if run["comparison"]:
        text += _comparison(run["comparison"])
    ended = ", ".join(f"{name} {count}" for name, count in sorted(run["outcomes"].items(), key=lambda p: -p[1]))
    text += [f"Ended: {ended or 'nothing yet'}. Cost: {_cost(run['totals'])}.", "",
             f"Stamps: tasks {run['dataset']['sha256'][:16]}, profile {run['profile']['name']}, budgets "
             f"{run['budgets']['sha256'][:16]}, judge {_cell(run['grading']['judge'].get('model') or 'programs')}, "
             f"seed {run['seed']}, commit {run['environment'].get('commit') or 'not a checkout'}."]
    return "\n".join(text) + "\n"


def _cost(totals: Json) -> str:
    """What all attempts took, unscored ones included."""
    return (f"{money(totals['cost_usd'])}, {number(int(totals['prompt_tokens']))} prompt and "
            f"{number(int(totals['completion_tokens']))} completion tokens, {duration(totals['working_s'])} of working "
            "time" + (f"; judging {money(totals['judge_usd'])}, {number(int(totals['judge_tokens']))} tokens"
                      if totals["judge_tokens"] else ""))


def _comparison(found: Json) -> list[str]:
    """The comparison as lines of markdown."""
    rows = [f"| {name} | {points(one['estimate'])} | [{points(one['low'])}, {points(one['high'])}] | "
            f"{one['p_value']:.4f} | {points(one['detectable'])} | {one['n']} | {len(one['flipped'])} |"
            for name, one in ((key, found[key]) for key in ("pass@1", "mean_score"))]
    warned = [f"**{one['key']} differs: {_cell(one['a'])} and {_cell(one['b'])}**" for one in found["differences"]]
    return [f"## {_cell(found['a'])} minus {_cell(found['b'])}", "", *warned, "",
            "| metric | difference | 95 % interval | p | detectable | tasks | flipped |", f"|{'---|' * 7}",
            *rows, ""]


def _cell(text: object) -> str:
    """Text that stays inside its cell of a markdown table and starts no markup."""
    return "".join(f"\\{char}" if char in "|<>`[]*_\\" else " " if char in "\r\n" else char for char in visible(text))


def print_report(run: Json) -> None:
    """The numbers as a table on stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, markup=False, soft_wrap=True)
    for line in run["warnings"]:
        console.print(Text(f"warning: {line}", style="bold yellow"))
    table = Table(title=Text(visible(f"{run['benchmark']} · {run['agent']['name']}")), title_justify="left")
    for name in ("metric", "conditional", "95 %", "strict", "95 %"):
        table.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
    for row in lines(run):
        table.add_row(*(Text(part) for part in row))
    console.print(table)
    overall, first = run["overall"], run["overall"]["conditional"]["pass@1"]
    ended = ", ".join(f"{name} {count}" for name, count in sorted(run["outcomes"].items(), key=lambda p: -p[1]))
    console.print(f"{overall['n_scored']} of {run['n_asked']} attempts scored; {ended}")
    console.print(f"cost: {_cost(run['totals'])}")
    console.print(f"detectable difference to a second such run: {points(first['detectable'])}")
    if run["comparison"]:
        print_comparison(run["comparison"])


def print_comparison(found: Json) -> None:
    """A comparison as a table on stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, markup=False, soft_wrap=True)
    for one in found["differences"]:
        console.print(Text(f"warning: {one['key']} differs: {one['a']} and {one['b']}", style="bold yellow"))
    for key, what in (("tasks_changed", "tasks"), ("prompts_differ", "prompts")):
        if found[key]:
            console.print(Text(f"warning: the {what} of {len(found[key])} tasks differ", style="bold yellow"))
    title = f"A - B in percentage points: {found['a']} minus {found['b']}"
    table = Table(title=Text(visible(title)), title_justify="left")
    for name in ("metric", "A - B", "95 %", "p", "detectable", "tasks", "flipped"):
        table.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
    for name in ("pass@1", "mean_score"):
        one = found[name]
        ends = interval(Interval(one["estimate"], one["low"], one["high"]))
        table.add_row(name, f"{100 * one['estimate']:+.1f}", ends, f"{one['p_value']:.4f}",
                      points(one["detectable"]).removesuffix(" points"), str(one["n"]), str(len(one["flipped"])))
    console.print(table)
    for one in found["pass@1"]["flipped"][:10]:
        console.print(Text(visible(f"  {one['task_id']}: {percent(one['a'])} and {percent(one['b'])}")))
