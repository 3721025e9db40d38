"""Held-out evaluation of the newest policy: the same tasks and seeds every time, no feedback, no hints."""

from agentsdpo.assemble import Run, evaluator
from agentsdpo.collect.metrics import collect_metrics
from agentsdpo.config import RunConfig
from agentsdpo.learn.alarms import BEHAVIOUR
from agentsdpo.show.console import View
from agentsdpo.track import MetricsWriter
from agentsdpo.types import Episode, Json

EVAL_SEED = 77
"""Of sampling in every evaluation, whatever the run's seed."""


def evaluate(run: Run, metrics: MetricsWriter, view: View) -> list[Json]:
    """Play what is due at this step and not in the metrics yet, one line per split and decoding.

    Before the first and after the last step: all splits, sampled and greedy. Every ``eval.every`` steps in between:
    the curve's splits, sampled. Every ``tripwire.every`` steps: the first of these.

    Returns:
        All lines of this step, those of an earlier life included.
    """
    rows = [dict(r) for r in metrics.rows if r["kind"] == "eval" and r["step"] == run.step]
    have = {(r["split"], r["decoding"]) for r in rows}
    left = [(split, decoding, n) for split, decoding, n in due(run.config, run.step) if (split, decoding) not in have]
    return rows + (play(run, left, metrics, view) if left else [])


def play(run: Run, wanted: list[tuple[str, str, int]], metrics: MetricsWriter, view: View) -> list[Json]:
    """Play (split, decoding, episodes) with the newest policy; one line each.

    Where the learner has gone on since that was published (``publish.every``, a soft alarm), its own weights play, but
    for the last time: what is judged, and what a gated teacher copies, is this very state.
    """
    view.stage(f"evaluation of version {run.version} on {', '.join(dict.fromkeys(split for split, *_ in wanted))}")
    if run.ahead and not run.ends:
        run.engine.load_weights(run.together.policy(), run.version)
    else:
        run.load_policy(run.version)
    rows = []
    for split, decoding, count in wanted:
        episodes = evaluator(run, greedy=decoding == "greedy").collect(split, range(count), seed=EVAL_SEED)
        acts = {key: value for key, value in collect_metrics(episodes).items() if key in BEHAVIOUR}
        row = {"split": split, "decoding": decoding, "version": run.version, **run.totals, **scores(episodes), **acts}
        metrics.write("eval", run.step, row)
        view.evaluation({"step": run.step, **row})
        rows.append(row)
    return rows


def due(config: RunConfig, step: int) -> list[tuple[str, str, int]]:
    """(split, decoding, episodes) to be played at one step.

    >>> due(RunConfig(), 20), len(due(RunConfig(), 0)), due(RunConfig(), 7)
    ([('test_names', 'sampled', 64)], 10, [])
    """
    about, ends = config.eval, step in (0, config.steps)
    if ends:
        found = [(split, decoding, about.final_episodes) for decoding in ("sampled", "greedy")
                 for split in about.final_splits]
    else:
        found = [(split, "sampled", about.episodes) for split in about.splits] if step % about.every == 0 else []
    known = {(split, decoding) for split, decoding, _ in found}
    watched = config.tripwire.on and (ends or step % config.tripwire.every == 0)
    return found + [one for one in probes(config) if watched and one[:2] not in known]


def probes(config: RunConfig) -> list[tuple[str, str, int]]:
    """What the tripwire probes with, as in :func:`due`; nothing for a run without a curve."""
    return [(split, "sampled", config.eval.episodes) for split in config.eval.splits[:1]]


def scores(episodes: list[Episode]) -> Json:
    """``n`` scored episodes, and their ``pass`` rate and mean ``score`` if there are any."""
    grades = [e.grade for e in episodes if e.grade is not None and e.grade.mean is not None]
    if not grades:
        return {"n": 0}
    return {"n": len(grades), "pass": sum(bool(g.passed) for g in grades) / len(grades),
            "score": sum(g.mean or 0.0 for g in grades) / len(grades)}
