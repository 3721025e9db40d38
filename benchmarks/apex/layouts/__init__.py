"""Benchmarks on disk: :func:`open_layout` reads whatever lies at a path as a task set.

| what lies there | module here that reads it |
|---|---|
| ``tasks_and_rubrics.json``, ``world_files_zipped/``, ``task_files/`` | ``apex`` |
| ``tasks/``, ``worlds/``, ``manifest.json``; or folders with ``task.toml`` | ``harbor`` |
| a ``.toml`` or ``.jsonl`` file of one's own | ``taskfile`` |
"""

from pathlib import Path

from agentsdpo.benchmarks.apex.layouts.apex import read_apex
from agentsdpo.benchmarks.apex.layouts.harbor import is_harbor, read_harbor
from agentsdpo.benchmarks.apex.layouts.laid import LaidTasks, Layout
from agentsdpo.benchmarks.apex.layouts.taskfile import read_task_file
from agentsdpo.collect.hosted import HostedConfig
from agentsdpo.envs.config import ContainerConfig
from agentsdpo.errors import FormatError

__all__ = ["LaidTasks", "Layout", "open_layout"]


def open_layout(path: Path, *, judge: HostedConfig | None = None,
                containers: ContainerConfig | None = None) -> LaidTasks:
    """The task set at a path.

    Args:
        path: a folder or a task file.
        judge: the model that judges criteria without a check; None where there are none.
        containers: how to come by archipelago containers that hold the worlds; None holds them in memory.

    Raises:
        FormatError: nothing there that can be read, or it cannot be scored: no rubric, ids that are not unique, files
            that are missing. UnsafePath, UnsafeArchive: files of a world that lead out of it or expand too much.
        ConfigError: a check that does not exist.
    """
    return LaidTasks(_read(path), judge, containers=containers)


def _read(path: Path) -> Layout:
    if (path / "tasks_and_rubrics.json").is_file():
        return read_apex(path)
    if is_harbor(path):
        return read_harbor(path)
    if path.is_file() and path.suffix in (".toml", ".jsonl"):
        return read_task_file(path)
    raise FormatError(f"{path} is no benchmark that can be read",
                      fix="give a folder with tasks_and_rubrics.json or Harbor task folders, or a .toml or .jsonl file")
