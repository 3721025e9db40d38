"""One hard task at test time: attempts in small rounds, and between two rounds the policy learns from its own failures.

    agentsdpo solve TASK [--method sdpo|best_of_k|multi_turn]

``sdpo`` (2601.20802, section on test time) distils what the model does when it reads the feedback on its failed
attempts into the model that does not read it, a few optimiser steps a round, until the first verified success or the
end of the budget. Its weights are thrown away unless asked for. Two arms on the same budget of attempts to compare
with: ``best_of_k`` tries again and learns nothing; ``multi_turn`` reads the feedback on all its earlier attempts at the
beginning of the next one, with unchanged weights, one attempt after the other.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from agentsdpo.assemble import check_request, inprocess_engine, make_learner
from agentsdpo.collect.collector import Collector, Stamp
from agentsdpo.collect.policy import EnginePolicy, Policy
from agentsdpo.config import RunConfig
from agentsdpo.errors import ConfigError, EngineError, NothingToLearn, TrainForbidden
from agentsdpo.hint.hinter import make_hinter
from agentsdpo.hint.peers import deeds
from agentsdpo.hint.render import HintedChat
from agentsdpo.learn.rows import TrainRow
from agentsdpo.learning import train_rows
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.replay.ids import Key
from agentsdpo.replay.rows import Row
from agentsdpo.types import Episode, Hint, Json, Task

Method = Literal["sdpo", "best_of_k", "multi_turn"]
PATIENCE = 4
"""Attempts in a row without a score after which the machinery counts as broken, where a round has fewer."""


@dataclass(frozen=True)
class Attempt:
    """One attempt: its number and its round from 1, the mean criterion score (None: unscored), whether it passed."""

    number: int
    round: int
    score: float | None
    passed: bool


@dataclass(frozen=True)
class Solution:
    """What came of a task.

    Attributes:
        task: id of the task. method: by which it was tried. budget: attempts that were allowed.
        attempts: all that were played, in order; those of one round are played at once, so that some may come after
            the first success.
        deeds: calls of the first success, one a line, and its final words; None without one.
        wall_s: seconds in all. steps: optimiser steps taken.
    """

    task: str
    method: Method
    budget: int
    attempts: tuple[Attempt, ...]
    deeds: str | None
    wall_s: float
    steps: int

    @property
    def solved_at(self) -> int | None:
        """Number of the first attempt that passed."""
        return next((one.number for one in self.attempts if one.passed), None)

    @property
    def best(self) -> float | None:
        """Highest score of any attempt."""
        return max((one.score for one in self.attempts if one.score is not None), default=None)

    def json(self) -> Json:
        """All of it as JSON."""
        return {**asdict(self), "solved_at": self.solved_at, "best": self.best}


Told = Callable[[Sequence[Attempt]], None]
"""Told of the attempts of each round when it is over."""


def solve(config: RunConfig, where: tuple[str, int], *, method: Method = "sdpo", attempts: int = 64, updates: int = 4,
          keep: Path | str | None = None, told: Told = lambda attempts: None) -> Solution:
    """Try one task until the first success or the end of the budget.

    Args:
        config: model, suite, objective, who writes hints; ``group`` is the number of attempts in a round.
        where: split and index of the task.
        method: see above.
        attempts: the budget.
        updates: optimiser steps after each round that holds no success; ``sdpo`` alone.
        keep: registry folder for the policy that came out; None throws it away.
        told: see :data:`Told`.

    Raises:
        TrainForbidden: the task must not be trained on, and the method would learn from its grader.
        ConfigError: a policy is to be kept of a method that makes none. EngineError: no attempt of a round, and none
            of the last :data:`PATIENCE`, could be scored.
        RegistryError: nothing can be kept in this folder; said before anything is played.
        ModelError, ConfigError: see :func:`~agentsdpo.assemble.check_request`.
    """
    if keep is not None and method != "sdpo":
        raise ConfigError(f"method {method!r} changes no weights, so there is no policy to keep",
                          fix="leave --keep out, or use --method sdpo")
    solver = Solver(config, where, method)
    registry = solver.registry(keep) if keep is not None else None
    began, done = time.monotonic(), list[Attempt]()
    won, rounds = None, 0
    while len(done) < attempts and not any(one.passed for one in done):
        rounds += 1
        size = min(1 if method == "multi_turn" else config.group, attempts - len(done))
        episodes = solver.play(len(done), size, attempts)
        fresh = [_attempt(episode, len(done) + i + 1, rounds) for i, episode in enumerate(episodes)]
        done += fresh
        _check_scored(episodes, done[-max(PATIENCE, size):])
        won = next((episode for episode in episodes if episode.grade and episode.grade.passed), None)
        told(fresh)
        if not any(one.passed for one in fresh) and len(done) < attempts:
            solver.learn(episodes, updates)
    if registry is not None:
        solver.publish(registry)
    return Solution(task=solver.task.task_id, method=method, budget=attempts, attempts=tuple(done),
                    deeds="\n".join(deeds(won)) if won else None, wall_s=round(time.monotonic() - began, 3),
                    steps=solver.steps)


def _check_scored(episodes: Sequence[Episode], last: Sequence[Attempt]) -> None:
    """Raise EngineError where nothing could be scored for so long."""
    if all(one.score is None for one in last):
        raise EngineError(f"none of {len(last)} attempts at {episodes[0].task_id} could be scored: "
                          f"{episodes[0].metadata.get('error', 'no reason was recorded')}",
                          fix="mend the engine or the environment")


def _attempt(episode: Episode, number: int, rounds: int) -> Attempt:
    return Attempt(number, rounds, episode.reward, bool(episode.grade and episode.grade.passed))


class Solver:
    """One task, one model, and what it has learnt about it.

    Args:
        config, where, method: see :func:`solve`.

    Attributes:
        steps: optimiser steps taken. version: policy version that plays, one more per round that was learnt from.
        said: lines of feedback so far, as ``multi_turn`` reads them.
    """

    def __init__(self, config: RunConfig, where: tuple[str, int], method: Method) -> None:
        self.config, self.method = config, method
        self.split, self.index = where
        path, self.chat, self.suite = check_request(config)
        self.task: Task = self.suite.task(self.split, self.index)
        if method != "best_of_k" and not self.task.train_allowed:
            raise TrainForbidden(f"task {self.task.task_id} must not be trained on, and {method} goes by the feedback "
                                 "of its grader", fix="use --method best_of_k, or a task whose licence allows it")
        self.engine = inprocess_engine(config.collect, path, self.chat)
        self.learner = make_learner(config) if method == "sdpo" else None
        self.hinter = make_hinter(config.hint, self.suite)
        stamp = Stamp.of(self.engine, self.chat, run_id="solve", model_id=config.model)
        self.collector = Collector(self.suite, self._policy, config.collect, stamp=stamp)
        self.said: dict[str, None] = {}
        self.rows: list[TrainRow] = []
        self.steps = self.version = 0

    def _policy(self, task: Task, seed: int) -> Policy:
        """What plays the next attempt: the model, and for ``multi_turn`` with the feedback so far in its context."""
        chat = self.chat
        if self.said:
            hint = Hint(text="\n".join(self.said), source="feedback", author=self.suite.name,
                        placement=self.config.hint.placement)
            chat = HintedChat(chat, hint)
        return EnginePolicy(self.engine, chat, self.config.collect, training=self.method == "sdpo")

    def play(self, first: int, count: int, budget: int) -> list[Episode]:
        """Some attempts at once; ``first`` were played before."""
        return self.collector.collect(self.split, [self.index] * count, seed=self.config.seed,
                                      attempts=range(first, first + count), group_size=budget)

    def learn(self, episodes: Sequence[Episode], updates: int) -> None:
        """Take in the feedback on a round of failures: into the weights, into the context, or not at all."""
        if self.method == "best_of_k":
            return
        hints = self.hinter.hints(list(episodes))
        if self.method == "multi_turn":
            self.said |= dict.fromkeys(line for hint in hints if hint for line in hint.text.splitlines())
            return
        marked = self.config.learn.tool_weight != 1.0
        self.rows += [row for e, hint in zip(episodes, hints, strict=True) if hint for branch in branches(e, hint)
                      for row in train_rows(self.chat, branch, tool=marked)]
        if self._update(updates):
            self.version += 1
            assert self.learner is not None
            self.engine.load_weights(self.learner.policy(), self.version)

    def _update(self, updates: int) -> int:
        """Optimiser steps that were taken: none where nobody had anything to say."""
        assert self.learner is not None
        taken = 0
        for _ in range(updates):
            try:
                self.learner.step(self.rows, self.version)
            except NothingToLearn:
                break
            taken += 1
        self.steps += taken
        return taken

    def registry(self, folder: Path | str) -> PolicyRegistry:
        """Where the policy is to be kept.

        Raises:
            RegistryError: nothing can be written there.
        """
        registry = PolicyRegistry(folder, base_model=self.config.model, tokenizer_sha256=self.chat.tokenizer_sha256,
                                  chat_template_sha256=self.chat.template_sha256)
        registry.try_writing()
        return registry

    def publish(self, registry: PolicyRegistry) -> None:
        """Keep the policy as it stands, as the next version."""
        assert self.learner is not None
        registry.publish(self.learner.policy(), learner_step=self.steps)


def branches(episode: Episode, hint: Hint) -> Iterator[Row]:
    """The branches of an episode as a store would give them, with a hint."""
    same = ("task_id", "env_id", "run_id", "group_id", "stop_reason", "grade", "reward", "train_allowed",
            "tokenizer_sha256", "chat_template_sha256")
    about = {name: getattr(episode, name) for name in same}
    for branch in episode.branches:
        yield Row(key=Key(episode.episode_id, branch.branch_id, episode.attempt), branch=branch, hint=hint,
                  policy_versions=branch.policy_versions, **about)


def parse_task(text: str) -> tuple[str, int]:
    """Split and index of ``SPLIT/INDEX``; an index alone is of ``train``.

    Raises:
        ConfigError: it is neither.

    >>> parse_task("test_names/3"), parse_task("3")
    (('test_names', 3), ('train', 3))
    """
    split, _, index = text.rpartition("/")
    if not index.isdecimal():
        raise ConfigError(f"the task is {text!r}", fix="give it as SPLIT/INDEX, as in train/3")
    return split or "train", int(index)
