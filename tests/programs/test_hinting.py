"""The hint writer as a program: nothing is hinted twice, nothing is forgotten, whenever it is killed."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentsdpo.errors import HintError, StoreError
from agentsdpo.hint.config import HintConfig
from agentsdpo.hint.hinter import Hinter
from agentsdpo.hint.peers import Peer
from agentsdpo.hint.sources import Criteria
from agentsdpo.programs.flow import looked_at
from agentsdpo.programs.hinting import HintWriter, write_hints
from agentsdpo.replay.example import episode
from agentsdpo.replay.overlay import Slot
from agentsdpo.replay.store import ReplayStore
from agentsdpo.types import CriterionResult, Episode, Grade, Hint


def bare(number: int, feedback: str = "name the file in lower case") -> Episode:
    """An episode without a hint, whose grade says something."""
    made = episode(number)
    assert made.grade is not None
    return made.model_copy(update={"hint": None, "grade": made.grade.model_copy(update={"feedback": feedback})})


@pytest.fixture
def store(tmp_path: Path) -> ReplayStore:
    return ReplayStore.open(tmp_path / "store")


def writer(store: ReplayStore) -> HintWriter:
    return HintWriter(store, Hinter({"criteria": Criteria("grader")}, HintConfig()))


def test_it_writes_what_is_missing_and_says_how_far_it_is(store: ReplayStore) -> None:
    store.append([episode(0), bare(1), bare(2, feedback="")])
    hints = writer(store)
    assert looked_at(store) is None
    assert hints.look() == 3
    assert (hints.written, hints.silent) == (1, 1)
    found = {e.episode_id: e.hint.text if e.hint else None for e in store.episodes()}
    assert found == {"e-0": "write the file", "e-1": "name the file in lower case", "e-2": None}
    assert looked_at(store) == 3, "also those with nothing to say: nobody shall wait for them"
    assert hints.look() == 0
    store.append([bare(3)])
    assert hints.look() == 1
    assert looked_at(store) == 4


def test_started_again_it_leaves_alone_what_has_a_hint(store: ReplayStore) -> None:
    store.append([bare(1), bare(2)])
    writer(store).look()
    again = writer(store)
    again.look()
    assert again.written == 0
    assert {late.revision for late in store.snapshot().late.latest.values()} == {1}


def test_started_again_it_knows_the_successes_it_knew_before(store: ReplayStore) -> None:
    def scored(number: int, score: float, feedback: str) -> Episode:
        grade = Grade.of([CriterionResult(id="unit", score=score)], feedback)
        return bare(number).model_copy(update={"grade": grade, "task_id": "one", "metadata": {"answer": "7"}})

    def hints() -> HintWriter:
        sources = {"criteria": Criteria("grader"), "peer": Peer(HintConfig())}
        return HintWriter(store, Hinter(sources, HintConfig(min_chars=1)))

    store.append([scored(1, 1.0, "well done")])
    hints().look()
    assert store.episode("e-1").hint is not None, "a success that is not looked at again"
    store.append([scored(2, 0.0, "")])
    again = hints()
    again.look()
    found = store.episode("e-2").hint
    assert found is not None
    assert found.source == "peer"


def test_what_replaces_a_salvaged_episode_is_looked_at_anew(store: ReplayStore) -> None:
    store.append([bare(1).model_copy(update={"grade": None})], salvaged=True)
    hints = writer(store)
    hints.look()
    assert hints.silent == 1
    store.append([bare(1)])
    hints.look()
    assert store.episode("e-1").hint is not None


def test_a_store_that_is_not_there_is_refused(tmp_path: Path) -> None:
    from agentsdpo.config import RunConfig

    with pytest.raises(StoreError, match="nothing"):
        write_hints(RunConfig(), tmp_path / "nothing")


@pytest.mark.slow
def test_killed_again_and_again_every_episode_gets_one_hint(store: ReplayStore, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('name = "t"\n')
    command = [sys.executable, "-m", "agentsdpo.cli", "hint", "write", str(tmp_path / "run.toml"), "--store",
               str(store.root), "--follow"]
    rng, number = random.Random(3), 0

    def hinted() -> int:
        return len(store.snapshot().late.latest)

    for _ in range(4):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        goal = hinted() + rng.randrange(5, 25)
        while hinted() < goal and time.monotonic() < deadline:
            if number - hinted() < 40:
                store.append([bare(number + i) for i in range(5)])
                number += 5
            time.sleep(rng.uniform(0.0, 0.3))
        process.kill()
        process.wait()
    store.append([bare(number + i) for i in range(5)])  # so that the last one has work, and is seen to be up
    number += 5
    last = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while hinted() < number and time.monotonic() < deadline:
        time.sleep(0.1)
    last.send_signal(signal.SIGTERM)
    assert "stopped; hints written so far are in the store" in last.communicate(timeout=60)[1]
    assert last.returncode == 1
    view = store.snapshot()
    assert {slot.key for slot in view.late.latest} == set(view.rows)
    assert all(Slot("hint", key) in view.late.latest for key in view.rows)
    assert all(e.hint is not None for e in view.episodes())


def test_each_attempt_at_an_episode_gets_its_own_hint(store: ReplayStore) -> None:
    first = bare(1, feedback="name the file in upper case")
    store.append([first, first.model_copy(update={"attempt": 1, "grade": bare(1, feedback="").grade}),
                  bare(2), bare(2, feedback="tell the cfo as well").model_copy(update={"attempt": 1})])
    hints = writer(store)
    hints.look()
    assert (hints.written, hints.silent) == (3, 1)
    assert {(e.episode_id, e.attempt): e.hint.text if e.hint else None for e in store.episodes()} == {
        ("e-1", 0): "name the file in upper case", ("e-1", 1): None,
        ("e-2", 0): "name the file in lower case", ("e-2", 1): "tell the cfo as well"}


def test_a_source_that_breaks_is_not_a_source_with_nothing_to_say(store: ReplayStore) -> None:
    class Broken(Criteria):
        async def write(self, episode: Episode) -> Hint | None:
            if episode.episode_id == "e-1":
                raise HintError("the server is down", fix="start it")
            return await super().write(episode)

    store.append([bare(1), bare(2), bare(3, feedback="")])
    hints = HintWriter(store, Hinter({"criteria": Broken("grader")}, HintConfig()))
    hints.look()
    assert (hints.written, hints.silent, hints.broken) == (1, 1, 1)
    assert hints.words() == "1 hints written, 1 episodes with nothing to say, 1 without a hint because a source failed"
