"""``agentsdpo demo``: a small real model that cannot do its job learns it from its own stale episodes and from hints.

Every arm starts from the same weights, plays the same tasks with the same seeds, and is evaluated on the same held-out
tasks; the arms differ in the objective alone.
"""

import json
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentsdpo.config import RunConfig, from_mapping
from agentsdpo.errors import RunError
from agentsdpo.evaluate import summarise
from agentsdpo.loop import train
from agentsdpo.report import write_report
from agentsdpo.runfolder import git_commit
from agentsdpo.track import read_metrics
from agentsdpo.types import Json

STEPS, STALENESS = 150, 3
_WORLD: Json = {"collect": {"window": 512, "concurrency": 128, "max_tokens": 64}}
"""An episode is about 200 tokens; a turn of the seed model at most 40."""
_QUICK: Json = {"eval": {"episodes": 32, "final_episodes": 32, "every": 10}}
REUSE = 5
"""Policy versions a row may be drawn for after it was collected."""


def demo_config(arm: str, *, staleness: int, steps: int, seed: int, quick: bool = False,
                sets: Sequence[str] = ()) -> RunConfig:
    """Settings of one arm: a preset on the built-in world, with one staleness bound for every arm.

    >>> demo_config("naive", staleness=8, steps=10, seed=0).learn.max_staleness
    13
    """
    data: Json = {**_WORLD, **(_QUICK if quick else {}), "name": arm, "preset": arm, "steps": steps, "seed": seed,
                  "staleness": staleness, "learn": {"max_staleness": staleness + REUSE}}
    return from_mapping(data, sets)


def run_demo(*, arms: Sequence[str] | None = None, staleness: int | None = None, steps: int | None = None,
             seed: int = 0, out: Path = Path("runs/demo"), quick: bool = False, sets: Sequence[str] = (),
             mode: str = "auto") -> Json:
    """Train and evaluate each arm, write ``summary.json`` and ``report.html``.

    Args:
        arms: presets; ``robust`` alone when not given.
        staleness: policy versions the collector is held behind the learner; 3.
        steps: optimiser steps per arm; 150, or 20 when quick.
        seed: of tasks, sampling and drawing.
        out: run folder; a demo that was stopped there goes on, one that was finished is replaced.
        quick: fewer steps and episodes: a look, not a result.
        sets: overrides for every arm, ``learn.lr=1e-3``.
        mode: terminal display, ``auto``, ``plain`` or ``none``.

    Returns:
        The summary.
    """
    began, out, names = time.monotonic(), Path(out), tuple(arms or ("robust",))
    configs = {arm: demo_config(arm, staleness=STALENESS if staleness is None else staleness,
                                steps=steps or (20 if quick else STEPS), seed=seed, quick=quick, sets=sets)
               for arm in names}
    _make_room(out)
    records = {}
    for arm, config in configs.items():
        folder = out / "arms" / arm
        totals = train(config, out=folder, resume=(folder / "config.toml").exists(), mode=mode).totals
        rows = read_metrics(folder / "metrics.jsonl")
        records[arm] = {**summarise(rows, config.steps), "staleness": config.staleness, "steps": config.steps,
                        "episodes": totals["episodes"], "wall_s": rows[-1]["wall_s"]}
    summary = _summary(records, time.monotonic() - began, seed)
    (out / "config.toml").write_text((out / "arms" / names[0] / "config.toml").read_text())
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    write_report(out)
    return summary


def _summary(arms: dict[str, Json], wall_s: float, seed: int) -> Json:
    """Numbers of the main arm on top (``robust`` where it was run), all arms below, and what produced them."""
    main = "robust" if "robust" in arms else next(iter(arms))
    top: dict[str, Any] = {k: v for k, v in arms[main].items() if k not in ("splits", "wall_s")}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)
    return {"arm": main, **top, "wall_s": round(wall_s, 1), "peak_rss_mib": round(peak), "seed": seed,
            "commit": git_commit(), "hardware": f"{_cpu()}, {len(os.sched_getaffinity(0))} cores",
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), "arms": arms}


def _cpu() -> str:
    """Name of the processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines()
             if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _make_room(out: Path) -> None:
    """Remove a finished demo; refuse a folder that holds anything else."""
    if not (out / "summary.json").exists():
        return
    known = {"arms", "config.toml", "summary.json", "report.html"}
    foreign = sorted(p.name for p in out.iterdir() if p.name not in known)
    if foreign:
        raise RunError(f"{out} holds {foreign[0]!r}, which no demo wrote", fix="choose another --out")
    for name in known:
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
