"""One answer per call: refused, over the budget, cut off by the clock, or what the environment said, cut to size."""

import asyncio
import time
from collections.abc import Mapping, Sequence

from agentsdpo.collect.budget import FINISHERS, NO_MORE, left
from agentsdpo.collect.progress import Progress
from agentsdpo.collect.turns import check_call, refusal
from agentsdpo.errors import EnvError
from agentsdpo.types import Env, Frozen, ToolCall, ToolResult, printable


class OutputLimit(Frozen):
    """How much of a tool's result the agent is shown. None is unlimited.

    Args:
        chars: longer results are cut.
        lines: results of more lines are cut.
        head, tail: characters kept of a result that is cut; ``head`` None keeps up to ``chars`` and ``lines``.
        refuse: above this many characters the result becomes an error.

    >>> OutputLimit(chars=10, head=4, tail=2).apply(ToolResult(call_id="c", content="0123456789abcdef")).content
    '0123\\n[10 characters left out]\\nef'
    """

    chars: int | None = 200_000
    lines: int | None = None
    head: int | None = None
    tail: int = 0
    refuse: int | None = None

    def apply(self, result: ToolResult) -> ToolResult:
        """The result as the agent may see it; ``truncated`` holds characters kept and original."""
        text = result.content
        if self.refuse is not None and len(text) > self.refuse:
            why = f"the result has {len(text)} characters, more than {self.refuse}; ask for less"
            return refusal(result.call_id, "tool", why).model_copy(update={
                "state_hash": result.state_hash, "wall_s": result.wall_s, "truncated": (0, len(text))})
        kept = self._head(text)
        if kept == len(text):
            return result
        end = text[len(text) - min(self.tail, len(text) - kept):]
        out = len(text) - kept - len(end)
        content = f"{text[:kept]}\n[{out} characters left out]\n{end}".rstrip("\n") if out else text
        return result.model_copy(update={"content": content, "truncated": (len(text) - out, len(text))})

    def _head(self, text: str) -> int:
        """Characters kept at the start; all of them where nothing is to be cut."""
        room = len(text) if self.chars is None else min(self.chars, len(text))
        if self.lines is not None and text.count("\n", 0, room) >= self.lines:
            room = len("\n".join(text[:room].split("\n", self.lines)[:self.lines]))
        return room if self.head is None or room == len(text) else min(room, self.head)


APEX_V1 = OutputLimit(chars=96_000, head=20_000, tail=5_000, refuse=200_000)
"""Of the harness of APEX-Agents v1, whose 24,000 tokens are counted here as four characters each."""
APEX_V1_1 = OutputLimit(chars=32_768, lines=200)
"""Of the harness of APEX-Agents v1.1."""


def sort_out(run: Progress, calls: Sequence[ToolCall], owed: Mapping[str, ToolResult]
             ) -> tuple[dict[str, ToolResult], list[ToolCall]]:
    """Answers that are known without asking the environment, and the calls that it is to answer, in order."""
    answers, fit = dict(owed), []
    room = left(run.budget, "tool_calls", run.counts["calls"])
    limit = len(calls) if run.budget.calls_per_turn is None else run.budget.calls_per_turn
    limit = limit if room is None or run.asked else min(limit, room)
    for i, call in enumerate(calls):
        if run.asked and call.name not in FINISHERS:
            answers[call.id] = refusal(call.id, "budget", NO_MORE)
        elif i >= limit:
            answers[call.id] = refusal(call.id, "budget", f"only {limit} calls were left to this turn")
        elif call.id not in answers:
            problem = check_call(call, run.tools)
            if problem is None:
                fit.append(call)
            else:
                answers[call.id] = problem
    return answers, fit


async def execute(env: Env, run: Progress, calls: Sequence[ToolCall], limit: OutputLimit, *, timed: bool = True
                  ) -> list[ToolResult]:
    """Have the environment answer; calls cut by the clock are answered ``timeout``.

    Args:
        env: of the episode.
        run: knows what time is left; tool time is added to its working clock.
        calls: that passed all checks.
        limit: of what is shown.
        timed: False while an episode is replayed, when the clocks say nothing.

    Raises:
        EnvError: the environment did not answer every id once and in order.
    """
    if not calls:
        return []
    began = time.monotonic()
    try:
        async with asyncio.timeout(_allowed(run, calls) if timed else None):
            results = await env.call(tuple(calls))
    except TimeoutError:
        return [refusal(call.id, "timeout", "the tool took too long") for call in calls]
    finally:
        run.clock.working += (time.monotonic() - began) * timed
    if [r.call_id for r in results] != [call.id for call in calls]:
        raise EnvError(f"environment {env.env_id} answered ids {[r.call_id for r in results]} to calls "
                       f"{[call.id for call in calls]}", fix="return one result per call, in the order given")
    return [_shown(result, limit) for result in results]


def _allowed(run: Progress, calls: Sequence[ToolCall]) -> float:
    """Seconds these calls may take."""
    allowed, rest = sum(run.tools[call.name].timeout_s for call in calls), run.left_s(working=True)
    return allowed if rest is None else min(allowed, rest)


def _shown(result: ToolResult, limit: OutputLimit) -> ToolResult:
    content = printable(result.content)
    return limit.apply(result if content == result.content else result.model_copy(update={"content": content}))
