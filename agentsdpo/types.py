"""The vocabulary: what passes between the rooms. Words are those of the glossary in ``docs/glossary.md``.

The token record (branches, calls, completions) stands in ``record.py`` and is importable from here.
"""

from collections.abc import Awaitable
from enum import StrEnum
from typing import Literal, Protocol, runtime_checkable

from pydantic import Field, field_validator

from agentsdpo.record import (
    Branch,
    Call,
    Completion,
    Frozen,
    Json,
    Sampling,
    TokenKind,
    VersionSpan,
    check_row,
    span_bounds,
)

__all__ = [
    "Branch", "Budget", "Call", "Closes", "Completion", "Criterion", "CriterionResult", "Env", "Episode", "ErrorKind",
    "Frozen", "Grade", "Grader", "Hint", "Json", "ModelTurn", "Outcome", "Sampling", "StopReason", "Suite", "Task",
    "TokenKind", "ToolCall", "ToolResult", "ToolSpec", "Usage", "VersionSpan", "check_row", "span_bounds", "staleness",
]


class StopReason(StrEnum):
    """Why an episode ended."""

    COMPLETED = "completed"
    """The agent submitted or gave a final answer."""
    MAX_TURNS = "max_turns"
    MAX_TOOL_CALLS = "max_tool_calls"
    MAX_SAMPLED_TOKENS = "max_sampled_tokens"
    """The budget of completion tokens ran out."""
    MAX_PROMPT_TOKENS = "max_prompt_tokens"
    """The budget of prompt tokens, summed over calls, ran out."""
    CONTEXT_OVERFLOW = "context_overflow"
    """The next prompt would not fit into the model's window."""
    ROLLOUT_TIMEOUT = "rollout_timeout"
    """Wall time or working time ran out."""
    MAX_REPEAT = "max_repeat"
    """The same call, again and again, changed nothing; only where the budget says ``max_repeat``."""
    PARSE_ERROR = "parse_error"
    """Too many turns in a row held nothing usable."""
    ENGINE_ERROR = "engine_error"
    """Engine or environment broke: unscored."""


# --------------------------------------------------------------------------------------------- tools and tasks


class ToolSpec(Frozen):
    """One tool as the model sees it; ``parameters`` is a JSON schema of an object.

    >>> spec = ToolSpec(name="note_get", description="Read a note.", parameters={"type": "object"}, mutates=False)
    >>> spec.openai()["function"]["name"]
    'note_get'
    """

    name: str
    description: str
    parameters: Json
    mutates: bool = True
    timeout_s: float = 60.0

    def openai(self) -> Json:
        """The tool in OpenAI's ``tools`` shape, as chat templates take it."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


class ToolCall(Frozen):
    """A call the agent made; ``arguments`` is a string when it could not be parsed, kept verbatim."""

    id: str
    name: str
    arguments: Json | str

    def openai(self) -> Json:
        """The call in the shape chat templates take inside an assistant message."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


ErrorKind = Literal["none", "unknown_tool", "bad_arguments", "tool", "timeout", "budget"]


class ToolResult(Frozen):
    """The one answer to one call id. Tool faults are observations, never exceptions."""

    call_id: str
    content: str
    is_error: bool = False
    error_kind: ErrorKind = "none"
    truncated: tuple[int, int] | None = Field(default=None, description="(kept, original) characters")
    state_hash: str | None = None
    wall_s: float = 0.0


class Budget(Frozen):
    """Limits of one episode; None is unlimited; the first one exhausted ends the episode and is recorded.

    ``wall_s`` counts everything; ``working_s`` counts model calls (the attempt that succeeded, without queues, limits
    of rate and back-off) and tools. ``max_repeat`` bounds a run of one and the same call that changes nothing.
    """

    turns: int | None = 100
    tool_calls: int | None = 1000
    calls_per_turn: int | None = 16
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    wall_s: float | None = 10_800.0
    working_s: float | None = None
    max_repeat: int | None = None


class Criterion(Frozen):
    """One binary check of a rubric. ``negative`` ones are worded so that met (1) is still good."""

    id: str
    text: str
    weight: float = 1.0
    primary: bool = False
    negative: bool = False
    target: Literal["answer", "files", "state", "all"] = "all"
    check: str | None = Field(default=None, description="'pkg.mod:func' for a programmatic check, else a judge")


class Task(Frozen):
    """A problem with data and a rubric. ``train_allowed`` is set by the loader from the licence."""

    task_id: str
    world_id: str | None = None
    domain: str = ""
    prompt: str
    expected_output: str = "message_in_console"
    rubric: tuple[Criterion, ...] = ()
    budget: Budget = Budget()
    seed: int = 0
    train_allowed: bool = False
    metadata: Json = {}


class CriterionResult(Frozen):
    """Outcome of one criterion; ``score`` is None exactly when ``status`` is not ``ok``."""

    id: str
    status: Literal["ok", "error", "skipped"] = "ok"
    score: float | None
    rationale: str = Field(default="", description="for audit alone")
    feedback: str = Field(default="", description="what may become a hint")
    judge: Json | None = Field(default=None, description="model, prompt_sha256, usage and raw replies of a judge, and "
                              "what its canary took")


class Grade(Frozen):
    """All criteria of one attempt; ``mean`` and ``passed`` are None when any criterion could not be judged.

    >>> grade = Grade.of([CriterionResult(id="unit", score=1.0), CriterionResult(id="file", score=0.0)], feedback="x")
    >>> grade.mean, grade.passed
    (0.5, False)
    """

    results: tuple[CriterionResult, ...]
    mean: float | None
    passed: bool | None
    feedback: str = ""

    @classmethod
    def of(cls, results: list[CriterionResult], feedback: str = "") -> "Grade":
        """Mean over criteria, passed when every score is at least 0.99; None as soon as one is not ``ok``."""
        scores = [r.score for r in results if r.status == "ok" and r.score is not None]
        if not results or len(scores) < len(results):
            return cls(results=tuple(results), mean=None, passed=None, feedback=feedback)
        passed = all(score >= 0.99 for score in scores)
        return cls(results=tuple(results), mean=sum(scores) / len(scores), passed=passed, feedback=feedback)


def printable(text: str) -> str:
    """The text with lone surrogates replaced, which neither a tokenizer nor the store can write as UTF-8.

    >>> printable("a" + chr(0xd800))
    'a?'
    """
    return text.encode("utf-8", "replace").decode()


class Hint(Frozen):
    """Privileged text only the teacher reads, and what it may speak of.

    ``text`` speaks of the whole episode, ``turns`` of single turns. Each sampled token has one hint: that of its turn,
    else the episode's, else none, and then it is not learnt from.
    """

    text: str = ""
    turns: tuple[tuple[int, str], ...] = Field(default=(), description="(turn, counted from 0; its own text)")
    source: Literal["criteria", "feedback", "peer", "gold", "demo", "judge", "user", "next_step", "contrast"]
    author: str = Field(description="who wrote it: a grader's name or a model id")
    placement: Literal["system_prefix", "last_user_suffix", "turn_local"] = Field(
        default="system_prefix", description="of what is read from the first turn on: in front, or at the end of the "
                                             "last opening message; what begins with a later turn stands before it")
    scope: Literal["episode", "turn"] = "episode"
    answer_bearing: bool = False

    @field_validator("text", "turns", "author")
    @classmethod
    def _printable(cls, said: str | tuple[tuple[int, str], ...]) -> str | tuple[tuple[int, str], ...]:
        """Lone surrogates replaced: JSON can hold them, and no tokenizer reads them."""
        if isinstance(said, str):
            return printable(said)
        return tuple((turn, printable(text)) for turn, text in said)

    @property
    def words(self) -> str:
        """Everything it says: of the whole episode first, then what it says of turns, each once."""
        return "\n".join(dict.fromkeys(filter(None, [self.text, *(text for _, text in self.turns)])))

    @property
    def told(self) -> list[tuple[str, str]]:
        """What it says of turns, and which these are, in words; turns in a row that are told the same are one.

        >>> Hint(turns=((0, "a"), (1, "a"), (2, "b")), source="user", author="u").told
        [('turns 0 to 1', 'a'), ('turn 2', 'b')]
        """
        runs: list[tuple[int, int, str]] = []
        for turn, text in sorted(self.turns):
            first = runs.pop()[0] if runs and runs[-1][1:] == (turn - 1, text) else turn
            runs.append((first, turn, text))
        return [(f"turn {first}" if first == last else f"turns {first} to {last}", text) for first, last, text in runs]


class Episode(Frozen):
    """One whole run of a task: branches, outcome, grade, stop reason, hint."""

    episode_id: str
    task_id: str
    env_id: str
    run_id: str = ""
    attempt: int = 0
    group_id: str = ""
    group_size: int = 1
    branches: tuple[Branch, ...]
    stop_reason: StopReason
    grade: Grade | None = None
    hint: Hint | None = None
    train_allowed: bool = False
    model_id: str = ""
    tokenizer_sha256: str = ""
    chat_template_sha256: str = ""
    vocab_size: int = 0
    engine: str = ""
    messages: tuple[Json, ...] = ()
    tools: tuple[Json, ...] = Field(default=(), description="as the agent saw them, OpenAI shape; () when not recorded")
    metadata: Json = {}

    @property
    def reward(self) -> float | None:
        """Mean criterion score, None when unscored."""
        return self.grade.mean if self.grade else None

    @property
    def policy_versions(self) -> tuple[int, int]:
        """Oldest and newest policy version over all branches."""
        return span_bounds(tuple(call for branch in self.branches for call in branch.calls))


def staleness(learner_version: int, oldest_version: int) -> int:
    """Learner version minus the oldest version in the branch, taken when it is consumed.

    >>> staleness(12, 9)
    3
    """
    return learner_version - oldest_version


# ------------------------------------------------------------------------------------------------- agents, envs


class Usage(Frozen):
    """What one turn of a policy cost. ``working_s`` is None where nobody measured it: then the whole wait counts."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = ""
    working_s: float | None = Field(default=None, description="seconds of the attempt that succeeded, queues left out")
    retries: int = 0
    cost_usd: float = 0.0


class ModelTurn(Frozen):
    """What a policy produced in one turn; ``completion`` and ``usage`` are None for scripted agents."""

    text: str
    calls: tuple[ToolCall, ...] = ()
    calls_at: int | None = Field(default=None, ge=0, description="where in the text they begin; None: beside it")
    completion: Completion | None = None
    usage: Usage | None = None
    malformed: tuple[ToolResult, ...] = Field(default=(), description="answers already owed to calls that do not parse")


class Outcome(Frozen):
    """What a grader sees: the answer, both snapshots, and the calls in order."""

    answer: str | None
    initial: bytes
    final: bytes
    calls: tuple[tuple[ToolCall, ToolResult], ...] = ()


class Env(Protocol):
    """State and tools; owns no loop, no reward, no rubric. One instance is one episode.

    ``call`` answers every id once, in order, and never raises for a tool fault; :class:`EnvError` is for broken
    infrastructure alone.
    """

    env_id: str
    tools: tuple[ToolSpec, ...]

    async def reset(self, task: Task, *, seed: int, episode_id: str) -> list[Json]:
        """Start the task and return the opening messages (system, user). The rubric must not be read."""
        ...

    async def call(self, calls: tuple[ToolCall, ...]) -> list[ToolResult]:
        """Run the calls in order."""
        ...

    def done(self) -> bool:
        """Whether the agent has submitted."""
        ...

    def snapshot(self) -> bytes | Awaitable[bytes]:
        """Everything needed to continue, as canonical bytes; a coroutine where the state lives behind a network."""
        ...

    def restore(self, data: bytes) -> None | Awaitable[None]:
        """Continue from a snapshot, in an environment that was reset for the same task."""
        ...

    def outcome(self, answer: str | None) -> Outcome | Awaitable[Outcome]:
        """What the grader may see."""
        ...


@runtime_checkable
class Closes(Protocol):
    """An environment that holds something (a process, a connection) until its episode is over."""

    async def close(self) -> None:
        """The episode is over, however it ended; called once."""
        ...


class Grader(Protocol):
    """Pure and repeatable; holds no environment."""

    async def grade(self, task: Task, outcome: Outcome) -> Grade:
        """Judge one outcome."""
        ...


class Suite(Protocol):
    """A source of tasks with the environment and the grader that belong to them."""

    name: str

    def task(self, split: str, index: int) -> Task:
        """Task ``index`` of ``split``; the same arguments give the same task for ever."""
        ...

    def env(self) -> Env:
        """A fresh environment for one episode."""
        ...

    def grader(self) -> Grader:
        """The grader of these tasks."""
        ...
