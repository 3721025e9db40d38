"""One hard task at test time: stops at the first success, learns from failures, keeps nothing unasked."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agentsdpo import cli
from agentsdpo.config import RunConfig, from_mapping
from agentsdpo.envs.desk import DeskSuite
from agentsdpo.envs.desk.agents import greedy, oracle
from agentsdpo.errors import ConfigError, EngineError, RegistryError, TrainForbidden
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.solve import Attempt, Method, Solution, Solver, parse_task, solve
from agentsdpo.types import Task
from agentsdpo.verbs.solving import strip, words

pytestmark = pytest.mark.usefixtures("one_thread")
WORLD = {"window": 512, "concurrency": 8, "max_tokens": 64}


class Forbidden(DeskSuite):
    """Tasks that must not be trained on."""

    def task(self, split: str, index: int) -> Task:
        """As the desk's, but for the licence."""
        return super().task(split, index).model_copy(update={"train_allowed": False})


class Broken(DeskSuite):
    """An environment that cannot be made."""

    def env(self) -> Any:
        """Always fails."""
        raise OSError("the sandbox is gone")


class Hiccup(DeskSuite):
    """The second environment cannot be made."""

    made = 0

    def env(self) -> Any:
        """Fails once."""
        self.made += 1
        if self.made == 2:
            raise OSError("the sandbox is gone")
        return super().env()


def small(*sets: str) -> RunConfig:
    return from_mapping({"preset": "test_time", "collect": WORLD}, sets)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Solution, Path, list[list[Attempt]]]:
    folder, rounds = tmp_path_factory.mktemp("kept") / "policies", list[list[Attempt]]()
    found = solve(small(), ("train", 3), attempts=48, keep=folder, told=lambda fresh: rounds.append(list(fresh)))
    return found, folder, rounds


def test_failures_are_learnt_from_until_the_first_success(learnt: tuple[Solution, Path, list[list[Attempt]]]) -> None:
    found, _, rounds = learnt
    assert found.solved_at is not None, "a task the model passes once in some 300 attempts"
    assert len(found.attempts) == 4 * len(rounds), "what was played beside the success is told as well"
    assert 4 * (len(rounds) - 1) < found.solved_at <= 4 * len(rounds)
    assert [one.number for one in found.attempts] == list(range(1, len(found.attempts) + 1))
    assert found.steps == 4 * (len(rounds) - 1)
    assert found.deeds
    assert found.deeds.splitlines()[-1].startswith("submit "), "what the first success did, call by call"
    assert found.best == 1.0


def test_the_policy_is_kept_where_it_was_asked_for(learnt: tuple[Solution, Path, list[list[Attempt]]]) -> None:
    found, folder, _ = learnt
    registry = PolicyRegistry(folder)
    assert registry.versions() == [0]
    assert registry.manifest(0).learner_step == found.steps


def test_best_of_k_is_the_same_first_round_and_learns_nothing(
        learnt: tuple[Solution, Path, list[list[Attempt]]]) -> None:
    found = solve(small(), ("train", 3), method="best_of_k", attempts=6)
    assert (found.steps, len(found.attempts), found.solved_at, found.deeds) == (0, 6, None, None)
    assert [one.round for one in found.attempts] == [1, 1, 1, 1, 2, 2]
    assert [one.score for one in found.attempts[:4]] == [one.score for one in learnt[0].attempts[:4]]


def test_multi_turn_reads_the_feedback_on_earlier_attempts() -> None:
    solver = Solver(small(), ("train", 3), "multi_turn")
    first = solver.play(0, 1, 4)
    solver.learn(first, 4)
    assert solver.said
    (second,) = solver.play(1, 1, 4)
    opening = solver.chat.decode(second.branches[0].token_ids[:second.branches[0].calls[0].start].tolist())
    assert all(line in opening for line in solver.said)
    assert all(line not in str(first[0].messages) for line in solver.said)
    assert solver.learner is None
    found = solve(small(), ("train", 3), method="multi_turn", attempts=3)
    assert [one.round for one in found.attempts] == list(range(1, len(found.attempts) + 1))


@pytest.mark.parametrize("method", ["sdpo", "multi_turn"])
def test_tasks_that_must_not_be_trained_on_are_refused(method: Method) -> None:
    with pytest.raises(TrainForbidden, match=f"must not be trained on, and {method} goes by the feedback"):
        solve(small("suite='tests.test_solve:Forbidden'"), ("train", 3), method=method)


def test_trying_again_is_allowed_on_any_task() -> None:
    found = solve(small("suite='tests.test_solve:Forbidden'"), ("train", 3), method="best_of_k", attempts=1)
    assert len(found.attempts) == 1


def test_a_broken_environment_is_no_failure() -> None:
    with pytest.raises(EngineError, match="none of 4 attempts .* could be scored: .*the sandbox is gone"):
        solve(small("suite='tests.test_solve:Broken'"), ("train", 3), attempts=8)


def test_one_attempt_without_a_score_does_not_end_the_others() -> None:
    config = small("suite='tests.test_solve:Hiccup'", "group=1")
    found = solve(config, ("train", 3), method="best_of_k", attempts=3)
    assert [one.score is None for one in found.attempts] == [False, True, False]
    with pytest.raises(EngineError, match="none of 1 attempts"):
        solve(small("suite='tests.test_solve:Broken'", "group=1"), ("train", 3), method="best_of_k", attempts=3)


def test_nothing_said_is_nothing_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    solver = Solver(small("hint.sources=['feedback']"), ("train", 3), "sdpo")
    monkeypatch.setattr(solver, "_policy", lambda task, seed: greedy(task))
    solver.collector.policy = solver._policy
    solver.learn(solver.play(0, 2, 4), 4)
    assert (solver.steps, solver.version) == (0, 0)
    solver.collector.policy = lambda task, seed: oracle(task, DeskSuite().firm)
    assert all(e.grade and e.grade.passed for e in solver.play(2, 2, 4))


def test_calls_of_tools_may_weigh_more() -> None:
    solver = Solver(small("learn.tool_weight=2"), ("train", 3), "sdpo")
    solver.learn(solver.play(0, 2, 4), 1)
    assert (solver.steps, solver.version) == (1, 1)


def test_names_of_tasks() -> None:
    assert parse_task("a/b/7") == ("a/b", 7)
    for wrong in ("train/", "train/x", "-1", ""):
        with pytest.raises(ConfigError, match="SPLIT/INDEX"):
            parse_task(wrong)


def run(*more: str) -> Any:
    sets = [f"collect.{key}={value}" for key, value in WORLD.items()]
    return CliRunner().invoke(cli.app, ["solve", *more, *(part for one in sets for part in ("--set", one))])


def test_the_verb_says_what_came_of_it_and_fails_where_nothing_did() -> None:
    found = run("train/3", "--attempts", "2", "--method", "best_of_k")
    assert found.exit_code == 1
    assert found.stdout.startswith("desk-mini-train-3: not solved in 2 attempts, best score 0.")
    assert "round   1  attempts   1 to   2" in found.stderr
    about = json.loads(run("train/3", "--attempts", "2", "--method", "best_of_k", "--json").stdout)
    assert (about["solved_at"], about["kept"], len(about["attempts"])) == (None, None, 2)


def test_a_policy_that_learnt_nothing_is_kept_and_that_is_said(tmp_path: Path) -> None:
    found = run("train/3", "--attempts", "1", "--keep", str(tmp_path / "kept"))
    assert f"the policy is kept in {tmp_path / 'kept'}, as it was: there was nothing to learn" in found.stderr
    assert PolicyRegistry(tmp_path / "kept").versions() == [0]


@pytest.mark.parametrize(("more", "message"), [
    (("train/3", "--method", "wish"), "method is 'wish'; use one of sdpo, best_of_k, multi_turn"),
    (("nowhere",), "the task is 'nowhere'; give it as SPLIT/INDEX"),
    (("valley/3",), "there is no split 'valley'"),
    (("train/3", "--method", "best_of_k", "--keep", "x"), "changes no weights, so there is no policy to keep")])
def test_what_cannot_be_done_is_said(more: tuple[str, ...], message: str) -> None:
    found = run(*more)
    assert isinstance(found.exception, ConfigError)
    assert message in str(found.exception)


def test_a_success_in_words() -> None:
    attempts = (Attempt(1, 1, 0.5, False), Attempt(2, 1, None, False), Attempt(3, 1, 1.0, True))
    found = Solution("t", "sdpo", 8, attempts, "a(b=1)\nand answered: done", 1.25, 4)
    assert strip(attempts) == "▅✗✓"
    assert words(found).splitlines() == ["t: solved by attempt 3 of at most 8, 4 optimiser steps, 1.2 s", "  ▅✗✓",
                                         "  a(b=1)", "  and answered: done"]


def test_where_nothing_can_be_kept_nothing_is_played(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    rounds: list[list[Attempt]] = []
    with pytest.raises(RegistryError, match=r"file cannot be written: .* give this user write permission"):
        solve(small(), ("train", 3), attempts=4, keep=tmp_path / "file",
              told=lambda fresh: rounds.append(list(fresh)))
    assert rounds == [], "what was learnt would have been lost"
