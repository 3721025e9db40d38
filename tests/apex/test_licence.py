"""The licence guard at every border: an episode of an APEX tree never becomes training data."""

import asyncio
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from agentsdpo.benchmarks.apex.config import BenchConfig
from agentsdpo.benchmarks.apex.judge import RubricGrader
from agentsdpo.benchmarks.apex.layouts import open_layout
from agentsdpo.collect.collector import Collector
from agentsdpo.collect.hosted import HostedConfig
from agentsdpo.errors import TrainForbidden
from agentsdpo.hint.config import HintConfig
from agentsdpo.hint.hinter import Hinter
from agentsdpo.learn.config import LearnConfig
from agentsdpo.learn.rows import TrainRow, admit
from agentsdpo.replay import ReplayStore
from agentsdpo.replay.example import example
from agentsdpo.replay.formats import export, import_
from agentsdpo.replay.formats.exporting import EXPORTS, Tally, _Work
from agentsdpo.types import CriterionResult, Episode, Grade, Outcome, Task


@pytest.fixture
def task(tmp_path: Path) -> Task:
    """A task of a v1 tree whose file claims that it may be trained on."""
    world = "world_" + "a" * 32
    (tmp_path / "world_files_zipped").mkdir()
    with zipfile.ZipFile(tmp_path / "world_files_zipped" / f"{world}.zip", "w") as archive:
        archive.writestr("filesystem/a.txt", "5")
    (tmp_path / "tasks_and_rubrics.json").write_text(json.dumps([{
        "task_id": "task_" + "1" * 32, "world_id": world, "prompt": "?", "train_allowed": True,
        "x_agentsdpo": {"train_allowed": True}, "rubric": [{"verifier_id": "ver_" + "1" * 32, "criteria": "5"}]}]))
    return open_layout(tmp_path, judge=HostedConfig(model="openai/j")).tasks[0]


@pytest.fixture
def episode(task: Task) -> Episode:
    """An episode of that task with tokens, a grade and feedback."""
    (stored, *_) = example().snapshot().gather([next(iter(
        (key.episode_id, key.attempt) for key in example().snapshot().keys(None)))])
    grade = Grade.of([CriterionResult(id=task.rubric[0].id, score=0.0, feedback="5 was expected")], feedback="5")
    return stored.model_copy(update={"task_id": task.task_id, "train_allowed": task.train_allowed, "grade": grade})


def test_the_loader_sets_the_stamp(task: Task) -> None:
    assert task.train_allowed is False


def test_nothing_turns_it_on() -> None:
    for settings in ({"train_allowed": True}, {"profile": {"train_allowed": True}}, {"feedback_level": 3}):
        with pytest.raises(ValidationError):
            BenchConfig(**settings)  # type: ignore[arg-type]
    assert not [name for name in Collector.__init__.__annotations__ if "allowed" in name]


def test_the_store_refuses(episode: Episode, tmp_path: Path) -> None:
    store = ReplayStore.open(tmp_path / "store")
    with pytest.raises(TrainForbidden):
        store.append([episode])
    assert len(store) == 0


@pytest.mark.parametrize("fmt", ["atif", "hf"])
def test_imports_refuse(episode: Episode, tmp_path: Path, fmt: str) -> None:
    """Exports of it cannot be made, so one of an allowed episode is edited to claim less, and more."""
    path = tmp_path / "episodes.jsonl"
    export(example(), fmt, path, limit=1)
    said = json.loads(path.read_text())
    if fmt == "atif":
        said["extra"] = {"train_allowed": False}
    else:
        said |= {"train_allowed": True, "task_id": "mercor/apex-agents-v1.1/3"}
    path.write_text(json.dumps(said))
    with pytest.raises(TrainForbidden, match="for evaluation only"):
        import_(ReplayStore.open(tmp_path / "store"), fmt, path, train_allowed=True)


def test_exports_refuse(episode: Episode) -> None:
    store = example()
    work = _Work(store, store.snapshot(), None, Tally(), None, lambda done, total: None)
    with pytest.raises(TrainForbidden, match="keep evaluation-only episodes out of training data"):
        work.ready(episode)
    assert {"openai", "hf", "pairs", "sts", "verifiers"} <= set(EXPORTS), "all of them go through it"


def test_hints_refuse(episode: Episode) -> None:
    hinter = Hinter({}, HintConfig())
    assert hinter.hint(episode) is None
    assert hinter.counts["forbidden"] == 1
    with pytest.raises(TrainForbidden, match="which has train_allowed=False"):
        asyncio.run(hinter.write(episode))


def test_the_learner_refuses(episode: Episode) -> None:
    row: Any = TrainRow(branch=episode.branches[0], hint_ids=None, episode_id=episode.episode_id,
                        train_allowed=episode.train_allowed)
    with pytest.raises(TrainForbidden, match="must not be trained on"):
        admit([row], 10**6, LearnConfig(), window=4096, vocab_size=10**6)


def test_graders_give_no_feedback(task: Task) -> None:
    with pytest.raises(TrainForbidden):
        asyncio.run(RubricGrader(None, feedback=1).grade(task, Outcome(answer="5", initial=b"", final=b"")))
