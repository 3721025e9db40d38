"""Base of every config class. The classes stand beside what they configure: ``<room>/config.py``."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Immutable settings; unknown keys are errors. Every field states its unit and range in its description."""

    LISTED: ClassVar[str] = ""
    """The command that lists all settings of the class, where there is one."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
