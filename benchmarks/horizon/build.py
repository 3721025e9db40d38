"""Teach the shipped seed model long episodes, for this study alone.

    python -m agentsdpo.benchmarks.horizon.build [--out DIR] [--threads 2] [--first-stage 1]

Starts from the shipped weights and reads the drills and episodes of :mod:`.corpus` in stages, the first at one learning
rate, each other at one that falls to zero. Writes weights in float16, tokenizer, template and ``training.json``;
``python -m agentsdpo.benchmarks.horizon.gates --model DIR`` judges the result.
"""

from functools import partial
from pathlib import Path

from agentsdpo.benchmarks.horizon.corpus import cut_traces, drills, recalled
from agentsdpo.envs.desk.build_seed import Stage, Stages, teach

SEED, OUT = 48, Path("runs/horizon-model")
STAGES: Stages = (
    (Stage(450, decay=False), partial(drills, lengths=(4, 8, 16), reading=0.0)),
    (Stage(1200, decay=True), partial(drills, lengths=(8, 16, 32, 48), reading=0.25)),
    (Stage(1200, decay=True), cut_traces),
    (Stage(1000, decay=True, peak=0.5), partial(cut_traces, short=0.5)),
    (Stage(450, decay=True, peak=0.5), partial(cut_traces, short=0.8)),
    (Stage(450, decay=True, peak=0.5), recalled),
    (Stage(1100, decay=True, peak=0.5), recalled))
"""Who is next among few, then among many, then whole episodes: in this order it is learned, at once it is not. The last
two bring back what the drills made it forget, whom a hint wants told, which 2,650 steps of the former three did not."""


if __name__ == "__main__":
    teach(__doc__, STAGES, SEED, OUT)
