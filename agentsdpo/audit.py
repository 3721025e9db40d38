"""Are the hints of a store worth learning from? Controls per source, with intervals and a verdict.

The size of the gap says nothing about usefulness: an all-wrong hint has nearly the gap of the right one. What counts is
the lift, whether the hinted model acts better than the bare one on the same tasks, and per token the difference that
another row's hint makes. The lift is measured here with the model that would be the teacher, on fresh episodes.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from agentsdpo.chat import ChatFormat
from agentsdpo.config import RunConfig
from agentsdpo.errors import HintError, TokenizerMismatch
from agentsdpo.hint.audit import leaks
from agentsdpo.hint.sources import task_of
from agentsdpo.learn.config import LearnConfig
from agentsdpo.learn.control import derange, empty_hint_gap
from agentsdpo.learn.inspect import both_logps
from agentsdpo.learn.load import load_chat, load_model, pick_device
from agentsdpo.learn.model import longest_row, prepare_model
from agentsdpo.learn.rows import LossRow, admit
from agentsdpo.learning import train_rows
from agentsdpo.lift import TASKS, Lifts, Player, refuse_useless
from agentsdpo.replay.rows import Row
from agentsdpo.replay.snapshot import Snapshot
from agentsdpo.replay.store import ReplayStore
from agentsdpo.stats import Interval, bootstrap
from agentsdpo.suites import model_path
from agentsdpo.types import Hint, Json, Suite

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
            hint. Both None when nothing was played. tasks: how many the lift is of.
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
    tasks: int = 0

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


@dataclass
class Sample:
    """The branches of one source: counts of all, and a uniform sample of them in random order (a reservoir).

    Attributes:
        size: most rows kept. rows: those. branches, leaked: how many there are, and whose agent says its hint.
        texts: hashes of the different hints.
    """

    size: int
    random: random.Random
    rows: list[Row] = field(default_factory=list)
    branches: int = 0
    leaked: int = 0
    texts: set[bytes] = field(default_factory=set)

    def add(self, row: Row, hint: Hint, *, leaked: bool) -> None:
        """One more branch."""
        self.branches += 1
        self.leaked += leaked
        self.texts.add(sha256(hint.model_dump_json(include={"text", "turns"}).encode()).digest())
        at = self.random.randrange(self.branches)
        if len(self.rows) < self.size:
            self.rows.insert(min(at, len(self.rows)), row)
        elif at < self.size:
            self.rows[at] = row


def audit_store(config: RunConfig, uri: Path | str, *, rows: int = 64, tasks: int = 32, seed: int = 0,
                say: Callable[[str], None] = lambda _: None) -> list[Verdict]:
    """:func:`audit_hints` with the model and the suite that a configuration names; ``tasks`` 0 plays none.

    Raises:
        StoreError: no such store. ModelError, ConfigError: no such model or suite. HintError, TokenizerMismatch: below.
    """
    path, store = model_path(config), ReplayStore.open(uri, create=False)
    chat = load_chat(path)
    model = load_model(path, chat, device=pick_device())
    prepare_model(model)
    try:
        return audit_hints(store.snapshot(), model, chat, config.learn, player=Player.of(config) if tasks else None,
                           rows=rows, tasks=tasks, seed=seed, say=say)
    finally:
        store.close()


def require_store_lift(config: RunConfig, view: Snapshot, *, tasks: int = TASKS) -> None:
    """Refuse to learn from a store whose hints are not shown to help, where ``hint.min_lift`` asks for that.

    Raises:
        HintError: the lower end of a source's lift does not reach it. TokenizerMismatch: the store is of another model.
    """
    if config.hint.min_lift is None:
        return
    player = Player.of(config)
    found = samples(view, player.chat, size=4 * tasks, seed=config.seed)
    refuse_useless({source: player.lift(*_places(own.rows, view, player.suite, tasks), config.seed)
                    for source, own in found.items()}, config.hint.min_lift)


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
    found = samples(view, chat, size=max(rows, 4 * tasks), seed=seed)
    verdicts = []
    for source, own in sorted(found.items()):
        say(f"{source}: {own.branches} branches")
        verdicts.append(_verdict(source, own, view, model, chat, config, player, (rows, tasks, seed)))
    return verdicts


def samples(view: Snapshot, chat: ChatFormat, *, size: int, seed: int) -> dict[str, Sample]:
    """The hinted branches of a store by source, read one by one.

    Raises:
        HintError: there is none. TokenizerMismatch: they are of another model.
    """
    found: dict[str, Sample] = {}
    foreign: list[str] = []
    for row in view.branches():
        if row.hint is None:
            continue
        if row.tokenizer_sha256 != chat.tokenizer_sha256:
            foreign.append(row.tokenizer_sha256)
            continue
        own = found.setdefault(row.hint.source, Sample(size, random.Random(f"{seed}/{row.hint.source}")))
        own.add(row, row.hint, leaked=leaks(chat, row.hint, row.branch))
    if foreign:
        total = len(foreign) + sum(own.branches for own in found.values())
        raise TokenizerMismatch(f"{len(foreign)} of {total} hinted branches are of tokenizer {foreign[0][:12]}, the "
                                f"model's is {chat.tokenizer_sha256[:12]}",
                                fix="set model to the one that the store was collected with")
    if not found:
        raise HintError("no branch of the store has a hint", fix="write some with `agentsdpo hint write`")
    return found


def _verdict(source: str, own: Sample, view: Snapshot, model: Any, chat: ChatFormat, config: LearnConfig,
             player: Player | None, sizes: tuple[int, int, int]) -> Verdict:
    rows, tasks, seed = sizes
    empty, gap, wrong = _gaps(*_admitted(own.rows[:rows], chat, config, model), model, config, seed)
    played = lifts(own.rows, view, player, tasks, seed) if player else Lifts()
    return Verdict(source=source, branches=own.branches, distinct=len(own.texts) / own.branches,
                   leaked=own.leaked / own.branches, empty_gap=empty, gap=gap, wrong_gap=wrong, lift=played.right,
                   wrong_lift=played.wrong, tasks=played.tasks)


def _admitted(rows: Sequence[Row], chat: ChatFormat, config: LearnConfig, model: Any) -> tuple[list[LossRow], int]:
    """Rows as a learner of the newest version would score them, however stale, and the model's window in tokens.

    Raises:
        HintError: none can be scored, with the reasons.
    """
    version, window = max(row.policy_versions[1] for row in rows), longest_row(model)
    found = admit([one for row in rows for one in train_rows(chat, row)], version,
                  config.model_copy(update={"max_staleness": None, "mix": "pure"}), window=window,
                  vocab_size=model.config.get_text_config().vocab_size)
    if not found.rows:
        raise HintError(f"none of {len(rows)} hinted branches can be scored: {dict(found.refused)}",
                        fix="mend what refuses them; see docs/learning.md")
    return found.rows, window


def _gaps(rows: list[LossRow], window: int, model: Any, config: LearnConfig, seed: int
          ) -> tuple[float, Interval, Interval | None]:
    """Gap without any hint, with the right one, and the difference that a wrong one makes; nats per token.

    A row whose wrong hint does not fit the window is left out.
    """
    right = [both_logps(model, row) for row in rows]
    gaps = [float(np.abs(teacher - student).mean()) for student, teacher in right]
    order, wrong = derange([row.row.hint_ids or () for row in rows], seed), []
    for row, other, (_, teacher) in zip(rows, order, right, strict=True) if order else ():
        given = replace(row, row=replace(row.row, hint_ids=rows[other].row.hint_ids))
        if given.teacher_length <= window:
            wrong.append(float(np.abs(teacher - both_logps(model, given)[1]).mean()))
    return empty_hint_gap(model, rows[:8], config), bootstrap(gaps), bootstrap(wrong) if wrong else None


def lifts(rows: Sequence[Row], view: Snapshot, player: Player, count: int, seed: int) -> Lifts:
    """Lift of hints and of wrong ones over at most ``count`` tasks that the suite still knows."""
    places, hints = _places(rows, view, player.suite, count)
    return player.lifts(places, hints, seed) if places else Lifts()


def _places(rows: Sequence[Row], view: Snapshot, suite: Suite, count: int
            ) -> tuple[dict[str, tuple[str, int]], dict[str, Hint]]:
    """Split and index of tasks, and their hints; those of single turns cannot be played, tasks of other suites neither.

    One episode is read for each task, and no more than are needed.
    """
    hints = {row.task_id: (row.key, row.hint) for row in reversed(rows) if row.hint and row.hint.text}
    names = [(key.episode_id, key.attempt) for key, _ in hints.values()]
    places: dict[str, tuple[str, int]] = {}
    for episode in view.gather(names):
        if task_of(episode, suite) is not None:
            places[episode.task_id] = (episode.metadata["split"], episode.metadata["index"])
        if len(places) == count:
            break
    return places, {task: hints[task][1] for task in places}
