"""The folder of a benchmark run: what was asked for, one line per attempt, the files of each attempt.

::

    RUN/  run.json         what was asked for and with what; written once
          gradings.json    which judge graded when; the last finished one counts
          attempts.jsonl   one line per scored attempt and grading, append-only
          failures.jsonl   attempts that could not be scored, same shape
          initial/<sha256>.zip                     states that attempts began from, each once
          episodes/<task>/<attempt>/...            files of an attempt, see docs/benchmark.md
          references.json  report.json  report.md  report.html

A line counts once its newline is there: a torn last line is ignored, and cut off before the next one is appended.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import ValidationError

from agentsdpo.benchmarks.apex.records import Attempt, in_order
from agentsdpo.errors import RunError
from agentsdpo.files import sync, write_text
from agentsdpo.types import Json

GRADING_FAULT = "judge_error"
"""The one outcome that another grading can mend."""


class RunNotFound(RunError):
    """There is no benchmark run, or no such attempt, at this place."""

    exit_code = 4


def folder_name(task_id: str) -> str:
    """A task id as the name of one folder: safe whatever the id holds, readable where it is harmless.

    >>> folder_name("task_01"), folder_name("../../etc"), folder_name(".")
    ('task_01', '%2E%2E%2F%2E%2E%2Fetc', '%2E')
    >>> len(folder_name("x" * 500))
    97
    """
    if re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,119}", task_id):
        return task_id
    name = quote(task_id.encode("utf-8", "surrogatepass"), safe="-_").replace(".", "%2E")
    return name if len(name) <= 120 else f"{name[:32]}-{sha256(name.encode()).hexdigest()}"


@dataclass(frozen=True)
class BenchFolder:
    """Paths and records of one benchmark run."""

    path: Path

    @classmethod
    def find(cls, path: Path | str) -> "BenchFolder":
        """The folder of a run that exists.

        Raises:
            RunNotFound: there is no ``run.json``.
        """
        folder = cls(Path(path))
        if not (folder.path / "run.json").is_file():
            raise RunNotFound(f"{folder.path} holds no benchmark run",
                              fix="give a folder that agentsdpo bench run made")
        return folder

    def episode(self, task_id: str, attempt: int) -> Path:
        """Folder of one attempt."""
        return self.path / "episodes" / folder_name(task_id) / str(attempt)

    def about(self) -> Json:
        """``run.json``."""
        return _json(self.path / "run.json")

    def write_about(self, about: Json) -> None:
        """Write ``run.json``, once."""
        write_text(self.path / "run.json", json.dumps(about, indent=1, ensure_ascii=False) + "\n")

    def gradings(self) -> list[Json]:
        """All gradings, oldest first: ``id``, ``judge``, ``finished``."""
        path = self.path / "gradings.json"
        return _json(path) if path.is_file() else [{"id": 0, "judge": self.about()["judge"], "finished": True}]

    def grading(self) -> Json:
        """The grading that counts: the last finished one."""
        return [grading for grading in self.gradings() if grading["finished"]][-1]

    def set_gradings(self, gradings: Iterable[Mapping[str, object]]) -> None:
        """Replace the list."""
        write_text(self.path / "gradings.json", json.dumps(list(gradings), indent=1) + "\n")

    def append(self, attempt: Attempt) -> None:
        """Put down what became of an attempt, durably: scored or not decides where."""
        path = self.path / ("attempts.jsonl" if attempt.scored else "failures.jsonl")
        of_faults = {"error_class", "message", "ended"} if attempt.scored else set()
        fields = attempt.model_dump(mode="json", exclude=of_faults)
        _append(path, json.dumps(fields, ensure_ascii=False))

    def records(self, grading: int | None = None) -> list[Attempt]:
        """The latest word on every attempt under one grading (None: the one that counts), in order of place.

        Raises:
            RunError: a line that is not the last one is damaged.
        """
        wanted = self.grading()["id"] if grading is None else grading
        found: dict[tuple[str, int], Attempt] = {}
        for failure in read_lines(self.path / "failures.jsonl"):
            if failure.grading == wanted or failure.outcome != GRADING_FAULT:
                found[failure.place] = failure
        for attempt in read_lines(self.path / "attempts.jsonl"):
            if attempt.grading == wanted:
                found[attempt.place] = attempt
        return sorted(found.values(), key=in_order)

    def failures(self) -> list[Attempt]:
        """Every time an attempt could not be scored, oldest first."""
        return read_lines(self.path / "failures.jsonl")

    def report(self, name: str) -> Path:
        """Path of a report."""
        return self.path / name


def read_lines(path: Path) -> list[Attempt]:
    """All whole lines of a file of attempts; none when it is not there.

    Raises:
        RunError: a line is not an attempt; names it.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is torn
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(Attempt.model_validate_json(line))
        except ValidationError as error:
            what = error.errors()[0]
            raise RunError(f"line {number} of {path} is no attempt: {what['msg']}",
                           fix="restore the file, or delete the line: its attempt is then played again") from error
    return found


def _append(path: Path, line: str) -> None:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        end = os.lseek(handle, 0, os.SEEK_END)
        keep = _whole(handle, end)
        if keep < end:
            os.ftruncate(handle, keep)
        data = (line + "\n").encode("utf-8", "replace")
        os.lseek(handle, keep, os.SEEK_SET)
        while data:
            data = data[os.write(handle, data):]
        os.fsync(handle)
    finally:
        os.close(handle)
    if end == 0:
        sync(path.parent)


def _whole(handle: int, end: int) -> int:
    """Length of the file up to its last newline."""
    while end > 0:
        begin = max(0, end - 65_536)
        at = os.pread(handle, end - begin, begin).rfind(b"\n")
        if at >= 0:
            return begin + at + 1
        end = begin
    return 0


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}", fix="restore it from where the run was made") from error
