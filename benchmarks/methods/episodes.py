"""How many episodes until 80 % of held-out tasks pass: single attempts with a hint, against groups without.

    python -m agentsdpo.benchmarks.methods.episodes                 # both arms, 5 seeds; may be stopped and continued
    python -m agentsdpo.benchmarks.methods.episodes --seeds 1
    python -m agentsdpo.benchmarks.methods.episodes --quick         # a look at whether it runs, not a result

Both arms start from the same weights and are judged on the same held-out tasks at temperature 1. ``robust`` plays
1,600 tasks once each, 16 a step, is held three policy versions behind, learns from each episode twice, and reads the
grader's words as a hint. ``grpo`` has 2,048 attempts, so that it could need twice as many: it plays every task eight
times with the newest policy, four tasks a step, and learns from the mean criterion score within the group: partial
credit, without which there would be nothing to learn from where one attempt in some 300 passes. Its learning rate is
the best of those tried.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from agentsdpo.benchmarks.study import Arm, Study, carry_out, options
from agentsdpo.formats import interval, percent
from agentsdpo.learn.presets import TOY
from agentsdpo.stats import Interval, over_seeds
from agentsdpo.types import Json

GOAL = 0.8
"""Held-out pass rate to be reached."""
SPLIT = "test_names"
SDFT = Path(__file__).parent / "sdft" / "model"
"""Made by ``python -m agentsdpo.benchmarks.methods.sdft.build``; float16."""
COMMON: Json = {
    "steps": 100, "episodes_per_step": 16, "checkpoint_every": 50, "checkpoint_keep": 1,
    "collect": {"window": 512, "concurrency": 128, "max_tokens": 64}, "replay": {"durability": "episode"},
    "eval": {"every": 10, "episodes": 64, "final_episodes": 64, "splits": [SPLIT], "final_splits": [SPLIT]},
    "tripwire": {"on": False}, "learn": {"max_staleness": 8, "control_every": 0}}
QUICK = ("steps=2", "eval.every=1", "eval.episodes=8", "eval.final_episodes=8")
_GROUPS = ("staleness=0", "learn.max_staleness=0", "episodes_per_step=32", "steps=64", "eval.every=5")
MAIN = (Arm("robust", ("preset=robust", "staleness=3", "learn.batch=32")),
        Arm("grpo", ("preset=grpo", *_GROUPS, "learn.batch=4")))
"""The question. ``grpo`` learns from four groups of eight a step, all fresh."""
MORE = (Arm("opd_grpo", ("preset=opd_grpo", *_GROUPS, "learn.batch=4")),
        Arm("safe_agent", ("preset=safe_agent", *_GROUPS, "learn.batch=4")),
        Arm("sdpo", ("preset=sdpo", *_GROUPS, "learn.batch=32")))
"""Other methods with groups on the rollouts of ``grpo``, run when they are named."""
SHOWN = Arm("sdft", ("preset=sdft", f"model={SDFT}", f"learn.lr={TOY['sdft']['lr']}", "learn.max_staleness=4",
                     "staleness=3", "learn.batch=32"))
"""Plays as ``robust`` does, when it is named; with a model of its own: the shipped one reads no demonstrations."""
TUNING = tuple(Arm(f"grpo-{lr}", ("preset=grpo", *_GROUPS, "learn.batch=4", f"learn.lr={lr}"))
               for lr in ("1e-4", "6e-4", "1e-3"))
"""``grpo`` at other learning rates, for whoever doubts that its own is the best one."""
ARMS = {arm.name: arm for arm in (*MAIN, *MORE, SHOWN, *TUNING)}


def reached(rows: Sequence[Json], goal: float = GOAL) -> int | None:
    """Episodes played up to the first evaluation from which on the goal is met at two in a row, or at the last.

    One evaluation of 64 episodes is off by up to 5 points one time in three: a single one may be luck.

    Args:
        rows: evaluations of one run.

    Returns:
        None where that never happened.

    >>> rates = {0: 0.0, 80: 0.9, 160: 0.7, 240: 0.8, 320: 0.9}
    >>> points = [{"episodes": n, "pass": rate} for n, rate in rates.items()]
    >>> reached(points), reached(points[:3])
    (240, None)
    """
    ordered = sorted(rows, key=lambda row: row["episodes"])
    met = [row["pass"] >= goal for row in ordered]
    return next((row["episodes"] for row, now, then in zip(ordered, met, [*met[1:], True], strict=True)
                 if now and then), None)


def lines(found: pa.Table) -> Iterator[str]:
    """What the study says: one line per arm, then the ratio."""
    rows = [row for row in found.to_pylist() if row["split"] == SPLIT and row["decoding"] == "sampled"]
    needed, spent, least = dict[str, list[int | None]](), 0, dict[str, float]()
    for arm in sorted({row["arm"] for row in rows}, reverse=True):
        seeds = sorted({row["seed"] for row in rows if row["arm"] == arm})
        own = [[row for row in rows if row["arm"] == arm and row["seed"] == seed] for seed in seeds]
        ends = [max(run, key=lambda row: row["step"]) for run in own]
        spent = max(row["episodes"] for row in ends)
        needed[arm] = [reached(run) for run in own]
        least[arm] = over_seeds([spent if n is None else n for n in needed[arm]]).estimate
        final = over_seeds([row["pass"] for row in ends], ends[0]["n"])
        score = over_seeds([row["score"] for row in ends])
        yield (f"{arm:<10} {len(seeds)} seed{'s' * (len(seeds) > 1)}  episodes to {GOAL:.0%}: "
               f"{_needed(needed[arm], spent)}  after {spent}: pass {_percent(final)}, score {_percent(score)}")
    if needed.keys() >= {arm.name for arm in MAIN} and None not in needed["robust"]:
        more = "at least " if None in needed["grpo"] else ""
        yield f"grpo / robust: {more}{least['grpo'] / least['robust']:.1f}"


def _needed(counts: Sequence[int | None], spent: int) -> str:
    known = [n for n in counts if n is not None]
    if len(known) < len(counts):
        return f"not within {spent} in {len(counts) - len(known)} of {len(counts)}"
    middle, low, high = over_seeds(known)
    return f"{middle:.0f}" + (f" [{low:.0f}, {high:.0f}]" if len(known) > 1 else "")


def _percent(found: Interval) -> str:
    return f"{percent(found.estimate)} {interval(found)}".strip()


STUDY = Study("methods-episodes", ARMS, tuple(arm.name for arm in MAIN), COMMON, QUICK, lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, then write the table and print what it says."""
    carry_out(STUDY, options(STUDY, __doc__).parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
