"""Collectors over a Ray cluster: many machines, one command.

    agentsdpo collect CONFIG.toml --store URI --policies DIR --ray ADDRESS --of N

Ray starts the processes, spreads them over the machines and starts one anew elsewhere when its worker or its machine
dies; everything else goes through store and registry, which every machine must reach under the same names. A collector
that starts anew plays what the store lacks of its episodes, so that none is lost or doubled.
"""

from collections.abc import Callable
from typing import Any

from agentsdpo.config import RunConfig, from_mapping
from agentsdpo.errors import ConfigError, EngineError
from agentsdpo.types import Json

POLL_S = 10.0
"""Seconds between two looks at which collectors are done."""


def collect_over_ray(config: RunConfig, uri: str, policies: str, *, address: str, of: int, engine: str = "inprocess",
                     episodes: int | None = None, say: Callable[[str], None] = lambda text: None) -> Json:
    """Run collectors 0 to ``of`` - 1 on a cluster until all their episodes are stored, or until interrupted.

    Args:
        config: of the run.
        uri: store, as every machine of the cluster reaches it.
        policies: policy registry, likewise.
        address: of the cluster, ``auto`` for the one this machine belongs to, ``local`` to start one here.
        of: how many collectors; each takes one CPU of the cluster.
        engine, episodes: of each, see :func:`agentsdpo.programs.collecting.assemble_collector`.
        say: told of progress, one line at a time.

    Returns:
        ``store``, ``episodes`` stored by the last lives, ``left_out``, ``version``, ``collectors``.

    Raises:
        ConfigError: ray is not installed. EngineError: the cluster cannot be reached, or a collector failed.
        KeyboardInterrupt: interrupted; the collectors were told to stop.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError("collecting over a cluster needs ray, which is not installed",
                          fix="pip install 'agentsdpo[ray]' on every machine") from error
    try:
        ray.init(address=address, log_to_driver=False, include_dashboard=False if address == "local" else None)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EngineError(f"no Ray cluster at {address!r}: {error}",
                          fix="start one with `ray start --head`, or give --ray local") from error
    try:
        # A worker that dies is no fault of the collector's: its task is run again for as often as it takes.
        remote = ray.remote(num_cpus=1, max_retries=-1)(collector)
        settings = config.model_dump(mode="json")
        running = {remote.remote(settings, uri, policies, number, of, engine, episodes): number for number in range(of)}
        say(f"{of} collectors on {len(ray.nodes())} machines")
        return {"store": uri, "collectors": of, **_gathered(ray, running, say)}
    finally:
        ray.shutdown()


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
