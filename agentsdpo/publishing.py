"""From a registry to running servers: one version once, or every new one as it comes.

    agentsdpo publish RUN/policies --to http://127.0.0.1:8000 --follow

Who follows asks each server every so often what it serves, and pushes where that is not the latest version: after a
publish, after a server was restarted, after this program was killed in the middle of a push. Nothing is kept but one
small record per server in the registry.
"""

import importlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from agentsdpo.config import SEED_MODEL
from agentsdpo.envs.desk.seed import seed_path
from agentsdpo.errors import ConfigError, CorruptionError, PushError, RegistryError, StoreError
from agentsdpo.learn.scoring import ModelScorer
from agentsdpo.publish.bucket import is_bucket, open_registry
from agentsdpo.publish.push import BOUND, Outcome, Pusher, PushReport, Scorer
from agentsdpo.publish.push_adapter import AdapterPusher, AutoPusher
from agentsdpo.publish.push_full import ReloadPusher
from agentsdpo.publish.registry import PolicyRegistry

_log = logging.getLogger(__name__)
POLL_S = 0.5
"""Seconds between two looks at registry and servers."""
LONGEST_WAIT_S = 60.0
"""Longest time between two tries of a push that fails; it grows from one look to this."""


class RegistryScorer:
    """Scores with versions of a registry; implements :class:`~agentsdpo.publish.push.Scorer`.

    Args:
        registry: where the weights are.
        model: folder or hub name of the model they were trained from; the manifest's own when not given.
    """

    def __init__(self, registry: PolicyRegistry, model: str | None = None) -> None:
        self._registry, self._name = registry, model
        self._model: ModelScorer | None = None

    @property
    def prompt(self) -> Sequence[int]:
        """See :class:`~agentsdpo.publish.push.Scorer`; after :meth:`load`."""
        return self._loaded.prompt

    def load(self, version: int) -> None:
        """See :class:`~agentsdpo.publish.push.Scorer`."""
        weights = self._registry.load(version)
        if self._model is None:
            self._model = ModelScorer(trained_from(self._registry, version, self._name))
        self._model.load(weights)

    def logps(self, ids: Sequence[int], n: int) -> Sequence[float]:
        """See :class:`~agentsdpo.publish.push.Scorer`."""
        return self._loaded.logps(ids, n)

    @property
    def _loaded(self) -> ModelScorer:
        if self._model is None:
            raise RegistryError("no version was loaded to score with", fix="call load first")
        return self._model


def trained_from(registry: PolicyRegistry, version: int, name: str | None = None) -> Path | str:
    """Folder or hub name of the model that a version was trained from: the one named, or the manifest's own.

    Raises:
        ConfigError: neither says.
    """
    name = name or registry.manifest(version).base_model
    if not name:
        raise ConfigError("the registry does not say which model its versions were trained from",
                          fix="name its folder: --model PATH")
    return seed_path() if name == SEED_MODEL else name


def make_pusher(how: str, registry: PolicyRegistry, *, bound: float = BOUND, keep: int = 4, stem: str | None = None,
                model: str | None = None) -> Pusher:
    """The pusher a word names.

    Args:
        how: ``auto``, ``reload``, ``adapter``, or ``module:function``, which is called with a scorer and the bound.
        bound: largest mean absolute difference of log-probs, nats.
        keep: adapters that stay loaded per server.
        stem: of their names, see :class:`~agentsdpo.publish.push_adapter.AdapterPusher`.
        model: see :class:`RegistryScorer`.

    Raises:
        ConfigError: there is no such way.
    """
    scorer: Scorer = RegistryScorer(registry, model)
    full, adapter = ReloadPusher(scorer, bound=bound), AdapterPusher(scorer, bound=bound, keep=keep, stem=stem)
    if how in ("auto", "reload", "adapter"):
        return {"auto": AutoPusher(full, adapter), "reload": full, "adapter": adapter}[how]
    module, _, name = how.partition(":")
    try:
        return getattr(importlib.import_module(module), name)(scorer, bound)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(f"--with is {how!r}: {error}", fix="use auto, reload, adapter, or module:function") from error


def newest(registry: PolicyRegistry) -> int:
    """The latest version.

    Raises:
        RegistryError: nothing was published there.
    """
    version = registry.latest()
    if version is None:
        raise RegistryError(f"no policy version was published in {registry.root}",
                            fix="give the folder of a run with policies, of a demo one of its arms, or a registry")
    return version


def follow(registry: PolicyRegistry, pusher: Pusher, servers: Sequence[str], *,
           sleep: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.monotonic
           ) -> Iterator[PushReport]:
    """Push every new version, and the latest one to servers that lack it; one report per try, without end.

    What fails is tried again after a growing pause, at once when there is a new version or other servers lack it. A
    bucket that cannot be reached is asked again in the same way.
    """
    failed: tuple[int, frozenset[str]] | None = None
    again, pause, away = 0.0, POLL_S, POLL_S
    while True:
        try:
            version = registry.latest()
            lacking = [] if version is None else [url for url in servers if not _serves(pusher, registry, version, url)]
        except StoreError as error:
            _log.warning("the registry cannot be read, the next look is in %g s: %s", away, error)
            sleep(away)
            away = min(2 * away, LONGEST_WAIT_S)
            continue
        away = POLL_S
        if version is not None and lacking:
            now = version, frozenset(lacking)
            if now != failed or clock() >= again:
                report = _try(pusher, registry, version, lacking)
                pause = POLL_S if report.ok or now != failed else min(2 * pause, LONGEST_WAIT_S)
                failed, again = (None if report.ok else now), clock() + pause
                yield report
        sleep(POLL_S)


def push(registry: PolicyRegistry, pusher: Pusher, version: int, servers: Sequence[str]) -> PushReport:
    """Push one version, and let others know what came of it. Raises as :meth:`Pusher.push`."""
    try:
        return pusher.push(registry, version, servers)
    finally:
        registry.share()


def _serves(pusher: Pusher, registry: PolicyRegistry, version: int, url: str) -> bool:
    try:
        return pusher.serves(registry, version, url)
    except (PushError, RegistryError, CorruptionError):
        return False  # the push finds out why, and says it


def _try(pusher: Pusher, registry: PolicyRegistry, version: int, servers: Sequence[str]) -> PushReport:
    """A push whose version may be at fault: that is a report too, for a later one may be good."""
    try:
        return push(registry, pusher, version, servers)
    except (PushError, RegistryError, CorruptionError, StoreError) as error:
        return PushReport(version, "none", tuple(Outcome(url, ok=False, error=str(error)) for url in servers))


def registry_at(folder: Path | str) -> PolicyRegistry:
    """The registry in a folder, in ``policies`` below it when a run's own folder is given, or in a bucket."""
    if is_bucket(folder):
        return open_registry(folder)
    path = Path(folder)
    of_run = (path / "config.toml").is_file() or (path / "policies").is_dir()
    return PolicyRegistry(path / "policies" if of_run else path)
