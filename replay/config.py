"""How the learner draws from the replay store."""

from typing import Literal

from pydantic import Field

from agentsdpo.settings import Settings


class ReplayConfig(Settings):
    """Which branches are drawn, in which order, and how often.

    >>> ReplayConfig(max_uses=4).strategy
    'uniform'
    """

    strategy: Literal["uniform", "fifo", "newest"] = Field(
        default="uniform", description="order within one pass over the eligible branches: by a seeded hash, oldest "
                                       "arrival first, newest arrival first")
    unit: Literal["branch", "episode"] = Field(
        default="episode", description="what one draw takes, and what learn.batch counts: all eligible branches of an "
                                       "episode, or one branch")
    max_uses: int = Field(
        default=0, ge=0, le=1_000_000, description="draws of one unit before it is set aside, a cap on samples per "
                                                   "insert; 0 is no cap")
