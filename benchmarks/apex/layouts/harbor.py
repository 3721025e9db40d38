"""Harbor task folders, and the tree of APEX-Agents v1.1 that is made of them.

::

    manifest.json                            v1.1 alone
    worlds/<world_id>/{filesystem,apps_data}.tar.gz
    tasks/<task>/task.toml  instruction.md
                 tests/verifiers.json or tests/rubric.json    the criteria
                 environment/files/**        laid over the world
                 solution/**                 never read

A single task folder, or a folder of them, is read too. The criteria are those of our graders' shapes: a list of
``{"verifier_id", "criteria"}`` or of archipelago's verifiers. A task whose tests are scripts alone needs Harbor itself
to score it, and is refused. Nothing of this format is trained on: it does not carry a licence.
"""

import math
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from agentsdpo.benchmarks.apex.layouts.apex import Verifier, rubric_of
from agentsdpo.benchmarks.apex.layouts.laid import Layout, below, folder_files, plain_id, read_json
from agentsdpo.benchmarks.apex.taskset import check_tasks
from agentsdpo.envs.archives import Files, open_archive
from agentsdpo.errors import FormatError
from agentsdpo.types import Budget, Criterion, Task

_RUBRICS = ("tests/verifiers.json", "tests/rubric.json")


def is_harbor(path: Path) -> bool:
    """Whether a folder is a Harbor task, holds some, or holds a ``tasks/`` that does."""
    return path.is_dir() and next(_folders(path), None) is not None


def _folders(path: Path) -> Iterator[Path]:
    """Task folders, in order of name."""
    if (path / "task.toml").is_file():
        yield path
        return
    inside = path / "tasks" if (path / "tasks").is_dir() else path
    yield from sorted(folder for folder in inside.iterdir() if (folder / "task.toml").is_file())


def read_harbor(path: Path) -> Layout:
    """The tasks of a folder.

    Raises:
        FormatError: a task lacks its instruction or a rubric that can be read, or names a world that is not there.
    """
    ours = (path / "manifest.json").is_file() and (path / "worlds").is_dir()
    tasks = tuple(_task(folder) for folder in _folders(path))
    check_tasks(tasks, str(path))
    names = sorted({task.world_id for task in tasks if task.world_id is not None})
    overlays = {task.task_id: folder_files(Path(task.metadata["folder"]) / "environment" / "files") for task in tasks
                if (Path(task.metadata["folder"]) / "environment" / "files").is_dir()}
    tasks = tuple(task.model_copy(update={"metadata": {k: v for k, v in task.metadata.items() if k != "folder"}})
                  for task in tasks)
    return Layout(name="apex-agents" if ours else "harbor", version="1.1" if ours else "1", source=path, tasks=tasks,
                  worlds={name: _world(path, name) for name in names}, overlays=overlays,
                  world_of={task.task_id: task.world_id or "" for task in tasks})


def _world(root: Path, name: str) -> Files:
    folder = root / "worlds" / name
    found: dict[str, Any] = {}
    for archive, inside in (("filesystem.tar.gz", "filesystem"), ("apps_data.tar.gz", ".apps_data")):
        if (folder / archive).is_file():
            found |= below(open_archive(folder / archive), inside)
    if not found:
        raise FormatError(f"world {name!r} has no files in {folder}", fix="copy filesystem.tar.gz there")
    return found


def _task(folder: Path) -> Task:
    """One task folder; ``metadata["folder"]`` says which."""
    try:
        said = tomllib.loads((folder / "task.toml").read_text("utf-8"))
        prompt = (folder / "instruction.md").read_text("utf-8").strip()
    except (OSError, ValueError) as error:
        raise FormatError(f"{folder} cannot be read: {error}", fix="give it task.toml and instruction.md") from error
    about, limit = _table(said, "metadata", folder), _table(said, "agent", folder).get("timeout_sec")
    if limit is not None and not (isinstance(limit, (int, float)) and 0 < limit < math.inf):
        raise FormatError(f"{folder / 'task.toml'}: agent.timeout_sec is {limit!r}", fix="give seconds, above 0")
    budget = Budget() if limit is None else Budget(wall_s=float(limit))
    world = about.get("world_id")
    return Task(task_id=plain_id(str(about.get("task_id", folder.name)), str(folder)), prompt=prompt, budget=budget,
                world_id=None if world is None else plain_id(str(world), str(folder)),
                domain=str(about.get("domain", "")), rubric=_rubric(folder), train_allowed=False,
                expected_output=str(about.get("expected_output") or "message_in_console"),
                metadata={"folder": str(folder), "task_name": folder.name})


def _table(said: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
    found = said.get(name, {})
    if not isinstance(found, dict):
        raise FormatError(f"{folder / 'task.toml'}: {name} is {found!r}, no table", fix=f"write [{name}]")
    return found


def _rubric(folder: Path) -> tuple[Criterion, ...]:
    """Criteria of a task, from the first of its files that holds some."""
    for name in _RUBRICS:
        if (folder / name).is_file():
            rows = read_json(folder / name)
            try:
                return rubric_of([Verifier.model_validate(_flat(row)) for row in rows])
            except (ValidationError, TypeError) as error:
                raise FormatError(f"{folder / name} holds no list of criteria: {error}",
                                  fix='write [{"verifier_id": "...", "criteria": "..."}]') from error
    raise FormatError(f"{folder} has no rubric that can be read",
                      fix=f"put its criteria into {' or '.join(_RUBRICS)}; tests that are scripts need Harbor itself")


def _flat(row: Any) -> Any:
    """A row of a rubric; archipelago's verifiers hold theirs one level deeper."""
    if isinstance(row, dict) and isinstance(row.get("verifier_values"), dict):
        values = row["verifier_values"]
        return {"verifier_id": row.get("verifier_id"), **values}
    return row
