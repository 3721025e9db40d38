"""Settings of collection. Nothing heavy is imported here."""

from typing import Literal

from pydantic import Field

from agentsdpo.collect.budget import ANNOUNCE
from agentsdpo.settings import Settings
from agentsdpo.types import Budget, Sampling


class CompactionConfig(Settings):
    """What happens to a history that is about to fill the window; see :mod:`agentsdpo.collect.compaction`."""

    manager: Literal["none", "notes", "summary"] = Field(default="none", description=(
        "what stands for the turns left out: nothing is left out, the agent's notes, or a summary it writes"))
    compact_at: float = Field(default=0.7, gt=0.0, lt=1.0, description=(
        "share of the window that the next prompt may fill before it is cut down, (0, 1)"))
    keep_turns: int = Field(default=4, ge=1, le=10_000, description="newest turns that stay as they are, 1 or more")
    summary_tokens: int = Field(default=256, ge=1, le=1_000_000, description="longest summary, tokens; 1 or more")


class CollectConfig(Settings):
    """How episodes are sampled and bounded.

    Budgets given here tighten those of the task, never loosen them. With ``top_p`` or ``top_k`` on, the engine must
    record the kept set, else training collection is refused (:class:`agentsdpo.errors.TruncatedSampling`).

    >>> CollectConfig(temperature=0.0).sampling(seed=1, max_tokens=8).max_tokens
    8
    """

    concurrency: int = Field(default=32, ge=1, le=100_000, description="episodes in flight at once, 1 or more")
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description=(
        "where a model plays that is not behind a server: auto (a GPU where there is one), cpu, cuda or cuda:1"))
    window: int = Field(default=1536, ge=2, le=10_000_000, description="longest prompt plus completion, tokens")
    temperature: float = Field(default=1.0, ge=0.0, le=100.0, description="of sampling, 0 to 100; 0 is greedy")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, description="nucleus mass kept, (0, 1]; 1 is off")
    top_k: int = Field(default=0, ge=0, le=1_000_000, description="likeliest ids kept, 0 or more; 0 is off")
    max_tokens: int = Field(default=256, ge=1, le=1_000_000, description="tokens of one turn, 1 or more")
    max_turns: int | None = Field(default=None, ge=1, le=100_000, description="turns of an episode; none: the task's")
    max_tool_calls: int | None = Field(default=None, ge=1, le=1_000_000,
                                       description="tool calls of an episode; none: the task's")
    max_completion_tokens: int | None = Field(default=None, ge=1, le=100_000_000,
                                              description="sampled tokens of an episode; none: the task's")
    max_wall_s: float | None = Field(default=None, gt=0.0, le=1_000_000.0,
                                     description="seconds of an episode; none: the task's")
    max_repeat: int | None = Field(default=None, ge=2, le=1_000_000, description=(
        "run of one call that changes nothing after which an episode ends; none: the task's"))
    announce: str = Field(default="off", pattern=f"^({ANNOUNCE})$", description=(
        "when the agent is told its budget: off, start, or every_5 and the like, counted in turns"))
    final_turn: bool = Field(default=False, description="whether a spent budget leaves one turn for the answer")
    compaction: CompactionConfig = CompactionConfig()

    def sampling(self, *, seed: int, max_tokens: int) -> Sampling:
        """Sampling of one turn, with at most ``max_tokens`` tokens."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, seed=seed,
                        max_tokens=min(max_tokens, self.max_tokens))

    def budget(self, task: Budget) -> Budget:
        """The task's budget, tightened by these settings.

        >>> CollectConfig(max_turns=4).budget(Budget(turns=10)).turns
        4
        """
        own = {"turns": self.max_turns, "tool_calls": self.max_tool_calls,
               "completion_tokens": self.max_completion_tokens, "wall_s": self.max_wall_s,
               "max_repeat": self.max_repeat}
        limits = {key: min(x for x in (value, getattr(task, key)) if x is not None)
                  for key, value in own.items() if value is not None}
        return task.model_copy(update=limits)
