"""Adapters onto running servers: a new name and a new path for every version, several served side by side, no pause.

Loaded on every server, then announced, and only then is the oldest one unloaded; its files stay for one publication
more, since engines read an adapter from its path again when it was evicted in between.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from agentsdpo.errors import PushError
from agentsdpo.publish.control import VllmControl
from agentsdpo.publish.push import BOUND, Connect, Mismatch, Outcome, PushReport, Round, Scorer, parity
from agentsdpo.publish.push_full import ReloadPusher
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.publish.served import Served, pushing_to, read_served, write_served


def adapter_name(model: str, version: int) -> str:
    """What requests for one version ask for.

    >>> adapter_name("seed", 12)
    'seed@v12'
    """
    return f"{model}@v{version}"


def adapter_version(name: str) -> int | None:
    """The version in a name, None when it names none.

    >>> adapter_version("seed@v12"), adapter_version("seed")
    (12, None)
    """
    digits = name.rpartition("@v")[2]
    return int(digits) if "@v" in name and digits.isdecimal() else None


class AdapterPusher:
    """Pushes adapters by hot-loading; implements :class:`~agentsdpo.publish.push.Pusher`.

    Folders must be visible to the servers under the same path, and the servers must serve the base of the adapter.

    Args:
        scorer: says what the log-probs must be.
        bound: largest mean absolute difference, nats.
        keep: versions that stay loaded, newest first; at most the servers' ``--max-loras``, and more than the versions
            that collectors may be behind.
        stem: what the names begin with; the name of the server's own model when not given. Registries that share a
            server, as those of several tenants, need one each.
        connect: opens a server.
    """

    kind = "adapter"

    def __init__(self, scorer: Scorer, *, bound: float = BOUND, keep: int = 4, stem: str | None = None,
                 connect: Connect = VllmControl) -> None:
        self.scorer, self.bound, self.keep, self.stem, self._connect = scorer, bound, max(keep, 1), stem, connect

    def serves(self, registry: PolicyRegistry, version: int, url: str) -> bool:
        """See :class:`~agentsdpo.publish.push.Pusher`."""
        with self._connect(url) as server:
            announced = read_served(registry.root, server.url).version == version
            return announced and self._name(server, version) in server.adapters()

    def push(self, registry: PolicyRegistry, version: int, servers: Sequence[str]) -> PushReport:
        """See :class:`~agentsdpo.publish.push.Pusher`. Announced once every server that answers has loaded it."""
        manifest = registry.manifest(version)
        if manifest.base is None:
            raise PushError(f"policy version {version} is full weights, no adapter",
                            fix="push it by reload (--with reload)")
        self.scorer.load(version)
        round_, names = Round(), dict[str, str]()
        with ExitStack() as stack:
            opened = {url: stack.enter_context(self._connect(url)) for url in servers}

            def load(url: str) -> Outcome:
                stack.enter_context(pushing_to(registry.root, opened[url].url))
                names[url], outcome = self._load(registry, version, manifest.base or 0, opened[url])
                return replace(outcome, url=url)

            round_.visit(servers, load)
            waited_for = [o for o in round_.outcomes if not o.ok and o.url not in round_.gone]
            if waited_for:
                why = f"loaded, but not announced before {waited_for[0].url} has it too"
                outcomes = [replace(o, ok=False, error=why) if o.ok else o for o in round_.outcomes]
            else:
                announcing, loaded = Round(), {o.url: o for o in round_.outcomes if o.ok}
                announcing.visit(list(loaded), lambda url: self._announce(
                    registry, version, manifest.base or 0, opened[url], loaded[url]))
                done = {o.url: o for o in announcing.outcomes}
                outcomes = [done.get(o.url, o) for o in round_.outcomes]
        return PushReport(version, self.kind, tuple(outcomes), next(iter(names.values()), None))

    def foreign(self, registry: PolicyRegistry, label: str) -> bool:
        """Whether a label may be another registry's name for the base, as tenants that share a server have: what the
        weights are only a probe can tell."""
        if self.stem is None or not label.isdecimal():
            return False
        return int(label) not in registry.versions() or registry.manifest(int(label)).kind != "full"

    def _name(self, server: VllmControl, version: int) -> str:
        return adapter_name(self.stem or server.base()[0], version)

    def _load(self, registry: PolicyRegistry, version: int, base: int, server: VllmControl) -> tuple[str, Outcome]:
        """Load and probe; a name that does not pass is unloaded again."""
        name, folder = self._name(server, version), registry.folder(version).resolve()
        label = server.label()
        if label not in ("default", str(base)) and not self.foreign(registry, label):
            raise PushError(f"{server.url} serves weights {label!r}, the adapter stands on version {base}",
                            fix=f"push version {base} there first, or restart the server with the base model")
        record = read_served(registry.root, server.url)
        if server.paused():
            fix = f"resume it: curl -X POST {server.url}/resume" if record.before is None else \
                f"a push that was cut off left it so; push version {base} there first"  # its weights may be half there
            raise PushError(f"{server.url} is paused", fix=fix)
        write_served(registry.root, record.model_copy(
            update={"holds": tuple(sorted({base, version, *record.holds})), "pushing": version}))
        fresh = _load_once(server, name, folder)
        try:
            nats = parity(server, self.scorer, name, self.bound)
        except Mismatch as error:
            if fresh:
                server.unload_adapter(name)
            write_served(registry.root, record)
            fix = (f"if the server was started with another model than version {base}, push that first; it serves "
                   f"{label!r}" if fresh else "it was loaded before and is another one: restart the server")
            raise Mismatch(f"version {version} was not pushed: {error.what}", fix=fix) from error
        return name, Outcome(server.url, ok=True, changed=fresh, parity_nats=nats, pause_s=0.0 if fresh else None)

    def _announce(self, registry: PolicyRegistry, version: int, base: int, server: VllmControl,
                  outcome: Outcome) -> Outcome:
        """Say that the version serves, then unload what is too old; its files are held until the next publication."""
        stem = self._name(server, version).rpartition("@v")[0]
        found = [(adapter_version(name), name) for name in server.adapters() if name.rpartition("@v")[0] == stem]
        ours = sorted((number, name) for number, name in found if number is not None)
        holds = {base, version, *(number for number, _ in ours)}
        write_served(registry.root, Served(url=server.url, version=version, holds=tuple(sorted(holds))))
        newest = {number for number, _ in ours[-self.keep:]} | {version}
        for number, name in ours:
            if number not in newest:
                server.unload_adapter(name)
        return outcome


def _load_once(server: VllmControl, name: str, folder: Path) -> bool:
    """Load an adapter unless it is there; whether it was loaded now.

    Raises:
        PushError: the name is taken by another folder, or the server refuses.
    """
    there = server.adapters().get(name)
    if there is None:
        try:
            server.load_adapter(name, folder)
            return True
        except PushError:
            there = server.adapters().get(name)  # a call that was sent twice finds its own work
            if there is None:
                raise
    if Path(there) != folder:
        raise PushError(f"{server.url} has {name!r} from {there}, not from {folder}",
                        fix="give each registry a server of its own, or restart this one")
    return False


class AutoPusher:
    """Adapters by hot-loading, full weights by reload, and the base of an adapter first where it is missing."""

    def __init__(self, full: ReloadPusher, adapter: AdapterPusher, *, connect: Connect = VllmControl) -> None:
        self.full, self.adapter, self._connect = full, adapter, connect

    def serves(self, registry: PolicyRegistry, version: int, url: str) -> bool:
        """See :class:`~agentsdpo.publish.push.Pusher`."""
        return self._of(registry, version).serves(registry, version, url)

    def push(self, registry: PolicyRegistry, version: int, servers: Sequence[str]) -> PushReport:
        """See :class:`~agentsdpo.publish.push.Pusher`."""
        base = registry.manifest(version).base
        if base is not None:
            lacking = [url for url in servers if self._lacks(registry, base, url)]
            if lacking:
                self.full.push(registry, base, lacking)  # what fails is found again, and told, by the next line
        return self._of(registry, version).push(registry, version, servers)

    def _of(self, registry: PolicyRegistry, version: int) -> ReloadPusher | AdapterPusher:
        return self.full if registry.manifest(version).kind == "full" else self.adapter

    def _lacks(self, registry: PolicyRegistry, base: int, url: str) -> bool:
        """Whether a server was stopped in the middle of a push, or serves another version than the base."""
        with self._connect(url) as server:
            try:
                if server.paused():
                    return read_served(registry.root, server.url).before is not None
                label = server.label()
                if label in ("default", str(base)) or server.adapters():
                    return False
                return not (self.adapter.foreign(registry, label) and self._serves_base(base, server))
            except PushError:
                return False

    def _serves_base(self, base: int, server: VllmControl) -> bool:
        """Whether the weights of a server are those of the base, whatever it calls them."""
        self.full.scorer.load(base)
        try:
            parity(server, self.full.scorer, server.base()[0], self.full.bound)
        except Mismatch:
            return False
        return True
