"""Settings of the hint room."""

from pydantic import Field

from agentsdpo.settings import Settings


class HintConfig(Settings):
    """How much a hint may say, and when there is too little to say.

    >>> HintConfig().level
    3
    """

    level: int = Field(default=3, ge=1, le=3, description=(
        "how much of the grade becomes the hint: 1 which criteria failed, 2 also the feedback on each of them, "
        "3 the grader's whole feedback; in [1, 3]"))
    min_chars: int = Field(default=10, ge=1, le=10_000, description=(
        "characters; a shorter text says nothing and its episode is dropped and counted; in [1, 10000]"))
    leak_ngram: int = Field(default=8, ge=2, le=64, description=(
        "tokens; so many hint tokens in a row among the agent's own tokens count as a leak; in [2, 64]"))
