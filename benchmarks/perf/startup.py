"""How long ``agentsdpo --help`` takes: whole processes, median of many, beside a bare interpreter.

    python -m agentsdpo.benchmarks.perf.startup [--json]
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from agentsdpo.benchmarks.perf.figure import Figure, run_all

RUNS = 20


def help_seconds(*command: str) -> Figure:
    """Median wall time of ``agentsdpo [COMMAND] --help``, runs taken in turn with those of a bare interpreter."""
    pairs = [(_seconds("-m", "agentsdpo.cli", *command, "--help"), _seconds("-c", "pass")) for _ in range(RUNS + 1)]
    mine, bare = (statistics.median(values) for values in zip(*pairs[1:], strict=True))
    return Figure("help_s", round(mine, 4), "s", "python -c pass", {"peer_s": round(bare, 4), "runs": RUNS})


def _seconds(*arguments: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - began


def _measure() -> Iterator[Figure]:
    yield help_seconds()


if __name__ == "__main__":
    run_all(__doc__ or "", {"help": _measure})
