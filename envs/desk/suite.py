"""Tasks of the desk world by split: who is seen in training, and which one axis each test split holds out."""

import math
from typing import Any

from agentsdpo.calls import call_line
from agentsdpo.envs.desk import families, text, world
from agentsdpo.envs.desk.agents import oracle, steps
from agentsdpo.envs.desk.env import DeskEnv
from agentsdpo.envs.desk.families import FAMILIES
from agentsdpo.envs.desk.firm import Firm
from agentsdpo.envs.desk.grade import DeskGrader, rubric
from agentsdpo.envs.desk.tools import SPECS
from agentsdpo.errors import ConfigError
from agentsdpo.types import Budget, Task

SPLITS = ("train", "val", "test_world", "test_names", "test_period", "test_n", "test_firm")
_FIRST_WORLD = {"train": (0, 1000), "val": (1_000, 100), "test_world": (10_000, 200), "test_names": (1_000, 100),
                "test_period": (1_000, 100), "test_n": (1_000, 100), "test_firm": (1_000, 100)}
PRESETS = ("desk-mini", "desk")
MOST_FIGURES = 48
"""Figures of one task; a world has 64 clients."""


class DeskSuite:
    """Seeded tasks of one firm with their environment and grader.

    Args:
        preset: ``desk-mini`` (four house rules, figures are copied) or ``desk`` (six, converted and rounded).
        firm_seed: fixes the house rules and nothing visible.
        families: drawn from evenly.
        n: horizon knob, drawn from evenly; figures to file, at most 4 in training.
        rows: rows of a sheet that are not asked for; none in ``desk-mini``, 3 in ``desk``.
        distractors: mails that ask for nothing.
        fault_rate: share of reads that fail once, 0 to 0.5.
        feedback_level: 0 to 3, see :class:`DeskGrader`.
        hint_scope: ``all`` rules of the kind, or only the ``failed`` ones.

    Raises:
        ConfigError: no such preset or family, or ``n`` out of 1 to 48.

    >>> suite = DeskSuite()
    >>> suite.task("train", 3) == DeskSuite(firm_seed=8).task("train", 3)
    True
    """

    def __init__(self, preset: str = "desk-mini", *, firm_seed: int = 7, families: tuple[str, ...] = ("lookup",),
                 n: tuple[int, ...] = (1,), rows: int | None = None, distractors: int = 2, fault_rate: float = 0.0,
                 feedback_level: int = 3, hint_scope: str = "all") -> None:
        if preset not in PRESETS:
            raise ConfigError(f"there is no suite {preset!r}", fix=f"choose one of {', '.join(PRESETS)}")
        strange = [family for family in families if family not in FAMILIES]
        if strange or not families:
            raise ConfigError(f"there is no family {', '.join(map(repr, strange))}" if strange else "families is empty",
                              fix=f"choose of {', '.join(FAMILIES)}")
        if not n or min(n) < 1 or max(n) > MOST_FIGURES:
            raise ConfigError(f"n is {list(n)}", fix=f"give numbers of figures to file, each 1 to {MOST_FIGURES}")
        self.name, self.preset, self.firm = preset, preset, Firm(firm_seed)
        self.families, self.n = tuple(families), tuple(n)
        self.rows = {"desk-mini": 0, "desk": 3}[preset] if rows is None else rows
        self.distractors, self.fault_rate = distractors, fault_rate
        self.feedback_level, self.hint_scope = feedback_level, hint_scope

    def task(self, split: str, index: int) -> Task:
        """Task ``index`` of ``split``; the same arguments give the same task for ever, whatever the firm.

        Raises:
            ConfigError: unknown split.
        """
        if split not in SPLITS:
            raise ConfigError(f"there is no split {split!r}", fix=f"choose one of {', '.join(SPLITS)}")
        meta = self._meta(split, index)
        return Task(task_id=f"{self.preset}-{split}-{index}", world_id=f"world-{meta['world_seed']}", domain="desk",
                    prompt=families.prompt(meta), rubric=rubric(meta), seed=meta["seed"], train_allowed=True,
                    budget=_budget(meta), metadata=meta)

    def _meta(self, split: str, index: int) -> dict[str, Any]:
        first, count = _FIRST_WORLD[split]
        seed = text.digest("task", split, index) % 2**31
        world_seed, held_out = first + index % count, split == "test_names"
        family = text.pick(self.families, "family", seed)
        n = (8, 16, 32, 48)[text.digest("n", seed) % 4] if split == "test_n" else self.n[
            text.digest("n", seed) % len(self.n)]
        pool = sorted(world.clients_of(world_seed, held_out=held_out), key=lambda c: text.digest("client", seed, c))
        years = (7, 8, 9) if split == "test_period" else (1, 2, 3, 4, 5, 6)
        kinds = families.CLOSE_KINDS if family == "close" else [text.pick(text.KINDS, "kind", seed)]
        quarter, year = 1 + text.digest("quarter", seed) % 4, years[text.digest("year", seed) % len(years)]
        return {"family": family, "preset": self.preset, "n": n, "kinds": kinds, "seed": seed,
                "clients": pool[:max(1, n // 3) if family == "close" else n], "period": text.period(quarter, year),
                "world_seed": world_seed, "held_out": held_out, "rows": self.rows, "distractors": self.distractors,
                "fault_rate": self.fault_rate, "stranger": split == "test_firm"}

    def env(self) -> DeskEnv:
        """A fresh desk."""
        return DeskEnv()

    def gold(self, task: Task) -> str:
        """What the expert's answer to the task is: where it files which figure and whom it tells."""
        done = [step for step in steps(task, oracle(task, self.firm)) if SPECS[step[0]].mutates]
        return "\n".join(call_line(name, arguments) for name, arguments in done)

    def demo(self, task: Task) -> str:
        """Every call of the expert, in order."""
        return "\n".join(call_line(name, arguments) for name, arguments in steps(task, oracle(task, self.firm)))

    def grader(self) -> DeskGrader:
        """The grader of this firm."""
        return DeskGrader(self.firm, level=self.feedback_level, scope=self.hint_scope)


def _budget(meta: dict[str, Any]) -> Budget:
    """Room for an agent that knows its way, slips now and then, leafs through the mails and tries again what failed."""
    n = meta["n"]
    pages, bookkeeping = meta["distractors"] // world.MAIL_PAGE, 8 * (meta["family"] == "close")
    turns = (8 + 8 * n + pages + bookkeeping) * (1 + 2 * meta["fault_rate"])
    return Budget(turns=math.ceil(turns), tool_calls=60 * n + 20 + 2 * pages)
