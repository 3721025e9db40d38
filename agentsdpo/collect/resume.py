"""Going on with an episode from its log: the events move it on as the loop had, the environment is brought along.

Up to the newest checkpoint the environment is not asked; from there on its calls are made again, and every answer must
be what it was. A difference is a fault of the environment, which leaves the episode unscored: it never starts over.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from agentsdpo.collect.answers import OutputLimit, execute, sort_out
from agentsdpo.collect.episode_log import EpisodeLog, LogError
from agentsdpo.collect.events import compaction_of, heard_of, result_of
from agentsdpo.collect.policy import Policy, Remembers
from agentsdpo.collect.progress import Heard, Progress
from agentsdpo.collect.waiting import settled
from agentsdpo.errors import EnvError
from agentsdpo.types import Env, Json, ModelTurn, StopReason, ToolResult

_COMPARED = ("call_id", "content", "is_error", "error_kind", "state_hash")
"""What must be the same in the answer to a call that is made again."""


class Resume:
    """Replays the events of a log into a fresh progress.

    Args:
        log: opened.
        run: opened with the same messages and tools.
        env: reset for the same task.
        policy: told of its turns where it has a memory.
        limit: of what is shown of a tool's result, as when the episode was played.
    """

    def __init__(self, log: EpisodeLog, run: Progress, env: Env, policy: Policy, limit: OutputLimit) -> None:
        self.log, self.run, self.env, self.policy, self.limit = log, run, env, policy, limit

    async def replay(self) -> None:
        """Bring run, environment and policy to where the log ends.

        Raises:
            EnvError: the environment answered differently than before.
        """
        checkpoint, snapshot = self._newest()
        if snapshot is not None:
            await settled(self.env.restore(snapshot))
        events = self.log.events[1:]
        self.run.clock.set(self.log.events[-1]["t_wall"], 0.0)
        at = 0
        while at < len(events):
            event = events[at]
            if self.run.pending is not None and not self.run.pending.calls:
                self.run.answered(())  # a turn without calls has no results to be written
            if event["type"] == "tool_result":
                at = await self._results(events, at, again=event["seq"] > checkpoint)
            else:
                await self._apply(event)
                at += 1
        last = self.log.events[-1]
        self.run.clock.set(last["t_wall"], last["t_working"])

    def _newest(self) -> tuple[int, bytes | None]:
        """Number of the newest checkpoint's event and its snapshot; -1 and None without a good one."""
        for event in reversed(self.log.events):
            if event["type"] == "checkpoint":
                snapshot = self.log.snapshot(event)
                if snapshot is not None:
                    return event["seq"], snapshot
        return -1, None

    async def _apply(self, event: Json) -> None:
        """Move on by one event that asks nothing of the environment."""
        run, kind = self.run, event["type"]
        if kind == "model_call":
            heard = heard_of(event)
            if isinstance(self.policy, Remembers):
                await self.policy.recall(run.ctx, tuple(run.tools.values()), _turn(heard))
            run.ctx.builder.regrow(heard.growth)
            run.ctx.builder.rendered, run.ctx.builder.tools = list(run.ctx.messages), tuple(run.tools)
            run.took(heard)
        elif kind == "compaction":
            change = compaction_of(event)
            run.ctx.builder.regrow(change.growth)
            run.compacted(change)
        elif kind == "budget":
            if "told" in event:
                run.told(event["told"])
            else:
                run.asked_to_end(StopReason(event["spent"]))
        elif kind == "final":
            run.stop = StopReason(event["stop_reason"])

    async def _results(self, events: Sequence[Json], at: int, *, again: bool) -> int:
        """The results of one turn, and where the next event is. Half of them are none: the turn is answered anew."""
        run = self.run
        assert run.pending is not None
        group = list(_run_of(events, at))
        if len(group) < len(run.pending.calls):
            self.log.forget(group[0]["seq"])
            return len(events)
        results = [result_of(event) for event in group]
        if again:
            answers, fit = sort_out(run, run.pending.calls, run.pending.owed)
            answers |= {r.call_id: r for r in await execute(self.env, run, fit, self.limit, timed=False)}
            for call, result in zip(run.pending.calls, results, strict=True):
                _compare(result, answers[call.id], f"{call.name} of turn {run.ctx.turn - 1}")
        run.answered(results)
        return at + len(group)


def _run_of(events: Sequence[Json], at: int) -> Iterator[Json]:
    while at < len(events) and events[at]["type"] == "tool_result":
        yield events[at]
        at += 1


def _turn(heard: Heard) -> ModelTurn:
    return ModelTurn(text=heard.text, calls=heard.calls, calls_at=heard.calls_at, malformed=tuple(heard.owed.values()),
                     usage=heard.usage)


def _compare(was: ToolResult, now: ToolResult, call: str) -> None:
    """Raises EnvError when an answer is not what it was."""
    for name in _COMPARED:
        before, after = getattr(was, name), getattr(now, name)
        if before != after:
            raise EnvError(f"after the restart {call} gave {name} {str(after)[:80]!r}, before it {str(before)[:80]!r}",
                           fix="play the episode again, with a checkpoint after every turn")


def check_start(event: Json, about: Json, messages: Sequence[Json]) -> None:
    """The log must be of this very episode.

    Raises:
        LogError: it is of another one, or of other settings. EnvError: the environment begins otherwise than before.
    """
    for name, value in about.items():
        if event.get(name) != value:
            raise LogError(f"the log is of an episode with {name} {_short(event.get(name))}, not {_short(value)}",
                           fix="give each attempt a folder of its own, and resume with the settings it began with")
    if event["messages"] != list(messages):
        raise EnvError("after the restart the environment opens the task with other messages than before",
                       fix="play the episode again")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
