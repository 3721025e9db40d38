"""The built-in world with tools as slow as real ones: most answer soon, a few take very long.

    suite = "agentsdpo.benchmarks.perf.slow_tools:desk_mini"

Each call waits for a time from a log-normal distribution, fixed by episode seed and number of the call, so that two
runs that play the same episodes wait for the same times. Nothing else about the world is changed.
"""

import asyncio
import math
import random
from typing import Any

from agentsdpo.envs.desk import DeskSuite
from agentsdpo.types import Env, Json, Task, ToolCall, ToolResult

MEDIAN_S, SIGMA, LONGEST_S = 0.5, 1.3, 30.0
"""Of the waiting times: median 0.5 s, mean 1.1 s, one in a hundred above 10 s; cut off below the tools' time-out."""


def latency(seed: int, nth: int) -> float:
    """Seconds that the ``nth`` call of an episode takes.

    >>> times = sorted(latency(seed, 0) for seed in range(2000))
    >>> round(times[1000], 1), 9 < times[1980] < 12, times[-1] <= LONGEST_S
    (0.5, True, True)
    """
    draw = random.Random(f"{seed}/{nth}").gauss(0.0, 1.0)
    return min(MEDIAN_S * math.exp(SIGMA * draw), LONGEST_S)


class SlowEnv:
    """An environment whose tools take their time; everything else is the wrapped one's."""

    def __init__(self, env: Env) -> None:
        self._env, self._seed, self._calls = env, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    async def reset(self, task: Task, *, seed: int, episode_id: str) -> list[Json]:
        """See :class:`agentsdpo.types.Env`."""
        self._seed, self._calls = seed, 0
        return await self._env.reset(task, seed=seed, episode_id=episode_id)

    async def call(self, calls: tuple[ToolCall, ...]) -> list[ToolResult]:
        """Wait for every call, one after the other, then have them answered."""
        for _ in calls:
            await asyncio.sleep(latency(self._seed, self._calls))
            self._calls += 1
        return await self._env.call(calls)


class SlowSuite(DeskSuite):
    """The tasks of the built-in world, played in :class:`SlowEnv`."""

    def env(self) -> Env:
        """A fresh, slow environment."""
        slow: Any = SlowEnv(super().env())
        return slow


def desk_mini() -> SlowSuite:
    """The suite ``desk-mini``, slowly."""
    return SlowSuite("desk-mini", distractors=2, rows=0)
