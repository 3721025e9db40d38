"""Do hints help? The model that would be the teacher plays the same tasks with them, without, and with wrong ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from agentsdpo.assemble import inprocess_engine
from agentsdpo.chat import ChatFormat
from agentsdpo.collect.collector import Collector
from agentsdpo.collect.config import CollectConfig
from agentsdpo.collect.engine import Engine
from agentsdpo.collect.policy import EnginePolicy, Policy
from agentsdpo.config import RunConfig
from agentsdpo.errors import HintError
from agentsdpo.hint.hinter import make_hinter
from agentsdpo.hint.render import HintedChat
from agentsdpo.learn.control import derange
from agentsdpo.learn.load import load_chat
from agentsdpo.stats import Interval, bootstrap
from agentsdpo.suites import TASKS_PER_SEED, make_suite, model_path
from agentsdpo.types import Hint, Suite, Task

TASKS = 32
"""Tasks that are played before a run that requires a lift begins."""
Places = Mapping[str, tuple[str, int]]
"""(split, index) by task id."""


class Lifts(NamedTuple):
    """Score with the hint, and with another task's, less the score without.

    None where no task could be played; ``wrong`` also where all hints are alike. ``tasks`` is how many ``right`` is of.
    """

    right: Interval | None = None
    wrong: Interval | None = None
    tasks: int = 0


@dataclass(frozen=True)
class Player:
    """Plays tasks with and without hints."""

    suite: Suite
    engine: Engine
    chat: ChatFormat
    config: CollectConfig

    @classmethod
    def of(cls, config: RunConfig) -> "Player":
        """Model and suite that a configuration names.

        Raises:
            ModelError, ConfigError: there is no such model or suite.
        """
        path = model_path(config)
        chat = load_chat(path)
        return cls(make_suite(config), inprocess_engine(config.collect, path, chat), chat, config.collect)

    def scores(self, tasks: Places, hints: Mapping[str, Hint], seed: int) -> dict[str, float]:
        """Mean score of each task that could be played and graded, by task id.

        A task whose hint fills ``collect.window`` by itself ends before its first turn: its score would tell of the
        window, not of the hint, and is left out.

        Args:
            tasks: to be played.
            hints: by task id; tasks without one are played bare.
            seed: of sampling, the same for all that is compared.
        """
        bare = EnginePolicy(self.engine, self.chat, self.config, training=False)

        def policy(task: Task, _: int) -> Policy:
            hint = hints.get(task.task_id)
            return bare if hint is None else EnginePolicy(self.engine, HintedChat(self.chat, hint), self.config,
                                                          training=False)

        collector, found = Collector(self.suite, policy, self.config, evaluate=True), {}
        for split in sorted({split for split, _ in tasks.values()}):
            for episode in collector.collect(split, [i for s, i in tasks.values() if s == split], seed=seed):
                played = episode.task_id not in hints or any(branch.calls for branch in episode.branches)
                if episode.reward is not None and played:
                    found[episode.task_id] = episode.reward
        return found

    def lift(self, tasks: Places, hints: Mapping[str, Hint], seed: int) -> Interval | None:
        """Score with the hint less the score without, over tasks that could be graded; None without any."""
        return difference(self.scores(tasks, hints, seed), self.scores(tasks, {}, seed))

    def lifts(self, tasks: Places, hints: Mapping[str, Hint], seed: int) -> Lifts:
        """What hints, and those of other tasks, are worth on tasks that could be graded."""
        bare, names = self.scores(tasks, {}, seed), list(tasks)
        order = derange([tuple(hints[task].text.encode()) for task in names], seed)
        wrong = {task: hints[names[other]] for task, other in zip(names, order, strict=True)} if order else None
        right = self.scores(tasks, hints, seed)
        return Lifts(difference(right, bare), difference(self.scores(tasks, wrong, seed), bare) if wrong else None,
                     len(right.keys() & bare.keys()))


def difference(one: Mapping[str, float], other: Mapping[str, float]) -> Interval | None:
    """Mean difference of scores in [0, 1] over the tasks that both have, with its bootstrap interval.

    Where n tasks all differ alike, as one always does, what is redrawn is always the same, and would pass for a
    certainty. Of all tasks a share of up to ``1 - 0.025^(1/n)`` may still differ by anything, and not have been seen.

    >>> [round(end, 4) for end in difference({"a": 1.0, "b": 0.5}, {"a": 0.5})]
    [0.5, -0.9625, 0.9875]
    """
    gaps = [one[task] - other[task] for task in sorted(one.keys() & other.keys())]
    if not gaps or max(gaps) - min(gaps) > 1e-9:
        return bootstrap(gaps) if gaps else None
    gap, unseen = gaps[0], 1.0 - 0.025 ** (1 / len(gaps))
    return Interval(gap, gap - unseen * (1.0 + gap), gap + unseen * (1.0 - gap))


def lift_before(config: RunConfig, *, tasks: int = TASKS) -> dict[str, Interval | None]:
    """Lift of each source's hints for the first model, on attempts that nobody learns from.

    The tasks are the last ones of the seed's range, which no run reaches. Each is played once for its hint, and then
    with and without it under another seed: the attempt that a hint speaks of would be compared with itself.

    Raises:
        HintError: no attempt got a hint of the whole episode.
    """
    player, end = Player.of(config), (config.seed + 1) * TASKS_PER_SEED
    collector = Collector.of_engine(player.suite, player.engine, player.chat, config.collect)
    played = collector.collect("train", range(end - tasks, end), seed=config.seed)
    hints = make_hinter(config.hint, player.suite).hints(played)
    told: dict[str, tuple[dict[str, tuple[str, int]], dict[str, Hint]]] = {}
    for episode, hint in zip(played, hints, strict=True):
        if hint is not None and hint.text:
            places, texts = told.setdefault(hint.source, ({}, {}))
            places[episode.task_id], texts[episode.task_id] = ("train", episode.metadata["index"]), hint
    if not told:
        raise HintError(f"none of {tasks} attempts got a hint, so that hint.min_lift cannot be checked",
                        fix="mend the sources of hints, or leave hint.min_lift out")
    return {source: player.lift(places, texts, config.seed + 1) for source, (places, texts) in told.items()}


def require_lift(config: RunConfig) -> None:
    """Refuse to train on hints that are not shown to help, where ``hint.min_lift`` asks for that.

    Raises:
        HintError: see :func:`refuse_useless`, :func:`lift_before`.
    """
    if config.hint.min_lift is not None:
        refuse_useless(lift_before(config, tasks=TASKS), config.hint.min_lift)


def refuse_useless(lifts: Mapping[str, Interval | None], least: float) -> None:
    """Raise unless the lower end of every source's lift reaches ``least``.

    Raises:
        HintError: it does not.

    >>> refuse_useless({"criteria": Interval(0.3, 0.2, 0.4)}, 0.1)
    >>> refuse_useless({"peer": Interval(0.05, -0.02, 0.1)}, 0.0)
    Traceback (most recent call last):
    agentsdpo.errors.HintError: hints of peer lift the score by +0.050 [-0.020, +0.100], hint.min_lift is 0.0; ...
    """
    short = {source: lift for source, lift in lifts.items() if lift is None or lift.low < least}
    if short:
        said = ", ".join(f"hints of {source} " + ("could not be played" if lift is None else (
            f"lift the score by {lift.estimate:+.3f} [{lift.low:+.3f}, {lift.high:+.3f}]"))
            for source, lift in sorted(short.items()))
        raise HintError(f"{said}, hint.min_lift is {least}", fix="mend the hints (`agentsdpo hint audit` says more "
                        "about them), play more capable models, or lower hint.min_lift")
