"""The files of one attempt: written when it has been played, read again to grade it anew."""

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from agentsdpo.benchmarks.apex import branchfile, shapes
from agentsdpo.benchmarks.apex.records import Attempt, opening_of
from agentsdpo.benchmarks.apex.runfolder import BenchFolder, RunNotFound
from agentsdpo.collect.episode_log import CHECKPOINTS, EVENTS, EpisodeLog
from agentsdpo.collect.rollout import Rollout
from agentsdpo.errors import FormatError
from agentsdpo.files import write_bytes
from agentsdpo.types import Grade, Json, Outcome, Task

STATE = ".apps_data/agentsdpo/state"
"""Where a state that is no archive itself stands inside the snapshot."""
MOST = 1 << 31
"""Bytes above which a packed state is not unpacked."""


@dataclass(frozen=True)
class About:
    """What the files of every attempt of a run repeat: the agent, its budget on this task, the judge."""

    agent: Json
    budget: Json
    judge: Json


def write_episode(folder: BenchFolder, task: Task, attempt: Attempt, run: Rollout, about: About) -> None:
    """Write everything an attempt left behind but its grade; durable when this returns."""
    files = {name: text(value) for name, value in documents(folder, task, attempt, run, about).items()}
    write_files(folder.episode(task.task_id, attempt.attempt), files | states(task, run))


def documents(folder: BenchFolder, task: Task, attempt: Attempt, run: Rollout, about: About) -> dict[str, Any]:
    """The JSON files of an attempt but its grade, by name; the state that it began from is kept."""
    initial = keep_initial(folder, run.outcome.initial) if run.outcome else ""
    return {
        "initial_messages.json": opening_of(run.messages),
        "agent_config.json": shapes.agent_config(task, attempt, about.agent, about.budget),
        "trajectory.json": shapes.trajectory(attempt, run, initial_sha256=initial),
        "verifiers.json": shapes.verifiers(task), "eval_configs.json": shapes.eval_configs(),
        "scoring_config.json": shapes.scoring_config(), "grading_settings.json": shapes.grading_settings(about.judge),
    }


def states(task: Task, run: Rollout) -> dict[str, bytes]:
    """The state that an attempt left behind and its tokens, by name of their files; without those it has not."""
    final = {"final_snapshot.zip": zipped(run.outcome.final)} if run.outcome else {}
    tokens = {"branches.npz": branchfile.pack(run.branches, train_allowed=task.train_allowed)} if run.branches else {}
    return final | tokens


def write_grade(folder: BenchFolder, attempt: Attempt, grade: Grade | None) -> None:
    """Write ``grades.json``, and a line in the log; that of an earlier grading is kept as ``grades-<grading>.json``."""
    place = folder.episode(attempt.task_id, attempt.attempt)
    before = place / "grades.json"
    if before.is_file() and _grading(before) != attempt.grading:
        before.rename(place / f"grades-{_grading(before)}.json")
    saved = shapes.grades(attempt, grade)
    write_files(place, {"grades.json": text(saved)})
    if (place / EVENTS).is_file():
        told = {key: saved[shapes.OURS][key] for key in ("grading", "outcome", "passed")}
        EpisodeLog(place).add("grade", {**told, "score": attempt.score, "criteria": attempt.criteria})


def grade_file(place: Path, grading: int) -> Path:
    """Where the grade of an attempt under one grading stands: the newest one, which may not count yet, moved it."""
    newest, kept = place / "grades.json", place / f"grades-{grading}.json"
    return kept if kept.is_file() and not (newest.is_file() and _grading(newest) == grading) else newest


def _grading(path: Path) -> int:
    return int(json.loads(path.read_bytes())[shapes.OURS]["grading"])


def set_log_aside(place: Path) -> None:
    """Move the log of an attempt out of the way, so that it is played from the start; it stays for whoever wonders."""
    if not (place / EVENTS).is_file():
        return
    aside = place / f"broken-{sum(1 for _ in place.glob('broken-*'))}"
    aside.mkdir(parents=True)
    for name in (EVENTS, CHECKPOINTS):
        if (place / name).exists():
            (place / name).rename(aside / name)


def keep_initial(folder: BenchFolder, state: bytes) -> str:
    """Keep the state that attempts of a task begin from, once; returns its hash."""
    name = sha256(state).hexdigest()
    if not (folder.path / "initial" / f"{name}.zip").is_file():
        write_files(folder.path / "initial", {f"{name}.zip": zipped(state)})
    return name


def read_outcome(folder: BenchFolder, attempt: Attempt) -> Outcome:
    """What the grader saw, from the files.

    Raises:
        RunNotFound: the attempt left no files. FormatError: they are damaged.
    """
    place = folder.episode(attempt.task_id, attempt.attempt)
    if not (place / "trajectory.json").is_file():
        raise RunNotFound(f"attempt {attempt.attempt} at {attempt.task_id!r} left no files in {place}",
                          fix="play it: agentsdpo bench resume")
    try:
        saved = json.loads((place / "trajectory.json").read_bytes())
        initial = unzipped((folder.path / "initial" / f"{saved[shapes.OURS]['initial_sha256']}.zip").read_bytes())
        final = unzipped((place / "final_snapshot.zip").read_bytes())
        return Outcome(answer=saved["final_answer"], initial=initial, final=final, calls=shapes.calls_of(saved))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise FormatError(f"the files of attempt {attempt.attempt} at {attempt.task_id!r} are damaged: {error!r}",
                          fix=f"delete {place} and its line in attempts.jsonl, then resume the run") from error


def zipped(state: bytes) -> bytes:
    """A state as an archive: as it is when it is one, else as its one member :data:`STATE`; the same bytes every time.

    >>> unzipped(zipped(b"{}")), zipped(b"{}") == zipped(b"{}")
    (b'{}', True)
    """
    if state.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return state
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr(zipfile.ZipInfo(STATE), state, zipfile.ZIP_DEFLATED, 1)
    return buffer.getvalue()


def unzipped(data: bytes) -> bytes:
    """The state that :func:`zipped` was given."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if archive.namelist() != [STATE]:
            return data
        size = archive.getinfo(STATE).file_size
        if size > MOST:
            raise FormatError(f"a packed state says that it has {size} bytes, more than {MOST}",
                              fix="look where this run folder comes from")
        return archive.read(STATE)


def text(value: object) -> bytes:
    """JSON as it stands in the files; lone surrogates become ``?``."""
    return (json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n").encode("utf-8", "replace")


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write some files into a folder: each is whole or not there, all are durable when this returns."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_bytes(folder / name, data)
