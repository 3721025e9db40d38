"""Settings of the horizon study: how long its episodes are, how they are collected, learned from and judged."""

import argparse
from pathlib import Path

from agentsdpo.benchmarks.study import Arm
from agentsdpo.collect.config import CollectConfig
from agentsdpo.learn.presets import TOY
from agentsdpo.types import Json

MODEL = Path(__file__).parent / "model"
"""The shipped seed model, taught long episodes by ``python -m agentsdpo.benchmarks.horizon.build``; float16."""
LENGTHS = (4, 16, 48)
"""Clients of a task: 14, 50 and 146 calls of an agent that takes notes and makes no mistake."""
COLLECT: Json = {"window": 1536, "concurrency": 64, "max_tokens": 96, "compaction": {"manager": "notes"}}
"""What the model was taught with: a prompt is cut at 70 % of the window, and notes survive."""
CONFIG = CollectConfig.model_validate(COLLECT)
SPLITS = ("test_names", "test_world", "test_period", "test_firm")
COMMON: Json = {
    "preset": "robust", "staleness": 16, "checkpoint_every": 20, "checkpoint_keep": 1,
    "collect": COLLECT, "replay": {"durability": "episode", "max_uses": 1},
    "eval": {"every": 10, "final_splits": list(SPLITS)}, "tripwire": {"on": False},
    "learn": {**TOY["robust"], "max_staleness": 16, "control_every": 0}}
"""As ``robust-16`` of the staleness study, of which this is the longer one: single episodes, each learned from once,
sixteen policy versions after the one that played it. A model that is named by its folder would learn at a large model's
rate: this one has that of the seed model."""
QUICK = ("steps=2", "episodes_per_step=4", "learn.batch=4", "eval.every=1", "eval.episodes=4", "eval.final_episodes=4",
         "eval.final_splits=[\"test_names\"]")


def existing(text: str) -> Path:
    """A folder of a model, from a command line.

    Raises:
        argparse.ArgumentTypeError: there is none.
    """
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(
            f"there is no model at {text}: python -m agentsdpo.benchmarks.horizon.build makes one")
    return Path(text)


def _arm(n: int, steps: int, episodes: int, evaluated: int) -> Arm:
    return Arm(f"robust-n{n}", (
        f"desk.n=[{n}]", f"steps={steps}", f"episodes_per_step={episodes}", f"learn.batch={episodes}",
        f"eval.episodes={evaluated}", f"eval.final_episodes={evaluated}"))


ARMS = {arm.name: arm for arm in (_arm(4, 160, 16, 64), _arm(16, 240, 8, 32), _arm(48, 240, 4, 8))}
"""2,560 episodes, 1,920 and 960: the longer ones say the same rule more often, and cost more."""
