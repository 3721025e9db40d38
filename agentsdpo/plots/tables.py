"""Rows that figures are drawn from: run folders, tables of studies, data frames."""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agentsdpo.errors import RunError
from agentsdpo.formats import is_number
from agentsdpo.results import HELD_OUT, evals, headline_split
from agentsdpo.runfolder import RunData, parsed, read_run
from agentsdpo.stats import Interval, over_seeds, wilson
from agentsdpo.types import Json

NEVER = 1000
"""A staleness from here on means that the first policy alone collects."""
_FRAMES = (("to_pylist", ()), ("to_dicts", ()), ("to_dict", ("records",)))


def records(frame: Any) -> list[Json]:
    """Rows of a pyarrow table, of a pandas or polars data frame, or of a list of objects.

    >>> records([{"pass": 0.5}])
    [{'pass': 0.5}]
    """
    for name, arguments in _FRAMES:
        if hasattr(frame, name):
            return list(getattr(frame, name)(*arguments))
    return [dict(row) for row in frame]


def read_study(path: Path | str, arms: Collection[str] | None = None) -> list[Json]:
    """Evaluations of a study, ``docs/results/<study>.parquet``: one row per arm, seed, step, split and decoding.

    Args:
        path: the table.
        arms: only these; None is all.

    Raises:
        RunError: there is no such file.
    """
    import pyarrow.parquet as pq

    if not Path(path).is_file():
        raise RunError(f"there is no table of a study at {path}", fix="run the study, or name another file")
    return [{"kind": "eval", **row} for row in pq.read_table(path).to_pylist() if arms is None or row["arm"] in arms]


def arm_name(kind: str, staleness: float) -> str:
    """Name of an arm in a study: what is trained, and the age of its data.

    >>> arm_name("robust", 16), arm_name("robust", 1_000_000)
    ('robust-16', 'robust-off')
    """
    return f"{kind}-{'off' if staleness >= NEVER else staleness}"


def chosen(default: str) -> list[Path]:
    """Folders a notebook shows: those of ``RUN``, with ``:`` between several, else its own data.

    Relative ones are looked for in the working folder and then in its parent, as notebooks stand one level below the
    folder they are started from.

    Raises:
        RunError: one of them is not there.
    """
    found = []
    for name in os.environ.get("RUN", default).split(":"):
        places = [place for place in (Path(name), Path("..") / name) if place.is_dir()]
        if not places:
            raise RunError(f"RUN names {name!r}, and there is no such folder", fix="give the folder of a run")
        found.append(places[0])
    return found


def read_seeds(folders: Sequence[Path]) -> tuple[RunData, list[Json]]:
    """The first run, and the metric rows of the main arms of all, each with the seed it was run with.

    Runs that recorded no seed, or the same one, are counted from 0.
    """
    runs = [read_run(folder) for folder in folders]
    seeds = [run.summary.get("seed") for run in runs]
    named = seeds if len(set(map(str, seeds))) == len(runs) and None not in seeds else range(len(runs))
    return runs[0], [{**row, "seed": seed} for run, seed in zip(runs, named, strict=True) for row in run.main.rows]


def read_arms(folders: Sequence[Path]) -> list[Json]:
    """Evaluations of all arms of some runs as those of a study: arm, staleness and seed are what each was set to.

    Raises:
        RunError: there is none.
    """
    rows: list[Json] = []
    for run in map(read_run, folders):
        for arm in run.arms:
            settings = parsed(arm.config or run.config, run.path)
            age, seed = settings.get("staleness", 0), settings.get("seed", 0)
            rows += [{**row, "arm": arm_name(arm.name, age), "staleness": age, "seed": seed} for row in evals(arm.rows)]
    if not rows:
        raise RunError(f"no evaluation in {', '.join(map(str, folders))}",
                       fix="let a run reach its zero-shot evaluation first")
    return rows


def arms_of(rows: Sequence[Json]) -> dict[str, list[Json]]:
    """Rows by arm, arms in order of their kind and of the age of their data.

    >>> list(arms_of([{"arm": "robust-16", "staleness": 16}, {"arm": "robust-3", "staleness": 3}]))
    ['robust-3', 'robust-16']
    """
    arms: dict[str, list[Json]] = {}
    for row in sorted(rows, key=lambda row: (kind_of(row["arm"]), row["staleness"])):
        arms.setdefault(row["arm"], []).append(row)
    return arms


def kind_of(arm: str) -> str:
    """What is trained in an arm, its name without the age of the data.

    >>> kind_of("robust-16"), kind_of("robust-off"), kind_of("naive")
    ('robust', 'robust', 'naive')
    """
    head, dash, tail = arm.rpartition("-")
    return head if dash and (tail.isdigit() or tail == "off") else arm


def main_kind(arms: Iterable[str], wanted: str) -> str:
    """The kind of arm that stands in front: the wanted one, or the first of those there are where it is not.

    >>> main_kind(["naive-8", "robust-8"], "robust"), main_kind(["sdpo-0", "grpo-0"], "robust")
    ('robust', 'grpo')
    """
    kinds = sorted(set(map(kind_of, arms)))
    return wanted if wanted in kinds or not kinds else kinds[0]


def judged(rows: Sequence[Json]) -> tuple[str, ...]:
    """Splits whose rate stands for some rows: the held-out ones that were evaluated, else the one whose curve is shown.

    >>> judged([{"kind": "eval", "split": split, "step": 0} for split in ("val", "test_world")])
    ('test_world',)
    >>> judged([{"kind": "eval", "split": "mine", "step": 0}])
    ('mine',)
    """
    known = {row["split"] for row in evals(rows)}
    return tuple(split for split in HELD_OUT if split in known) or tuple(filter(None, [headline_split(rows)]))


def final(rows: Sequence[Json], value: str = "pass", splits: Sequence[str] | None = None,
          decoding: str = "sampled") -> dict[int, list[Json]]:
    """Of one arm: by seed, the last evaluations of one decoding that have a value, a row for each split in the order
    given, :func:`judged` ones when none are named."""
    splits = judged(rows) if splits is None else splits
    ends: dict[int, dict[str, Json]] = {}
    for row in sorted(evals(rows, None, decoding), key=lambda row: row["step"]):
        if row["split"] in splits and is_number(row.get(value)):
            ends.setdefault(row["seed"], {})[row["split"]] = row
    last = {seed: max(row["step"] for row in own.values()) for seed, own in ends.items()}
    return {seed: [own[split] for split in splits if split in own and own[split]["step"] == last[seed]]
            for seed, own in sorted(ends.items())}


def full(ends: Mapping[int, Sequence[Json]], value: str = "pass") -> dict[int, list[float]]:
    """Rates by seed from what :func:`final` finds, with as many splits for every seed.

    A run that ended early was last evaluated on its curve's split alone: the least rate that it had there stands for
    the other splits.

    >>> full({0: [{"split": "a", "pass": 0.5}, {"split": "b", "pass": 1.0}], 1: [{"split": "a", "pass": 0.25}]})
    {0: [0.5, 1.0], 1: [0.25, 0.25]}
    """
    splits = max(([row["split"] for row in own] for own in ends.values()), key=len, default=[])
    rates = {seed: {row["split"]: float(row[value]) for row in own} for seed, own in ends.items()}
    return {seed: [own.get(split, min(own.values())) for split in splits] for seed, own in rates.items()}


def held_out(rows: Sequence[Json], value: str = "pass", step: int | None = None,
             splits: Sequence[str] | None = None) -> Interval | None:
    """An arm's rate on the held-out splits, sampled: :func:`agentsdpo.stats.over_seeds`, one seed's splits pooled.

    Args:
        rows: of one arm.
        value: ``pass`` or ``score``.
        step: at which; each seed's last when not given.
        splits: as :func:`final` takes them.
    """
    ends = final(rows if step is None else [row for row in rows if row.get("step") == step], value, splits)
    if not ends:
        return None
    if len(ends) > 1 or value != "pass":
        return over_seeds(list(full(ends, value).values()))
    (own,) = ends.values()
    return wilson(round(sum(row["pass"] * row["n"] for row in own)), sum(row["n"] for row in own))


def by_split(rows: Sequence[Json]) -> dict[str, Json]:
    """What :func:`agentsdpo.plots.split_bars` draws, of one arm: every split's sampled pass rate before and after
    training, and greedy after it, over all seeds.

    >>> rows = [{"kind": "eval", "split": "val", "step": step, "seed": seed, "n": 4, "pass": step / 8}
    ...         for step in (0, 8) for seed in (0, 1)]
    >>> by_split(rows)["val"]["n"], by_split(rows)["val"]["final_pass"]
    (8, 1.0)
    """
    found: dict[str, Json] = {}
    for split in dict.fromkeys(row["split"] for row in evals(rows)):
        own = evals(rows, split)
        at, end = (pick(row["step"] for row in own) for pick in (min, max))
        last = [row for (row,) in final(own, splits=[split]).values()]
        greedy = final(own, splits=[split], decoding="greedy")
        found[split] = {"n": sum(row["n"] for row in last)}
        for when, rate in (("zero_shot", held_out(own, step=at, splits=[split])),
                           ("final", held_out(own, splits=[split]) if end > at else None)):
            if rate:
                found[split] |= {f"{when}_pass": rate.estimate, f"{when}_ci95": [rate.low, rate.high]}
        if greedy and end > at:
            found[split]["final_greedy_pass"] = sum(row["pass"] for (row,) in greedy.values()) / len(greedy)
    return found
