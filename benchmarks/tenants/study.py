"""Rounds of work and correction, what is measured after each, and whether anything of one tenant reached the other.

The curve is of held-out work: unseen clients, greedy, by the adapter that serves the tenant at that moment. Beside it
stands what the users themselves saw, before they corrected it.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agentsdpo.benchmarks.tenants.programs import SETTINGS, STEM, Service
from agentsdpo.benchmarks.tenants.users import Talk, User
from agentsdpo.chat import ChatFormat
from agentsdpo.collect.collector import Collector
from agentsdpo.collect.config import CollectConfig
from agentsdpo.collect.vllm import VllmEngine
from agentsdpo.config import RunConfig, load
from agentsdpo.envs.desk import DeskSuite
from agentsdpo.envs.desk.firm import Firm, hint
from agentsdpo.envs.desk.seed import seed_path
from agentsdpo.envs.desk.text import KINDS
from agentsdpo.evaluate import EVAL_SEED, scores
from agentsdpo.learn.load import load_chat
from agentsdpo.provenance import git_commit, hardware
from agentsdpo.replay.store import ReplayStore
from agentsdpo.types import Json

FIRMS = {"acme": 7, "globex": 6708}
"""Tenants and the seeds of their house rules, which differ for every kind of work in every slot."""
SPLIT = "test_names"


@dataclass
class Study:
    """One service and its tenants' users.

    Args:
        service: running. evals: held-out tasks per evaluation. seed: of the tasks that users ask for.
        say: told of every round.
    """

    service: Service
    evals: int = 48
    seed: int = 0
    say: Callable[[str], None] = lambda text: None
    talks: dict[str, list[Talk]] = field(default_factory=dict)
    rows: list[Json] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chat = load_chat(seed_path())
        self.suites = {tenant: DeskSuite("desk-mini", firm_seed=FIRMS[tenant]) for tenant in self.service.tenants}
        self.users = {tenant: User(self.service.proxy, self.service.keys[tenant], suite)
                      for tenant, suite in self.suites.items()}
        self.talks = {tenant: [] for tenant in self.suites}
        self._settings, self._began = load(SETTINGS), time.time()
        self._origin = {"commit": git_commit() or "", "hardware": hardware()}  # files may change while it runs

    def run(self, conversations: int) -> None:
        """Let every tenant have so many conversations, in rounds; evaluate before the first and after each."""
        each, tasks = self._settings.episodes_per_step, range(self.seed * 100_000, self.seed * 100_000 + conversations)
        self._evaluate()
        for first in range(0, conversations, each):
            for tenant, user in self.users.items():
                done = user.work(tasks[first:first + each])
                self.talks[tenant] += done
                self._row(tenant, "train", "sampled", {
                    "n": len(done), "pass": sum(talk.right for talk in done) / len(done),
                    "score": sum(talk.score for talk in done) / len(done)})
            for tenant in self.users:
                step = due(sum(bool(talk.said) for talk in self.talks[tenant]), self._settings)
                self.service.wait(f"the adapter of {tenant}'s step {step}",
                                  lambda: self.service.learnt(tenant, step))  # noqa: B023
            self._evaluate()

    # ---------------------------------------------------------------------------------------------------- measuring

    def _evaluate(self) -> None:
        for tenant in self.suites:
            self._row(tenant, SPLIT, "greedy", self.play(self.service.serving(tenant), self.suites[tenant]))
        last = {tenant: [row for row in self.rows if row["arm"] == tenant] for tenant in self.suites}
        self.say("   ".join(
            f"{tenant}: {rows[-1]['episodes']:3d} conversations, {sum(bool(t.said) for t in self.talks[tenant]):3d} "
            f"corrected, held-out work right {rows[-1]['pass']:4.0%} by {self.service.serving(tenant)}"
            for tenant, rows in last.items()))

    def play(self, model: str, suite: DeskSuite) -> Json:
        """Held-out tasks, greedily, by one model, graded by one firm: ``n``, ``pass``, ``score``."""
        engine = VllmEngine(self.service.url, model=model, eos_ids=(self.chat.eos_id,), vocab_size=1024)
        config = CollectConfig(concurrency=32, window=1536, max_tokens=64, temperature=0.0)
        player = Collector.of_engine(suite, engine, self.chat, config, evaluate=True)
        return scores(player.collect(SPLIT, range(self.evals), seed=EVAL_SEED))

    def _row(self, tenant: str, split: str, decoding: str, found: Json) -> None:
        talks, registry = self.talks[tenant], self.service.registry(tenant)
        latest = registry.latest()
        self.rows.append({
            "study": "tenants", "arm": tenant, "preset": self._settings.preset, "staleness": 0, "seed": self.seed,
            "step": 0 if latest is None else registry.manifest(latest).learner_step, "episodes": len(talks),
            "env_steps": sum(talk.calls for talk in talks), "wall_s": round(time.time() - self._began, 1),
            "split": split, "decoding": decoding, **self._origin, **found})

    def crossed(self) -> dict[tuple[str, str], Json]:
        """Every tenant's adapter, by every tenant's rules: (whose adapter, whose rules) -> scores."""
        return {(own, other): self.play(self.service.serving(own), self.suites[other])
                for own in self.suites for other in self.suites}


def due(corrected: int, config: RunConfig) -> int:
    """Optimiser step of the newest version that so many corrected conversations are good for.

    >>> due(7, load(SETTINGS)), due(8, load(SETTINGS)), due(11, load(SETTINGS))
    (0, 20, 25)
    """
    if corrected < config.episodes_per_step:
        return 0
    steps = int((config.flow.samples_per_insert or 1.0) * corrected / config.learn.batch)
    return steps - steps % config.publish.every


def sentences(tenant: str) -> set[str]:
    """Everything that a tenant's users can say about its house rules."""
    firm = Firm(FIRMS[tenant])
    return {hint(kind, firm.rules(kind, "desk-mini")) for kind in KINDS}


def leaks(tenant: str, folder: Path | str, talks: Mapping[str, Sequence[Talk]], chat: ChatFormat) -> list[str]:
    """What of other tenants is found in a tenant's store, in words; [] when nothing is.

    Args:
        folder: of the store. talks: all conversations, by tenant.
    """
    view = ReplayStore.open(folder, create=False).snapshot()
    own, found = {talk.name for talk in talks[tenant]}, list[str]()
    for key in view.rows:
        (row,) = view.read([key])
        if row.task_id not in own:
            found.append(f"conversation {row.task_id} is not {tenant}'s")
        text = chat.decode(row.branch.token_ids.tolist()) + (row.hint.words if row.hint else "")
        found += [f"conversation {row.task_id} holds {sentence!r} of {other}" for other in talks if other != tenant
                  for sentence in sentences(other) if sentence in text]
    return found + _foreign(tenant, talks[tenant])


def _foreign(tenant: str, talks: Iterable[Talk]) -> list[str]:
    """Answers that came of another tenant's adapter."""
    return [f"conversation {talk.name} was answered by {model}" for talk in talks for model in talk.served_by
            if "@v" in model and not model.startswith(f"{STEM}-{tenant}@v")]
