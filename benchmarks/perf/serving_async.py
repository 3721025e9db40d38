"""Wall clock to a held-out pass rate: programs side by side against the synchronous loop, with tools that take long.

    python -m agentsdpo.benchmarks.perf.serving_async [--json]

Both arms run the same configuration from a cold start: same model, tasks, batch, bound on staleness, concurrency and
number of optimiser steps, tool latencies from the same distribution (:mod:`~agentsdpo.benchmarks.perf.slow_tools`).
The synchronous arm plays all episodes of a step at once and waits for the slowest. Nothing is evaluated while they run:
every published version is kept, and those of every fifth step are played afterwards on the same held-out tasks and
seeds, in the world without latencies. A version's time is that of its publication.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from agentsdpo import plots
from agentsdpo.assemble import model_path
from agentsdpo.benchmarks.perf.figure import Figure, run_all
from agentsdpo.benchmarks.perf.slow_tools import MEDIAN_S, SIGMA
from agentsdpo.collect.collector import Collector
from agentsdpo.collect.inprocess import InProcessEngine
from agentsdpo.config import RunConfig, from_mapping
from agentsdpo.envs.desk import DeskSuite
from agentsdpo.evaluate import EVAL_SEED, scores
from agentsdpo.learn.load import load_chat, load_model
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.track import read_metrics
from agentsdpo.types import Json

OUT = Path("runs/serving-async")
STEPS, EVERY, EPISODES, SPLIT = 60, 5, 96, "test_names"
SHARE = 0.9
"""Of the lower of the two arms' best pass rates: what both have to reach."""
_ARMS = {"sync": "from agentsdpo.loop import train\ntrain(load({config!r}), out={out!r}, mode='none')",
         "async": "from agentsdpo.programs.side_by_side import train_async\n"
                  "train_async(load({config!r}), out={out!r}, mode='none')"}


def bench_config(steps: int) -> RunConfig:
    """Settings of both arms."""
    return from_mapping({
        "name": "serving-async", "steps": steps, "suite": "agentsdpo.benchmarks.perf.slow_tools:desk_mini",
        "episodes_per_step": 16, "collect": {"window": 512, "concurrency": 64, "max_tokens": 64},
        "replay": {"durability": "episode"}, "learn": {"max_staleness": 8, "batch": 32}, "tripwire": {"on": False},
        "publish": {"keep": 100_000}, "eval": {"splits": [], "final_splits": []}})


def run_arm(arm: str, folder: Path, config: Path) -> float:
    """Run one arm in a process of its own; returns when it began, in seconds since the epoch.

    Raises:
        CalledProcessError: it failed.
    """
    code = "from agentsdpo.config import load\n" + _ARMS[arm].format(config=str(config), out=str(folder / arm))
    began = time.time()
    subprocess.run([sys.executable, "-c", code], check=True, stdin=subprocess.DEVNULL)
    return began


def curve(folder: Path, config: RunConfig, began: float) -> list[Json]:
    """Pass rate of the versions of every fifth step, as ``eval`` rows of a run."""
    chat = load_chat(model_path(config))
    engine = InProcessEngine(load_model(model_path(config), chat), chat.eos_id, max_slots=64, window=512)
    collector = Collector.of_engine(DeskSuite("desk-mini"), engine, chat, config.collect, evaluate=True)
    registry, rows, seen = PolicyRegistry(folder / "policies"), list[Json](), set[int]()
    joined = {row["step"]: row for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == "step"}
    for version in registry.versions():
        step = registry.manifest(version).learner_step
        if step % EVERY or step in seen:
            continue
        seen.add(step)
        engine.load_weights(registry.load(version), version)
        found = scores(collector.collect(SPLIT, range(EPISODES), seed=EVAL_SEED))
        at = (registry.folder(version) / "manifest.json").stat().st_mtime - began
        rows.append({"kind": "eval", "step": step, "wall_s": round(at, 1), "split": SPLIT, "decoding": "sampled",
                     "version": version, "episodes": joined.get(step, {}).get("episodes", 0), **found})
    return rows


def reached(rows: list[Json], target: float) -> Json:
    """The first row at or above a pass rate."""
    return next(row for row in rows if row["pass"] >= target)


def compare(sync: list[Json], beside: list[Json]) -> Figure:
    """The figure of two curves."""
    target = SHARE * min(max(row["pass"] for row in rows) for rows in (sync, beside))
    ours, theirs = reached(beside, target), reached(sync, target)
    about = {"target_pass": round(target, 3), "async_s": ours["wall_s"], "sync_s": theirs["wall_s"],
             "async_step": ours["step"], "sync_step": theirs["step"], "async_best": max(r["pass"] for r in beside),
             "sync_best": max(r["pass"] for r in sync), "async_all_s": beside[-1]["wall_s"],
             "sync_all_s": sync[-1]["wall_s"], "episodes": EPISODES, "split": SPLIT,
             "latency": f"log-normal, median {MEDIAN_S} s, sigma {SIGMA}", "load": round(os.getloadavg()[0], 1)}
    return Figure("async_vs_sync_wallclock", round(theirs["wall_s"] / ours["wall_s"], 2), "ratio",
                  "the synchronous loop, same settings", about)


def draw(folder: Path, sync: list[Json], beside: list[Json]) -> None:
    """``curve.svg`` and ``curve.png``: pass rate against wall clock, both arms."""
    figure = plots.learning_curve(beside, x="wall_s", split=SPLIT, context={"synchronous loop": sync},
                                  below="blue: programs side by side", size=(6.4, 4.0))
    (folder / "curve.svg").write_text(plots.svg(figure, "async") + "\n")
    figure.savefig(folder / "curve.png", dpi=150)


def measure(folder: Path = OUT, steps: int = STEPS, arms: tuple[str, ...] = ("async", "sync")) -> Iterator[Figure]:
    """Run both arms, evaluate, compare, draw; a folder that holds the curves already is only compared again."""
    folder.mkdir(parents=True, exist_ok=True)
    config, path = bench_config(steps), folder / "config.toml"
    path.write_text(config.to_toml())
    for arm in arms:
        if not (folder / f"{arm}.json").exists():
            rows = curve(folder / arm, config, run_arm(arm, folder, path))
            (folder / f"{arm}.json").write_text(json.dumps(rows, indent=1) + "\n")
    beside, sync = (json.loads((folder / f"{arm}.json").read_text()) for arm in ("async", "sync"))
    draw(folder, sync, beside)
    yield compare(sync, beside)


if __name__ == "__main__":
    run_all(__doc__ or "", {"async": measure})
