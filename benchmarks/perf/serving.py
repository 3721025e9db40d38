"""Serving in numbers: collector, publishing, proxy and asynchrony, each beside what it is held against.

    python -m agentsdpo.benchmarks.perf.serving [--json] [--only collector publish proxy async]

All parts start their own servers (``make vllm`` first), one after the other.
"""

from collections.abc import Callable, Iterable
from importlib import import_module

from agentsdpo.benchmarks.perf.figure import Figure, run_all

PARTS = ("collector", "publish", "proxy", "async")


def part(name: str) -> Callable[[], Iterable[Figure]]:
    """The part's ``measure``, imported when it runs: a part that is left out costs nothing."""
    return lambda: import_module(f"agentsdpo.benchmarks.perf.serving_{name}").measure()


if __name__ == "__main__":
    run_all(__doc__ or "", {name: part(name) for name in PARTS})
