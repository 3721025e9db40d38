"""Teach the shipped seed model to do as a demonstration does, for the curve of the preset ``sdft`` alone.

    python -m agentsdpo.benchmarks.methods.sdft.build [--out DIR] [--threads 2] [--first-stage 1]

Starts from the shipped weights. Part of the text are episodes with an expert's calls in front, under rules that are
redrawn for each, as in :mod:`agentsdpo.envs.desk.corpus`, so that no rule can be learned here; the rest is what the
model has read before. Writes weights in float16, tokenizer, template and ``training.json``.
"""

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from agentsdpo.calls import call_line
from agentsdpo.chat import ChatFormat
from agentsdpo.envs.desk.agents import ScriptedAgent, steps
from agentsdpo.envs.desk.build_seed import Stage, Stages, teach
from agentsdpo.envs.desk.corpus import MIXES, Frame, Mix, Trace, tasks, trace, traces
from agentsdpo.hint.sources import DEMO
from agentsdpo.types import Task

SEED, OUT = 49, Path("runs/sdft-model")
MINI: Mix = ((1.0, "desk-mini", "lookup", (1,), 0),)
"""The tasks on which the preset is measured."""


def shown(task: Task, rules: dict[str, str]) -> str:
    """The hint that the source ``demo`` would write, had the firm these rules."""
    done = steps(task, ScriptedAgent(task, rules))
    return "\n".join([DEMO, *(call_line(name, arguments) for name, arguments in done)])


def demonstrated(chat: ChatFormat, seed: int, share: float, mix: Mix) -> Iterator[Trace]:
    """An endless, seeded stream of episodes, a share of them with a demonstration of the same task in front."""
    frame, rng = Frame(chat), random.Random(seed)
    known, own = traces(frame, seed, MIXES[1]), tasks(mix, seed, rng)
    while True:
        if rng.random() > share:
            yield next(known)
        else:
            yield trace(frame, next(own), rng, epsilon=rng.choice((0.0, 0.05, 0.2)), words=shown)


STAGES: Stages = (
    (Stage(900, decay=True, peak=0.5), partial(demonstrated, share=0.5, mix=MIXES[1])),
    (Stage(900, decay=True), partial(demonstrated, share=0.7, mix=MINI)))
"""After the first the model copies sheet, unit and folder, and guesses who is told."""


if __name__ == "__main__":
    teach(__doc__, STAGES, SEED, OUT)
