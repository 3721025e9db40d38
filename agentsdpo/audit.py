"""Are the hints of a store worth learning from? Controls per source, with intervals and a verdict.

The size of the gap says nothing about usefulness: an all-wrong hint has nearly the gap of the right one. What counts is
the lift, whether the hinted model acts better than the bare one on the same tasks, and per token the difference that
another row's hint makes. The lift is measured here with the model that would be the teacher, on fresh episodes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agentsdpo.chat import ChatFormat
from agentsdpo.collect.collector import Collector
from agentsdpo.collect.config import CollectConfig
from agentsdpo.collect.engine import Engine
from agentsdpo.collect.inprocess import InProcessEngine
from agentsdpo.collect.policy import EnginePolicy, Policy
from agentsdpo.config import RunConfig
from agentsdpo.errors import HintError, TokenizerMismatch
from agentsdpo.hint.audit import leaks
from agentsdpo.hint.render import HintedChat
from agentsdpo.learn.config import LearnConfig
from agentsdpo.learn.control import derange, empty_hint_gap
from agentsdpo.learn.inspect import both_logps
from agentsdpo.learn.load import load_chat, load_model
from agentsdpo.learn.model import prepare_model
from agentsdpo.learn.rows import LossRow, admit
from agentsdpo.learning import train_rows
from agentsdpo.replay.rows import Row
from agentsdpo.replay.snapshot import Snapshot
from agentsdpo.replay.store import ReplayStore
from agentsdpo.stats import Interval, bootstrap
from agentsdpo.suites import make_suite, model_path
from agentsdpo.types import Hint, Json, Suite, Task

SAME = 0.01
"""Nats per token: a wrong hint that makes less difference than this shows that hints say nothing."""
ALIGNED = 1e-3
"""Nats per token: a larger gap without any hint means misaligned positions or a forward that is not deterministic."""


@dataclass(frozen=True)
class Verdict:
    """What was found about the hints of one source.

    Attributes:
        source: of the hints.
        branches: with a hint of this source.
        distinct: share of different texts. leaked: share of branches whose agent says eight hint tokens in a row.
        empty_gap: nats per token without any hint; must be below :data:`ALIGNED`.
        gap: mean |gap| in nats per token. wrong_gap: difference that another row's hint makes; None when all are alike.
        lift: score of the hinted model less that of the bare one, per task. wrong_lift: the same with another task's
            hint. Both None when nothing was played.
        words: the verdict. warnings: what else is wrong.
    """

    source: str
    branches: int
    distinct: float
    leaked: float
    empty_gap: float
    gap: Interval
    wrong_gap: Interval | None
    lift: Interval | None
    wrong_lift: Interval | None

    @property
    def words(self) -> str:
        """By the lift alone: ``useful``, ``harmful``, ``no evidence of use``, ``not played``."""
        if self.lift is None:
            return "not played"
        return "useful" if self.lift.low > 0 else "harmful" if self.lift.high < 0 else "no evidence of use"

    @property
    def warnings(self) -> list[str]:
        """Everything that should be looked at, in words."""
        found = []
        if self.leaked:
            found.append(f"{self.leaked:.1%} of the agents say their hint, which they never read")
        if self.empty_gap > ALIGNED:
            found.append(f"without a hint teacher and student differ by {self.empty_gap:.2g} nats per token")
        if self.wrong_gap is not None and self.wrong_gap.high < SAME:
            found.append("another row's hint makes no difference")
        if self.wrong_lift is not None and self.wrong_lift.low > 0:
            found.append("another task's hint helps as well: any text does")
        if self.branches > 1 and self.distinct * self.branches < 1.5:
            found.append("all hints are one text")
        return found

    def json(self) -> Json:
        """All of it, intervals as [estimate, low, high]."""
        return {name: list(value) if isinstance(value, Interval) else value
                for name, value in vars(self).items()} | {"verdict": self.words, "warnings": self.warnings}


@dataclass(frozen=True)
class Player:
    """Plays tasks with and without hints."""

    suite: Suite
    engine: Engine
    chat: ChatFormat
    config: CollectConfig

    def scores(self, tasks: Mapping[str, tuple[str, int]], hints: Mapping[str, Hint], seed: int) -> dict[str, float]:
        """Mean score of each task that could be graded, by task id.

        Args:
            tasks: (split, index) by task id.
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
                if episode.reward is not None:
                    found[episode.task_id] = episode.reward
        return found


def audit_store(config: RunConfig, uri: Path | str, *, rows: int = 64, tasks: int = 32, seed: int = 0,
                say: Callable[[str], None] = lambda _: None) -> list[Verdict]:
    """:func:`audit_hints` with the model and the suite that a configuration names; ``tasks`` 0 plays none.

    Raises:
        StoreError: no such store. ModelError, ConfigError: no such model or suite. HintError, TokenizerMismatch: below.
    """
    path, store = model_path(config), ReplayStore.open(uri, create=False)
    chat = load_chat(path)
    model, player = load_model(path, chat), None
    prepare_model(model)
    if tasks:
        engine = InProcessEngine(load_model(path, chat), chat.eos_id, max_slots=config.collect.concurrency,
                                 window=config.collect.window)
        player = Player(make_suite(config), engine, chat, config.collect)
    try:
        return audit_hints(store.snapshot(), model, chat, config.learn, player=player, rows=rows, tasks=tasks,
                           seed=seed, say=say)
    finally:
        store.close()


def audit_hints(view: Snapshot, model: Any, chat: ChatFormat, config: LearnConfig, *, player: Player | None,
                rows: int = 64, tasks: int = 32, seed: int = 0, say: Callable[[str], None] = lambda _: None
                ) -> list[Verdict]:
    """Look at the hints of a store, source by source.

    Args:
        view: of the store.
        model: the teacher to be, on whichever device it is.
        chat: its format.
        config: of the learner.
        player: None leaves the lift out.
        rows: branches per source that are scored.
        tasks: tasks per source that are played, three times each.
        seed: of what is chosen and played.
        say: told of progress, one line at a time.

    Raises:
        HintError: the store has no hint, or none that can be scored. TokenizerMismatch: it is of another model.
    """
    by_source: dict[str, list[Row]] = {}
    for row in view.branches():
        if row.hint is not None:
            by_source.setdefault(row.hint.source, []).append(row)
    if not by_source:
        raise HintError("no branch of the store has a hint", fix="write some with `agentsdpo hint write`")
    _same_tokenizer([row for rows in by_source.values() for row in rows], chat)
    verdicts = []
    for source, found in sorted(by_source.items()):
        say(f"{source}: {len(found)} branches")
        verdicts.append(_verdict(source, found, view, model, chat, config, player, (rows, tasks, seed)))
    return verdicts


def _same_tokenizer(rows: Sequence[Row], chat: ChatFormat) -> None:
    foreign = [row for row in rows if row.tokenizer_sha256 != chat.tokenizer_sha256]
    if foreign:
        raise TokenizerMismatch(f"{len(foreign)} of {len(rows)} hinted branches are of tokenizer "
                                f"{foreign[0].tokenizer_sha256[:12]}, the model's is {chat.tokenizer_sha256[:12]}",
                                fix="give --model the model that the store was collected with")


def _verdict(source: str, found: list[Row], view: Snapshot, model: Any, chat: ChatFormat, config: LearnConfig,
             player: Player | None, sizes: tuple[int, int, int]) -> Verdict:
    rows, tasks, seed = sizes
    picked = [found[i] for i in np.random.default_rng(seed).permutation(len(found))]
    admitted = _admitted(picked[:rows], chat, config, model)
    empty, gap, wrong = _gaps(admitted, model, config, seed)
    lift, wrong_lift = _lifts(picked, view, player, tasks, seed) if player else (None, None)
    texts = [row.hint.model_dump_json(include={"text", "turns"}) for row in found if row.hint]
    return Verdict(source=source, branches=len(found), distinct=len(set(texts)) / len(texts),
                   leaked=float(np.mean([leaks(chat, row.hint, row.branch) for row in found if row.hint])),
                   empty_gap=empty, gap=gap, wrong_gap=wrong, lift=lift, wrong_lift=wrong_lift)


def _admitted(rows: Sequence[Row], chat: ChatFormat, config: LearnConfig, model: Any) -> list[LossRow]:
    """Rows as a learner of the newest version would score them, however stale.

    Raises:
        HintError: none can be scored, with the reasons.
    """
    shape = model.config.get_text_config()
    version = max(row.policy_versions[1] for row in rows)
    found = admit([one for row in rows for one in train_rows(chat, row)], version,
                  config.model_copy(update={"max_staleness": None, "mix": "pure"}),
                  window=getattr(shape, "max_position_embeddings", None) or 2**31, vocab_size=shape.vocab_size)
    if not found.rows:
        raise HintError(f"none of {len(rows)} hinted branches can be scored: {dict(found.refused)}",
                        fix="mend what refuses them; see docs/learning.md")
    return found.rows


def _gaps(rows: list[LossRow], model: Any, config: LearnConfig, seed: int) -> tuple[float, Interval, Interval | None]:
    """Gap without any hint, with the right one, and the difference that a wrong one makes; nats per token."""
    right = [both_logps(model, row) for row in rows]
    gaps = [float(np.abs(teacher - student).mean()) for student, teacher in right]
    order, wrong = derange([row.row.hint_ids or () for row in rows], seed), []
    for row, other, (_, teacher) in zip(rows, order, right, strict=True) if order else ():
        given = LossRow(**{**vars(row), "row": _with_hint(row, rows[other])})
        wrong.append(float(np.abs(teacher - both_logps(model, given)[1]).mean()))
    return empty_hint_gap(model, rows[:8], config), bootstrap(gaps), bootstrap(wrong) if wrong else None


def _with_hint(row: LossRow, other: LossRow) -> Any:
    return type(row.row)(**{**vars(row.row), "hint_ids": other.row.hint_ids})


def _lifts(rows: Sequence[Row], view: Snapshot, player: Player, count: int, seed: int
           ) -> tuple[Interval | None, Interval | None]:
    """Score with the hint, and with another task's, less the score without; over tasks the suite still knows."""
    places: dict[str, tuple[str, int]] = {}
    hints: dict[str, Hint] = {}
    for row in rows:
        place = _place(row, view, player.suite)
        if place and row.hint:
            places[row.task_id], hints[row.task_id] = place, row.hint
        if len(places) == count:
            break
    if not places:
        return None, None
    bare = player.scores(places, {}, seed)
    order = derange([tuple(hints[task].text.encode()) for task in places], seed)
    names = list(places)
    wrong = {task: hints[names[other]] for task, other in zip(names, order, strict=True)} if order else None
    return _difference(player.scores(places, hints, seed), bare), (
        _difference(player.scores(places, wrong, seed), bare) if wrong else None)


def _place(row: Row, view: Snapshot, suite: Suite) -> tuple[str, int] | None:
    """Split and index of a row's task; None when the suite has another task there, or the hint is of single turns."""
    about = view.episode(row.key.episode_id).metadata
    split, index = about.get("split"), about.get("index")
    if not (isinstance(split, str) and isinstance(index, int) and row.hint and row.hint.text):
        return None
    return (split, index) if suite.task(split, index).task_id == row.task_id else None


def _difference(one: Mapping[str, float], other: Mapping[str, float]) -> Interval | None:
    both = sorted(one.keys() & other.keys())
    return bootstrap([one[task] - other[task] for task in both]) if both else None
