"""What a running episode has come to. It changes by events alone, so that a log of them rebuilds it exactly.

:meth:`Progress.took`, :meth:`Progress.answered` and their neighbours are the only places where an episode moves on:
the loop calls them with what has just happened, a resumed episode with what the log says had happened.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from agentsdpo.collect.budget import FINAL_S, Clock, ask, left_s
from agentsdpo.collect.policy import Context
from agentsdpo.collect.turns import OPEN_CALL, read_turn, unique_ids, visible
from agentsdpo.replay.journal import Growth
from agentsdpo.types import Budget, Json, ModelTurn, StopReason, ToolCall, ToolResult, ToolSpec, Usage

MAX_UNUSABLE = 3
"""Turns in a row without anything usable after which an episode ends with ``parse_error``."""
NUDGE = "That turn held neither a tool call nor an answer. Call a tool, or answer in plain text."
_COUNTS = ("turns", "calls", "valid_calls", "mutating_calls", "mutating_ok", "repeats", "truncated",
           "completion_tokens", "prompt_tokens", "calls_refused", "tool_errors", "longest_repeat", "compactions",
           "retries", "final_turn")
_NEVER_RAN = ("bad_arguments", "unknown_tool", "budget")


def zero_counts() -> dict[str, int]:
    """Totals of an episode that has not begun; see :class:`agentsdpo.collect.rollout.Rollout`."""
    return dict.fromkeys(_COUNTS, 0)


@dataclass(frozen=True, slots=True)
class Heard:
    """One turn of the agent as the loop takes it: ids unique, what cannot be run answered already.

    Args:
        text: as sampled or scripted.
        calls: in order.
        owed: answers to calls that could not be read, by id.
        usage: what it cost, ``working_s`` filled in.
        growth: what the token record grew by; () for scripted agents.
        renamed: ids the agent wrote that were taken, and those given instead.
        calls_at: where in the text the calls begin; None: they are no part of it.
    """

    text: str
    calls: tuple[ToolCall, ...]
    owed: Mapping[str, ToolResult]
    usage: Usage
    growth: Sequence[Growth] = ()
    renamed: Mapping[str, list[str]] = field(default_factory=dict)
    calls_at: int | None = None


@dataclass(frozen=True, slots=True)
class Compacted:
    """A history that was cut down: the model now sees the opening, ``inserted``, and all from message ``tail_from`` on.

    Args:
        manager: who did it. before, after: tokens of the next prompt.
        tail_from: index into the whole history; an agent's message stands there.
        inserted: messages in place of what was dropped.
        usage: of the call that wrote a summary. growth: its tokens. accepted: whether that summary is in use.
    """

    manager: str
    before: int
    after: int
    tail_from: int
    inserted: tuple[Json, ...] = ()
    usage: Usage | None = None
    growth: Sequence[Growth] = ()
    accepted: bool | None = None


@dataclass
class Progress:
    """One episode so far.

    Attributes:
        ctx: what the policy sees; ``ctx.messages`` is the history or, after a compaction, what was kept of it.
        budget, clock: limits and time; tools: by name.
        history: every message, none ever left out. opening: how many of them the environment began with.
        tail_from: index into the history from which on the model sees all of it.
        counts: totals for the metrics.
        pending: the turn whose calls are to be answered next.
        answer: the final text, None so far. asked: the limit that ran out, once a final answer was asked for.
        stop: why the episode ended, None while it runs.
        told_at, compacted_at: turn before which that happened last. cost_usd: of all calls of the model.
        failed: ids of calls that came to nothing. state_hash: the environment's, as last reported.
    """

    ctx: Context
    budget: Budget
    clock: Clock = field(default_factory=Clock)
    tools: dict[str, ToolSpec] = field(default_factory=dict)
    history: list[Json] = field(default_factory=list)
    opening: int = 0
    tail_from: int = 0
    counts: dict[str, int] = field(default_factory=zero_counts)
    pending: Heard | None = None
    answer: str | None = None
    asked: StopReason | None = None
    stop: StopReason | None = None
    unusable: int = 0
    cost_usd: float = 0.0
    told_at: int = -1
    compacted_at: int = -1
    failed: set[str] = field(default_factory=set)
    state_hash: str | None = None
    _ids: set[str] = field(default_factory=set)
    _last: tuple[str, Json | str] | None = None
    _run: int = 0
    _deadline: float = 0.0

    def opened(self, messages: Sequence[Json], tools: Sequence[ToolSpec]) -> None:
        """The environment was reset."""
        self.history = list(messages)
        self.opening = self.tail_from = len(messages)
        self.ctx.messages, self.tools = list(messages), {tool.name: tool for tool in tools}

    def left_s(self, *, working: bool) -> float | None:
        """Seconds until the clock ends the turn, None when unlimited.

        Args:
            working: all of this time is work, as that of tools is; a policy may spend some of its time in queues.
        """
        if self.asked is not None:
            return max(0.0, self._deadline - self.clock.wall)
        return left_s(self.budget if working else self.budget.model_copy(update={"working_s": None}), self.clock)

    def hear(self, turn: ModelTurn, elapsed: float, growth: Sequence[Growth] = ()) -> Heard:
        """Make a policy's turn fit for the loop; nothing changes yet but the ids that are taken.

        Args:
            turn: as the policy returned it.
            elapsed: seconds it took, counted where the policy did not measure.
            growth: of the token record.
        """
        sampled = turn.completion is not None  # and read already, in the form of its model
        if not sampled and not turn.calls and OPEN_CALL in visible(turn.text):
            read = read_turn(turn.text, self.ctx.turn)
            turn = turn.model_copy(update={"calls": read.calls, "malformed": read.malformed, "calls_at": read.calls_at})
        calls, now = unique_ids(turn.calls, self.ctx.turn, set(self._ids))
        renamed = {old: ids for old, ids in now.items() if ids != [old]}
        return Heard(turn.text, tuple(calls), _owed(turn, now), _usage(turn, elapsed), growth, renamed,
                     turn.calls_at)

    def took(self, heard: Heard) -> None:
        """The agent took a turn; its calls wait for answers, unless the turn was an answer itself."""
        self._count_usage(heard.usage)
        self.counts["turns"] += 1
        self.counts["truncated"] += heard.usage.finish_reason == "length"
        self._ids.update(call.id for call in heard.calls)
        self._say(_assistant(heard))
        self.ctx.turn, self.ctx.fork_reason = self.ctx.turn + 1, None
        said = visible(heard.text)
        if not heard.calls and said:
            self.answer, self.stop = said, self.asked or StopReason.COMPLETED
            return
        self.unusable = self.unusable + 1 if len(heard.owed) == len(heard.calls) else 0
        self.pending = heard

    def answered(self, results: Sequence[ToolResult]) -> None:
        """Every call of the pending turn has its result, in order."""
        assert self.pending is not None
        calls, self.pending = self.pending.calls, None
        for call, result in zip(calls, results, strict=True):
            self._say({"role": "tool", "tool_call_id": result.call_id, "content": result.content})
            self._count(call, result)
        if self.asked is not None:
            self.stop = self.asked
        elif not calls and self.unusable < MAX_UNUSABLE:
            self._say({"role": "user", "content": NUDGE})

    def may_be_told(self) -> bool:
        """Whether there is a message it has not seen yet, and it was not told anything before this turn."""
        return self.told_at != self.ctx.turn and self.history[-1]["role"] in ("tool", "user")

    def told(self, text: str) -> None:
        """The agent is told something about its budget, at the end of the newest message."""
        newest, self.told_at = self.history[-1], self.ctx.turn
        changed = {**newest, "content": f"{newest['content']}\n\n{text}"}
        self.history[-1] = self.ctx.messages[-1] = changed

    def asked_to_end(self, reason: StopReason) -> None:
        """A limit ran out: one last turn, for the answer."""
        self.asked, self._deadline = reason, self.clock.wall + FINAL_S
        self.counts["final_turn"] = 1
        self._say({"role": "user", "content": ask(reason, self.tools)})

    def compacted(self, change: Compacted) -> None:
        """The model sees less of the history from now on."""
        if change.usage is not None:
            self._count_usage(change.usage)
        self.counts["compactions"] += 1
        self.ctx.messages = [*self.history[:self.opening], *change.inserted, *self.history[change.tail_from:]]
        self.ctx.fork_reason, self.tail_from, self.compacted_at = "compaction", change.tail_from, self.ctx.turn

    def _say(self, message: Json) -> None:
        self.history.append(message)
        self.ctx.messages.append(message)

    def _count_usage(self, usage: Usage) -> None:
        self.counts["completion_tokens"] += usage.completion_tokens
        self.counts["prompt_tokens"] += usage.prompt_tokens
        self.counts["retries"] += usage.retries
        self.clock.working += usage.working_s or 0.0
        self.cost_usd += usage.cost_usd

    def _count(self, call: ToolCall, result: ToolResult) -> None:
        """Totals: valid calls reached the environment; a repeat equals the call before it."""
        valid = result.error_kind not in _NEVER_RAN
        mutating = valid and self.tools[call.name].mutates
        same = self._last == (call.name, call.arguments)
        still = not valid or (result.state_hash == self.state_hash if result.state_hash else not mutating)
        self._run = self._run + 1 if same and still else 1
        self._last = (call.name, call.arguments)
        self.state_hash = result.state_hash or self.state_hash
        if result.is_error:
            self.failed.add(call.id)
        counts = self.counts
        counts["calls"] += result.error_kind != "budget"
        counts["valid_calls"] += valid
        counts["calls_refused"] += not valid
        counts["tool_errors"] += valid and result.is_error
        counts["mutating_calls"] += mutating
        counts["mutating_ok"] += mutating and not result.is_error
        counts["repeats"] += same
        counts["longest_repeat"] = max(counts["longest_repeat"], self._run)


def _assistant(heard: Heard) -> Json:
    """The turn as a message: the text before its calls, and the calls."""
    text = heard.text[:heard.calls_at].rstrip() if heard.calls else heard.text
    message: Json = {"role": "assistant", "content": text}
    if heard.calls:
        message["tool_calls"] = [call.openai() for call in heard.calls]
    return message


def _owed(turn: ModelTurn, now: Mapping[str, list[str]]) -> dict[str, ToolResult]:
    """Answers to unreadable calls, under the ids their calls carry now."""
    queue = {old: list(ids) for old, ids in now.items()}
    owed = {}
    for result in turn.malformed:
        if queue.get(result.call_id):
            call_id = queue[result.call_id].pop(0)
            owed[call_id] = result.model_copy(update={"call_id": call_id})
    return owed


def _usage(turn: ModelTurn, elapsed: float) -> Usage:
    """What the policy measured; what it left out is read off the completion and the clock."""
    done, usage = turn.completion, turn.usage
    if usage is None:
        usage = Usage() if done is None else Usage(
            completion_tokens=len(done.token_ids), finish_reason=done.finish_reason, working_s=done.working_s)
    return with_time(usage, elapsed)


def with_time(usage: Usage, elapsed: float) -> Usage:
    """The usage with the seconds that somebody waited for it, where nobody measured what it took."""
    return usage if usage.working_s is not None else usage.model_copy(update={"working_s": elapsed})
