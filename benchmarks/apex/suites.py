"""From the name in a configuration to a task set."""

from collections.abc import Sequence
from pathlib import Path

from agentsdpo.benchmarks.apex.config import BenchConfig
from agentsdpo.benchmarks.apex.desk import DeskTasks
from agentsdpo.benchmarks.apex.taskset import TaskSet
from agentsdpo.envs.desk import PRESETS
from agentsdpo.errors import ConfigError
from agentsdpo.types import Closes, Env, Grader, Task

DESK_TASKS = 20
"""Tasks of the desk world when a configuration does not say how many."""


class FirstTasks:
    """The first tasks of a set; the same benchmark, so the hash is that of the whole.

    Raises:
        ConfigError: there are not so many.
    """

    def __init__(self, whole: TaskSet, count: int) -> None:
        if count > len(whole.tasks):
            raise ConfigError(f"tasks is {count} but {whole.name} has {len(whole.tasks)}", fix="ask for fewer")
        self._whole, self.tasks = whole, tuple(whole.tasks[:count])
        self.name, self.version, self.sha256 = whole.name, whole.version, whole.sha256

    tasks: Sequence[Task]

    async def close(self) -> None:
        """As the whole set."""
        if isinstance(self._whole, Closes):
            await self._whole.close()

    def env(self, task: Task) -> Env:
        """As the whole set."""
        return self._whole.env(task)

    def grader(self, task: Task) -> Grader:
        """As the whole set."""
        return self._whole.grader(task)


def open_suite(config: BenchConfig) -> TaskSet:
    """The task set of a configuration.

    Raises:
        ConfigError: neither a preset of the desk world nor a path; or fewer tasks than asked for.
        FormatError: the path holds no benchmark that can be read.
    """
    if config.suite in PRESETS:
        desk = config.desk
        return DeskTasks(config.suite, split=desk.split, count=config.tasks or DESK_TASKS, families=desk.families,
                         n=desk.n, firm_seed=desk.firm_seed, fault_rate=desk.fault_rate)
    if not Path(config.suite).exists():
        raise ConfigError(f"there is no suite {config.suite!r}",
                          fix=f"choose {' or '.join(PRESETS)}, or give the path of a benchmark or a task file")
    from agentsdpo.benchmarks.apex.layouts import open_layout

    whole = open_layout(Path(config.suite), judge=config.judge, containers=config.containers)
    return FirstTasks(whole, config.tasks) if config.tasks else whole
