"""Continual learning: a stream of once-only requests, late corrections, and house rules that change half-way.

    python -m agentsdpo.benchmarks.methods.continual                  # what is missing of all arms and 5 seeds
    python -m agentsdpo.benchmarks.methods.continual --seeds 1        # about 4 minutes a run
    python -m agentsdpo.benchmarks.methods.continual --quick          # a look at whether it runs, not a result

Every arm starts from the seed model and meets the same requests, delays and rules. After each run its rows are put into
the table, and a run that stands there is not repeated. Along the stream: requests before they are learnt from
(``stream``), unseen clients by the rules that hold (``taught``) and of kinds that nobody ever asks for (``untaught``);
at its ends and at the change also earlier skills (``skill: ...``).
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from agentsdpo.assemble import inprocess_engine
from agentsdpo.benchmarks.methods.continual_learn import (
    LR,
    Distilled,
    Retried,
    Student,
    Tuned,
    Words,
    earlier_work,
    lines_of,
)
from agentsdpo.benchmarks.methods.continual_measure import Exam, acts, followed
from agentsdpo.benchmarks.methods.continual_report import SCHEMA, TABLE, lines, read
from agentsdpo.benchmarks.methods.continual_stream import COLLECT, House, Plan, Stream
from agentsdpo.benchmarks.study import in_table, write_table
from agentsdpo.chat import ChatFormat
from agentsdpo.collect.inprocess import InProcessEngine
from agentsdpo.envs.desk.seed import seed_path
from agentsdpo.evaluate import scores
from agentsdpo.learn.load import load_chat, load_model
from agentsdpo.provenance import git_commit, hardware
from agentsdpo.replay.store import ReplayStore
from agentsdpo.types import Json

QUICK = Plan(steps=4, change=2, per_step=6, batch=8, past=4, every=2, episodes=8, skills=4)


@dataclass(frozen=True)
class Arm:
    """One way to learn from the stream.

    Attributes:
        learns: ``sdpo``, or fine-tuning on ``words`` or on ``retries``.
        replay: fill each step up with older attempts. earlier: share of each batch that is work from before the stream.
        newest: read older attempts with the newest word on their topic (fine-tuning leaves out those whose word no
            longer holds).
        updates: optimiser steps in each step of the stream; those behind the first are on older attempts alone.
        lr: learning rate.
        brakes: of SDPO, which of ``gate`` and ``pull`` are on; the preset has both.
    """

    learns: str
    replay: bool = True
    earlier: float = 0.0
    newest: bool = True
    updates: int = 1
    lr: float = LR
    brakes: tuple[str, ...] = ()


ARMS = {"sdpo-earlier": Arm("sdpo", earlier=0.3), "sdpo-earlier-half": Arm("sdpo", earlier=0.5),
        "sdpo-earlier-half-x4": Arm("sdpo", earlier=0.5, updates=4),
        "sdpo-earlier-half-x4-4e-4": Arm("sdpo", earlier=0.5, updates=4, lr=4e-4),
        "sft-retries-earlier-half-x4": Arm("retries", earlier=0.5, updates=4),
        "sdpo-replay": Arm("sdpo"), "sdpo-fresh": Arm("sdpo", replay=False),
        "sft-retries-earlier": Arm("retries", earlier=0.3), "sft-retries": Arm("retries"),
        "sdpo-as-said": Arm("sdpo", newest=False), "sft-words": Arm("words"),
        "conversations": Arm("sdpo", brakes=("gate", "pull")), "sdpo-replay-gate": Arm("sdpo", brakes=("gate",)),
        "sdpo-replay-pull": Arm("sdpo", brakes=("pull",)),
        "conversations-half-x4-4e-4": Arm("sdpo", earlier=0.5, updates=4, lr=4e-4, brakes=("gate", "pull"))}


def run(arm: Arm, seed: int, plan: Plan, say: Callable[[str], None]) -> list[Json]:
    """The whole stream for one arm; one row per evaluation, without what is the same for all rows."""
    chat, house, rows = load_chat(seed_path()), House.of(seed), []
    engine = _engine(chat)
    exam = Exam(house, engine, chat, episodes=plan.episodes, skills=plan.skills)
    with tempfile.TemporaryDirectory() as folder:
        store = ReplayStore.open(folder)
        student = _student(arm, seed, plan, chat, house, store)
        stream = Stream(house, plan, seed, engine, chat, store)
        spent: Json = {"episodes": 0, "env_steps": 0, "staleness": 0}
        began = time.monotonic()
        for step in range(plan.steps + 1):
            rows += [{**row, **spent, "step": step, "wall_s": time.monotonic() - began}
                     for row in (_examine(exam, house, plan, step) if step else first_rows(seed, plan))]
            if step == plan.steps:
                break
            played = stream.play(step)
            learnt = student.learn(stream.arriving(step))
            version = student.version
            for _ in range(arm.updates - 1):
                learnt = student.learn(())
                student.version = version  # ages are counted in versions that were published
            spent = {"episodes": spent["episodes"] + len(played), "staleness": learnt.get("staleness", 0),
                     "env_steps": spent["env_steps"] + sum(e.metadata["calls"] for e in played)}
            rows.append({"split": "stream", **scores(played), **acts(played), **spent, **learnt, "step": step,
                         "before": followed(played, house.before), "after": followed(played, house.after),
                         "wall_s": time.monotonic() - began})
            engine.load_weights(student.model.state_dict(), student.version)
            say(f"step {step + 1} of {plan.steps}: score {rows[-1].get('score', 0):.2f}, {learnt['rows']} rows, "
                f"{time.monotonic() - began:.0f} s")
        store.close()
    return rows


def _engine(chat: ChatFormat) -> InProcessEngine:
    """The first model, ready to act."""
    return inprocess_engine(COLLECT, seed_path(), chat)


def _student(arm: Arm, seed: int, plan: Plan, chat: ChatFormat, house: House, store: ReplayStore) -> Student:
    model, first, batch = load_model(seed_path(), chat), _engine(chat), plan.batch if arm.replay else 0
    past = earlier_work(first, chat, store, plan.past, seed) if arm.earlier else []
    if arm.learns == "sdpo":
        return Distilled(model, chat, store, batch=batch, newest=arm.newest, seed=seed, earlier=past, share=arm.earlier,
                         lr=arm.lr, brakes=arm.brakes)
    make: Any = Words(chat, store) if arm.learns == "words" else Retried(first, chat, house, plan, seed)
    return Tuned(model, make, batch=batch, newest=arm.newest, seed=seed, earlier=lines_of(store, past),
                 share=arm.earlier, lr=arm.lr)


def _examine(exam: Exam, house: House, plan: Plan, step: int) -> list[Json]:
    """What is due at a step: by the rules that its requests so far had to follow."""
    suite, ends = house.at(step - 1, plan), step in (plan.change, plan.steps)
    rows = exam.rules(suite) if ends or step % plan.every == 0 else []
    return rows + (exam.skills() if ends else [])


@cache
def first_rows(seed: int, plan: Plan) -> tuple[Json, ...]:
    """The seed model's own, the same for every arm."""
    chat, house = load_chat(seed_path()), House.of(seed)
    exam = Exam(house, _engine(chat), chat, episodes=plan.episodes, skills=plan.skills)
    return (*exam.rules(house.before), *exam.skills())


def study(arms: Sequence[str], seeds: Sequence[int], plan: Plan, path: Path, say: Callable[[str], None]) -> None:
    """Run what the table lacks, all arms of a seed before the next seed."""
    for seed in seeds:
        for name in arms:
            if (name, seed) in in_table(path):
                continue
            say(f"{name}, seed {seed}")
            about = {"study": "continual", "arm": name, "seed": seed, "decoding": "sampled", "commit": git_commit(),
                     "preset": "conversations" if ARMS[name].learns == "sdpo" else f"sft on {ARMS[name].learns}",
                     "hardware": hardware()}
            rows = [{**row, **about} for row in run(ARMS[name], seed, plan, say)]
            write_table(pa.Table.from_pylist(rows, SCHEMA), path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="these; all if not given")
    parser.add_argument("--seeds", type=int, default=5, help="0 to this, exclusive; 5")
    parser.add_argument("--quick", action="store_true", help="four steps of six requests: a look, not a result")
    parser.add_argument("--table", type=Path, help=f"results; {TABLE}, or runs/continual-quick.parquet")
    args = parser.parse_args(arguments)
    table = args.table or (Path("runs/continual-quick.parquet") if args.quick else TABLE)
    study(args.arms, range(args.seeds), QUICK if args.quick else Plan(), table,
          lambda text: print(text, file=sys.stderr, flush=True))  # noqa: T201
    for line in lines(read(table)):
        print(line)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
