"""The evaluator as a program: plays what the learner of a run folder has asked to have evaluated.

    agentsdpo evaluate RUN [--follow] [--server URL]

Always the same tasks with the same seeds, as in the synchronous loop (:mod:`agentsdpo.evaluate`). It keeps no state:
what is due stands in the run folder, and so do the answers.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agentsdpo.assemble import check_request
from agentsdpo.collect.collector import Collector
from agentsdpo.collect.metrics import collect_metrics
from agentsdpo.config import RunConfig, load
from agentsdpo.errors import PushError, RegistryError, RunError
from agentsdpo.evaluate import EVAL_SEED, scores
from agentsdpo.learn.alarms import BEHAVIOUR
from agentsdpo.programs.collecting import make_engine
from agentsdpo.programs.owed import Owed, append_answer, key_of, read_answers, read_owed
from agentsdpo.publish.control import VllmControl
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.publishing import make_pusher, push
from agentsdpo.runfolder import RunFolder
from agentsdpo.types import Json

POLL_S = 0.5
"""Seconds between two looks at what is due."""


class Evaluator:
    """Plays versions of one run's registry.

    Args:
        config: of the run.
        folder: of the run.
        say: told of every evaluation, in one line.
        server: an inference server that nobody else uses: versions are swapped into it. None plays in this process.

    Raises:
        ModelError, ConfigError, EngineError: see the parts.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, say: Callable[[str], None], server: str | None = None
                 ) -> None:
        path, self._chat, self._suite = check_request(config)
        self.config, self.folder, self.say, self._server = config, folder, say, server
        self._engine = make_engine(server or "inprocess", config, path, self._chat)
        self._registry, self._candidates = PolicyRegistry(folder.policies), PolicyRegistry(folder.candidates)
        self._serving: tuple[int, int | None] = (-1, None)

    def next(self) -> tuple[Owed, str, str, int] | None:
        """The oldest evaluation that is due and was not played."""
        have = {key_of(row) for row in read_answers(self.folder)}
        return next(((owed, *one) for owed in read_owed(self.folder)
                     for key, one in zip(owed.keys, owed.wanted, strict=True) if key not in have), None)

    def play(self, owed: Owed, split: str, decoding: str, count: int) -> Json:
        """Play one evaluation and write it down; returns its line.

        Raises:
            RegistryError: the version is not there any more. PushError: the server did not take it.
        """
        wanted = (owed.version, owed.candidate)
        if wanted != self._serving:
            self._seat(*((self._registry, owed.version) if owed.candidate is None
                         else (self._candidates, owed.candidate)), owed.version)
            self._serving = wanted
        sampling: Any = self.config.collect.model_copy(update={"temperature": 0.0} if decoding == "greedy" else {})
        collector = Collector.of_engine(self._suite, self._engine, self._chat, sampling, evaluate=True)
        episodes = collector.collect(split, range(count), seed=EVAL_SEED)
        acts = {key: value for key, value in collect_metrics(episodes).items() if key in BEHAVIOUR}
        row = {"step": owed.step, "version": owed.version, "split": split, "decoding": decoding, **scores(episodes),
               **acts}
        append_answer(self.folder, row)
        self.say(f"version {owed.version} on {split}, {decoding}: pass {row.get('pass')} of {row['n']} episodes")
        return row

    def _seat(self, registry: PolicyRegistry, number: int, version: int) -> None:
        """Have the engine play one version of a registry; whatever it served before is gone."""
        if self._server is None:
            self._engine.load_weights(registry.load(number), version)
            return
        with VllmControl(self._server) as control:
            for name in control.adapters():  # full weights are not swapped under adapters
                control.unload_adapter(name)
        report = push(registry, make_pusher("auto", registry, keep=1), number, [self._server])
        if not report.ok:
            raise PushError(f"version {version} cannot be evaluated: {report.servers[0].error}",
                            fix="look into the server's log, or evaluate in this process (without --server)")
        self._engine.use(report.name or self._engine.facts.base)


def evaluate_due(run: Path | str, *, follow: bool = False, server: str | None = None,
                 say: Callable[[str], None] = lambda text: None) -> Json:
    """Play what is due in a run folder.

    Args:
        run: the folder.
        follow: go on with what becomes due later, until interrupted.
        server: see :class:`Evaluator`.
        say: told of every evaluation, in one line.

    Returns:
        ``run`` and ``played``, how many evaluations.

    Raises:
        RunError: no such run. KeyboardInterrupt: interrupted; the evaluation under way is played again next time.
    """
    folder, played = RunFolder(Path(run)), 0
    if not folder.config.is_file():
        raise RunError(f"{folder.path} holds no run", fix="give the folder that `agentsdpo train` or `learn` writes")
    evaluator = Evaluator(load(folder.config), folder, say, server)
    while True:
        job = evaluator.next()
        if job is None:
            if not follow:
                return {"run": str(folder.path), "played": played}
            time.sleep(POLL_S)
            continue
        try:
            evaluator.play(*job)
            played += 1
        except RegistryError:  # the learner gave this version up since, and says so in what is due
            if not follow:
                raise
            time.sleep(POLL_S)
