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
        default="branch", description="what one draw takes: a branch, or all eligible branches of an episode")
    max_uses: int = Field(
        default=0, ge=0, le=1_000_000, description="draws of one branch before it is set aside, a cap on samples per "
                                                   "insert; 0 is no cap")
