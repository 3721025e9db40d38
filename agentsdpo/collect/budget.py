"""Limits of an episode: two clocks, which limit is exhausted first, and what the agent is told about them."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from agentsdpo.types import Budget, StopReason

FINAL_S = 60.0
"""Seconds that a final answer turn may take, whatever clock had run out before it."""
FINISHERS = ("submit", "final_answer")
"""Tools that a final answer turn may still call."""
ASK = "The budget is spent ({what}). This is your last turn: give your final answer now{how}."
"""The one message that opens a final answer turn."""
NO_MORE = "the budget is spent; only a final answer is taken now"
"""The answer to any other call of a final answer turn."""
ANNOUNCE = r"off|start|every_[1-9][0-9]{0,5}"
"""When the agent is told its budget: never, in the opening, or there and then every so many turns."""

_SPENT = {StopReason.MAX_TURNS: "no turns left", StopReason.MAX_TOOL_CALLS: "no tool calls left",
          StopReason.MAX_SAMPLED_TOKENS: "no completion tokens left",
          StopReason.MAX_PROMPT_TOKENS: "no prompt tokens left", StopReason.ROLLOUT_TIMEOUT: "no time left",
          StopReason.MAX_REPEAT: "the same call again and again changed nothing"}
_COUNTED = (("turns", "turns", "turns"), ("tool_calls", "calls", "tool calls"),
            ("prompt_tokens", "prompt_tokens", "prompt tokens"),
            ("completion_tokens", "completion_tokens", "completion tokens"))
"""Limit, the count it bounds, and its name for the agent."""
_STOPS = {"turns": StopReason.MAX_TURNS, "tool_calls": StopReason.MAX_TOOL_CALLS,
          "prompt_tokens": StopReason.MAX_PROMPT_TOKENS, "completion_tokens": StopReason.MAX_SAMPLED_TOKENS}


@dataclass
class Clock:
    """Seconds of one episode over all processes that played it; the time in between does not count.

    Attributes:
        working: seconds of model calls that succeeded and of tools.
    """

    working: float = 0.0
    _before: float = 0.0
    _began: float = field(default_factory=time.monotonic)

    @property
    def wall(self) -> float:
        """Seconds since the episode began."""
        return self._before + time.monotonic() - self._began

    def set(self, wall: float, working: float) -> None:
        """Go on from what an earlier process had reached.

        >>> clock = Clock()
        >>> clock.set(50.0, 20.0)
        >>> 50.0 <= clock.wall < 51.0, clock.working
        (True, 20.0)
        """
        self._before, self._began, self.working = wall, time.monotonic(), working


def left(budget: Budget, limit: str, used: float) -> int | None:
    """What is left of a counted limit, None when it is unlimited.

    >>> left(Budget(turns=5), "turns", 3), left(Budget(turns=5), "turns", 9), left(Budget(turns=None), "turns", 3)
    (2, 0, None)
    """
    value = getattr(budget, limit)
    return None if value is None else max(0, value - int(used))


def left_s(budget: Budget, clock: Clock) -> float | None:
    """Seconds until the first of both clocks runs out, not below 0; None when neither is limited."""
    rests = [limit - used for limit, used in ((budget.wall_s, clock.wall), (budget.working_s, clock.working))
             if limit is not None]
    return max(0.0, min(rests)) if rests else None


def spent(budget: Budget, counts: Mapping[str, int], clock: Clock) -> StopReason | None:
    """The limit that is exhausted, None while the episode may go on.

    >>> spent(Budget(turns=2), {"turns": 2, "calls": 0, "prompt_tokens": 0, "completion_tokens": 0}, Clock())
    <StopReason.MAX_TURNS: 'max_turns'>
    """
    for limit, used, _ in _COUNTED:
        if left(budget, limit, counts[used]) == 0:
            return _STOPS[limit]
    if budget.max_repeat is not None and counts["longest_repeat"] >= budget.max_repeat:
        return StopReason.MAX_REPEAT
    return StopReason.ROLLOUT_TIMEOUT if left_s(budget, clock) == 0 else None


def ask(reason: StopReason, tools: Mapping[str, object]) -> str:
    """The message that asks for the answer at once.

    >>> ask(StopReason.MAX_TURNS, {"submit": 0})
    'The budget is spent (no turns left). This is your last turn: give your final answer now by calling submit.'
    """
    name = next((name for name in FINISHERS if name in tools), None)
    return ASK.format(what=_SPENT[reason], how=f" by calling {name}" if name else " in plain text")


def announcement(announce: str, turn: int, budget: Budget, counts: Mapping[str, int], clock: Clock) -> str | None:
    """What the agent is told before turn number ``turn``, None when nothing is due.

    >>> announcement("every_5", 10, Budget(turns=30, tool_calls=None), {"turns": 10}, Clock())
    '[Budget left: 20 of 30 turns, 180 of 180 minutes]'
    >>> announcement("start", 0, Budget(turns=30, tool_calls=60, wall_s=None), {}, Clock())
    '[Budget: 30 turns, 60 tool calls]'
    """
    every = int(announce.removeprefix("every_")) if announce.startswith("every_") else 0
    if announce == "off" or (turn and not (every and turn % every == 0)):
        return None
    parts = []
    for limit, used, name in _COUNTED:
        rest = left(budget, limit, counts.get(used, 0))
        if rest is not None:
            parts.append(f"{rest} of {getattr(budget, limit)} {name}" if turn else f"{rest} {name}")
    limits = [value for value in (budget.wall_s, budget.working_s) if value is not None]
    rest_s = left_s(budget, clock)
    if rest_s is not None:
        whole = f"{min(limits) / 60:.3g} minutes"
        parts.append(f"{rest_s / 60:.3g} of {whole}" if turn else whole)
    return f"[Budget{' left' if turn else ''}: {', '.join(parts)}]" if parts else None
