"""Write what the docs take from the code and from stored results: ``.venv/bin/python docs/reference.py``.

Configuration and metrics come from the code, the results page and the table in the README from ``docs/results/*.json``,
which are ``summary.json`` files of runs, committed as they were written; tables and figure of the studies' pages from
the studies' own tables.
"""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from agentsdpo.benchmarks.horizon.__main__ import results as horizon_results
from agentsdpo.benchmarks.staleness.__main__ import AGES
from agentsdpo.benchmarks.staleness.report import BASELINE
from agentsdpo.benchmarks.staleness.report import results as study_results
from agentsdpo.config import describe
from agentsdpo.formats import duration, interval, number, percent
from agentsdpo.learn.presets import AROUND, PRESETS, TOY
from agentsdpo.metrics import ROW_FIELDS, TABLE
from agentsdpo.plots.studies import age_curve
from agentsdpo.plots.style import svg
from agentsdpo.plots.tables import read_study
from agentsdpo.results import SPLIT_WORDS, rate
from agentsdpo.settings_io import flat
from agentsdpo.stats import Interval, wilson
from agentsdpo.types import Json

DOCS = Path(__file__).resolve().parent
RESULTS, RESULTS_END = "<!-- results: made by docs/reference.py -->", "<!-- end of results -->"
RUNS = ("demo.json", "arms-staleness-8.json")
"""Summaries of single runs among the results."""
MADE = "<!-- Made by docs/reference.py; do not edit. -->"


def configuration() -> str:
    """Every setting by table, then what the presets set."""
    parts = ["# Configuration", MADE, (
        "A run reads one TOML file: `agentsdpo train CONFIG.toml`. What it does not say is the preset's, then the "
        "default. `--set learn.lr=1e-4` overrides one setting; `\"none\"` stands for no value, since TOML has none. "
        "Unknown keys are refused. Defaults of `[learn]` are those of the preset `robust` with the shipped model.")]
    for table in dict.fromkeys(setting.key.rpartition(".")[0] for setting in describe()):
        rows = [(f"`{s.key.rpartition('.')[2]}`", s.expected, _value(s.default), s.description)
                for s in describe() if s.key.rpartition(".")[0] == table]
        parts += [f"## `[{table}]`" if table else "## The run", _table(("key", "value", "default", "meaning"), rows)]
    keys = list(dict.fromkeys(key for preset in (*PRESETS.values(), *TOY.values()) for key in preset))
    chosen = [(f"`learn.{key}`", *(_preset(name, key) for name in PRESETS)) for key in keys]
    about = {name: flat(AROUND.get(name, {})) for name in PRESETS}
    chosen += [(f"`{key}`", *(_value(about[name][key]) if key in about[name] else "–" for name in PRESETS))
               for key in dict.fromkeys(key for one in about.values() for key in one)]
    parts += ["## What the presets set", (
        "`preset = \"...\"` is the starting point of `[learn]` and of what the method needs around it; a dash leaves "
        "the default of the class. In brackets: with the shipped model, which is small and learns at larger rates."),
        _table(("key", *(f"`{name}`" for name in PRESETS)), chosen)]
    return "\n\n".join(parts) + "\n"


def metrics() -> str:
    """Every metric key, then the plain fields."""
    rows = [(f"`{one.pattern}`", one.unit, one.meaning, one.alarm) for one in TABLE]
    plain = [(f"`{key}`", kind, meaning) for kind, fields in ROW_FIELDS.items() for key, meaning in fields.items()]
    return "\n\n".join([
        "# Metrics", MADE, (
            "`metrics.jsonl` of a run holds one JSON object per line: `kind` is `step` (one optimiser step), `eval` "
            "(one evaluation of one split) or `tripwire` (one alarm with its evidence), `step` the optimiser steps "
            "done, `wall_s` seconds since the run began. All other keys are below; `{a,b}` stands for each of the "
            "words, `*` for one word not known beforehand. "
            "`null` is what was not finite."),
        "## Keys `<room>/<quantity>[/<stat>]`", _table(("key", "unit", "meaning", "look closer when"), rows),
        "## Plain fields", _table(("field", "lines", "meaning"), plain)]) + "\n"


def results() -> str:
    """Every stored summary, by arm and split."""
    parts = ["# Results", MADE, (
        "What runs and measurements wrote, kept in `docs/results/`: the `summary.json` of `agentsdpo demo`, then what "
        "was measured of time, memory and room on the disk. The studies of many runs have pages of their own: [how "
        "old the data may be](staleness.md), [how long an episode may be](horizon.md), [the "
        "methods](methods/README.md), [two tenants](proxy.md#two-tenants-end-to-end). Pass: every criterion of an "
        "episode met. 95 % intervals are Wilson's. Sampled decoding at temperature 1 unless it says greedy. One seed. "
        "A commit with a + was measured with changes that were not committed yet.")]
    for name in sorted(RUNS):
        summary = json.loads((DOCS / "results" / name).read_text(encoding="utf-8"))
        parts += [f"## {_command(summary)}", _provenance(summary), summary_table(summary)]
    for path in sorted((DOCS / "results").glob("perf-*.json")):
        room = path.stem.removeprefix("perf-")
        measured = json.loads(path.read_text(encoding="utf-8"))
        parts += [f"## `python -m agentsdpo.benchmarks.perf.{room}`", _machine(measured), figures_table(measured)]
    return "\n\n".join(parts) + "\n"


def readme() -> str:
    """The README with its table of results brought up to date."""
    return _with_results(DOCS.parent / "README.md", "\n\n".join(
        _headline(json.loads((DOCS / "results" / name).read_text(encoding="utf-8")))
        for name in RUNS))


def staleness() -> str:
    """The page of the staleness study with its table brought up to date."""
    found = pq.read_table(DOCS / "results" / "staleness.parquet")
    rows = [(f"`{one.arm}`", str(one.seeds), f"{percent(one.passed.estimate)} {interval(one.passed)}",
             percent(one.greedy), percent(one.score), percent(one.control), f"{one.collapsed} of {one.seeds}",
             f"{100 * one.difference.estimate:+.1f} {interval(one.difference)}".strip() if one.difference else "–")
            for one in study_results(found)]
    head = ("arm", "seeds", "pass, held out", "greedy", "mean score", "untaught firm", "collapsed",
            f"less `{BASELINE}`, points")
    return _with_results(DOCS / "staleness.md", f"{_table(head, rows)}\n\n{_made_on(found)}")


def horizon() -> str:
    """The page of the horizon study with its tables brought up to date."""
    found = pq.read_table(DOCS / "results" / "horizon.parquet")
    scale = json.loads((DOCS / "results" / "horizon-scale.json").read_text(encoding="utf-8"))

    def with_interval(rate: Interval) -> str:
        return f"{percent(rate.estimate)} {interval(rate)}".strip()

    trained = [(one.arm.rpartition("n")[2], f"{one.calls:.0f}", str(one.seeds), number(one.episodes),
                with_interval(one.before), with_interval(one.passed), percent(one.greedy),
                f"{percent(one.score_before.estimate)} → {percent(one.score.estimate)}", percent(one.control))
               for one in horizon_results(found)]
    told = [(str(row["n"]), f"{row['calls']:.0f}", f"{row['branches']:.1f}", str(row["episodes"]),
             with_interval(wilson(row["hinted_pass"] * row["episodes"], row["episodes"])),
             percent(row["unhinted_pass"]), percent(row["hinted_score"]), percent(row["unhinted_score"]))
            for row in scale["rows"]]
    return _with_results(DOCS / "horizon.md", "\n\n".join((
        "Trained:", _table(("clients", "calls", "seeds", "episodes", "pass, before", "after", "after, greedy",
                            "mean score", "untaught firm"), trained), _made_on(found),
        "Not trained, told the rules and not:", _table(
            ("clients", "calls, told", "branches, told", "tasks", "pass, told", "not told", "mean score, told",
             "not told"), told), f"{scale['hardware']}; commit {_commit(scale['commit'])}.")))


def _made_on(found: pa.Table) -> str:
    commits = ", ".join(sorted({one for commit in found["commit"].to_pylist() for one in _commit(commit).split(", ")}))
    return f"{', '.join(sorted(set(found['hardware'].to_pylist())))}; commit {commits}."


def staleness_figure() -> str:
    """What is left after training on data of some age."""
    return svg(age_curve(read_study(DOCS / "results" / "staleness.parquet", AGES)), "staleness") + "\n"


def _with_results(page: Path, results: str) -> str:
    """A page with what stands between the marks replaced."""
    head, _, rest = page.read_text(encoding="utf-8").partition(RESULTS)
    return f"{head}{RESULTS}\n{results}\n{RESULTS_END}{rest.partition(RESULTS_END)[2]}"


def _headline(summary: Json) -> str:
    """One run in the README: a row an arm, the held-out splits pooled."""
    rows = [(f"`{name}`", _rate(arm, "zero_shot"), _rate(arm, "final"), percent(arm["final_greedy_pass"]),
             percent(arm["final_score"])) for name, arm in summary["arms"].items()]
    head = (_command(summary), "before", "after", "after, greedy", "mean score after")
    return f"{_table(head, rows)}\n\n{_provenance(summary)}"


def _command(summary: Json) -> str:
    """What was typed; where it was written to does not matter here."""
    return f"`{re.sub(r' --out [^ ]+', '', summary['command'])}`"


def _provenance(summary: Json) -> str:
    commits = ", ".join(map(_commit, summary["commit"].split(", ")))
    return (f"Staleness {summary['staleness']}, {summary['steps']} steps, {number(summary['episodes'])} single "
            f"episodes an arm, seed {summary['seed']}, {summary['n']} held-out episodes; "
            f"{duration(summary['wall_s'])} in all, {number(summary['peak_rss_mib'])} MiB, {summary['hardware']}; "
            f"commit {commits}.")


def summary_table(summary: Json) -> str:
    """A row for every split of every arm."""
    rows = [(f"`{name}`", SPLIT_WORDS.get(split, split), number(record["n"]), _rate(record, "zero_shot"),
             _rate(record, "final"), percent(record["final_greedy_pass"]), percent(record["final_score"]))
            for name, arm in summary["arms"].items() for split, record in arm["splits"].items()]
    return _table(("arm", "split", "episodes", "before", "after", "after, greedy", "mean score after"), rows)


def _machine(measured: Json) -> str:
    return (f"Of a ratio, above 1 means that this project is better. {measured['machine']}, {measured['cores']} cores. "
            "Load: the system's average when the part had ended.")


def figures_table(measured: Json) -> str:
    """A row for every figure of a benchmark."""
    rows = [(f"`{one['name']}`", number(one["value"]), one["unit"], one["peer"] or "–",
             ", ".join(f"{key} {_shown(value)}" for key, value in one["detail"].items()), _commit(one["commit"]),
             str(one["load"]))
            for one in measured["figures"]]
    return _table(("figure", "value", "unit", "beside", "detail", "commit", "load"), rows)


def _commit(whole: str) -> str:
    """In short, of a resumed run all; a + says that the tree held changes beside it."""
    return ", ".join(one[:7] + "+" * one.endswith("+changes") for one in whole.split(", "))


def _shown(value: Any) -> str:
    return number(value) if isinstance(value, int | float) else str(value)


def _rate(record: Json, when: str) -> str:
    value = rate(record, when)
    return f"{percent(record[f'{when}_pass'])} {interval(value)}".strip()


def _preset(name: str, key: str) -> str:
    usual, toy = (_value(table[key]) if key in table else "–" for table in (PRESETS[name], TOY[name]))
    return usual if toy == "–" else f"{usual} ({toy})"


def _value(value: Any) -> str:
    """As it is written in TOML."""
    return f"`{json.dumps('none' if value is None else value)}`"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


PAGES = {"docs/configuration.md": configuration, "docs/metrics.md": metrics, "docs/results.md": results,
         "docs/staleness.md": staleness, "docs/horizon.md": horizon,
         "docs/images/staleness.svg": staleness_figure, "README.md": readme}

if __name__ == "__main__":
    for page, text in PAGES.items():
        (DOCS.parent / page).write_text(text(), encoding="utf-8")
