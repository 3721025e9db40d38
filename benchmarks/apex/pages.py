"""``report.html`` and one page per episode: no script, no network, nothing an agent wrote is anything but text.

Every text is escaped by the template engine, and what a reader could not see (control characters, zero-width and
bidirectional marks) is spelt out, so that a page shows what was said and does nothing else.
"""

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from agentsdpo import formats
from agentsdpo.benchmarks.apex import shapes
from agentsdpo.benchmarks.apex.episode import grade_file
from agentsdpo.benchmarks.apex.records import UNSCORED, Attempt
from agentsdpo.benchmarks.apex.runfolder import BenchFolder, folder_name
from agentsdpo.replay.formats.shapes import text_of
from agentsdpo.results import criteria_columns
from agentsdpo.show import pages
from agentsdpo.types import Json

MOST_SHOWN = 20_000
"""Characters of one message on an episode's page."""
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
                     "\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff]")


def visible(text: object) -> str:
    """Text in which nothing hides: control, zero-width and bidirectional characters are spelt out.

    >>> visible("a\\x1b[2J" + chr(0x202e) + "b")
    'a‹U+001B›[2J‹U+202E›b'
    """
    return _HIDDEN.sub(lambda found: f"‹U+{ord(found[0]):04X}›", "" if text is None else str(text))


def ends(found: Json) -> str:
    """The interval of an estimate and what it is of, in words."""
    if found["partial"] is None:
        return "no task has enough attempts"
    words = f"95 %: [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"
    return words if found["value"] is not None else f"{words}, {found['n_tasks']} of {found['of_tasks']} tasks"


def points(value: Any) -> str:
    """A difference of two rates in percentage points.

    >>> points(0.119), points(-0.02), points(None)
    ('11.9 points', '-2.0 points', '–')
    """
    return f"{100 * value:.1f} points" if formats.is_number(value) else formats.MISSING


def money(value: Any) -> str:
    """Dollars.

    >>> money(0.0), money(1.2345)
    ('no cost', '$1.23')
    """
    return f"${value:.2f}" if value else "no cost"


METHODS = {"cluster": "whole worlds are redrawn.", "task": "tasks are redrawn, since there is one world.",
           "wilson": "of Wilson, since redrawing finds no spread.", "none": "none."}


@cache
def environment() -> Any:
    """The template engine with the filters of these pages."""
    return pages.environment(visible=visible, duration=formats.duration, points=points, ends=ends, money=money)


def report_page(folder: BenchFolder, run: Json, comparison: Json | None) -> str:
    """``report.html`` from ``report.json``."""
    titles, overall = criterion_texts(folder, run), run["overall"]
    columns = criteria_columns(run)
    return environment().get_template("bench_report.html").render(
        title=visible(run["run_id"]), run=run, overall=overall, first=overall["conditional"],
        method_words=METHODS[overall["conditional"]["pass@1"]["method"]], rows=_rows(run), comparison=comparison,
        columns=columns, titles=titles, matrix=[_matrix_row(task, columns, titles) for task in run["tasks"]],
        endings=_endings(run), unmet=_unmet(run, titles), faults=_faults(run), stamps=_stamps(run))


def _rows(run: Json) -> list[Json]:
    """What the figure of intervals shows."""
    def row(name: str, found: Json, role: str) -> Json:
        return {"name": name, "value": found["partial"], "low": found["low"], "high": found["high"], "role": role}

    rows = [row(run["agent"]["name"], run["overall"]["conditional"]["pass@1"], "student")]
    rows += [row(name or "–", one["conditional"]["pass@1"], "student") for name, one in run["domains"].items()]
    rows += [row(name, one["pass@1"], "behaviour") for name, one in run["references"].items()]
    return [one for one in rows if one["value"] is not None]


def _matrix_row(task: Json, columns: Sequence[str], titles: Json) -> Json:
    """One task: share of attempts that met each criterion, and a mark per attempt."""
    by_name = dict(task["criteria"])
    if not by_name.keys() <= set(columns):
        names = dict(zip(columns, by_name, strict=False))
    else:
        names = {column: column for column in columns if column in by_name}
    cells = []
    for column in columns:
        met, judged = by_name.get(names.get(column, ""), (0, 0))
        level = "none" if not judged else f"c{min(3, 4 * met // judged)}"
        cells.append({"text": f"{met}/{judged}" if judged else "", "level": level,
                      "title": titles.get(names.get(column, ""), "")})
    return {"name": task["task_id"], "world": task["world_id"] or "", "passes": task["passes"], "n": task["n"],
            "cells": cells, "marks": [_mark(task, one) for one in task["attempts"]]}


def _mark(task: Json, attempt: Json) -> Json:
    place = f"episodes/{folder_name(task['task_id'])}/{attempt['attempt']}/episode.html"
    state = ("?", "none") if not attempt["scored"] else ("✓", "c3") if attempt["passed"] else ("✗", "c0")
    return {"text": state[0], "level": state[1], "href": quote(place),
            "title": f"attempt {attempt['attempt']}: {attempt['outcome']}"}


def _endings(run: Json) -> list[Json]:
    whole = sum(run["outcomes"].values())
    return [{"name": name, "count": count, "share": count / whole, "unscored": name in UNSCORED}
            for name, count in sorted(run["outcomes"].items(), key=lambda pair: -pair[1])]


def _unmet(run: Json, titles: Json, most: int = 12) -> list[Json]:
    """Criteria that failed most often, over all tasks that have them."""
    counts: dict[str, list[int]] = {}
    for task in run["tasks"]:
        for name, (met, judged) in task["criteria"].items():
            have = counts.setdefault(name, [0, 0])
            have[0], have[1] = have[0] + judged - met, have[1] + judged
    rows = [{"name": name, "share": failed / judged, "text": titles.get(name, "")}
            for name, (failed, judged) in counts.items() if judged and failed]
    return sorted(rows, key=lambda row: -row["share"])[:most]


def _faults(run: Json, most: int = 50) -> list[Json]:
    return [{"task_id": task["task_id"], **one} for task in run["tasks"] for one in task["attempts"]
            if not one["scored"]][:most]


def _stamps(run: Json) -> list[tuple[str, str]]:
    """What was run, in lines."""
    about, judge = run["environment"], run["grading"]["judge"]
    limits = ", ".join(f"{key} {value}" for key, value in {**(run["profile"].get("budget") or {}),
                                                           **run["budgets"]["given"]}.items() if value is not None)
    return [("benchmark", run["benchmark"]), ("tasks sha256", run["dataset"]["sha256"]),
            ("agent", f"{run['agent']['name']} ({run['agent']['engine']})"), ("profile", run["profile"]["name"]),
            ("budget", limits or ("each task's own" if "budget" in run["profile"] else "unknown")),
            ("judge", judge.get("model") or "programs"), ("judge prompt", judge.get("prompt_sha256") or "none"),
            ("grading", str(run["grading"]["id"])), ("seed", str(run["seed"])),
            ("commit", about.get("commit") or "not a checkout"), ("started", run["started"]),
            ("machine", f"{run['hardware']['cpu']}, {run['hardware']['cores']} cores"),
            ("command", " ".join(about["command"]))]


def criterion_texts(folder: BenchFolder, run: Json) -> dict[str, str]:
    """What each criterion asks, from the files of one attempt per task; empty where tasks word it differently."""
    texts: dict[str, str] = {}
    for task in run["tasks"]:
        for one in read_list(folder.episode(task["task_id"], 0) / "verifiers.json"):
            name, text = one["verifier_id"], one["verifier_values"]["criteria"]
            texts[name] = text if texts.get(name, text) == text else ""
    return texts


# ------------------------------------------------------------------------------------------------ episodes


def episode_page(folder: BenchFolder, record: Attempt) -> str | None:
    """The page of one attempt; None when it left no files."""
    place = folder.episode(record.task_id, record.attempt)
    trajectory = read_object(place / "trajectory.json")
    if not trajectory:
        return None
    grade = read_object(grade_file(place, record.grading))
    texts = {one["verifier_id"]: one["verifier_values"]["criteria"] for one in read_list(place / "verifiers.json")}
    messages = [*read_list(place / "initial_messages.json"), *trajectory["messages"]]
    return environment().get_template("bench_episode.html").render(
        title=visible(f"{record.task_id} attempt {record.attempt}"), record=record, back="../../../report.html",
        answer=trajectory["final_answer"],
        criteria=[_criterion(one, texts) for one in grade.get("verifier_results", ())],
        messages=[_message(message, trajectory[shapes.OURS]["calls"]) for message in messages])


def _criterion(one: Json, texts: dict[str, str]) -> Json:
    score = one["score"]
    met, level = ("?", "none") if score is None else ("✓", "c3") if score >= 0.99 else ("✗", "c0")
    return {"id": one["verifier_id"], "met": met, "level": level, "text": texts.get(one["verifier_id"], ""),
            "why": one["verifier_result_values"]["grade_rationale"]}


def _message(message: Json, calls: Sequence[Json]) -> Json:
    text, role = text_of(message.get("content")), message["role"]
    asked = [{"name": call["function"]["name"], "arguments": call["function"]["arguments"][:MOST_SHOWN]}
             for call in message.get("tool_calls") or ()]
    bad = role == "tool" and text.lower().startswith("error")
    return {"who": f"{role} {message.get('name') or ''}".strip(), "kind": f"{role} bad" if bad else role,
            "text": text[:MOST_SHOWN], "left_out": max(0, len(text) - MOST_SHOWN), "calls": asked}


def read_list(path: Path) -> list[Json]:
    """A JSON list of an attempt's files; empty when it is not there."""
    return json.loads(path.read_bytes()) if path.is_file() else []


def read_object(path: Path) -> Json:
    """A JSON object of an attempt's files; empty when it is not there."""
    return json.loads(path.read_bytes()) if path.is_file() else {}
