"""Settings of a benchmark run. Nothing heavy is imported here."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from agentsdpo.benchmarks.apex.profiles import PROFILES, Profile
from agentsdpo.collect.budget import ANNOUNCE
from agentsdpo.collect.config import CollectConfig, CompactionConfig
from agentsdpo.collect.hosted import HostedConfig
from agentsdpo.envs.config import ContainerConfig
from agentsdpo.settings import Settings
from agentsdpo.settings_io import build, read_toml, with_sets
from agentsdpo.types import Budget, Task


class BudgetConfig(Settings):
    """Limits of one attempt; what is not given is the profile's, then the task's."""

    turns: int | None = Field(default=None, ge=1, description="turns; none: the profile's")
    tool_calls: int | None = Field(default=None, ge=1, description="tool calls; none: the profile's")
    calls_per_turn: int | None = Field(default=None, ge=1, description="calls in one turn; none: the profile's")
    prompt_tokens: int | None = Field(default=None, ge=1, description="prompt tokens, summed; none: the profile's")
    completion_tokens: int | None = Field(default=None, ge=1, description="sampled tokens; none: the profile's")
    wall_s: float | None = Field(default=None, gt=0.0, allow_inf_nan=False,
                                 description="seconds on the wall; none: the profile's")
    working_s: float | None = Field(default=None, gt=0.0, allow_inf_nan=False,
                                    description="seconds of model and tools; none: the profile's")
    max_repeat: int | None = Field(default=None, ge=2, description="one call again and again; none: the profile's")


class DeskTasksConfig(Settings):
    """Which tasks of the built-in world."""

    split: str = Field(default="test_names", description="split; all but train are for evaluation alone")
    families: tuple[str, ...] = Field(default=(), description="kinds of work; empty: the suite's own")
    n: tuple[int, ...] = Field(default=(), description="figures to file, the horizon; empty: the suite's own")
    firm_seed: int = Field(default=7, ge=0, description="fixes the house rules")
    fault_rate: float = Field(default=0.0, ge=0.0, le=0.5, description="share of reads that fail once, 0 to 0.5")


class SamplingConfig(Settings):
    """How a model takes its turns."""

    temperature: float = Field(default=1.0, ge=0.0, le=100.0, description="of sampling; 0 is greedy")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, description="nucleus mass kept; 1 is off")
    top_k: int = Field(default=0, ge=0, description="likeliest ids kept; 0 is off")
    max_tokens: int = Field(default=256, ge=1, description="tokens of one turn")
    window: int = Field(default=1536, ge=2, description="longest prompt plus completion, tokens")


class BenchConfig(Settings):
    """One benchmark run.

    >>> BenchConfig().budget_of(Task(task_id="t", prompt="p", budget=Budget(turns=16))).turns
    16
    >>> BenchConfig(profile="apex_v1").budget_of(Task(task_id="t", prompt="p")).turns
    250
    """

    suite: str = Field(default="desk-mini", description="desk-mini, desk, or the path of a benchmark or a task file")
    tasks: int | None = Field(default=None, ge=1, description="the first so many; none: all, or 20 of the desk world")
    model: str = Field(default="seed", description="seed, a folder, a served or hosted model, or a scripted agent")
    engine: Literal["auto", "inprocess", "vllm", "litellm", "script"] = Field(
        default="auto", description="what answers; auto goes by the model's name and by url")
    url: str = Field(default="", description="address of a vLLM server, as in http://127.0.0.1:8000")
    served: str = Field(default="", description="name the server knows the model by; empty: its base model")
    attempts: int = Field(default=4, ge=1, le=10_000, description="attempts per task")
    concurrency: int = Field(default=32, ge=1, le=10_000, description="attempts in flight at once")
    retries: int = Field(default=2, ge=0, le=100, description="more tries of an attempt that could not be scored")
    checkpoint_every: int = Field(default=16, ge=1, description="turns between two snapshots to resume from; 1 where "
                                  "tools do not repeat themselves")
    seed: int = Field(default=0, ge=0, description="of attempts; with task and attempt it fixes every draw")
    profile: Literal["desk", "apex_v1", "apex_v1_1"] = Field(default="desk", description="budgets and limits of tools")
    announce: str = Field(default="off", pattern=f"^({ANNOUNCE})$", description=(
        "when the agent is told its budget: off, start, or every_5 and the like, in turns"))
    references: bool = Field(default=True, description="play scripted agents for scale, where the suite has some")
    containers: ContainerConfig | None = Field(default=None, description="that play the worlds; none: in memory")
    judge: HostedConfig | None = Field(default=None, description="the model that judges what no program can")
    hosted: HostedConfig | None = Field(default=None, description="the hosted model that plays, in place of model")
    budget: BudgetConfig = BudgetConfig()
    compaction: CompactionConfig | None = Field(default=None, description="of a full context; none: the profile's")
    desk: DeskTasksConfig = DeskTasksConfig()
    sampling: SamplingConfig = SamplingConfig()

    def rules(self) -> Profile:
        """What the profile says, with what is given here in its place."""
        profile = PROFILES[self.profile]
        return profile.model_copy(update={"compaction": self.compaction}) if self.compaction else profile

    def budget_of(self, task: Task) -> Budget:
        """The limits of one attempt at this task."""
        own = self.budget.model_dump(exclude_none=True)
        return (self.rules().budget or task.budget).model_copy(update=own)

    def collect(self) -> CollectConfig:
        """The settings as the engine's policy takes them."""
        return CollectConfig(concurrency=self.concurrency, **self.sampling.model_dump())


def load(path: Path | None, flags: Mapping[str, Any], sets: Iterable[str] = ()) -> BenchConfig:
    """Settings from a file, laid over by flags, laid over by ``key=value`` texts.

    Args:
        path: a TOML file; None for the defaults.
        flags: settings by name; those that are None were not given.
        sets: as ``--set`` takes them.

    Raises:
        ConfigError: see :mod:`agentsdpo.settings_io`.

    >>> load(None, {"attempts": 2, "model": None}, ["budget.turns=5"]).budget.turns
    5
    """
    given = {key: value for key, value in flags.items() if value is not None}
    return build(BenchConfig, with_sets({**(read_toml(path) if path else {}), **given}, sets))
