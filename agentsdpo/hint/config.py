"""Settings of the hint room."""

from typing import Literal

from pydantic import Field

from agentsdpo.settings import Settings


class HintConfig(Settings):
    """How much a hint may say, and when there is too little to say.

    ``level`` and ``scope`` are the grader's: a suite is made with them, and its feedback is the hint.

    >>> HintConfig().level, HintConfig().scope
    (3, 'all')
    """

    level: int = Field(default=3, ge=1, le=3, description=(
        "how much the grader says: 1 which criterion failed, 2 also what it is about, 3 what was expected; in [1, 3]"))
    scope: Literal["all", "failed"] = Field(default="all", description=(
        "at level 3, speak of all rules that apply to the task, or only of those that were broken"))
    min_chars: int = Field(default=10, ge=1, le=10_000, description=(
        "characters; a shorter text says nothing and its episode is dropped and counted; in [1, 10000]"))
