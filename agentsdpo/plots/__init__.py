"""Figures of runs, studies, benchmarks and episodes: functions from rows to a matplotlib ``Figure``.

Rows are JSON objects, or any data frame that :func:`records` knows. One house style, see :mod:`agentsdpo.plots.style`;
sentences computed from the same rows are in :mod:`agentsdpo.plots.words`.
"""

from agentsdpo.plots.bars import arms_comparison, split_bars
from agentsdpo.plots.card import criteria_matrix, pass_curve, read_bench
from agentsdpo.plots.curves import VALUES, curve_points, learning_curve
from agentsdpo.plots.panels import PANELS, diagnostic
from agentsdpo.plots.studies import age_curve, arm_grid
from agentsdpo.plots.style import AXES, ROLES, STYLE, show, svg
from agentsdpo.plots.tables import arms_of, by_split, chosen, read_arms, read_seeds, read_study, records
from agentsdpo.plots.tokens import attribution_strip, by_hint, gap_heatmap, hint_control, loss_by_part

__all__ = ["AXES", "PANELS", "ROLES", "STYLE", "VALUES", "age_curve", "arm_grid", "arms_comparison", "arms_of",
           "attribution_strip", "by_hint", "by_split", "chosen", "criteria_matrix", "curve_points", "diagnostic",
           "gap_heatmap", "hint_control", "learning_curve", "loss_by_part", "pass_curve", "read_arms", "read_bench",
           "read_seeds", "read_study", "records", "show", "split_bars", "svg"]
