"""Base of every config class. The classes stand beside what they configure: ``<room>/config.py``."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Immutable settings; unknown keys are errors. Every field states its unit and range in its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
