"""Collectors and evaluators over a Ray cluster: many machines, one command.

    agentsdpo collect CONFIG.toml --store URI --policies DIR --ray ADDRESS --of N
    agentsdpo evaluate RUN --ray ADDRESS --of N

Ray starts the processes, spreads them over the machines and starts one anew elsewhere when its worker or its machine
dies; everything else goes through store and registry, which every machine must reach under the same names. A collector
that starts anew plays what the store lacks of its episodes, so that none is lost or doubled. An evaluator is handed one
evaluation at a time and hands its numbers back; this process alone reads and writes the run folder.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from agentsdpo.config import RunConfig, from_mapping, load
from agentsdpo.errors import ConfigError, EngineError, RegistryError
from agentsdpo.programs.evaluating import Evaluator, Job, left, run_folder, take
from agentsdpo.runfolder import RunFolder
from agentsdpo.types import Json

POLL_S = 10.0
"""Seconds between two looks at which collectors are done."""
DUE_S = 0.5
"""Seconds between two looks at what is to be evaluated."""


@contextmanager
def cluster(address: str) -> Iterator[Any]:
    """The module ``ray``, connected.

    Args:
        address: of the cluster, ``auto`` for the one this machine belongs to, ``local`` to start one here.

    Raises:
        ConfigError: ray is not installed. EngineError: the cluster cannot be reached.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError("--ray needs ray, which is not installed",
                          fix="pip install 'agentsdpo[ray]' on every machine") from error
    try:
        ray.init(address=address, log_to_driver=False, include_dashboard=False if address == "local" else None)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EngineError(f"no Ray cluster at {address!r}: {error}",
                          fix="start one with `ray start --head`, or give --ray local") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def collect_over_ray(config: RunConfig, uri: str, policies: str, *, address: str, of: int, engine: str = "inprocess",
                     episodes: int | None = None, say: Callable[[str], None] = lambda text: None) -> Json:
    """Run collectors 0 to ``of`` - 1 on a cluster until all their episodes are stored, or until interrupted.

    Args:
        config: of the run.
        uri: store, as every machine of the cluster reaches it.
        policies: policy registry, likewise.
        address: see :func:`cluster`.
        of: how many collectors; each takes one CPU of the cluster.
        engine, episodes: of each, see :func:`agentsdpo.programs.collecting.assemble_collector`.
        say: told of progress, one line at a time.

    Returns:
        ``store``, ``episodes`` stored by the last lives, ``left_out``, ``version``, ``collectors``.

    Raises:
        ConfigError: ray is not installed. EngineError: the cluster cannot be reached, or a collector failed.
        KeyboardInterrupt: interrupted; the collectors were told to stop.
    """
    with cluster(address) as ray:
        # A worker that dies is no fault of the collector's: its task is run again for as often as it takes.
        remote = ray.remote(num_cpus=1, max_retries=-1)(collector)
        settings = config.model_dump(mode="json")
        running = {remote.remote(settings, uri, policies, number, of, engine, episodes): number for number in range(of)}
        say(f"{of} collectors on {len(ray.nodes())} machines")
        return {"store": uri, "collectors": of, **_gathered(ray, running, say)}


def _gathered(ray: Any, running: dict[Any, int], say: Callable[[str], None]) -> Json:
    """Wait for all collectors; the first fault of one, or Ctrl-C, stops the others."""
    found: list[Json] = []
    try:
        while running:
            for ref in ray.wait(list(running), timeout=POLL_S)[0]:
                number = running.pop(ref)
                found.append(ray.get(ref))
                say(f"collector {number} is done: {found[-1]['episodes']} episodes in its last life")
    except ray.exceptions.RayTaskError as error:
        raise EngineError(f"a collector failed: {error.cause!r}", fix="see the cause, then start again") from error
    finally:
        for ref in running:
            ray.cancel(ref)
    return {"episodes": sum(one["episodes"] for one in found), "left_out": sum(one["left_out"] for one in found),
            "version": max((one["version"] for one in found), default=-1)}


def collector(settings: Json, uri: str, policies: str, number: int, of: int, engine: str,
              episodes: int | None) -> Json:
    """What runs on a machine of the cluster: one collector, its settings as a plain mapping."""
    from agentsdpo.programs.collecting import collect

    return collect(from_mapping(settings), uri, policies, engine=engine, number=number, of=of, episodes=episodes)


def evaluate_over_ray(run: Path | str, *, address: str, of: int, follow: bool = False,
                      say: Callable[[str], None] = lambda text: None) -> Json:
    """Play what is due in a run folder on a cluster.

    Machines take the policies from ``publish.mirror`` where the run has one, else from the run folder, which they must
    then reach under the same path. Weights that an alarm holds back are in the run folder alone: they are played here.

    Args:
        run: the folder.
        address: see :func:`cluster`.
        of: how many evaluators at once; each takes one CPU of the cluster.
        follow: go on with what becomes due later, until interrupted.
        say: told of every evaluation, in one line.

    Returns:
        ``run``, ``evaluators``, and ``played``, how many evaluations.

    Raises:
        RunError: no such run. ConfigError, EngineError: see :func:`cluster`; or an evaluator failed.
        RegistryError: a version is not there any more, without ``follow``.
    """
    folder = run_folder(run)
    config = load(folder.config)
    with cluster(address) as ray:
        say(f"{of} evaluators on {len(ray.nodes())} machines")
        return {"run": str(folder.path), "evaluators": of,
                "played": _evaluated(ray, of, config, folder, follow=follow, say=say)}


def _evaluated(ray: Any, of: int, config: RunConfig, folder: RunFolder, *, follow: bool,
               say: Callable[[str], None]) -> int:
    """Hand out what is due and write down what comes back, until nothing is due; how many evaluations."""
    remote = ray.remote(num_cpus=1, max_retries=-1)(evaluation)
    settings = config.model_dump_json()
    here: Evaluator | None = None
    running, played = dict[Any, Job](), 0
    while True:
        begun = {_name(job) for job in running.values()}
        jobs = [job for job in left(folder) if _name(job) not in begun]
        for job in [job for job in jobs if job[0].candidate is None][:of - len(running)]:
            running[remote.remote(settings, str(folder.path), *job)] = job
        for job in [job for job in jobs if job[0].candidate is not None][:1]:
            here = here or Evaluator(config, folder)
            played += take(partial(here.play, *job), folder, follow=follow, say=say)
        if not jobs and not running:
            if not follow:
                return played
            time.sleep(DUE_S)
        for ref in ray.wait(list(running), timeout=DUE_S)[0] if running else ():
            del running[ref]
            played += take(partial(_answered, ray, ref), folder, follow=follow, say=say)


def _name(job: Job) -> tuple[int, int, str, str]:
    """What an evaluation is known by, however many others its learner still waits for."""
    owed, split, decoding, _ = job
    return owed.step, owed.version, split, decoding


def _answered(ray: Any, ref: Any) -> Json:
    """What an evaluator handed back. Raises RegistryError as it did, EngineError for any other fault."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RegistryError):
            raise error.cause from error
        raise EngineError(f"an evaluator failed: {error.cause!r}", fix="see the cause, then start again") from error


def evaluation(settings: str, run: str, *job: Any) -> Json:
    """What runs on a machine of the cluster: one evaluation, see :meth:`Evaluator.play`; settings as JSON."""
    return _evaluator(settings, run).play(*job)


@lru_cache(maxsize=1)
def _evaluator(settings: str, run: str) -> Evaluator:
    """That of this process, which Ray uses again: the model is loaded once."""
    config = from_mapping(json.loads(settings))
    return Evaluator(config, RunFolder(Path(run)), policies=config.publish.mirror or None)
