"""The built-in desk world as a benchmark: no container, no key, no network, graded by program."""

from collections.abc import Sequence
from typing import Any

from agentsdpo.benchmarks.apex.taskset import check_tasks, tasks_sha256
from agentsdpo.collect.collector import PolicyFactory
from agentsdpo.envs.desk import DeskSuite
from agentsdpo.envs.desk.agents import RandomAgent, Scattergun, greedy, guesser, oracle
from agentsdpo.types import Env, Grader, Task

VERSION = "1"
"""Raised whenever the same settings would give other tasks or other grades."""
FIRST = 8
"""Tasks that are hashed: the set has no end, and runs of 20 and of 200 of its tasks are of one set."""


class DeskTasks:
    """Tasks of one split of the desk world. Held-out splits are for evaluation alone.

    Args:
        preset: ``desk-mini`` or ``desk``.
        split: of :data:`agentsdpo.envs.desk.suite.SPLITS`.
        count: tasks 0 to ``count - 1`` of the split.
        families: kinds of work, drawn from evenly; None is the suite's own choice.
        n: horizon knob, drawn from evenly; None is the suite's own choice.
        firm_seed: fixes the house rules that the grader knows.
        fault_rate: share of reads that fail once, 0 to 0.5.

    Raises:
        ConfigError: no such preset or split. FormatError: ``count`` is 0.

    >>> desk = DeskTasks("desk-mini", count=3)
    >>> desk.name, [task.task_id for task in desk.tasks][-1], desk.tasks[0].train_allowed
    ('desk-mini', 'desk-mini-test_names-2', False)
    >>> desk.sha256 == DeskTasks("desk-mini", count=3).sha256 != DeskTasks("desk-mini", count=3, firm_seed=8).sha256
    True
    """

    version = VERSION

    def __init__(self, preset: str = "desk-mini", *, split: str = "test_names", count: int = 20,
                 families: tuple[str, ...] | None = None, n: tuple[int, ...] | None = None, firm_seed: int = 7,
                 fault_rate: float = 0.0) -> None:
        knobs: dict[str, Any] = {key: value for key, value in (("families", families), ("n", n)) if value}
        self.suite = DeskSuite(preset, firm_seed=firm_seed, fault_rate=fault_rate, feedback_level=0, **knobs)
        self.name, self.split = preset, split
        self.tasks: Sequence[Task] = tuple(self._task(split, index) for index in range(count))
        check_tasks(self.tasks, f"{preset} {split}")
        first = [self._task(split, index) for index in range(FIRST)]
        self.sha256 = tasks_sha256(first, version=VERSION, firm_seed=firm_seed)

    def _task(self, split: str, index: int) -> Task:
        task = self.suite.task(split, index)
        return task.model_copy(update={"train_allowed": task.train_allowed and split == "train"})

    def env(self, task: Task) -> Env:
        """A fresh desk."""
        return self.suite.env()

    def grader(self, task: Task) -> Grader:
        """The grader of this firm, without feedback."""
        return self.suite.grader()

    def agents(self) -> dict[str, PolicyFactory]:
        """The scripted agents of the world: who knows the rules, who guesses them, who shoots at everything."""
        firm = self.suite.firm
        return {"oracle": lambda task, seed: oracle(task, firm), "greedy": lambda task, seed: greedy(task),
                "random": lambda task, seed: RandomAgent(task, seed=seed),
                "guesser": lambda task, seed: guesser(task, seed=seed),
                "scattergun": lambda task, seed: Scattergun(task)}
