"""How the arms of the continual study learn from the same corrections.

- :class:`Distilled`: SDPO with the preset ``conversations``. It sees the attempt, the log-probs it was sampled with,
  and the correction, which the frozen first model reads as a hint.
- :class:`Words`: fine-tuning on the conversation: the correction stands behind the attempt as the user's next turn, and
  its tokens are learnt. It sees the attempt and the correction.
- :class:`Retried`: fine-tuning on good second attempts. The first model does the request again with the correction in
  its prompt; what passes is learnt without the correction. It sees more than the others: another attempt in the
  environment and the verdict on it.

All take AdamW steps at one learning rate, with the gradient clipped at norm 1, on as many rows.

Earlier work (:func:`earlier_work`) may be replayed beside: attempts of the first model at requests that state the
rules, from before the stream. Fine-tuning learns them as they are. To SDPO the user's words are a hint that the student
has read as well: the frozen teacher reads them twice.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from agentsdpo.benchmarks.methods.continual_stream import COLLECT, Correction, House, Memory, Plan, as_hints
from agentsdpo.benchmarks.seed_gates import ForeignFirms
from agentsdpo.chat import ChatFormat
from agentsdpo.collect.collector import Collector, Stamp
from agentsdpo.collect.inprocess import InProcessEngine
from agentsdpo.collect.policy import EnginePolicy, Policy
from agentsdpo.errors import NothingToLearn
from agentsdpo.hint.render import HintedChat, whole
from agentsdpo.learn.learner import Learner
from agentsdpo.learn.model import prepare_model, scores
from agentsdpo.learn.pack import packed_row
from agentsdpo.learn.presets import TOY, resolve
from agentsdpo.learning import train_rows
from agentsdpo.replay.store import ReplayStore
from agentsdpo.suites import TASKS_PER_SEED
from agentsdpo.types import Episode, Hint, Json, Task, TokenKind

LR = 8e-4
"""For a model of a few million parameters; the same for SDPO and for fine-tuning."""
WITHOUT: dict[str, Json] = {"gate": {"gate": "off", "veto": None}, "pull": {"beta_kl": 0.0}}
"""What takes each of the preset's two brakes out. Both compare with the past: the gate drops the turns in which the
student has changed its mind since it sampled them, and the K3 pull to the first weights holds on to options that were
sampled once and are wrong, so that they keep a share."""
EARLIER = ("lookup", "correct", "reconcile")
"""Families of earlier work."""


class Student(Protocol):
    """A model that learns from corrections as they arrive."""

    model: Any
    version: int

    def learn(self, said: Sequence[Correction]) -> Json:
        """Take at most one optimiser step; its numbers."""
        ...


def draw(fresh: Sequence[str], known: Iterable[str], n: int, rng: random.Random) -> list[str]:
    """Fresh attempts, filled up with older ones to ``n``; the fresh ones alone where ``n`` is 0."""
    older = [episode for episode in known if episode not in set(fresh)]
    return [*fresh, *rng.sample(older, min(max(n - len(fresh), 0), len(older)))]


def earlier_work(engine: InProcessEngine, chat: ChatFormat, store: ReplayStore, n: int, seed: int) -> list[str]:
    """What the first model did before the stream: told the rules, which differ from request to request, in families
    that the stream does not have as well; into the store, ``n`` of each family. Returns their ids."""
    found: list[str] = []
    stamp, first = Stamp.of(engine, chat, run_id=f"earlier-{seed}", model_id="seed"), seed * TASKS_PER_SEED
    for family in EARLIER:
        suite = ForeignFirms(families=(family,))

        def policy(task: Task, _: int, suite: ForeignFirms = suite) -> Policy:
            return EnginePolicy(engine, HintedChat(chat, suite.told(task)), COLLECT)

        ids = range(first + TASKS_PER_SEED // 2, first + TASKS_PER_SEED // 2 + n)
        played = Collector(suite, policy, COLLECT, stamp=stamp).collect("train", ids, seed=EARLIER.index(family))
        store.append([episode.model_copy(update={"hint": suite.told(suite.task("train", index))})
                      for index, episode in zip(ids, played, strict=True)])
        found += [episode.episode_id for episode in played]
    return found


class Distilled:
    """SDPO from the store, with hints that were attached late; ``earlier`` work takes ``share`` of each batch.

    With both ``brakes`` the preset is used as it is, but for the learning rate.
    """

    def __init__(self, model: Any, chat: ChatFormat, store: ReplayStore, *, batch: int, newest: bool, seed: int,
                 earlier: Sequence[str] = (), share: float = 0.0, lr: float = LR, brakes: Sequence[str] = ()) -> None:
        off = {key: value for name, change in WITHOUT.items() if name not in brakes for key, value in change.items()}
        config = resolve("conversations", {**TOY["conversations"], **off, "lr": lr, "control_every": 0})
        self.learner, self.chat, self.store, self.batch = Learner(model, config), chat, store, batch
        self.model, self.version = self.learner.model, 0
        self.memory, self._rng, self.earlier = Memory(newest=newest), random.Random(seed), list(earlier)
        self._share = round(batch * share)

    def learn(self, said: Sequence[Correction]) -> Json:
        """Attach what arrived to its attempts, and to older ones that it speaks of too; then one step."""
        self.store.add_hints(as_hints(self.memory.hear(said)))
        chosen = draw([one.episode_id for one in said], self.memory.heard, self.batch - self._share, self._rng)
        if not chosen:
            return {"rows": 0}
        view = self.store.snapshot()
        chosen += self._rng.sample(self.earlier, self._share)
        rows = [row for one in view.read([key for episode in chosen for key in view.attempt(episode)])
                for row in train_rows(self.chat, one, weight=self._weight(one.key.episode_id))]
        try:
            report = self.learner.step(rows, self.version)
        except NothingToLearn:
            return {"rows": 0}
        self.version += 1
        return {"rows": report.n_trained, "staleness": round(report.metrics["replay/staleness/mean"]),
                "gated": report.metrics["learn/gated_frac"]}

    def _weight(self, episode: str) -> float:
        """Takes the decay with staleness off earlier work: what is to be kept of it does not grow old."""
        return 1.0 if episode in self.memory.heard else self.learner.config.staleness_decay ** -self.version


class Line(NamedTuple):
    """A row of fine-tuning: ids int64[T], and which of them are learnt, bool[T]."""

    ids: np.ndarray
    loss: np.ndarray


class Tuned:
    """Fine-tuning on lines that are made from corrections; older ones whose word no longer holds are left out.

    ``earlier`` work takes ``share`` of each batch.
    """

    def __init__(self, model: Any, make: Callable[[Sequence[Correction]], dict[str, Line]], *, batch: int, newest: bool,
                 seed: int, earlier: Sequence[Line] = (), share: float = 0.0, lr: float = LR) -> None:
        prepare_model(model)
        self.model, self.version, self.batch, self.earlier = model, 0, batch, list(earlier)
        self._share = round(batch * share)
        self.memory, self._make, self._rng = Memory(newest=newest), make, random.Random(seed)
        self._lines: dict[str, Line] = {}
        self._optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)

    def learn(self, said: Sequence[Correction]) -> Json:
        """Make lines of what arrived, then one step of cross-entropy; every line weighs the same."""
        self.memory.hear(said)
        fresh = self._make(said)
        self._lines |= fresh
        known = [e for e in self._lines if not self.memory.newest or self.memory.holds(self.memory.heard[e])]
        chosen = [e for e in draw(list(fresh), known, self.batch - self._share, self._rng) if e in known]
        if not chosen:
            return {"rows": 0}
        lines = [*(self._lines[episode] for episode in chosen), *self._rng.sample(self.earlier, self._share)]
        loss = cross_entropy(self.model, lines)
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimiser.step()
        self.version += 1
        return {"rows": len(lines)}


def lines_of(store: ReplayStore, episodes: Sequence[str]) -> list[Line]:
    """Stored attempts as they are: what the agent said is learnt."""
    branches = [store.episode(episode).branches[0] for episode in episodes]
    return [Line(b.token_ids.astype(np.int64), b.token_kind == TokenKind.SAMPLED) for b in branches]


def cross_entropy(model: Any, lines: Sequence[Line]) -> torch.Tensor:
    """Mean over lines of the mean negative log-prob of the tokens that are learnt, nats."""
    first = np.cumsum([0, *(len(line.ids) for line in lines)])
    at = [np.flatnonzero(line.loss) for line in lines]
    where = torch.from_numpy(np.concatenate([own + start for own, start in zip(at, first, strict=False)]))
    ids = torch.from_numpy(np.concatenate([line.ids for line in lines]))
    weight = torch.from_numpy(np.concatenate([np.full(len(own), 1 / (len(lines) * len(own))) for own in at]))
    head = scores(model, packed_row([line.ids.astype(np.int32) for line in lines], "cpu"), where - 1)
    logp = head.log_probs()[torch.arange(len(where)), ids[where]]
    return -(weight.float() * logp).sum()


class Words:
    """Makes lines of a conversation: the attempt, then the user's correction, which is learnt."""

    def __init__(self, chat: ChatFormat, store: ReplayStore) -> None:
        self.chat, self.store = chat, store

    def __call__(self, said: Sequence[Correction]) -> dict[str, Line]:
        """One line per correction."""
        view = self.store.snapshot()
        return {one.episode_id: self._line(view.episode(one.episode_id), one.text) for one in said}

    def _line(self, episode: Episode, text: str) -> Line:
        branch, header = episode.branches[-1], len(self.chat.header_ids)
        turn = np.array(self.chat.extend([{"role": "user", "content": text}]))[:-header]
        ids = np.concatenate([branch.token_ids, turn]).astype(np.int64)
        return Line(ids, np.arange(len(ids)) >= len(branch.token_ids))


class Retried:
    """Makes lines of second attempts by the first model with the correction in its prompt, of those that pass."""

    def __init__(self, engine: InProcessEngine, chat: ChatFormat, house: House, plan: Plan, seed: int) -> None:
        self.engine, self.chat, self.house, self.plan, self.seed = engine, chat, house, plan, seed

    def __call__(self, said: Sequence[Correction]) -> dict[str, Line]:
        """A line for each correction whose second attempt passed, by the rules that held when it was asked."""
        found: dict[str, Line] = {}
        for before in (True, False):
            own = [one for one in said if (one.asked < self.plan.change) == before]
            if own:
                found |= self._again(own)
        return found

    def _again(self, said: Sequence[Correction]) -> dict[str, Line]:
        suite = self.house.at(said[0].asked, self.plan)
        told = {suite.task("train", one.index).task_id: Hint(text=one.text, source="user", author="user")
                for one in said}

        def policy(task: Task, _: int) -> Policy:
            return EnginePolicy(self.engine, HintedChat(self.chat, told[task.task_id]), COLLECT, training=False)

        again = Collector(suite, policy, COLLECT, evaluate=True).collect(
            "train", [one.index for one in said], seed=self.seed + 1)
        return {one.episode_id: self._line(episode, told[episode.task_id])
                for one, episode in zip(said, again, strict=True) if episode.grade and episode.grade.passed}

    def _line(self, episode: Episode, hint: Hint) -> Line:
        """The second attempt without what was said in front of it."""
        branch = episode.branches[0]
        ids, at = whole(self.chat, hint, branch.token_ids[:branch.calls[0].start].tolist())
        keep = np.ones(len(branch.token_ids), bool)
        keep[at:at + len(ids)] = False
        return Line(branch.token_ids[keep].astype(np.int64), (branch.token_kind == TokenKind.SAMPLED)[keep])
