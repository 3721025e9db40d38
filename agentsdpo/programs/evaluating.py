"""The evaluator as a program: plays what the learner of a run folder has asked to have evaluated.

    agentsdpo evaluate RUN [--follow] [--server URL | --ray ADDRESS --of N]

Always the same tasks with the same seeds, as in the synchronous loop (:mod:`agentsdpo.evaluate`). It keeps no state:
what is due stands in the run folder, and so do the answers.
"""

import time
from collections.abc import Callable
from functools import partial
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
from agentsdpo.publish.bucket import open_registry
from agentsdpo.publish.control import VllmControl
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.publishing import make_pusher, push
from agentsdpo.runfolder import RunFolder
from agentsdpo.types import Json

POLL_S = 0.5
"""Seconds between two looks at what is due."""
Job = tuple[Owed, str, str, int]
"""What one line answers: whose policy, split, ``sampled`` or ``greedy``, episodes."""


class Evaluator:
    """Plays versions of one run's registry.

    Args:
        config: of the run.
        folder: of the run.
        server: an inference server that nobody else uses: versions are swapped into it. None plays in this process.
        policies: the registry, a folder or ``s3://bucket/prefix``; None is that of the run folder.

    Raises:
        ModelError, ConfigError, EngineError: see the parts.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, server: str | None = None, policies: str | None = None
                 ) -> None:
        path, self._chat, self._suite = check_request(config)
        self.config, self._server = config, server
        self._engine = make_engine(server or "inprocess", config, path, self._chat)
        self._registry, self._candidates = open_registry(policies or folder.policies), PolicyRegistry(folder.candidates)
        self._serving: tuple[int, int | None] = (-1, None)

    def play(self, owed: Owed, split: str, decoding: str, count: int) -> Json:
        """Play one evaluation; its line of the answer.

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
        return {"step": owed.step, "version": owed.version, "split": split, "decoding": decoding, **scores(episodes),
                **acts}

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


def left(folder: RunFolder) -> list[Job]:
    """The evaluations that are due and were not played, oldest first."""
    have = {key_of(row) for row in read_answers(folder)}
    return [(owed, *one) for owed in read_owed(folder) for key, one in zip(owed.keys, owed.wanted, strict=True)
            if key not in have]


def take(play: Callable[[], Json], folder: RunFolder, *, follow: bool, say: Callable[[str], None]) -> int:
    """Have one evaluation played, write it down and say how it went; how many that are.

    With ``follow`` a version that is not there any more is none: the learner gave it up since, and says so in what is
    due, which is looked at again after a pause.

    Raises:
        RegistryError: the version is not there any more, without ``follow``.
    """
    try:
        row = play()
    except RegistryError:
        if not follow:
            raise
        time.sleep(POLL_S)
        return 0
    append_answer(folder, row)
    say(f"version {row['version']} on {row['split']}, {row['decoding']}: pass {row.get('pass')} of {row['n']} episodes")
    return 1


def run_folder(run: Path | str) -> RunFolder:
    """The folder of a run that is there. Raises RunError where there is none."""
    folder = RunFolder(Path(run).resolve())
    if not folder.config.is_file():
        raise RunError(f"{run} holds no run", fix="give the folder that `agentsdpo train` or `learn` writes")
    return folder


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
    folder, played = run_folder(run), 0
    evaluator = Evaluator(load(folder.config), folder, server)
    while True:
        jobs = left(folder)
        if not jobs:
            if not follow:
                return {"run": str(folder.path), "played": played}
            time.sleep(POLL_S)
            continue
        played += take(partial(evaluator.play, *jobs[0]), folder, follow=follow, say=say)
