"""Cutting a long history down to what the model sees next: by the agent's own notes, or by a summary it writes.

Nothing is lost: the whole history stays in the record, and the shorter one opens a new branch, whose reason says so.
A branch is exactly what the model read and wrote; old turns come back as context there, and carry loss only in the
branch they were sampled in. The tokens of a summary are sampled at the end of the branch they summarise.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from agentsdpo.collect.config import CompactionConfig
from agentsdpo.collect.policy import Policy, Summarises, Windowed
from agentsdpo.collect.progress import Compacted, Progress
from agentsdpo.errors import ConfigError
from agentsdpo.types import Json, ToolCall

NOTE_WRITE, NOTE_READ = "note_add", "note_get"
"""Tools of an environment whose notes survive: ``{"key", "text"}`` writes one, reading ``{"key": ""}`` lists all."""
REQUEST = ("Your memory is nearly full. Write a summary of the work so far for yourself: what was asked, what is done, "
           "which figures and names matter, what is left to do. Write text only, call no tool.")
HEADING = "Summary of your work so far:\n"


class Compactor(Protocol):
    """Decides when a history is too long, and what stands in its place."""

    async def compact(self, run: Progress, policy: Policy) -> Compacted | None:
        """What to change before the next turn; None while nothing has to change, or nothing can be left out."""
        ...


def compactor(config: CompactionConfig) -> Compactor | None:
    """The manager that the settings name; None for ``none``.

    >>> compactor(CompactionConfig()) is None, type(compactor(CompactionConfig(manager="notes"))).__name__
    (True, 'Notes')
    """
    return {"none": None, "notes": Notes(config), "summary": Summary(config)}[config.manager]


class Notes:
    """System, task, one answer that lists all notes, and the last turns. No call to a model.

    Args:
        config: when, and how many turns stay.
    """

    manager = "notes"

    def __init__(self, config: CompactionConfig) -> None:
        self.config = config

    async def compact(self, run: Progress, policy: Policy) -> Compacted | None:
        """See :class:`Compactor`. A policy without a window is left alone."""
        if not isinstance(policy, Windowed):
            return None
        tools = tuple(run.tools.values())
        before, limit = policy.prompt_size(run.ctx, tools), self.config.compact_at * policy.window
        if before <= limit:
            return None
        starts = _starts(run, self.config.keep_turns)
        return await self._change(run, policy, starts, before, limit) if starts else None

    async def _change(self, run: Progress, policy: Windowed, starts: Sequence[int], before: int, limit: float
                      ) -> Compacted:
        return _fitting(run, policy, starts, _noted(run), before, limit, self.manager)


class Summary(Notes):
    """System, task, a summary that the policy writes, and the last turns; notes in its place where it wrote none.

    Raises:
        ConfigError: at the first compaction, when the policy cannot write one.
    """

    manager = "summary"

    async def _change(self, run: Progress, policy: Windowed, starts: Sequence[int], before: int, limit: float
                      ) -> Compacted:
        if not isinstance(policy, Summarises):
            raise ConfigError(f"collect.compaction.manager is 'summary' but {type(policy).__name__} cannot write one",
                              fix="use 'notes', or a policy with a summarise method")

        def fits(text: str) -> bool:
            return _fitting(run, policy, starts, _said(text), before, limit, self.manager).after < before

        done = await policy.summarise(run.ctx, tuple(run.tools.values()), REQUEST,
                                      max_tokens=self.config.summary_tokens, accept=fits)
        inserted = _said(done.text) if done.accepted else _noted(run)
        change = _fitting(run, policy, starts, inserted, before, limit, self.manager)
        return replace(change, usage=done.usage, accepted=done.accepted)


def _starts(run: Progress, keep: int) -> list[int]:
    """Where the kept end of the history may begin, longest first: at one of the last ``keep`` turns of the agent.

    Each leaves out something that the model sees now. A turn is a message of the agent with all that followed it, so
    that no tool's answer loses its call.
    """
    turns = [i for i in range(run.tail_from, len(run.history)) if run.history[i]["role"] == "assistant"]
    return [at for at in turns[-keep:] if at > run.tail_from]


def _fitting(run: Progress, policy: Windowed, starts: Sequence[int], inserted: tuple[Json, ...], before: int,
             limit: float, manager: str) -> Compacted:
    """The change that keeps most and brings the prompt under the limit; if none does, the one that keeps least."""
    after, at = 0, starts[-1]
    for at in starts:
        messages = [*run.history[:run.opening], *inserted, *run.history[at:]]
        trial = replace(run.ctx, messages=messages, fork_reason="compaction", prepared=None)
        after = policy.prompt_size(trial, tuple(run.tools.values()))
        if after <= limit:
            break
    return Compacted(manager, before, after, at, inserted)


def _noted(run: Progress) -> tuple[Json, ...]:
    """All notes the agent has written, oldest first, as if it had just read them; nothing where it has none."""
    notes = {}
    for message in run.history:
        for call in message.get("tool_calls", ()):
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            if name == NOTE_WRITE and call["id"] not in run.failed and {"key", "text"} <= set(arguments):
                notes[arguments["key"]] = arguments["text"]
    if not notes or NOTE_READ not in run.tools:
        return ()
    call = ToolCall(id=f"notes_{run.counts['compactions']}", name=NOTE_READ, arguments={"key": ""})
    listing = "\n".join(f"{key} {text}" for key, text in notes.items())
    return ({"role": "assistant", "content": "", "tool_calls": [call.openai()]},
            {"role": "tool", "tool_call_id": call.id, "content": listing})


def _said(summary: str) -> tuple[Json, ...]:
    return ({"role": "user", "content": HEADING + summary},)
