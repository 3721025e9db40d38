"""What a benchmark version fixes besides its tasks: budgets, what is kept of long tool answers, compaction.

Two runs are comparable only under one profile. ``desk`` takes each task's own budget.
"""

from agentsdpo.collect.answers import APEX_V1, APEX_V1_1, OutputLimit
from agentsdpo.collect.config import CompactionConfig
from agentsdpo.types import Budget, Frozen


class Profile(Frozen):
    """Limits under which attempts are comparable.

    Attributes:
        budget: of every task; None: each task's own.
        output: how much of a tool's answer the agent is shown.
        compaction: what happens when the context is nearly full.
        final_turn: whether a spent budget leaves one turn for the answer.
    """

    budget: Budget | None = None
    output: OutputLimit = OutputLimit()
    compaction: CompactionConfig = CompactionConfig()
    final_turn: bool = True


PROFILES = {
    "desk": Profile(),
    "apex_v1": Profile(budget=Budget(turns=250, tool_calls=None, wall_s=10_800.0), output=APEX_V1,
                       compaction=CompactionConfig(manager="summary")),
    "apex_v1_1": Profile(budget=Budget(turns=100, tool_calls=None, wall_s=10_800.0), output=APEX_V1_1),
}
"""``apex_v1``: 250 turns and 3 h, a summary at 70 % of the window. ``apex_v1_1``: 100 turns and 3 h, no summary."""
