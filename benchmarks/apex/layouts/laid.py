"""A benchmark that was read from disk, as the runner takes it."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from agentsdpo.benchmarks.apex.checks import find_check
from agentsdpo.benchmarks.apex.judge import RubricGrader
from agentsdpo.benchmarks.apex.taskset import check_tasks, tasks_sha256
from agentsdpo.collect.hosted import HostedConfig, HostedModel
from agentsdpo.envs.archipelago import ArchipelagoEnv
from agentsdpo.envs.archives import Files, open_archive, zip_bytes
from agentsdpo.envs.config import ContainerConfig, McpServer
from agentsdpo.envs.mcp import McpEnv
from agentsdpo.envs.office import OfficeEnv
from agentsdpo.errors import ConfigError, FormatError
from agentsdpo.types import Env, Task

NEVER = "mercor/apex-agents"
"""Data sets whose id begins so are under a licence that forbids training, whatever a copy of them says."""
_THEIRS = re.compile(r"(?:task|world|ver)_[0-9a-f]{32}")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Layout:
    """What a reader found: tasks, and the files that each begins with.

    Attributes:
        name, version: of the benchmark. source: where it lies.
        tasks: in order. worlds: files of a world by its name. world_of: name of the world of a task id; ``""`` is the
            empty one. overlays: files laid over the world, by task id.
        archives: zip file that is exactly a world, by its name; saves packing it again.
        server: whose tools the tasks are done with, in place of the office's.
    """

    name: str
    version: str
    source: Path
    tasks: tuple[Task, ...]
    worlds: dict[str, Files] = field(default_factory=dict)
    world_of: dict[str, str] = field(default_factory=dict)
    overlays: dict[str, Files] = field(default_factory=dict)
    archives: dict[str, Path] = field(default_factory=dict)
    server: McpServer | None = None

    def files(self, task_id: str) -> Files:
        """The files a task begins with: its world, then what is laid over it."""
        return {**self.worlds.get(self.world_of.get(task_id, ""), {}), **self.overlays.get(task_id, {})}


class LaidTasks:
    """A :class:`~agentsdpo.benchmarks.apex.taskset.TaskSet` over a layout.

    Raises:
        FormatError: see :func:`~agentsdpo.benchmarks.apex.taskset.check_tasks`. ConfigError: a check does not exist.
    """

    def __init__(self, layout: Layout, judge: HostedConfig | None, *,
                 containers: ContainerConfig | None = None) -> None:
        check_tasks(layout.tasks, str(layout.source))
        for criterion in (c for task in layout.tasks for c in task.rubric if c.check is not None):
            find_check(str(criterion.check))
        self.layout, self.name, self.version = layout, layout.name, layout.version
        self.tasks: Sequence[Task] = layout.tasks
        self.model = HostedModel(judge) if judge is not None else None
        self._containers = containers
        self._packed: tuple[str, bytes] | None = None

    @property
    def sha256(self) -> str:
        """Over tasks with rubrics and over names, sizes and checksums of the files they begin with."""
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        layout = self.layout
        files = {"worlds": layout.worlds, "overlays": layout.overlays}
        return tasks_sha256(layout.tasks, version=layout.version, world_of=layout.world_of, files={
            kind: {name: [[path, entry.size, entry.crc] for path, entry in sorted(found.items())]
                   for name, found in group.items()} for kind, group in files.items()})

    def env(self, task: Task) -> Env:
        """An office in memory, or one in a container; the tools of a server where the layout names one."""
        files = self.layout.files(task.task_id)
        if self.layout.server is not None:
            return McpEnv(self.layout.server)
        if self._containers is not None:
            return ArchipelagoEnv(files, self._containers, packed=lambda: self._initial(task.task_id, files))
        return OfficeEnv(files, packed=lambda: self._initial(task.task_id, files))

    def grader(self, task: Task) -> RubricGrader:
        """Checks and the judge; no feedback.

        Raises:
            ConfigError: a criterion has no check and there is no judge.
        """
        if self.model is None and any(criterion.check is None for criterion in task.rubric):
            raise ConfigError(f"{self.layout.source}: task {task.task_id!r} has criteria without a check and there is "
                              "no judge", fix="name one: --judge provider/model")
        return RubricGrader(self.model)

    async def close(self) -> None:
        """Close the judge's connections."""
        if self.model is not None:
            await self.model.aclose()

    def _initial(self, task_id: str, files: Files) -> bytes:
        """The files a task begins with as an archive; the last one made is kept, since attempts come together."""
        if self._packed is None or self._packed[0] != task_id:
            whole = self.layout.archives.get(self.layout.world_of.get(task_id, ""))
            plain = whole is not None and not self.layout.overlays.get(task_id)
            self._packed = task_id, whole.read_bytes() if plain and whole is not None else zip_bytes(files)
        return self._packed[1]


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        FormatError: it is missing or no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} cannot be read: {error}", fix="fetch the benchmark again") from error


def plain_id(value: str, where: str) -> str:
    """An id that may name a file.

    Raises:
        FormatError: it holds anything but letters, digits, ``.``, ``_`` and ``-``.
    """
    if not _ID.fullmatch(value):
        raise FormatError(f"{where}: id {value[:80]!r} cannot name a file",
                          fix="use letters, digits, '.', '_' and '-', 128 at most")
    return value


def folder_files(path: Path) -> Files:
    """Files of a folder or archive; those outside ``filesystem/`` and ``.apps_data/`` are put into the file system."""
    files = open_archive(path)
    if any(name.startswith(("filesystem/", ".apps_data/")) for name in files):
        return files
    return {f"filesystem/{name}": entry for name, entry in files.items()}


def below(files: Files, root: str) -> Files:
    """Files with all paths below ``root``, which those of some archives are already."""
    inside = all(name.startswith(f"{root}/") for name in files)
    return files if inside else {f"{root}/{name}": entry for name, entry in files.items()}


def provenance(dataset: str, tasks: Sequence[Task]) -> str:
    """Why tasks must not be trained on whatever is said of them, empty when nothing speaks against it.

    >>> provenance("mercor/apex-agents-v1.1", [])
    "data set 'mercor/apex-agents-v1.1' is under a licence that forbids training"
    >>> provenance("mine", [Task(task_id="a", prompt="")])
    ''
    """
    if dataset.lower().startswith(NEVER):
        return f"data set {dataset!r} is under a licence that forbids training"
    for task in tasks:
        for name in (task.task_id, task.world_id or "", *(criterion.id for criterion in task.rubric)):
            if _THEIRS.fullmatch(name):
                return f"id {name!r} is one of {NEVER}, whose licence forbids training"
    return ""
