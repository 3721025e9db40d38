"""Tasks of one's own: one TOML file, or one JSON object a line.

    name = "quarterly"                # TOML; in JSONL a first line {"suite": {"name": ..., ...}}, which may be left out
    version = "1"
    licence = "own"                   # with train_allowed: one of LICENCES
    train_allowed = true              # default false: for evaluation alone
    server = {command = "python", args = ["tools.py"]}      # optional: an MCP server's tools in place of the office's

    [[task]]
    id = "q3"
    prompt = "What was revenue in Q3? Write memo.md."
    files = "worlds/q3"               # folder, .zip or .tar.gz beside this file; what the agent finds
    domain = "finance"                # optional, as are world, seed, expected_output
    budget = {turns = 20}             # optional
    rubric = [
        "States that revenue was 512 million",                                   # judged
        {id = "memo", text = "memo.md names the source", target = "files"},      # judged by the files alone
        {id = "sum", text = "The sum is right", check = "mychecks:sum_is_right", weight = 2.0},
    ]
"""

import json
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agentsdpo.benchmarks.apex.layouts.laid import Layout, folder_files, plain_id, provenance
from agentsdpo.envs.archives import Files, safe_path
from agentsdpo.envs.config import McpServer
from agentsdpo.errors import FormatError, TrainForbidden
from agentsdpo.types import Budget, Criterion, Task

LICENCES = ("own", "CC0-1.0", "CC-BY-4.0", "Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause")
"""Licences under which tasks may be trained on; ``own``: you wrote them."""
_SEE = "see agentsdpo.benchmarks.apex.layouts.taskfile for the keys"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Item(_Strict):
    """One criterion."""

    id: str | None = None
    text: str
    weight: float = Field(default=1.0, ge=0)
    primary: bool = False
    negative: bool = False
    target: Literal["answer", "files", "state", "all"] = "all"
    check: str | None = None


class _Row(_Strict):
    """One task."""

    id: str
    prompt: str
    rubric: list[_Item | str] = []
    files: str | None = None
    world: str | None = None
    domain: str = ""
    expected_output: str = "message_in_console"
    seed: int = 0
    budget: Budget = Budget()


class _Head(_Strict):
    """What holds for all tasks of a file."""

    name: str | None = None
    version: str = "1"
    dataset: str = ""
    licence: str | None = None
    train_allowed: bool = False
    server: McpServer | None = None


def read_task_file(path: Path) -> Layout:
    """The tasks of a file.

    Raises:
        FormatError: not TOML or JSON lines, unknown or missing keys, a file outside its folder.
        TrainForbidden: training is asked for and the licence is not known to allow it, or known to forbid it.
    """
    head, rows = _toml(path) if path.suffix == ".toml" else _lines(path)
    tasks = tuple(_task(row, head.train_allowed) for row in rows)
    if head.train_allowed:
        _licensed(head, tasks, path)
    files = {row.id: _files(path, row.files) for row in rows if row.files is not None}
    if head.server is not None and files:
        raise FormatError(f"{path} has a server and files, of task {next(iter(files))!r}",
                          fix="let the server bring its files, or leave it out: the office has tools of its own")
    return Layout(name=head.name or path.stem, version=head.version, source=path, tasks=tasks, overlays=files,
                  server=head.server)


def _task(row: _Row, train_allowed: bool) -> Task:
    items = [_Item(text=item) if isinstance(item, str) else item for item in row.rubric]
    rubric = tuple(Criterion(**{**item.model_dump(), "id": item.id or f"c{number}"})
                   for number, item in enumerate(items, 1))
    return Task(task_id=row.id, world_id=row.world, domain=row.domain, prompt=row.prompt, rubric=rubric, seed=row.seed,
                expected_output=row.expected_output, budget=row.budget, train_allowed=train_allowed)


def _licensed(head: _Head, tasks: tuple[Task, ...], path: Path) -> None:
    """Raise TrainForbidden unless a licence is named that allows training and nothing says otherwise."""
    why = provenance(head.dataset or head.name or "", tasks)
    if not why and head.licence not in LICENCES:
        why = f"licence {head.licence!r} is not known to allow training"
    if why:
        raise TrainForbidden(f"{path} says train_allowed = true, but {why}",
                             fix=f"leave train_allowed out, or name one of {', '.join(LICENCES)} if it is true")


def _files(source: Path, name: str) -> Files:
    """Files of a task, from below the folder of the task file."""
    place = source.parent / safe_path(name)
    if not place.resolve().is_relative_to(source.parent.resolve()):
        raise FormatError(f"{source}: files {name!r} lead to {place.resolve()}",
                          fix="keep them beside the task file, without links")
    return folder_files(place)


def _toml(path: Path) -> tuple[_Head, list[_Row]]:
    try:
        said = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} is no TOML: {error}", fix=_SEE) from error
    rows = said.pop("task", [])
    if not isinstance(rows, list):
        raise FormatError(f"{path}: task is no list", fix="write [[task]], with two brackets")
    return _valid(_Head, said, str(path)), [_row(row, f"{path}: task {i}") for i, row in enumerate(rows, 1)]


def _lines(path: Path) -> tuple[_Head, list[_Row]]:
    head, rows = _Head(), []
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read: {error}", fix="write UTF-8") from error
    for number, line in enumerate(lines, 1):
        where = f"{path}: line {number}"
        if not line.strip():
            continue
        try:
            said = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{where} is no JSON: {error}", fix="write one object a line") from error
        if isinstance(said, dict) and set(said) == {"suite"} and not rows:
            head = _valid(_Head, said["suite"], where)
        else:
            rows.append(_row(said, where))
    return head, rows


def _row(said: Any, where: str) -> _Row:
    row = _valid(_Row, said, where)
    plain_id(row.id, where)
    return row


def _valid(kind: Any, said: Any, where: str) -> Any:
    try:
        return kind.model_validate(said)
    except ValidationError as error:
        first = error.errors()[0]
        raise FormatError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}",
                          fix=_SEE) from error
