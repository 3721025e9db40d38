"""``agentsdpo demo``: a small real model that cannot do its job learns it from its own stale episodes and from hints.

Every arm starts from the same weights, plays the same tasks with the same seeds at the same staleness, draws as many
rows a step, learns from the same kind of teacher, and is evaluated on the same held-out tasks. Arms are presets: they
differ in the objective, its normaliser, and the learning rate that suits it (``learn/presets.py``).
"""

import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentsdpo.assemble import check_request
from agentsdpo.config import RunConfig, from_mapping
from agentsdpo.errors import RunError
from agentsdpo.files import write_text
from agentsdpo.learn.presets import unit_size
from agentsdpo.loop import train
from agentsdpo.provenance import hardware
from agentsdpo.results import commits, record_of_run, settings_of, starts_of
from agentsdpo.show.report import write_report
from agentsdpo.types import Json

STEPS, STALENESS = 70, 3
REUSE = 5
"""Policy versions a row may still be drawn for after it was collected."""
_WORLD: Json = {"collect": {"window": 512, "concurrency": 128, "max_tokens": 64}, "episodes_per_step": 16,
                "replay": {"durability": "episode"},
                "eval": {"every": 10, "final_episodes": 96}}
"""An episode is about 200 tokens; a turn of the seed model at most 40. 16 fresh episodes a step, each used twice."""
_QUICK: Json = {"eval": {"episodes": 32, "final_episodes": 32, "every": 5}}


def demo_config(arm: str, *, staleness: int, steps: int, seed: int, quick: bool = False,
                sets: Sequence[str] = ()) -> RunConfig:
    """Settings of one arm: a preset on the built-in world, one staleness bound and one batch for every arm.

    >>> demo_config("naive", staleness=8, steps=10, seed=0).learn.max_staleness
    13
    """
    data: Json = {**_WORLD, **(_QUICK if quick else {}), "name": arm, "preset": arm, "steps": steps, "seed": seed,
                  "staleness": staleness,
                  "learn": {"max_staleness": staleness + REUSE, "batch": 32 // unit_size(arm)}}
    return from_mapping(data, sets)


def run_demo(*, arms: Sequence[str] | None = None, staleness: int | None = None, steps: int | None = None,
             seed: int = 0, out: Path = Path("runs/demo"), quick: bool = False, sets: Sequence[str] = (),
             mode: str = "auto") -> Json:
    """Train and evaluate each arm, write ``summary.json`` and ``report.html``.

    Args:
        arms: presets; ``robust`` alone when not given.
        staleness: policy versions the collector is held behind the learner; 3.
        steps: optimiser steps per arm; 70, or 20 when quick.
        seed: of tasks, sampling and drawing.
        out: run folder; a demo that was stopped there goes on, one that was finished is refused.
        quick: fewer steps and episodes: a look, not a result.
        sets: overrides for every arm, ``learn.lr=1e-3``.
        mode: terminal display, ``auto``, ``plain`` or ``none``.

    Returns:
        The summary.

    Raises:
        RunError: ``out`` holds a finished run, something else, or a stopped demo of other arms or settings.
    """
    began, out, names = time.monotonic(), Path(out), tuple(arms or ("robust",))
    configs = {arm: demo_config(arm, staleness=STALENESS if staleness is None else staleness,
                                steps=steps or (20 if quick else STEPS), seed=seed, quick=quick, sets=sets)
               for arm in names}
    for config in configs.values():
        check_request(config)
    _check_room(out, names)
    for arm, config in configs.items():
        folder = out / "arms" / arm
        train(config, out=folder, resume=(folder / "config.toml").exists(), mode=mode)
    return conclude(out, began=began)


def conclude(out: Path | str, *, began: float | None = None) -> Json:
    """Write ``report.html`` and, last, ``summary.json`` of a run folder: a demo's, or that of one training run.

    Args:
        out: the folder.
        began: monotonic time at which the work began; the arms' own clocks count alone when not given.
    """
    out = Path(out)
    folders = {p.name: p for p in sorted((out / "arms").glob("*"))} if (out / "arms").is_dir() else {"": out}
    records = {name or settings_of(folder)["name"]: record_of_run(folder) for name, folder in folders.items()}
    main = "robust" if "robust" in records else next(iter(records))
    top: dict[str, Any] = {k: v for k, v in records[main].items() if k not in ("splits", "wall_s", "commit")}
    clocks = sum(record["wall_s"] for record in records.values())
    wall = max(clocks, time.monotonic() - began) if began is not None else clocks
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)
    starts = [start for folder in folders.values() for start in starts_of(folder)]
    summary = {"arm": main, **top, "wall_s": round(wall, 1), "peak_rss_mib": round(peak), "commit": commits(starts),
               "hardware": hardware(), "command": " ".join(starts[0]["command"]), "arms": records}
    if "" not in folders:
        write_text(out / "config.toml", (folders[main] / "config.toml").read_text())
    write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_report(out)
    return summary


def _check_room(out: Path, arms: Sequence[str]) -> None:
    """Refuse a folder that holds a finished run, something that no demo wrote, or a stopped demo of other arms."""
    if not out.is_dir():  # what else may stand there is named when the folder is made
        return
    wrote = ("summary.json", "report.html")  # once all arms are done; the page alone may be of a stopped demo
    if all((out / name).exists() for name in wrote):
        raise RunError(f"{out} holds a finished run", fix="choose another --out, or delete the folder first")
    known = ("arms", "config.toml", *wrote)
    foreign = sorted(p.name for p in out.iterdir() if p.name not in known and not p.name.startswith("."))
    if foreign:
        raise RunError(f"{out} holds {foreign[0]!r}, which no demo wrote", fix="choose another --out")
    other = sorted(p.name for p in (out / "arms").glob("*") if p.name not in arms)
    if other:
        raise RunError(f"{out} holds a stopped demo with arm {other[0]!r}, which was not asked for now",
                       fix="name the same --arms to go on with it, or choose another --out")
