"""Settings of the publish room."""

from typing import Literal

from pydantic import Field

from agentsdpo.settings import Settings


class PublishConfig(Settings):
    """How often a policy version is published, as what, and how many are kept on disk.

    >>> PublishConfig().every
    1
    """

    every: int = Field(default=1, ge=1, le=100_000, description="optimiser steps between two publishes; 1 or more")
    keep: int = Field(default=4, ge=1, le=1_000_000, description=(
        "versions kept on disk, newest first; versions inside the staleness window are kept in any case; 1 or more"))
    kind: Literal["auto", "full", "adapter"] = Field(default="auto", description=(
        "what a version holds: full weights, or the adapter alone on the full weights of the first version; auto is an "
        "adapter exactly when one is trained (learn.adapter.rank above 0)"))
