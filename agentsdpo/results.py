"""The numbers of a run: what report, figures and terminal take from metric rows and summaries.

Rows are those of ``metrics.jsonl``. ``step``: one optimiser step with the diagnostics of ``learn/``, ``replay/``,
``collect/``. ``eval``: one evaluation of one split with one decoding; ``pass`` and ``score`` are fractions. A row may
carry ``seed`` when several seeds share an arm. Summaries are those of ``summary.json``.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from agentsdpo.formats import is_number
from agentsdpo.runfolder import Arm, parsed, read_starts
from agentsdpo.stats import Interval, wilson
from agentsdpo.track import read_metrics
from agentsdpo.types import Json

HELD_OUT = ("test_names", "test_world", "test_period")
"""Splits that hold out one axis each and ask for the rules that were taught; pooled into the headline."""
HELD_OUT_FIRST = (*HELD_OUT, "val")
"""Which split stands for a run when one must: unseen clients first, then the other held-out axes."""
CONTROL_SPLIT = "test_firm"
"""Worlds of a firm whose rules were never taught; a pass rate above zero-shot there is a leak."""
SPLIT_WORDS = {
    "train": "seen worlds", "val": "same distribution", "test_world": "unseen worlds",
    "test_names": "unseen clients", "test_period": "unseen periods", "test_n": "longer horizon",
    "test_firm": "untaught firm (control)",
}
"""What each split of the desk world asks."""
POOLED, POOLED_WORDS = "held-out", "held-out clients, worlds and periods, pooled"
"""Name and words of the headline: ``test_names``, ``test_world`` and ``test_period`` together."""


def steps(rows: Iterable[Json]) -> list[Json]:
    """The rows of optimiser steps."""
    return [row for row in rows if row.get("kind") == "step"]


def evals(rows: Iterable[Json], split: str | None = None, decoding: str | None = None) -> list[Json]:
    """The rows of evaluations, of one split and one decoding if asked.

    >>> rows = [{"kind": "eval", "split": "val", "decoding": "greedy"}, {"kind": "step"}]
    >>> len(evals(rows)), len(evals(rows, "val", "sampled"))
    (1, 0)
    """
    return [row for row in rows if row.get("kind") == "eval"
            and split in (None, row.get("split")) and decoding in (None, row.get("decoding", "sampled"))]


def reached(arm: Arm) -> Json:
    """Steps, episodes and seconds of an arm's last rows, for a run that has no summary yet."""
    rows = [row for row in arm.rows if row.get("kind") in ("step", "eval")]
    tops = {name: [row[key] for row in rows if is_number(row.get(key))]
            for name, key in (("steps", "step"), ("episodes", "episodes"), ("wall_s", "wall_s"))}
    return {name: max(values) for name, values in tops.items() if values}


def headline_split(rows: Sequence[Json]) -> str | None:
    """The split whose curve is shown: held-out before seen, among those evaluated at least half as often as any.

    A split that is only measured before and after training is no curve.

    >>> rows = [{"kind": "eval", "split": "val", "step": step} for step in range(6)]
    >>> headline_split(rows + [{"kind": "eval", "split": "test_names", "step": step} for step in (0, 5)])
    'val'
    >>> headline_split(rows + [{"kind": "eval", "split": "test_names", "step": step} for step in (0, 2, 5)])
    'test_names'
    """
    counts: dict[str, set[object]] = {}
    for row in evals(rows):
        counts.setdefault(str(row.get("split")), set()).add(row.get("step"))
    most = max(map(len, counts.values()), default=0)
    known = [s for s in HELD_OUT_FIRST if s in counts] + [s for s in counts if s not in HELD_OUT_FIRST]
    return next((split for split in known if 2 * len(counts[split]) >= most), None)


def eval_interval(row: Json) -> Interval | None:
    """Wilson 95 % interval of the pass rate of one evaluation row; None without ``pass`` or ``n``."""
    return _interval_of(row.get("pass"), None, row.get("n"))


def rate(record: Json, when: str) -> Interval | None:
    """``<when>_pass`` of a summary record with its 95 % interval, computed from ``n`` if none was stored.

    Args:
        record: a run, an arm or a split of ``summary.json``.
        when: ``zero_shot`` or ``final``.

    >>> rate({"final_pass": 0.5, "final_ci95": [0.4, 0.6]}, "final")
    Interval(estimate=0.5, low=0.4, high=0.6)
    >>> rate({"steps": 3}, "final") is None
    True
    """
    ends = record.get(f"{when}_pass_ci95") or record.get(f"{when}_ci95")
    return _interval_of(record.get(f"{when}_pass"), ends, record.get("n"))


def _interval_of(value: object, ends: object, n: object) -> Interval | None:
    if not is_number(value):
        return None
    if isinstance(ends, list | tuple) and len(ends) == 2 and all(is_number(end) for end in ends):
        return Interval(float(value), float(ends[0]), float(ends[1]))
    if isinstance(n, int) and n > 0 and 0 <= value <= 1:
        return wilson(value * n, n)
    return Interval(float(value), math.nan, math.nan)


def summary_split(record: Json) -> str | None:
    """The split an arm's own pass rates speak of, as its summary names it; None when it does not.

    >>> summary_split({"split": "held-out", "final_pass": 0.9}), summary_split({"final_pass": 0.9})
    ('held-out', None)
    """
    named = record.get("split")
    return str(named) if named else None


def split_words(record: Json) -> str:
    """The same for people; empty when it is not stated.

    >>> split_words({"split": "held-out"}), split_words({"split": "val"}), split_words({})
    ('held-out clients, worlds and periods, pooled', 'val', '')
    """
    split = summary_split(record) or ""
    return POOLED_WORDS if split == POOLED else split


def arm_rate(arm: Arm, when: str) -> Interval | None:
    """An arm's pass rate as :func:`rate`; ends that the arm lacks are taken from the split it speaks of."""
    own = rate(arm.summary, when)
    of_split = rate((arm.summary.get("splits") or {}).get(summary_split(arm.summary)) or {}, when)
    same = own and of_split and own.estimate == of_split.estimate and math.isnan(own.low)
    return of_split if same else own


def zero_shot(arm: Arm, split: str | None, value: str = "pass") -> float | None:
    """Sampled pass rate (or ``score``) before the first step: from the metrics, else the summary, else None."""
    first = [row.get(value) for row in evals(arm.rows, split, "sampled") if row.get("step") == 0]
    record = (arm.summary.get("splits") or {}).get(split) or arm.summary
    found = [float(one) for one in (*first, record.get(f"zero_shot_{value}")) if is_number(one)]
    return found[0] if found else None


def staleness_words(arm: Arm) -> str:
    """Staleness of the consumed data in words; empty when it was not recorded.

    >>> rows = ({"kind": "step", "replay/staleness/mean": 4.0, "replay/staleness/max": 7},)
    >>> staleness_words(Arm("demo", "", rows, {}))
    'staleness 4.0 policy versions on average, at most 7'
    """
    means = [r["replay/staleness/mean"] for r in steps(arm.rows) if is_number(r.get("replay/staleness/mean"))]
    tops = [r["replay/staleness/max"] for r in steps(arm.rows) if is_number(r.get("replay/staleness/max"))]
    if not means:
        return ""
    most = f", at most {max(tops):.0f}" if tops else ""
    return f"staleness {sum(means) / len(means):.1f} policy versions on average{most}"


# ------------------------------------------------------------------------------------------ of one training run


def concluded(folder: Path) -> Json:
    """What the summary of a finished training run says, from the files it wrote; an arm of a demo has none of its own.

    Nothing is told of memory: that was of the process.
    """
    name, record, starts = settings_of(folder)["name"], record_of_run(folder), starts_of(folder)
    told = {"hardware": starts[0]["hardware"], "command": " ".join(starts[0]["command"])} if starts else {}
    top = {key: value for key, value in record.items() if key != "splits"}
    return {"arm": name, **top, **told, "arms": {name: record}}


def record_of_run(folder: Path) -> Json:
    """Numbers of one training run, from what it wrote."""
    settings, rows = settings_of(folder), read_metrics(folder / "metrics.jsonl")
    most = reached(Arm(settings["name"], "", tuple(rows), {}))  # the last line may be an evaluation that came late
    return {**summarise(rows, settings["steps"]), **most, "staleness": settings["staleness"],
            "steps": settings["steps"], "seed": settings["seed"], "commit": commits(starts_of(folder))}


def settings_of(folder: Path) -> Json:
    """The resolved settings of a training run."""
    return parsed((folder / "config.toml").read_text(encoding="utf-8", errors="replace"), folder)


def starts_of(folder: Path) -> list[Json]:
    """What was recorded at each start of a training run."""
    return read_starts(folder / "environment.json")


def commits(starts: Sequence[Json]) -> str | None:
    """The code that ran, not the code that sums up: usually one commit, else all in order of their first start."""
    return ", ".join(dict.fromkeys(start["commit"] for start in starts if start["commit"])) or None


def summarise(rows: list[Json], steps: int) -> Json:
    """Before and after, per split and pooled over the held-out ones (over all that were played, where one of those was
    not), from the lines of one arm.

    Keys: ``zero_shot_pass``, ``final_pass``, their ``_ci95`` (Wilson), the greedy counterparts, and ``splits``.
    """
    ends = [r for r in rows if r["kind"] == "eval" and r["step"] in (0, steps) and "pass" in r]
    splits = {r["split"]: _split([e for e in ends if e["split"] == r["split"]], steps) for r in ends}
    held = set(HELD_OUT) <= splits.keys()
    pooled = _split(_pool([r for r in ends if r["split"] in HELD_OUT] if held else ends), steps)
    return {**pooled, "split": "held-out" if held else ", ".join(splits), "splits": splits}


def _pool(rows: list[Json]) -> list[Json]:
    """One row per (step, decoding): all tasks of the splits together."""
    groups: dict[tuple[int, str], list[Json]] = {}
    for row in rows:
        groups.setdefault((row["step"], row["decoding"]), []).append(row)
    pooled = []
    for (step, decoding), group in groups.items():
        n = sum(r["n"] for r in group)
        mean = {k: sum(r[k] * r["n"] for r in group) / n for k in ("pass", "score")}
        pooled.append({"step": step, "decoding": decoding, "n": n, **mean})
    return pooled


def _split(rows: list[Json], steps: int) -> Json:
    found: dict[str, Any] = {}
    for row in rows:
        when = "final" if row["step"] == steps else "zero_shot"
        name = when if row["decoding"] == "sampled" else f"{when}_greedy"
        rate = wilson(row["pass"] * row["n"], row["n"])
        found |= {f"{name}_pass": row["pass"], f"{name}_score": row["score"], "n": row["n"],
                  f"{name}_pass_ci95": [rate.low, rate.high]}
    return found


# -------------------------------------------------------------------------------------- criteria of a benchmark run


MOST_COLUMNS = 16
"""Criteria that get a column each; sets with more of them number the criteria of each task."""


def criteria_names(report: Json) -> list[str]:
    """Criteria that the tasks of a benchmark report share, by name; empty where every task has its own.

    >>> criteria_names({"tasks": [{"criteria": {f"{task}-{i}": [1, 1] for i in range(6)}} for task in "abc"]})
    []
    """
    names = list(dict.fromkeys(name for task in report["tasks"] for name in task["criteria"]))
    return names if len(names) <= max(MOST_COLUMNS, _most_criteria(report)) else []


def criteria_columns(report: Json) -> list[str]:
    """Names of the columns in a table of tasks and criteria: :func:`criteria_names`, else places in the task from 1."""
    return criteria_names(report) or [str(place + 1) for place in range(_most_criteria(report))]


def _most_criteria(report: Json) -> int:
    return max((len(task["criteria"]) for task in report["tasks"]), default=0)
