"""Episodes killed with SIGKILL at any instant, resumed from their logs, and compared with the same ones left alone.

    python -m agentsdpo.benchmarks.perf.resumeloop [--attempts 1000]

Each attempt is forked from a process that has imported everything, killed at a random instant, once to three times, and
then goes on to its end, which must have the final state, messages, tokens, counts and grade of the attempt that nobody
touched. Oracles play desks with faults; some attempts are the shipped model's, with compaction.
"""

import argparse
import asyncio
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

from agentsdpo.collect.compaction import compactor
from agentsdpo.collect.config import CollectConfig, CompactionConfig
from agentsdpo.collect.episode_log import EpisodeLog
from agentsdpo.collect.policy import EnginePolicy, Policy
from agentsdpo.collect.rollout import Rollout, run_episode
from agentsdpo.envs.desk import DeskSuite, agents, families
from agentsdpo.types import Json, Task

TASKS = 20
"""Different tasks among the attempts."""
MODEL_EVERY = 50
"""One attempt in so many is the shipped model's."""


@dataclass
class Report:
    """Outcome of a kill loop."""

    attempts: int = 0
    kills: int = 0
    models: int = 0
    mismatches: list[str] = field(default_factory=list)


def play(number: int, log: EpisodeLog | None) -> Json:
    """Play attempt ``number`` and say how it ended: everything that must survive, and none of the clocks."""
    of, model = number % TASKS, is_model(number)
    suite = DeskSuite(n=(1,)) if model else DeskSuite("desk", families=families.FAMILIES, n=(4,), fault_rate=0.2)
    task = suite.task("val", of)
    policy: Policy = _model_policy() if model else agents.oracle(task, suite.firm, epsilon=0.1, seed=of)
    made = compactor(CompactionConfig(manager="notes", compact_at=0.6, keep_turns=1))
    run = asyncio.run(run_episode(suite.env(), policy, task, seed=of, episode_id=f"e{of}", log=log, compaction=made))
    return ended(suite, task, run)


def is_model(number: int) -> bool:
    """Whether the shipped model plays this attempt."""
    return number % MODEL_EVERY == MODEL_EVERY - 1


@cache
def _model_policy() -> EnginePolicy:
    import torch

    from agentsdpo.collect.inprocess import InProcessEngine
    from agentsdpo.envs.desk.seed import seed_path
    from agentsdpo.learn.load import load_chat, load_model

    torch.set_num_threads(1)
    chat = load_chat(seed_path())
    engine = InProcessEngine(load_model(seed_path(), chat), chat.eos_id, max_slots=1, window=256)
    return EnginePolicy(engine, chat, CollectConfig(window=256, max_tokens=64), training=False)


def ended(suite: DeskSuite, task: Task, run: Rollout) -> Json:
    """Final state hash, tokens, messages and grade of one rollout; log-probs are left out, as they may round."""
    tokens = hashlib.sha256()
    for branch in run.branches:
        tokens.update(branch.token_ids.tobytes() + branch.token_kind.tobytes())
    grade = suite.grader().judge(task, run.outcome) if run.outcome else None
    return {"stop": str(run.stop_reason), "error": run.error, "tokens": tokens.hexdigest(), "counts": run.counts,
            "state": hashlib.sha256(run.outcome.final).hexdigest() if run.outcome else None,
            "messages": hashlib.sha256(json.dumps(run.messages).encode()).hexdigest(),
            "grade": grade.model_dump(mode="json") if grade else None}


def kill_loop(attempts: int, *, seed: int = 0) -> Report:
    """Play, kill, resume, compare, attempt after attempt."""
    rng, report = random.Random(seed), Report()
    whole: dict[tuple[int, bool], tuple[Json, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(attempts):
            place, of = Path(folder) / str(number), (number % TASKS, is_model(number))
            if of not in whole:
                whole[of] = _alone(number, Path(folder) / f"whole-{number}")
            expected, seconds = whole[of]
            for _ in range(1 + number % 3):
                report.kills += _killed(number, place, rng.uniform(0.0, seconds))
            report.attempts, report.models = report.attempts + 1, report.models + (is_model(number))
            found = play(number, _log(number, place))
            if found != expected:
                names = [key for key in expected if found[key] != expected[key]]
                report.mismatches.append(f"attempt {number}: {', '.join(names)} {found['error']}")
    return report


def _log(number: int, place: Path) -> EpisodeLog:
    return EpisodeLog(place, every=(1, 4, 16)[number % 3], sync=number % 25 == 0)


def _alone(number: int, place: Path) -> tuple[Json, float]:
    """An attempt nobody kills, and how long it takes."""
    play(number, None)
    began = time.perf_counter()
    return play(number, _log(number, place)), time.perf_counter() - began


def _killed(number: int, place: Path, seconds: float) -> bool:
    """Fork a process that plays, kill it after some seconds; whether it was still playing."""
    pid = os.fork()
    if pid == 0:
        try:
            play(number, _log(number, place))
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--attempts", type=int, default=1000)
    report = kill_loop(parser.parse_args().attempts)
    print(json.dumps(asdict(report)))  # noqa: T201 - a script's result
    sys.exit(bool(report.mismatches))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
