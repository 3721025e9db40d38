"""What a benchmark is to the runner: tasks, an environment and a grader for each, a name and a hash.

A layout (APEX v1, Harbor, a task file, the desk world) is a class that fulfils :class:`TaskSet`. More is optional and
found by asking: a grader that uses a judge says which one (:class:`Judges`), an environment that holds something
outside the process lets go of it (:class:`agentsdpo.types.Closes`), a set may bring agents (:class:`Scripted`).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from agentsdpo.collect.policy import Policy
from agentsdpo.errors import FormatError
from agentsdpo.types import Env, Grader, Json, Task


class TaskSet(Protocol):
    """Tasks of one benchmark version with what plays and grades them.

    Attributes:
        name: of the benchmark, as in ``apex-agents``.
        version: stamped on every run as ``name@version``; scores of two versions are not comparable.
        sha256: of everything that decides a score: tasks with rubrics, files of the worlds, rules of the grader.
            Two runs are compared only if theirs agree.
        tasks: in a fixed order, with unique ids and at least one criterion each; see :func:`check_tasks`.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def version(self) -> str: ...  # noqa: D102
    @property
    def sha256(self) -> str: ...  # noqa: D102
    @property
    def tasks(self) -> Sequence[Task]: ...  # noqa: D102

    def env(self, task: Task) -> Env:
        """A fresh environment for one attempt.

        Raises:
            EnvError: it cannot be made; the attempt is unscored.
        """
        ...

    def grader(self, task: Task) -> Grader:
        """The grader of this task; gives no feedback."""
        ...


@runtime_checkable
class Judges(Protocol):
    """A grader that asks a language model."""

    def judged_by(self) -> Json:
        """Who judges: at least ``model`` and ``prompt_sha256``; stamped on the run, and agreed on in comparisons."""
        ...


@runtime_checkable
class Scripted(Protocol):
    """A task set with agents of its own that need no model: the scale on which others are read."""

    def agents(self) -> Mapping[str, Callable[[Task, int], Policy]]:
        """Makers of a policy by name, from task and seed. ``oracle`` solves every task; others must not."""
        ...


def canonical(value: object) -> bytes:
    """A JSON value as bytes that depend on nothing but the value.

    >>> canonical({"b": 1, "a": "é"})
    b'{"a":"\\xc3\\xa9","b":1}'
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "surrogatepass")


def task_sha256(task: Task) -> str:
    """Hash of one task, rubric and budget included."""
    return hashlib.sha256(canonical(task.model_dump(mode="json"))).hexdigest()


def tasks_sha256(tasks: Sequence[Task], **more: object) -> str:
    """Hash of a whole set: its tasks in order, and what else decides a score (hashes of files, a grader's seed).

    >>> task = Task(task_id="t", prompt="p")
    >>> tasks_sha256([task], firm=7) == tasks_sha256([task], firm=7) != tasks_sha256([task], firm=8)
    True
    """
    return hashlib.sha256(canonical({"tasks": [task_sha256(task) for task in tasks], "more": more})).hexdigest()


def check_tasks(tasks: Sequence[Task], source: str) -> None:
    """Refuse a set that could not be scored honestly.

    Args:
        tasks: as read.
        source: where from, for the message.

    Raises:
        FormatError: there are no tasks, two share an id, one has no rubric, or two criteria of one share an id.

    >>> check_tasks([Task(task_id="a", prompt="p")], "mine.json")
    Traceback (most recent call last):
    agentsdpo.errors.FormatError: mine.json: task 'a' has no rubric; give it at least one criterion: nothing else scores
    """
    if not tasks:
        raise FormatError(f"{source} holds no tasks", fix="give a file or folder with at least one task")
    for task in tasks:
        try:
            json.dumps(task.model_dump(mode="json"), ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError as error:
            raise FormatError(f"{source}: task {task.task_id!r} holds {error.object[error.start]!r}, which is no text",
                              fix="take the lone surrogate out") from error
        except ValueError as error:
            raise FormatError(f"{source}: task {task.task_id!r} holds a number that is infinite or none",
                              fix="write finite weights and budgets; leave out what has no limit") from error
    twice = [name for name, count in Counter(task.task_id for task in tasks).items() if count > 1]
    if twice:
        raise FormatError(f"{source}: {len(twice)} task ids appear more than once, the first is {twice[0]!r}",
                          fix="make task ids unique: attempts are filed under them")
    for task in tasks:
        ids = [criterion.id for criterion in task.rubric]
        if not ids:
            raise FormatError(f"{source}: task {task.task_id!r} has no rubric",
                              fix="give it at least one criterion: nothing else scores")
        if len(set(ids)) < len(ids):
            raise FormatError(f"{source}: task {task.task_id!r} has {len(ids)} criteria with {len(set(ids))} ids",
                              fix="make the ids of its criteria unique")
