"""A whole run as programs side by side on one machine: the asynchronous counterpart of :mod:`agentsdpo.loop`.

    agentsdpo train CONFIG.toml --async [--collectors N] [--server URL]

Starts collectors, hint writer, learner, evaluator and, for servers, a publisher, with the very commands one would type
on machines of their own, keeps them alive, and shows the learner's metrics as they come. It holds no state: killed, it
takes them all with it, and goes on with ``--resume``.
"""

import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from agentsdpo.assemble import check_request
from agentsdpo.collect.vllm.server import base_url
from agentsdpo.config import RunConfig
from agentsdpo.lift import require_lift
from agentsdpo.programs.collecting import check_ungrouped
from agentsdpo.programs.supervise import Program, Supervisor
from agentsdpo.provenance import cores
from agentsdpo.replay.store import ReplayStore
from agentsdpo.runfolder import RunFolder, hold, open_run
from agentsdpo.show import console
from agentsdpo.show.console import View
from agentsdpo.track import Tail
from agentsdpo.types import Json


def train_async(config: RunConfig, *, out: Path | str, collectors: int = 1, servers: Sequence[str] = (),
                resume: bool = False, mode: str = "auto") -> RunFolder:
    """Run one configuration to its last step and evaluation.

    Args:
        config: resolved settings; written into ``out``.
        out: run folder.
        collectors: processes that collect; with servers, so many each.
        servers: URLs of inference servers; without one every collector has a model of its own.
        resume: go on with the run in ``out``.
        mode: terminal display, ``auto``, ``plain`` or ``none``.

    Raises:
        RunError: ``out`` holds another run or one that is running, or a program cannot be kept alive.
        ModelError, ConfigError: see the parts. HintError: see :func:`~agentsdpo.lift.require_lift`.
        KeyboardInterrupt: stopped; everything finished is on disk.
    """
    check_request(config)
    check_ungrouped(config)
    for url in servers:
        base_url(url)  # before the folder is made, not once a program has died of it
    if not resume:
        require_lift(config)
    folder = open_run(out, config, resume=resume)
    logs = RunFolder(folder.logs)
    logs.path.mkdir(exist_ok=True)
    try:
        hold(logs.path)
        ReplayStore.open(folder.replay).close()
        folder.release()  # the learner holds it from now on
        with console.training(config.steps, config.name, mode=mode) as view:
            apart = programs(folder, collectors, servers)
            view.stage(f"starting {', '.join(one.name for one in apart)}; logs in {logs.path}")
            watcher = Watcher(folder, view)
            keep = Supervisor(apart, logs.path, view.note)
            asyncio.run(keep.run(watcher.look))
    finally:
        folder.release()
        logs.release()
    return folder


def programs(folder: RunFolder, collectors: int, servers: Sequence[str]) -> list[Program]:
    """The programs of a run, each with the command one would type."""
    config, store, policies = str(folder.config), str(folder.replay), str(folder.policies)
    engines = [*servers] * collectors if servers else ["inprocess"] * collectors
    threads = {} if "OMP_NUM_THREADS" in os.environ else {
        "OMP_NUM_THREADS": str(max(1, cores() // (1 + (0 if servers else collectors))))}
    found = [Program("learner", _verb("learn", config, "--store", store, "--out", str(folder.path), "--follow",
                                      "--resume"), ends=True, environment=threads),
             Program("hints", _verb("hint", "write", config, "--store", store, "--follow")),
             Program("evaluator", _verb("evaluate", str(folder.path), "--follow"), environment=threads)]
    found += [Program(f"collector-{i}", _verb("collect", config, "--store", store, "--policies", policies, "--engine",
                                              engine, "--number", str(i), "--of", str(len(engines))),
                      environment=threads) for i, engine in enumerate(engines)]
    if servers:
        named = [word for url in servers for word in ("--server", url)]
        found.append(Program("publisher", _verb("publish", policies, *named, "--follow")))
    return found


def _verb(*words: str) -> list[str]:
    return [sys.executable, "-m", "agentsdpo.cli", *words]


class Watcher:
    """Shows new lines of ``metrics.jsonl`` as the learner writes them.

    Args:
        folder: of the run; what its file holds already is not shown.
        view: told of every line.
    """

    def __init__(self, folder: RunFolder, view: View) -> None:
        self._tail, self._view = Tail(folder.metrics), view
        self._shown = {_name(row) for row in self._tail.look()[0]}

    def look(self) -> None:
        """Show what is new, and no step a second time where the learner went on from a checkpoint."""
        for row in self._tail.look()[0]:
            if _name(row) not in self._shown:
                self._shown.add(_name(row))
                console.show_row(self._view, row)


def _name(row: Json) -> tuple[object, ...]:
    return tuple(row.get(key) for key in ("kind", "step", "split", "decoding"))
