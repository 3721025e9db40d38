"""Writers killed with SIGKILL at any moment, and an oracle that knows what each of them had been told is safe.

    python -m agentsdpo.benchmarks.perf.killloop [--rounds 1000]

Writers play made-up episodes through journals and append them; whatever the store acknowledged goes to a file of their
own, a line at a time. Each round kills one of them beside the others, recovers the store, and compares: an acknowledged
episode must be there whole, an acknowledged step must be in what was salvaged, and no row may hold anything else than
what its writer wrote. Episodes follow from their number, so that the oracle needs no copy of them.
"""

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from agentsdpo.replay import ReplayStore
from agentsdpo.replay.ids import Key, derived_uuid
from agentsdpo.replay.journal import Growth, Journal
from agentsdpo.replay.rows import Row
from agentsdpo.replay.spool import Spool
from agentsdpo.replay.upkeep.recover import recover
from agentsdpo.types import Branch, Call, Episode, Json, Sampling, StopReason, TokenKind, VersionSpan

TURNS, PIECE = 3, 12
"""Turns of an episode, and tokens of each prompt and each completion."""
ROUNDS_PER_STORE = 20
"""After so many rounds a new store is begun: the cost of a round stays the same."""
MAX_WAIT_S = 0.15


# --------------------------------------------------------------------------------------------------- episodes


def plan(writer: int, number: int) -> tuple[Episode, list[tuple[list[Growth], list[Json]]]]:
    """An episode and the steps it is made of: growth and messages after each call and each tool result."""
    rng = np.random.default_rng([writer, number])
    ids, kinds, logps, calls, messages, steps = [], [], [], [], [], []
    for turn in range(TURNS):
        fresh = rng.integers(0, 1000, 2 * PIECE).tolist()
        lps = [float("nan")] * PIECE + (-rng.exponential(1.0, PIECE)).astype(np.float32).tolist()
        kind = [int(TokenKind.TOOL if turn else TokenKind.CONTEXT)] * PIECE + [int(TokenKind.SAMPLED)] * PIECE
        start = len(ids) + PIECE
        call = Call(call_id=f"b0t{turn}", turn=turn, start=start, end=start + PIECE, prompt_sha256="",
                    finish_reason="stop", sampling=Sampling(seed=turn),
                    versions=(VersionSpan(version=number, start=0, end=PIECE),))
        ids, kinds, logps, calls = ids + fresh, kinds + kind, logps + lps, [*calls, call]
        messages = [*messages, {"role": "assistant", "content": f"turn {turn}"}]
        steps.append(([Growth(0, {}, fresh, kind, lps, [call])], messages))
        messages = [*messages, {"role": "tool", "content": f"result {turn}"}]
        steps.append(([], messages))
    branch = Branch(token_ids=np.array(ids, np.int32), token_kind=np.array(kinds, np.uint8),
                    logprobs=np.array(logps, np.float32), calls=tuple(calls))
    episode = Episode(**about(writer, number), branches=(branch,), stop_reason=StopReason.COMPLETED,
                      messages=tuple(messages))
    return episode, steps


def about(writer: int, number: int) -> Json:
    """What is known of an episode when it begins."""
    return {"episode_id": derived_uuid("kill loop", writer, number), "task_id": "t", "env_id": "made up",
            "train_allowed": True, "vocab_size": 1000}


def calls_after(steps: int) -> int:
    """Calls among the first steps: every other step is a call, the first one too."""
    return (steps + 1) // 2


# ---------------------------------------------------------------------------------------------------- writers


def write(writer: int, acks: str, root: str) -> None:
    """Play, append and acknowledge one episode after the other until killed."""
    store = ReplayStore.open(root, create=False)
    spool, log = Spool(store), os.open(acks, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
    for number in itertools.count():
        play(store, spool, writer, number, lambda line: os.write(log, f"{line}\n".encode()))


def play(store: ReplayStore, spool: Spool, writer: int, number: int, acknowledge: Callable[[str], object]) -> None:
    """Play one episode through its journal and append it; each line is said once what it names is safe."""
    episode, steps = plan(writer, number)
    journal = spool.begin(about(writer, number))
    assert journal is not None
    for done, (growth, messages) in enumerate(steps, 1):
        journal.step(growth, messages)
        acknowledge(f"step {number} {done}")
    store.append([episode])
    acknowledge(f"episode {number} 0")
    spool.seal([episode.episode_id])


def nurse() -> None:
    """A process that has imported everything and forks a writer per line of standard input."""
    with tempfile.TemporaryDirectory() as folder:  # imports what pyarrow needs once, not in each fork
        Journal.open(Path(folder), "store", "writer", "episode").seal()
    print("ready", flush=True)  # noqa: T201 - the protocol of the pipe
    for line in sys.stdin:
        words = line.split()
        if words[0] == "wait":
            os.waitpid(int(words[1]), 0)
            print("gone", flush=True)  # noqa: T201
        elif (pid := os.fork()) == 0:
            write(int(words[0]), *words[1:])
        else:
            print(pid, flush=True)  # noqa: T201


class Nursery:
    """The process that forks writers; use it as a context."""

    def __enter__(self) -> "Nursery":
        command = [sys.executable, "-m", __spec__.name, "--nurse"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._pipe(self._process.stdout).readline() == "ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe(self._process.stdin).close()
        self._process.wait(30)
        self._pipe(self._process.stdout).close()

    def start(self, writer: int, acks: Path, root: Path) -> int:
        """Fork a writer; returns its process id."""
        return int(self._ask(f"{writer} {acks} {root}"))

    def kill(self, pid: int) -> None:
        """Kill a writer and wait until it is gone."""
        os.kill(pid, signal.SIGKILL)
        assert self._ask(f"wait {pid}") == "gone\n"

    def _ask(self, line: str) -> str:
        pipe = self._pipe(self._process.stdin)
        pipe.write(line + "\n")
        pipe.flush()
        return self._pipe(self._process.stdout).readline()

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


# ----------------------------------------------------------------------------------------------------- oracle


@dataclass
class KillReport:
    """What many rounds came to. ``lost`` and ``wrong`` name what must not be; both are empty.

    Attributes:
        rounds: writers killed.
        episodes, steps: acknowledged ones.
        salvaged: episodes brought back from journals. orphans: data files whose commit was cut off.
        lost: acknowledged episodes and steps that are not in the store.
        wrong: rows that are not what was written, and recoveries that were not done when they said so.
    """

    rounds: int = 0
    episodes: int = 0
    steps: int = 0
    salvaged: int = 0
    orphans: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def kill_loop(rounds: int, *, writers: int = 3, seed: int = 0, folder: Path | None = None) -> KillReport:
    """Kill a writer ``rounds`` times, among ``writers`` concurrent ones; see the module's text.

    Args:
        rounds: writers to kill, each 0 to 150 ms after the one before.
        writers: alive at any time.
        seed: of the waits and the choice of victims.
        folder: where stores are made; a temporary one by default.
    """
    report, rng, numbers = KillReport(), random.Random(seed), itertools.count()
    with tempfile.TemporaryDirectory(dir=folder) as scratch, Nursery() as nursery:
        while report.rounds < rounds:
            root = Path(scratch) / f"store-{report.rounds}"
            todo = min(ROUNDS_PER_STORE, rounds - report.rounds)
            _one_store(root, todo, writers, rng, numbers, nursery, report)
    return report


def _one_store(root: Path, rounds: int, writers: int, rng: random.Random, numbers: Iterator[int], nursery: Nursery,
               report: KillReport) -> None:
    store, acks, alive = ReplayStore.open(root), root.parent / f"{root.name}-acks", dict[int, int]()
    acks.mkdir()

    def begin() -> None:
        writer = next(numbers)
        alive[writer] = nursery.start(writer, acks / str(writer), root)

    for _ in range(writers):
        begin()
    for left in range(rounds, 0, -1):
        time.sleep(rng.uniform(0, MAX_WAIT_S))
        victim = rng.choice(sorted(alive))
        nursery.kill(alive.pop(victim))
        if left > writers:
            begin()
        report.rounds += 1
        _settle(store, report)
        _compare(store, victim, acks / str(victim), report)
    for pid in alive.values():
        nursery.kill(pid)
    _settle(store, report)
    for victim in alive:
        _compare(store, victim, acks / str(victim), report)
    _nothing_left(store, report)


def _settle(store: ReplayStore, report: KillReport) -> None:
    done = recover(store)
    report.salvaged += done.count("salvaged")
    report.orphans += done.count("lost")
    report.wrong += [f"{found.what}: {found.path} {found.detail}" for found in done.found if found.what == "set_aside"]


def _nothing_left(store: ReplayStore, report: KillReport) -> None:
    """With every writer dead a second recovery finds nothing, and each file is named or put away."""
    again = recover(store)
    report.wrong += [f"recovered twice: {found}" for found in again.found if again.changed]
    files = {info.path for info in store.storage.list("data")}
    report.wrong += [f"orphan {path}" for path in files - store.fold().files.keys()]
    report.wrong += [f"journal {path}" for path in store.root.glob("spool/*/*/*.arrows")]


def _compare(store: ReplayStore, writer: int, acks: Path, report: KillReport) -> None:
    """Hold what a dead writer was told is safe against what the store has of it."""
    lines = acks.read_text().splitlines(keepends=True) if acks.exists() else []
    told = [line.split() for line in lines if line.endswith("\n")]
    whole, steps = {int(n) for kind, n, _ in told if kind == "episode"}, dict[int, int]()
    for number, done in ((int(n), int(done)) for kind, n, done in told if kind == "step"):
        steps[number] = done
    report.episodes += len(whole)
    report.steps += sum(kind == "step" for kind, _, _ in told)
    view = store.snapshot()
    for number in range(max(steps, default=-1) + 2):
        safe, key = steps.get(number, 0), Key(about(writer, number)["episode_id"], 0, 0)
        row = view.read([key])[0] if key in view.rows else None
        status = None if row is None else view.rows[key].status
        if number in whole and status != "sealed":
            report.lost.append(f"episode {number} of writer {writer} is {status}")
        if calls_after(safe) > (0 if row is None else len(row.branch.calls)):
            report.lost.append(f"step {safe} of episode {number} of writer {writer}")
        if row is not None and not _true(row, writer, number):
            report.wrong.append(f"episode {number} of writer {writer} is not what was written")


def _true(row: Row, writer: int, number: int) -> bool:
    """Whether a row is the beginning of the episode that was written, cut behind a whole call."""
    truth, have = plan(writer, number)[0].branches[0], row.branch
    n = len(have.token_ids)
    names = ("token_ids", "token_kind", "logprobs")
    same = all(getattr(truth, name)[:n].tobytes() == getattr(have, name).tobytes() for name in names)
    return same and have.calls == truth.calls[:len(have.calls)] and n == have.calls[-1].end


# ----------------------------------------------------------------------------------------------------- timing


def step_times(steps: int, *, tokens: int = 400, folder: Path | None = None) -> tuple[list[float], list[float]]:
    """Seconds of each durable step of a journal, and of a bare write and fdatasync of as many bytes in between.

    Args:
        steps: how many of each.
        tokens: of one step.
        folder: on the disk to measure; a temporary one by default.
    """
    mine, bare, rng = list[float](), list[float](), np.random.default_rng(0)
    call = plan(0, 0)[0].branches[0].calls[0]
    with tempfile.TemporaryDirectory(dir=folder) as spool:
        journal = Journal.open(Path(spool), "store", "writer", "episode", about(0, 0))
        handle = os.open(Path(spool) / "bare", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        for _ in range(steps):
            ids, lps = rng.integers(0, 150_000, tokens).tolist(), (-rng.exponential(1.0, tokens)).tolist()
            before, began = journal.path.stat().st_size, time.perf_counter()
            journal.step([Growth(0, {}, ids, [1] * tokens, lps, [call])])
            mine.append(time.perf_counter() - began)
            data = os.urandom(journal.path.stat().st_size - before)
            began = time.perf_counter()
            os.write(handle, data)
            os.fdatasync(handle)
            bare.append(time.perf_counter() - began)
        os.close(handle)
        journal.seal()
    return mine, bare


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--nurse", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.nurse:
        nurse()
        return
    report = kill_loop(args.rounds)
    sys.stdout.write(json.dumps(asdict(report)) + "\n")
    sys.exit(bool(report.lost or report.wrong))


if __name__ == "__main__":
    main()
