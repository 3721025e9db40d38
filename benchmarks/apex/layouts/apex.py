"""APEX-Agents v1 from a local copy. The data set is gated: nothing is fetched here, and none of it is trained on.

::

    tasks_and_rubrics.json  world_descriptions.json
    world_files_zipped/<world_id>.zip        filesystem/, .apps_data/
    task_files/<task_id>/{filesystem,.apps_data}/**     laid over the world
    gold_files/**                            never read

Keys of our own in a task or a criterion stand under ``x_agentsdpo``: ``budget``; ``check``, ``weight``, ``target``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agentsdpo.benchmarks.apex.layouts.laid import Layout, below, folder_files, plain_id, read_json
from agentsdpo.benchmarks.apex.taskset import check_tasks
from agentsdpo.envs.archives import Files, open_archive
from agentsdpo.errors import FormatError
from agentsdpo.types import Budget, Criterion, Task

NAME, VERSION = "apex-agents", "1"


class _Read(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class Ours(_Read):
    """What we add to a criterion."""

    check: str | None = None
    weight: float = Field(default=1.0, ge=0)
    target: Literal["answer", "files", "state", "all"] = "all"


class Verifier(_Read):
    """One line of a rubric."""

    verifier_id: str
    criteria: str
    x_agentsdpo: Ours = Ours()

    def criterion(self, index: int) -> Criterion:
        """As the graders take it; the first of a rubric is primary."""
        ours = self.x_agentsdpo
        return Criterion(id=self.verifier_id, text=self.criteria, primary=index == 0, weight=ours.weight,
                         target=ours.target, check=ours.check)


class _OurTask(_Read):
    """What we add to a task."""

    budget: Budget = Budget()


class _TaskRow(_Read):
    """One task. The gold response is not among the fields: nobody may see it."""

    task_id: str
    task_name: str = ""
    world_id: str
    domain: str = ""
    prompt: str
    task_input_files: str | None = None
    expected_output: str | None = None
    gold_response_type: str | None = None
    rubric: list[Verifier] = []
    x_agentsdpo: _OurTask = _OurTask()

    def task(self) -> Task:
        """As the runner takes it; ``train_allowed`` is False, whatever the file says."""
        console = self.expected_output is None or self.gold_response_type == "text"
        return Task(
            task_id=self.task_id, world_id=self.world_id, domain=self.domain, prompt=self.prompt, train_allowed=False,
            expected_output="message_in_console" if console else str(self.expected_output),
            rubric=rubric_of(self.rubric), budget=self.x_agentsdpo.budget,
            metadata={"task_name": self.task_name, "input_files": self.task_input_files is not None})


def rubric_of(verifiers: Sequence[Verifier]) -> tuple[Criterion, ...]:
    """Criteria of verifiers, in order."""
    return tuple(verifier.criterion(index) for index, verifier in enumerate(verifiers))


def read_apex(root: Path) -> Layout:
    """The benchmark in a folder.

    Raises:
        FormatError: the folder is incomplete, or a task has no rubric, an id that is not unique or cannot name a file.
        UnsafePath, UnsafeArchive: a world that leads out of itself or expands too much.
    """
    source = root / "tasks_and_rubrics.json"
    rows = read_json(source)
    if not isinstance(rows, list):
        raise FormatError(f"{source} holds no list of tasks", fix="fetch the benchmark again")
    tasks = tuple(_task(row, f"{source}: task {number}") for number, row in enumerate(rows, 1))
    check_tasks(tasks, str(source))
    archives = {world: root / "world_files_zipped" / f"{world}.zip" for world in (_world(task) for task in tasks)}
    missing = [path for path in archives.values() if not path.is_file()]
    if missing:
        raise FormatError(f"{len(missing)} of {len(archives)} worlds are missing, the first is {missing[0]}",
                          fix="copy them there, or leave their tasks out of tasks_and_rubrics.json")
    return Layout(name=NAME, version=VERSION, source=root, tasks=tasks, archives=archives,
                  worlds={world: open_archive(path) for world, path in archives.items()},
                  world_of={task.task_id: _world(task) for task in tasks},
                  overlays={task.task_id: _overlay(root, task) for task in tasks})


def _world(task: Task) -> str:
    return str(task.world_id)


def _task(row: object, where: str) -> Task:
    try:
        task = _TaskRow.model_validate(row).task()
    except ValidationError as error:
        first = error.errors()[0]
        raise FormatError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}",
                          fix="fetch the benchmark again") from error
    plain_id(task.task_id, where)
    plain_id(_world(task), where)
    return task


def _overlay(root: Path, task: Task) -> Files:
    """What is laid over the world for one task; a task that says it has input files must have some."""
    folder = root / "task_files" / task.task_id
    if folder.is_dir():
        return folder_files(folder)
    if task.metadata["input_files"]:
        raise FormatError(f"task {task.task_id!r} has input files but {folder} is not there", fix="copy them there")
    return below({}, "filesystem")
