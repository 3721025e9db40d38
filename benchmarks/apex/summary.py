"""Everything a report says about one run, as one JSON object; see docs/benchmark.md for its keys."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from agentsdpo.benchmarks.apex.records import Attempt, by_task
from agentsdpo.benchmarks.apex.runfolder import BenchFolder
from agentsdpo.benchmarks.apex.statistics import COLUMNS, Estimate, TaskScores, table
from agentsdpo.types import Json

TOO_MANY_UNSCORED = 0.02
"""Share of unscored attempts above which a report opens with a warning."""
SPENT = ("turns", "tool_calls", "prompt_tokens", "completion_tokens", "wall_s", "working_s")
"""What attempts cost, by field of an attempt."""
MONEY = ("cost_usd", "judge_tokens", "judge_usd")
"""What is bought for them: by the agent, and for their grades."""
STAMPS = ("run_id", "benchmark", "dataset", "agent", "profile", "budgets", "judge", "seed", "attempts", "train_allowed",
          "started", "hardware", "environment")
"""Keys of ``run.json`` that a report repeats."""


def summarise(folder: BenchFolder) -> Json:
    """``report.json`` of one run, as far as it got.

    Raises:
        RunNotFound: there is no run. RunError: its records are damaged.
    """
    about, records = folder.about(), folder.records()
    tasks, n = by_task(records), about["attempts"]
    asked = about["dataset"]["tasks"] * n
    domains = sorted({task.domain for task in tasks})
    return {
        **{key: about.get(key) for key in STAMPS}, "grading": folder.grading(),
        "n_asked": asked, "n_missing": max(0, asked - len(records)), "warnings": warnings(records, asked),
        "overall": block(tasks, records, n, of_tasks=about["dataset"]["tasks"]),
        "domains": {name: block([t for t in tasks if t.domain == name], [r for r in records if r.domain == name], n)
                    for name in domains} if len(domains) > 1 else {},
        "outcomes": dict(Counter(record.outcome for record in records)),
        "spent": {key: middle([getattr(r, key) for r in records if r.scored]) for key in SPENT},
        "totals": totals(records), "references": references(folder), "tasks": [_task(task, records) for task in tasks],
    }


def block(tasks: Sequence[TaskScores], records: Sequence[Attempt], attempts: int, *, of_tasks: int = 0) -> Json:
    """Numbers of one group of tasks: counts and both columns. A task never attempted leaves the set without a value."""
    unscored = Counter(record.outcome for record in records if not record.scored)
    columns = {column: table(tasks, attempts, column, of_tasks=of_tasks) for column in COLUMNS}
    return {"n_tasks": len(tasks), "n_worlds": len({task.cluster for task in tasks}), "n_attempts": len(records),
            "n_scored": sum(record.scored for record in records), "n_unscored": dict(unscored),
            **{column: {name: estimate_json(one) for name, one in found.items()} for column, found in columns.items()}}


def estimate_json(found: Estimate) -> Json:
    """An estimate with its detectable difference."""
    return {**found.model_dump(), "detectable": found.detectable}


def warnings(records: Sequence[Attempt], asked: int) -> list[str]:
    """What a reader must know before the numbers.

    >>> lost = Attempt(task_id="t", attempt=0, outcome="env_error", scored=False)
    >>> warnings([lost], 2)
    ['1 of 1 attempts could not be scored (env_error 1): resume or grade it', '1 of 2 attempts were never made']
    """
    found, unscored = [], Counter(record.outcome for record in records if not record.scored)
    if sum(unscored.values()) > TOO_MANY_UNSCORED * max(len(records), 1):
        reasons = ", ".join(f"{name} {count}" for name, count in unscored.most_common())
        found.append(f"{sum(unscored.values())} of {len(records)} attempts could not be scored ({reasons}): resume or "
                     "grade it")
    if len(records) < asked:
        found.append(f"{asked - len(records)} of {asked} attempts were never made")
    return found


def middle(values: Iterable[float]) -> Json | None:
    """Median and 90 % quantile; None without values.

    >>> middle([1, 2, 3, 4, 10])
    {'median': 3.0, 'p90': 7.6}
    """
    found = list(values)
    if not found:
        return None
    return {"median": round(float(np.median(found)), 4), "p90": round(float(np.quantile(found, 0.9)), 4)}


def totals(records: Sequence[Attempt]) -> Json:
    """Sums over all attempts, unscored ones included: they cost as well."""
    return {**{key: round(sum(getattr(record, key) for record in records), 4) for key in SPENT},
            **{key: round(sum(getattr(record, key) for record in records), 6) for key in MONEY},
            "compactions": sum(record.compactions for record in records),
            "longest_repeat": max((record.longest_repeat for record in records), default=0)}


def references(folder: BenchFolder) -> Json:
    """Scores of scripted agents on the same tasks: ``{name: {n, passes, pass@1, mean_score}}``."""
    path = folder.path / "references.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _task(task: TaskScores, records: Sequence[Attempt]) -> Json:
    """One task with its attempts; ``criteria`` maps an id to [met, judged]."""
    own = [record for record in records if record.task_id == task.task_id]
    ids = list(dict.fromkeys(name for record in own for name in (record.criteria or {})))
    met = {name: [sum((r.criteria or {}).get(name, 0.0) >= 0.99 for r in own),
                  sum(name in (r.criteria or {}) for r in own)] for name in ids}
    return {"task_id": task.task_id, "world_id": task.world_id, "domain": task.domain, "n": task.scored,
            "passes": task.passes, "unscored": task.unscored, "criteria": met,
            "mean_score": task.score / task.scored if task.scored else None,
            "attempts": [record.model_dump(mode="json", exclude={"task_id", "world_id", "domain", "criteria"})
                         for record in own]}
