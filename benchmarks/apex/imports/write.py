"""Writes the run folder of imported attempts, with the files that a run of our own leaves."""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentsdpo.benchmarks.apex import episode, shapes
from agentsdpo.benchmarks.apex.agents import Agent, Says
from agentsdpo.benchmarks.apex.config import BenchConfig
from agentsdpo.benchmarks.apex.imports.found import Imported
from agentsdpo.benchmarks.apex.records import OUTCOMES, UNSCORED, Attempt, graded, opening_of, played
from agentsdpo.benchmarks.apex.runfolder import BenchFolder
from agentsdpo.benchmarks.apex.start import describe
from agentsdpo.benchmarks.apex.suites import open_suite
from agentsdpo.benchmarks.apex.taskset import TaskSet, tasks_sha256
from agentsdpo.collect.rollout import Rollout
from agentsdpo.envs.archives import zip_bytes
from agentsdpo.errors import EnvError, FormatError, RunError
from agentsdpo.files import make_folder
from agentsdpo.replay.formats.shapes import text_of
from agentsdpo.types import Env, Grade, Grader, Json, Outcome, StopReason, Task, printable

EMPTY = zip_bytes({})
"""The state of an attempt that came without one."""
NO_GRADE = "imported without a grade: name its benchmark with --suite when importing, then agentsdpo bench grade"
UNSAID = {"profile": {"name": "unknown"}, "budgets": {"given": {}, "sha256": "unknown"}, "seed": "unknown"}
"""Stamps of a run that its files do not give away: no run of our own agrees with them."""
_STOPS = {outcome: reason for reason, outcome in reversed(OUTCOMES.items())}


class ImportedTasks:
    """Tasks of imported attempts, as far as anybody said; nothing can be played or graded with them."""

    def __init__(self, whole: TaskSet | None, tasks: Sequence[Task]) -> None:
        self.name, self.version = (whole.name, whole.version) if whole else ("imported", "1")
        self.tasks = tasks if whole is None else whole.tasks
        self.sha256 = whole.sha256 if whole else tasks_sha256(tasks)

    tasks: Sequence[Task]

    def env(self, task: Task) -> Env:
        """There is none."""
        raise EnvError("imported tasks have no environment", fix="run the benchmark itself")

    def grader(self, task: Task) -> Grader:
        """Nobody that could be asked."""
        return _Nobody()


class _Nobody:
    async def grade(self, task: Task, outcome: Outcome) -> Grade:
        """No criterion is judged."""
        raise EnvError("imported tasks have no grader", fix="name their benchmark with --suite when importing")


class Writer:
    """Takes attempts one by one.

    Args:
        out: folder of the run. config: with the suite whose tasks these are, if it is at hand.

    Raises:
        RunError: the folder holds something. OutputError: it cannot be made.
    """

    def __init__(self, out: Path, config: BenchConfig | None) -> None:
        if out.is_dir() and any(out.iterdir()):
            raise RunError(f"{out} is not empty", fix="choose another --out")
        self.folder, self.config = BenchFolder(out), config
        self.suite = open_suite(config) if config else None
        make_folder(out)
        self._known = {task.task_id: task for task in self.suite.tasks} if self.suite else {}
        self._tasks: dict[str, Task] = {}
        self._numbers: dict[str, set[int]] = defaultdict(set)
        self.attempts, self.scored, self.messages = 0, 0, 0
        self._models: Counter[str] = Counter()
        self._judges: Counter[str | None] = Counter()

    def add(self, one: Imported) -> None:
        """Write one attempt.

        Raises:
            FormatError: the suite does not have its task, it is there twice, or the task's id is no text.
        """
        if printable(one.task_id) != one.task_id:
            raise FormatError(f"{one.where}: task id {one.task_id!r} holds a lone surrogate",
                              fix="rename the task: its files would not be found under what can be written of its id")
        task, number = self._task(one), self._number(one)
        outcome = None if one.outcome in UNSCORED else Outcome(
            answer=one.answer, initial=one.initial or EMPTY, final=one.final or one.initial or EMPTY,
            calls=one.calls())
        run = Rollout(
            stop_reason=_STOPS.get(one.outcome, StopReason.ENGINE_ERROR), branches=(), messages=tuple(one.messages),
            outcome=outcome, answer=one.answer, counts=one.counts(), wall_s=one.wall_s, error=one.fault
            if outcome is None else "", tools=(), working_s=one.working_s, cost_usd=one.cost_usd)
        attempt = played(task, number, 0, run, version=-1).model_copy(update={"outcome": one.outcome})
        grade = Grade.of(list(one.results)) if one.results and outcome else None
        if outcome is not None:
            attempt = graded(attempt, task, grade, "" if grade else NO_GRADE)
        self._files(one, task, attempt, run, grade)
        self.folder.append(attempt)
        self.attempts += 1
        self.scored += attempt.scored
        self.messages += len(one.messages)
        self._models[one.model] += 1
        self._judges[one.judge] += 1

    def _task(self, one: Imported) -> Task:
        """The suite's task, else what the attempt says of it."""
        if self.suite is not None:
            if one.task_id not in self._known:
                raise FormatError(f"{one.where}: {self.suite.name} has no task {one.task_id!r}",
                                  fix="give the suite that was played, or leave --suite out")
            return self._known[one.task_id].model_copy(update={"train_allowed": False})
        asked = next((text_of(m.get("content")) for m in one.messages if m["role"] == "user"), "")
        task = Task(task_id=one.task_id, world_id=one.world_id, prompt=asked, rubric=one.criteria, train_allowed=False)
        if not self._tasks.setdefault(one.task_id, task).rubric:
            self._tasks[one.task_id] = task
        return task

    def _number(self, one: Imported) -> int:
        """Its own, else the next that is free."""
        have = self._numbers[one.task_id]
        number = one.number if one.number is not None else next(i for i in range(len(have) + 1) if i not in have)
        if number in have:
            raise FormatError(f"{one.where}: attempt {number} at task {one.task_id!r} is there twice",
                              fix="import runs into folders of their own")
        have.add(number)
        return number

    def _files(self, one: Imported, task: Task, attempt: Attempt, run: Rollout, grade: Grade | None) -> None:
        """Ours, and over them what the attempt came with."""
        about = episode.About({"name": one.model or "imported", "engine": "imported"}, task.budget.model_dump(),
                              {"model": one.judge})
        files = episode.documents(self.folder, task, attempt, run, about)
        files["grades.json"] = shapes.grades(attempt, grade)
        for name, value in one.kept.items():
            if name != "verifiers" or self.suite is None:  # it is graded by the suite's
                files[f"{name}.json"] = _over(files.get(f"{name}.json"), value)
        said = files["trajectory.json"]
        said["messages"] = [shapes.message_out(message) for message in run.messages[len(opening_of(run.messages)):]]
        said["final_answer"], said[shapes.OURS]["tools"] = one.answer, list(one.tools)
        texts = {name: json.dumps(value, indent=1).encode() for name, value in files.items()}  # \ud800 stays what it is
        episode.write_files(self.folder.episode(task.task_id, attempt.attempt), texts | episode.states(task, run))

    def finish(self, fmt: str, path: Path) -> Json:
        """Write what holds for all of them; returns counts."""
        tasks = ImportedTasks(self.suite, [self._tasks[name] for name in sorted(self._tasks)])
        model, judge = (counts.most_common(1)[0][0] for counts in (self._models, self._judges))
        numbers = max(max(have) for have in self._numbers.values()) + 1
        given = self.config or BenchConfig(suite="")
        config = given.model_copy(update={"model": model or "imported", "attempts": numbers, "references": False})
        agent = Agent(model or "imported", "imported", lambda task, seed: Says(""))
        about = describe(config, tasks, agent, self.folder.path.resolve().name)
        self.folder.write_about({**about, **UNSAID, "train_allowed": False, "judge": {
            "model": judge or "unknown", "prompt_sha256": None}, "imported": {"from": fmt, "path": path.name}})
        return {"path": str(self.folder.path), "attempts": self.attempts, "tasks": len(self._numbers),
                "scored": self.scored, "messages": self.messages}


def _over(ours: Any, theirs: Any) -> Any:
    """What an attempt came with; what it does not say, and our own key, from the file that we wrote.

    >>> _over([{"id": "v1", "why": "", "x_agentsdpo": 1}], [{"id": "v1", "more": 2}])
    [{'id': 'v1', 'why': '', 'x_agentsdpo': 1, 'more': 2}]
    """
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours | {name: _over(ours.get(name), value) for name, value in theirs.items() if name != shapes.OURS}
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [_over(*pair) for pair in zip(ours, theirs, strict=True)]
    return theirs
