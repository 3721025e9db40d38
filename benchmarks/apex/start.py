"""Making the folder of a new run, and opening that of an old one."""

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from agentsdpo.benchmarks.apex.agents import Agent, make_agent
from agentsdpo.benchmarks.apex.config import BenchConfig
from agentsdpo.benchmarks.apex.runfolder import BenchFolder
from agentsdpo.benchmarks.apex.runner import Bench
from agentsdpo.benchmarks.apex.suites import open_suite
from agentsdpo.benchmarks.apex.taskset import Judges, TaskSet, canonical
from agentsdpo.errors import RunError
from agentsdpo.files import make_folder
from agentsdpo.provenance import cores, cpu_name, describe_environment
from agentsdpo.runfolder import hold
from agentsdpo.settings_io import build
from agentsdpo.types import Json

SAME = ("name", "engine", "served", "tokenizer_sha256", "chat_template_sha256")
"""What an agent is known by; the software that serves it may be another."""
CHANGEABLE = ("concurrency", "retries", "url")
"""Settings that may differ when a run is resumed; none of them changes a score."""


def start(config: BenchConfig, out: Path | str) -> Bench:
    """A new run, its folder made; nothing is played yet. Whatever can be asked for wrongly is found before that.

    Raises:
        RunError: the folder holds a run already, or another process runs in it.
        ConfigError, ModelError, FormatError: see suites and agents. OutputError: the folder cannot be made.
    """
    folder = BenchFolder(Path(out))
    _check_free(folder)
    taskset = open_suite(config)
    agent = make_agent(config, taskset)
    about = describe(config, taskset, agent, folder.path.resolve().name)
    make_folder(folder.path)
    hold(folder.path)
    _check_free(folder)  # again: while the model was loaded, another process may have begun, and ended
    folder.write_about(about)
    return Bench(config, taskset, agent, folder, about)


def _check_free(folder: BenchFolder) -> None:
    if (folder.path / "run.json").exists():
        raise RunError(f"{folder.path} holds a benchmark run", fix=f"choose another --out, or go on with it: agentsdpo "
                       f"bench resume {folder.path}")


def reopen(path: Path | str, changes: Mapping[str, Any] | None = None) -> Bench:
    """A run that was stopped, or finished with unscored attempts.

    Args:
        path: its folder.
        changes: settings of :data:`CHANGEABLE` to go on with; those that are None stay.

    Raises:
        RunNotFound: there is none. RunError: its tasks or its agent are no longer what they were, another process
            runs there, or it was imported.
    """
    folder = BenchFolder.find(path)
    about = folder.about()
    if "imported" in about:
        raise RunError(f"{folder.path} was imported from {about['imported']['from']}: nothing of it can be played",
                       fix=f"grade it: agentsdpo bench grade {folder.path}")
    new = {key: value for key, value in (changes or {}).items() if value is not None and key in CHANGEABLE}
    judge = folder.grading().get("config")
    config = build(BenchConfig, {**about["config"], **new, **({"judge": judge} if judge else {})})
    taskset = open_suite(config)
    check_dataset(about, taskset)
    hold(folder.path)
    grading = folder.grading()
    agent = make_agent(config, taskset)
    check_agent(about, agent)
    return Bench(config, taskset, agent, folder, {**about, "judge": grading["judge"]}, grading=grading["id"])


def check_agent(about: Json, agent: Agent) -> None:
    """Refuse to let somebody else finish a run: one run measures one agent.

    Raises:
        RunError: names what is not as it was.
    """
    began, now = about["agent"], {"name": agent.name, "engine": agent.engine, **agent.stamp}
    for key in SAME:
        before, after = began.get(key), now.get(key)
        if key in began and before != after:
            raise RunError(f"the run was begun by an agent with {key} {before!r}, now it would be played by one with "
                           f"{after!r}", fix="give it the old agent again, or start a new run")


def check_dataset(about: Json, taskset: TaskSet) -> None:
    """Refuse to go on with a run whose tasks have changed since.

    Raises:
        RunError: names both hashes.
    """
    if about["dataset"]["sha256"] != taskset.sha256:
        raise RunError(f"the run was made with {about['benchmark']} of sha256 {about['dataset']['sha256'][:12]}, what "
                       f"is there now has {taskset.sha256[:12]}", fix="put the old files back, or start a new run")


def describe(config: BenchConfig, taskset: TaskSet, agent: Agent, run_id: str) -> Json:
    """``run.json``: everything that decides a score or a comparison, and what it ran on."""
    rules = {**config.rules().model_dump(mode="json"), "announce": config.announce}
    given = config.budget.model_dump(exclude_none=True)
    return {
        "run_id": run_id, "benchmark": f"{taskset.name}@{taskset.version}",
        "dataset": {"name": taskset.name, "version": taskset.version, "sha256": taskset.sha256,
                    "tasks": len(taskset.tasks), "worlds": len({task.world_id for task in taskset.tasks})},
        "agent": {"name": agent.name, "engine": agent.engine, **agent.stamp},
        "profile": {"name": config.profile, **rules},
        "budgets": {"given": given, "sha256": hashlib.sha256(canonical([rules, given])).hexdigest()},
        "judge": judge_of(taskset), "seed": config.seed, "attempts": config.attempts, "feedback_level": 0,
        "train_allowed": all(task.train_allowed for task in taskset.tasks),
        "config": config.model_dump(mode="json"), "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {"cpu": cpu_name(), "cores": cores()}, "environment": describe_environment(),
    }


def judge_of(taskset: TaskSet) -> Json:
    """The judge of a set: that of the first task that has one; ``model`` None where programs grade.

    The graders of all tasks are made, so that one that cannot be is found before anything is played.
    """
    judges = [grader for grader in map(taskset.grader, taskset.tasks) if isinstance(grader, Judges)]
    return judges[0].judged_by() if judges else {"model": None, "prompt_sha256": None}
