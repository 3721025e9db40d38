"""Two runs against each other: refused where they were not measured alike, paired where they were."""

import re
from collections.abc import Sequence

from agentsdpo.benchmarks.apex.records import Attempt, by_task
from agentsdpo.benchmarks.apex.runfolder import BenchFolder
from agentsdpo.benchmarks.apex.statistics import compare
from agentsdpo.errors import ConfigError
from agentsdpo.types import Json

AGREE = ("dataset.sha256", "benchmark", "profile.name", "budgets.sha256", "judge.model", "judge.prompt_sha256")
"""What must be the same in both ``run.json`` for a difference to mean the agents."""


class NotComparable(ConfigError):
    """Two runs were made under different conditions."""


def differences(a: Json, b: Json) -> list[Json]:
    """Conditions that two runs do not share, as ``{key, a, b}``.

    >>> differences({"benchmark": "x@1"}, {"benchmark": "x@1.1"})
    [{'key': 'benchmark', 'a': 'x@1', 'b': 'x@1.1'}]
    """
    pairs = [(key, _at(a, key), _at(b, key)) for key in AGREE]
    return [{"key": key, "a": x, "b": y} for key, x, y in pairs if x != y]


def _at(about: Json, key: str) -> object:
    value: object = about
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def compare_runs(first: BenchFolder, second: BenchFolder, *, force: bool = False) -> Json:
    """The ``comparison`` block: A - B for pass@1 and mean score, with the tasks that flipped.

    ``tasks_changed`` and ``prompts_differ`` name tasks of both runs whose text, or whose opening, is not the same.

    Raises:
        NotComparable: the conditions differ and ``force`` is off; names them with both values.
        RunError: no task was scored in both.
    """
    a, b = _judged(first), _judged(second)
    found = differences(a, b)
    if found and not force:
        listed = "; ".join(f"{one['key']} is {_short(one['a'])} in {a['run_id']} and {_short(one['b'])} in "
                           f"{b['run_id']}" for one in found)
        raise NotComparable(f"the runs cannot be compared: {listed}", fix="compare runs made alike, or add --force to "
                            "compare them all the same")
    left, right = first.records(), second.records()
    scores = by_task(left), by_task(right)
    return {"a": a["run_id"], "b": b["run_id"], "agents": [a["agent"]["name"], b["agent"]["name"]],
            "differences": found, "tasks_changed": _unlike(left, right, "task_sha256"),
            "prompts_differ": _unlike(left, right, "prompt_sha256"),
            "pass@1": compare(*scores).as_json(), "mean_score": compare(*scores, metric="mean_score").as_json()}


def _short(value: object) -> str:
    """A value as an error shows it: hashes by their beginning."""
    return repr(value[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else value)


def _judged(folder: BenchFolder) -> Json:
    """``run.json`` with the judge of the grading that counts."""
    return {**folder.about(), "judge": folder.grading()["judge"]}


def _unlike(left: Sequence[Attempt], right: Sequence[Attempt], field: str) -> list[str]:
    """Tasks of both runs for which a hash differs."""
    mine: dict[str, set[str]] = {}
    for record in left:
        mine.setdefault(record.task_id, set()).add(getattr(record, field))
    return sorted({r.task_id for r in right if r.task_id in mine and getattr(r, field) not in mine[r.task_id] | {""}})
