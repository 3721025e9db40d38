"""How old may the data be? Each arm is trained on episodes of policies a fixed number of versions behind the learner.

    python -m agentsdpo.benchmarks.staleness                 # all arms, 5 seeds: hours; may be stopped and continued
    python -m agentsdpo.benchmarks.staleness --arms robust-16 naive-8 --seeds 1
    python -m agentsdpo.benchmarks.staleness --quick         # a look at whether it runs, not a result

Every arm starts from the same weights, plays the same tasks with the same seeds, takes as many optimiser steps with as
many rows, learns from the same kind of teacher (frozen, hinted) and is evaluated on the same held-out tasks; arms
differ in the objective and its learning rate (the preset's for the seed model), or in the one thing they are named
after. The tripwire is off: a collapse is to be seen, not to be mended. ``-off`` collects with the first policy alone.
"""

import sys
from collections.abc import Sequence

from agentsdpo.benchmarks.staleness.report import lines
from agentsdpo.benchmarks.study import Arm, Study, carry_out, options
from agentsdpo.types import Json

COMMON: Json = {
    "steps": 100, "episodes_per_step": 16, "checkpoint_every": 50, "checkpoint_keep": 1,
    "collect": {"window": 512, "concurrency": 128, "max_tokens": 64},
    "replay": {"durability": "episode", "max_uses": 1},
    "eval": {"every": 10, "episodes": 64, "final_episodes": 64,
             "final_splits": ["test_names", "test_world", "test_period", "test_firm"]},
    "tripwire": {"on": False}, "learn": {"batch": 16, "control_every": 0}}
"""1,600 single episodes; each is learned from once, ``staleness`` policy versions after the one that played it."""
QUICK = ("steps=4", "eval.every=2", "eval.episodes=8", "eval.final_episodes=8", "eval.final_splits=[\"test_names\"]")


def _arm(name: str, preset: str, staleness: int | None, *sets: str) -> Arm:
    """``staleness`` None: the policy before training plays all episodes."""
    bound = (f"staleness={staleness}", f"learn.max_staleness={staleness}") if staleness is not None else (
        "staleness=1000000", "learn.max_staleness=1000000")
    return Arm(name, (f"preset={preset}", *bound, *sets))


MAIN = (_arm("robust-0", "robust", 0), _arm("robust-3", "robust", 3), _arm("robust-16", "robust", 16),
        _arm("robust-64", "robust", 64), _arm("robust-off", "robust", None), _arm("sdpopp-3", "sdpopp", 3),
        _arm("sdpopp-8", "sdpopp", 8), _arm("naive-8", "naive", 8))
"""The question itself: the default at every age of data, the published recipe, and it without its corrections."""
AGES = tuple(arm.name for arm in MAIN)
MORE = (_arm("is-8", "naive", 8, "learn.ratio=is"), _arm("tis-8", "naive", 8, "learn.ratio=tis"),
        _arm("reverse-16", "robust", 16, "learn.beta=1.0"),
        _arm("ungated-64", "robust", 64, "learn.gate=off", "learn.veto=none"),
        _arm("ema-8", "robust", 8, "learn.teacher=ema", "learn.ema_rate=0.01"),
        _arm("live-0", "robust", 0, "learn.teacher=live", "learn.allow_live_lr=true"),
        _arm("sdpopp-3-1e-4", "sdpopp", 3, "learn.lr=1e-4"), _arm("sdpopp-8-1e-4", "sdpopp", 8, "learn.lr=1e-4"),
        _arm("sdpopp-8-3e-4", "sdpopp", 8, "learn.lr=3e-4"), _arm("sdpopp-8-1e-3", "sdpopp", 8, "learn.lr=1e-3"),
        _arm("naive-8-3e-5", "naive", 8, "learn.lr=3e-5"), _arm("naive-8-3e-4", "naive", 8, "learn.lr=3e-4"),
        *(_arm(f"{ratio}-8-{rate}", "naive", 8, f"learn.ratio={ratio}", f"learn.lr={rate}")
          for ratio in ("is", "tis") for rate in ("3e-4", "6e-4")),
        _arm("robust-16-n2", "robust", 16, "desk.n=[2]"), _arm("robust-16-n4", "robust", 16, "desk.n=[4]",
             "collect.window=1024"))
"""One thing changed at a time: a ratio on ``naive``'s sampled token; on ``robust`` the form, the gates, the teacher; on
the sampled token, and its ratios, the learning rate, so that they do not lose by the one they were given; episodes of 6
and 10 calls (two and four clients), as many as the shipped model has learnt to make."""
ARMS = {arm.name: arm for arm in (*MAIN, *MORE)}


STUDY = Study("staleness", ARMS, tuple(ARMS), COMMON, QUICK, lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, then write the table and print what it says."""
    carry_out(STUDY, options(STUDY, __doc__).parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
