"""Collection as a whole: stamps, grades, evaluation, repeats, interrupts, metrics, a real model."""

import asyncio
from typing import Any

import pytest
import torch

from agentsdpo.chat import ChatFormat
from agentsdpo.collect.collector import Collector
from agentsdpo.collect.config import CollectConfig
from agentsdpo.collect.inprocess import InProcessEngine
from agentsdpo.collect.metrics import collect_metrics
from agentsdpo.errors import ConfigError, ModelError, TruncatedSampling
from agentsdpo.replay.rules import check_episode, check_vocabulary
from agentsdpo.types import CriterionResult, Grade, StopReason, Task

CONFIG = CollectConfig(concurrency=4, max_tokens=12, window=1024, max_turns=3)


def scripted(world: Any, *, amount: int = 3, **env: Any) -> Collector:
    def policy(task: Task, seed: int) -> Any:
        return world.script(world.turn(("add", {"n": amount})), world.turn(("submit", {})))

    return Collector(world.suite(**env), policy, CONFIG)


def test_scripted_agents_are_graded_and_stamped(world: Any) -> None:
    good, bad = scripted(world).collect("train", [3, 4])
    assert (good.grade and good.grade.passed, bad.grade and bad.grade.passed) == (True, False)
    assert bad.grade is not None
    assert bad.grade.feedback == "the total must be 4"
    assert bad.hint is None  # writing hints is the next room's work
    assert bad.train_allowed
    assert bad.branches == ()
    assert (bad.env_id, bad.task_id) == ("counter", "train-4")
    assert good.tools == tuple(tool.openai() for tool in world.suite().env().tools)
    metrics = collect_metrics([good, bad])
    assert metrics["collect/pass"] == metrics["collect/score/mean"] == 0.5
    assert metrics["collect/act/valid_frac"] == 1.0
    assert metrics["collect/stop/completed"] == 1.0


def test_the_licence_is_stamped_and_evaluation_gives_no_feedback(world: Any) -> None:
    (closed,) = scripted(world).collect("test", [4])
    assert not closed.train_allowed
    judge = scripted(world)
    judge.evaluate = True
    (seen,) = judge.collect("train", [4])
    assert not seen.train_allowed
    assert seen.grade is not None
    assert seen.grade.feedback == seen.grade.results[0].feedback == ""
    assert seen.grade.mean == 0.0


def test_repeated_indices_are_attempts_of_one_group(world: Any) -> None:
    episodes = scripted(world).collect("train", [3, 5, 3])
    assert [e.attempt for e in episodes] == [0, 0, 1]
    assert [e.group_size for e in episodes] == [2, 1, 2]
    assert episodes[0].group_id == episodes[2].group_id != episodes[1].group_id
    assert episodes[0].metadata["seed"] != episodes[2].metadata["seed"]
    assert len({e.episode_id for e in episodes}) == 3


def test_a_broken_environment_is_unscored_never_zero(world: Any) -> None:
    (episode,) = scripted(world, broken=True).collect("train", [3])
    assert episode.stop_reason == StopReason.ENGINE_ERROR
    assert episode.grade is None
    assert episode.reward is None
    metrics = collect_metrics([episode])
    assert metrics["collect/unscored_frac"] == 1.0
    assert "collect/pass" not in metrics


class Bad:
    """Breaks for one task, in the place it is told."""

    def __init__(self, suite: Any, place: str, fault: Exception) -> None:
        self._suite, self.place, self.fault = suite, place, fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self._suite, name)

    def _break(self, task: Task, place: str) -> None:
        if place == self.place and task.metadata["target"] == 4:
            raise self.fault

    def env(self) -> Any:
        outer, env = self, self._suite.env()
        reset, outcome = env.reset, env.outcome

        async def broken_reset(task: Task, **kwargs: Any) -> Any:
            env.task = task
            outer._break(task, "reset")
            return await reset(task, **kwargs)

        def broken_outcome(answer: str | None) -> Any:
            outer._break(env.task, "outcome")
            return outcome(answer)

        env.reset, env.outcome = broken_reset, broken_outcome
        return env

    def grader(self) -> Any:
        outer, grade = self, self._suite.grader().grade

        class Grader:
            async def grade(self, task: Task, outcome: Any) -> Any:
                outer._break(task, "grade")
                return await grade(task, outcome)

        return Grader()


@pytest.mark.parametrize(("given", "said"), [
    ({"mean": 1.0}, "TypeError: Gives gave dict, not a Grade"), (None, "TypeError: Gives gave NoneType, not a Grade"),
    (Grade.of([CriterionResult(id="a", score=float("nan"))]), "ValueError: Gives gave the mean score nan")])
def test_what_is_no_grade_leaves_its_episode_unscored(world: Any, given: Any, said: str) -> None:
    class Gives:
        async def grade(self, task: Task, outcome: Any) -> Any:
            return given

    suite = world.suite()
    suite.grader = lambda: Gives()
    collector = Collector(suite, lambda task, seed: world.script(world.turn(("submit", {}))), CONFIG)
    (episode,) = collector.collect("train", [3])
    assert (episode.grade, episode.metadata["error"]) == (None, said)


@pytest.mark.parametrize("place", ["reset", "outcome", "grade", "policy"])
def test_a_bug_costs_its_own_episode_and_no_other(world: Any, place: str) -> None:
    suite = Bad(world.suite(), place, ZeroDivisionError("by nobody"))

    def policy(task: Task, seed: int) -> Any:
        suite._break(task, "policy")
        return world.script(world.turn(("add", {"n": 3})), world.turn(("submit", {})))

    collector = Collector(suite, policy, CONFIG)  # type: ignore[arg-type]
    episodes = collector.collect("train", [3, 4, 5])
    assert [e.grade is None for e in episodes] == [False, True, False]
    assert episodes[1].stop_reason == StopReason.ENGINE_ERROR
    assert episodes[1].metadata["error"] == "ZeroDivisionError: by nobody"
    assert len(collector.finished) == 3


@pytest.mark.parametrize("fault", [ConfigError("no such key"), ModelError("no template"), TruncatedSampling("top-p")])
@pytest.mark.parametrize("place", ["reset", "grade", "policy"])
def test_a_wrong_setup_surfaces_as_itself(world: Any, place: str, fault: Exception) -> None:
    suite = Bad(world.suite(), place, fault)

    def policy(task: Task, seed: int) -> Any:
        suite._break(task, "policy")
        return world.script(world.turn(("submit", {})))

    with pytest.raises(type(fault), match=str(fault)):
        Collector(suite, policy, CONFIG).collect("train", [3, 4, 5])  # type: ignore[arg-type]


def test_an_interrupt_keeps_what_was_finished(world: Any) -> None:
    def policy(task: Task, seed: int) -> Any:
        if task.metadata["target"] == 9:
            raise KeyboardInterrupt
        return world.script(world.turn(("submit", {})))

    collector = Collector(world.suite(), policy, CollectConfig(concurrency=1))
    with pytest.raises(KeyboardInterrupt):
        collector.collect("train", [1, 2, 9, 4])
    assert [e.task_id for e in collector.finished] == ["train-1", "train-2"]


def test_collect_works_inside_a_running_loop(world: Any) -> None:
    async def notebook() -> int:
        return len(scripted(world).collect("train", [3]))

    assert asyncio.run(notebook()) == 1


def test_a_model_plays_and_the_same_seed_gives_the_same_tokens(world: Any, tiny_model: Any,
                                                               tiny_tokenizer: Any) -> None:
    torch.set_num_threads(1)
    chat = ChatFormat(tiny_tokenizer)
    engine = InProcessEngine(tiny_model, chat.eos_id, max_slots=3, window=1024, version=7)
    collector = Collector.of_engine(world.suite(), engine, chat, CONFIG, run_id="r", model_id="tiny")
    first = collector.collect("train", range(6), seed=1)
    again = collector.collect("train", range(6), seed=1)
    other = collector.collect("train", range(6), seed=2)
    ids = [[e.branches[0].token_ids.tolist() for e in run] for run in (first, again, other)]
    assert ids[0] == ids[1] != ids[2]
    episode = first[0]
    assert episode.policy_versions == (7, 7)
    assert episode.tokenizer_sha256 == chat.tokenizer_sha256
    assert episode.vocab_size == engine.vocab_size
    assert episode.branches[0].n_trainable > 0
    for one in first:
        check_episode(one)
        check_vocabulary(one.branches[0], one.vocab_size)
    metrics = collect_metrics(first)
    assert metrics["collect/sampled_tokens"] == sum(b.n_sampled for e in first for b in e.branches)


def test_budgets_only_tighten() -> None:
    from agentsdpo.types import Budget

    budget = CollectConfig(max_turns=9, max_wall_s=5.0).budget(Budget(turns=4, wall_s=None))
    assert (budget.turns, budget.wall_s) == (4, 5.0)
