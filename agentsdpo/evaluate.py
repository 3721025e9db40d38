"""Held-out evaluation of the newest policy: the same tasks and seeds every time, no feedback, no hints."""

from typing import Any

from agentsdpo.assemble import Run, evaluator
from agentsdpo.console import View
from agentsdpo.stats import wilson
from agentsdpo.track import MetricsWriter
from agentsdpo.types import Json

EVAL_SEED = 77
"""Of sampling in every evaluation, whatever the run's seed."""
HELD_OUT = ("test_names", "test_world", "test_period")
"""Splits that hold out one axis each and ask for the rules that were taught; pooled into the headline."""


def evaluate(run: Run, metrics: MetricsWriter, view: View, *, final: bool) -> None:
    """Play the evaluation splits and write one line per split and decoding.

    Args:
        run: its newest version is played.
        metrics: where the lines go.
        view: told about each.
        final: all splits, sampled and greedy, as before and after training; else the curve's splits, sampled.
    """
    config = run.config.eval
    splits, count = (config.final_splits, config.final_episodes) if final else (config.splits, config.episodes)
    view.stage(f"evaluation of version {run.version} on {', '.join(splits)}")
    run.load_policy(run.version)
    for decoding in ("sampled", "greedy") if final else ("sampled",):
        player = evaluator(run, greedy=decoding == "greedy")
        for split in splits:
            episodes = player.collect(split, range(count), seed=EVAL_SEED)
            scored = [e.grade for e in episodes if e.grade is not None and e.grade.mean is not None]
            row: Json = {"split": split, "decoding": decoding, "n": len(scored), "version": run.version, **run.totals}
            if scored:
                row |= {"pass": sum(bool(g.passed) for g in scored) / len(scored),
                        "score": sum(g.mean or 0.0 for g in scored) / len(scored)}
            metrics.write("eval", run.step, row)
            view.eval({"step": run.step, **row})


def summarise(rows: list[Json], steps: int) -> Json:
    """Before and after, per split and pooled over the held-out ones, from the lines of one arm.

    Keys: ``zero_shot_pass``, ``final_pass``, their ``_ci95`` (Wilson), the greedy counterparts, and ``splits``.
    """
    ends = [r for r in rows if r["kind"] == "eval" and r["step"] in (0, steps) and "pass" in r]
    splits = {r["split"]: _split([e for e in ends if e["split"] == r["split"]], steps) for r in ends}
    pooled = _split(_pool([r for r in ends if r["split"] in HELD_OUT] or ends), steps)
    return {**pooled, "splits": splits}


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
