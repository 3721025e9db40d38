"""The objects of ATIF (Agent Trajectory Interchange Format) 1.0 to 1.8, strict: unknown fields are errors."""

import re
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

VERSION = "ATIF-v1.8"
"""What exports are written in."""
_VERSIONS = re.compile(r"ATIF-v1\.([0-8])")
_AGENT_ONLY = ("model_name", "reasoning_effort", "reasoning_content", "tool_calls", "metrics")

Extra = dict[str, Any] | None
"""What a producer adds for itself."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Source(_Part):
    """Where an image or a recording lies; it is never opened."""

    media_type: str
    path: str
    duration_sec: float | None = Field(default=None, ge=0)


class ContentPart(_Part):
    """One part of a message of several kinds."""

    type: Literal["text", "image", "audio"]
    text: str | None = None
    source: Source | None = None

    @model_validator(mode="after")
    def _either(self) -> "ContentPart":
        if (self.type == "text") != (self.text is not None) or (self.type == "text") == (self.source is not None):
            raise ValueError("a text part has text, any other part has a source")
        return self


Content = str | list[ContentPart]
"""A text, or parts of several kinds."""


class ToolCall(_Part):
    """One call of a tool."""

    tool_call_id: str
    function_name: str
    arguments: dict[str, Any]
    extra: Extra = None


class Metrics(_Part):
    """Cost, tokens and log-probs of one step; ``logprobs`` stand beside ``completion_token_ids``."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    cost_usd: float | None = None
    prompt_token_ids: list[int] | None = None
    completion_token_ids: list[int] | None = None
    logprobs: list[float] | None = None
    extra: Extra = None


class SubagentRef(_Part):
    """A pointer to a sub-agent's trajectory: embedded by id, or in a file."""

    trajectory_id: str | None = None
    trajectory_path: str | None = None
    session_id: str | None = None
    extra: Extra = None


class Result(_Part):
    """What a tool, or the environment by itself, answered."""

    source_call_id: str | None = None
    content: Content | None = None
    subagent_trajectory_ref: list[SubagentRef] | None = None
    extra: Extra = None


class Observation(_Part):
    """All answers to one step."""

    results: list[Result]


class Step(_Part):
    """A message of system, user or agent, with the answers it got."""

    step_id: int = Field(ge=1)
    timestamp: str | None = None
    source: Literal["system", "user", "agent"]
    model_name: str | None = None
    reasoning_effort: str | float | None = None
    message: Content
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    observation: Observation | None = None
    metrics: Metrics | None = None
    extra: Extra = None
    llm_call_count: int | None = Field(default=None, ge=0)
    is_copied_context: bool | None = None

    @field_validator("timestamp")
    @classmethod
    def _iso(cls, value: str | None) -> str | None:
        if value is not None:
            datetime.fromisoformat(value)
        return value

    @model_validator(mode="after")
    def _by_source(self) -> "Step":
        wrong = [name for name in _AGENT_ONLY if getattr(self, name) is not None]
        if self.source != "agent" and wrong:
            raise ValueError(f"{wrong[0]} belongs to steps of the agent, this one is of the {self.source}")
        if self.llm_call_count == 0 and (self.metrics is not None or self.reasoning_content is not None):
            raise ValueError("a step without a call to a model (llm_call_count 0) has metrics or reasoning_content")
        return self

    @model_validator(mode="after")
    def _by_call(self) -> "Step":
        ids = [call.tool_call_id for call in self.tool_calls or ()]
        if len(set(ids)) < len(ids):
            raise ValueError("two tool calls of the step have one tool_call_id")
        for result in self.observation.results if self.observation else ():
            if result.source_call_id is not None and self.tool_calls is not None and result.source_call_id not in ids:
                raise ValueError(f"source_call_id {result.source_call_id!r} names no tool call of the step")
        return self


class Agent(_Part):
    """Who acted."""

    name: str
    version: str
    model_name: str | None = None
    tool_definitions: list[dict[str, Any]] | None = None
    extra: Extra = None


class FinalMetrics(_Part):
    """Sums over all steps."""

    total_prompt_tokens: int | None = None
    total_completion_tokens: int | None = None
    total_cached_tokens: int | None = None
    total_cost_usd: float | None = None
    total_steps: int | None = None
    extra: Extra = None


class Trajectory(_Part):
    """One document."""

    schema_version: str
    session_id: str | None = None
    trajectory_id: str | None = None
    agent: Agent
    steps: list[Step]
    notes: str | None = None
    final_metrics: FinalMetrics | None = None
    continued_trajectory_ref: str | None = None
    extra: Extra = None
    subagent_trajectories: list["Trajectory"] | None = None

    @field_validator("schema_version")
    @classmethod
    def _known(cls, value: str) -> str:
        if not _VERSIONS.fullmatch(value):
            raise ValueError(f"{value!r} is none of ATIF-v1.0 to {VERSION}")
        return value

    @model_validator(mode="after")
    def _steps_count(self) -> "Trajectory":
        for number, step in enumerate(self.steps, 1):
            if step.step_id != number:
                raise ValueError(f"steps[{number - 1}].step_id is {step.step_id}, not {number}: ids count from 1 "
                                 "without gaps")
        return self

    @model_validator(mode="after")
    def _embedded(self) -> "Trajectory":
        ids = [sub.trajectory_id for sub in self.subagent_trajectories or ()]
        if None in ids or len(set(ids)) < len(ids):
            raise ValueError("embedded trajectories need a trajectory_id each, all different")
        return self

    @model_validator(mode="after")
    def _references(self) -> "Trajectory":
        minor = _VERSIONS.fullmatch(self.schema_version)
        for ref in references(self):
            known = ref.trajectory_id or ref.trajectory_path
            if known is None and (ref.session_id is None or (minor and int(minor.group(1)) >= 7)):
                raise ValueError("a subagent_trajectory_ref needs trajectory_id or trajectory_path")
        return self


def references(trajectory: Trajectory) -> list[SubagentRef]:
    """All pointers to sub-agents in the steps of a trajectory."""
    return [ref for step in trajectory.steps if step.observation
            for result in step.observation.results for ref in result.subagent_trajectory_ref or ()]


def multimodal(content: Content | None) -> bool:
    """Whether a content holds anything but text."""
    return isinstance(content, list) and any(part.type != "text" for part in content)
