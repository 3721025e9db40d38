"""What one piece of work costs, measured in a process of its own.

A case is a function ``module:name`` of JSON parameters that prepares the work and gives back a callable. The process
imports and prepares, notes its resident memory, sets the kernel's high-water mark back and runs the work: the highest
mark of that run, less what was resident before, is its memory. A second run, with everything warm, is timed. Time is
the process's CPU time on one thread, which other processes on the machine hardly change.
"""

import ctypes
import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from agentsdpo.types import Json

Work = Callable[[], float]
"""What is measured; gives back a number that peers must agree on: a loss, a sum of log-probs."""
LIMIT_S = 3600


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one case in one process.

    Args:
        cpu_s: process CPU time of the timed run, in seconds; the first run's when there is one alone.
        wall_s: wall time of the same.
        peak_mib: resident memory at its highest in the first run, above what was resident before it.
        whole_mib: the same with everything: interpreter, libraries, weights, inputs.
        value: what the first run gave back.
    """

    cpu_s: float
    wall_s: float
    peak_mib: float
    whole_mib: float
    value: float


def fresh(case: str, *, runs: int = 2, **parameters: object) -> Cost:
    """Measure one case in a new process on one thread.

    Args:
        case: ``module:function``.
        runs: how often the work is done; the last is timed.
        parameters: of the function, as JSON can hold them.

    Raises:
        subprocess.CalledProcessError: the case failed; its own message went to stderr.
    """
    command = [sys.executable, "-m", "agentsdpo.benchmarks.perf.fresh", case, str(runs), json.dumps(parameters)]
    one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S,
                           env=os.environ | one)
    return Cost(**json.loads(found.stdout.splitlines()[-1]))


def in_turn(cases: dict[str, tuple[str, Json]], rounds: int, *, runs: int = 2) -> dict[str, Cost]:
    """Medians over rounds; in each round all cases are measured one after the other, so that load hits all alike."""
    seen: dict[str, list[Cost]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, (case, parameters) in cases.items():
            seen[name].append(fresh(case, runs=runs, **parameters))
    return {name: Cost(**{key: statistics.median(asdict(cost)[key] for cost in costs) for key in Cost.__slots__})
            for name, costs in seen.items()}


def _main(case: str, runs: int, parameters: Json) -> None:
    """In the new process."""
    import torch

    torch.set_num_threads(1)
    module, _, name = case.partition(":")
    work: Work = getattr(importlib.import_module(module), name)(**parameters)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    value, cpu, wall, peak = 0.0, 0.0, 0.0, 0.0
    for run in range(runs):
        gc.collect()
        cpu, wall = time.process_time(), time.perf_counter()
        got = work()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        if not run:
            value, peak = got, _status("VmHWM")
    print(json.dumps(asdict(Cost(round(cpu, 4), round(wall, 4), round(peak - before, 1), round(peak, 1),  # noqa: T201
                                 value))))


def _status(key: str) -> float:
    """A line of ``/proc/self/status``, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]))
