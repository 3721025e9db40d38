"""The built-in world: a seeded professional-services firm whose house rules stand in no document.

Offline, on CPU, without keys. Only the grader knows the rules; its feedback is the hindsight hint.
"""

from agentsdpo.envs.desk.env import DeskEnv
from agentsdpo.envs.desk.firm import Firm
from agentsdpo.envs.desk.grade import DeskGrader
from agentsdpo.envs.desk.suite import PRESETS, SPLITS, DeskSuite

__all__ = ["PRESETS", "SPLITS", "DeskEnv", "DeskGrader", "DeskSuite", "Firm"]
