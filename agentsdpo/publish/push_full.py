"""Full weights from disk into a running server: pause, reload, reset the cache, name the version, resume, probe.

The order is required. A reload leaves prefix cache and version label as they were: without the reset, prompts seen
before are answered by neither model; a label that changes while tokens are sampled puts the border of a span in the
wrong place. Requests in flight are kept: their K/V is computed anew under the new weights, and their spans say from
which token on.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from agentsdpo.errors import PushError
from agentsdpo.publish.control import ServerGone, VllmControl
from agentsdpo.publish.push import (
    BOUND,
    PROBED,
    Connect,
    Outcome,
    PushReport,
    Round,
    Scorer,
    mean_difference,
    parity,
)
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.publish.served import Served, pushing_to, read_served, write_served

UNKNOWN = "unknown"
"""Label of weights that are no version's: what is sampled from them cannot be trained on."""


@dataclass(frozen=True)
class _Old:
    """What a push replaces: label and folder, and what the server said greedily to the probe when it could be asked."""

    label: str
    folder: str
    said: tuple[list[int], list[float]] | None


class ReloadPusher:
    """Pushes full weights by ``reload_weights``; implements :class:`~agentsdpo.publish.push.Pusher`.

    Folders must be visible to the servers under the same path.

    Args:
        scorer: says what the log-probs must be.
        bound: largest mean absolute difference, nats.
        connect: opens a server.
    """

    kind = "full"

    def __init__(self, scorer: Scorer, *, bound: float = BOUND, connect: Connect = VllmControl) -> None:
        self.scorer, self.bound, self._connect = scorer, bound, connect

    def serves(self, registry: PolicyRegistry, version: int, url: str) -> bool:
        """See :class:`~agentsdpo.publish.push.Pusher`."""
        with self._connect(url) as server:
            record = read_served(registry.root, server.url)  # a label alone may be that of another registry
            checked = record.version == version and record.pushing is None
            return checked and server.label() == str(version) and not server.paused()

    def push(self, registry: PolicyRegistry, version: int, servers: Sequence[str]) -> PushReport:
        """See :class:`~agentsdpo.publish.push.Pusher`. Checked before a server is touched: hashes, names, shapes."""
        if registry.manifest(version).kind != "full":
            raise PushError(f"policy version {version} is an adapter, no full weights to reload",
                            fix="push it as an adapter (--with adapter), or train with publish.kind = \"full\"")
        self.scorer.load(version)
        round_ = Round()
        round_.visit(servers, lambda url: self._one(registry, version, url))
        return PushReport(version, self.kind, tuple(round_.outcomes))

    def _one(self, registry: PolicyRegistry, version: int, url: str) -> Outcome:
        with self._connect(url) as server, pushing_to(registry.root, server.url):
            record = read_served(registry.root, server.url)
            model, started_with = server.base()
            there = self._there(registry, version, server, model, record)
            if there is not None:
                return replace(there, url=url)
            _ = server.repacks  # asked for before the pause
            old = self._old(registry, server, record, model, started_with)
            return self._replace(registry, version, server, model, old, record)

    def _there(self, registry: PolicyRegistry, version: int, server: VllmControl, model: str, record: Served
               ) -> Outcome | None:
        """What became of a server that serves the version already, as tenants that share a base find it; else None."""
        if server.label() != str(version) or record.pushing is not None or server.paused():
            return None
        with suppress(PushError):  # the label is of another registry, or lies: push after all
            self._say(server, model)  # into the prefix cache: one that outlived a push would show
            nats = parity(server, self.scorer, model, self.bound)
            held = record.holds if server.adapters() else ()
            write_served(registry.root, Served(url=server.url, version=version, holds=tuple(sorted({version, *held}))))
            return Outcome(server.url, ok=True, parity_nats=nats)
        return None

    def _old(self, registry: PolicyRegistry, server: VllmControl, record: Served, model: str,
             started_with: str) -> _Old:
        """What the server serves now.

        Raises:
            PushError: it is paused and not by a push, or has adapters, which stand on its present weights.
        """
        label, loaded = server.label(), list(server.adapters())
        if loaded:
            raise PushError(f"{server.url} has adapters on its present weights: {', '.join(loaded[:3])}",
                            fix="push adapters to it, or unload these first (or restart it)")
        if server.paused():
            if record.before is None:
                raise PushError(f"{server.url} is paused, and no push of this registry did that",
                                fix=f"whoever paused it may resume it: curl -X POST {server.url}/resume")
            return _Old(*record.before, said=None)
        said = self._say(server, model)  # and into the prefix cache: one that outlived the push would show
        known = label.isdecimal() and int(label) in registry.versions()
        folder = str(registry.folder(int(label)).resolve()) if known else started_with  # if wrong, a restore finds out
        return _Old(label, folder, said)

    def _say(self, server: VllmControl, model: str) -> tuple[list[int], list[float]]:
        return server.sample(model, self.scorer.prompt, PROBED, temperature=0.0)

    def _replace(self, registry: PolicyRegistry, version: int, server: VllmControl, model: str, old: _Old,
                 record: Served) -> Outcome:
        """The push itself; whatever stops it, the server does not stay paused."""
        kept = record.version
        holds = {version, *record.holds}
        write_served(registry.root, Served(url=server.url, version=kept, holds=tuple(sorted(holds)), pushing=version,
                                           before=(old.label, old.folder)))
        began, touched = time.monotonic(), False
        try:
            server.pause()
            touched = True
            self._transfer(registry, version, server)
            server.reset_cache()
            server.set_label(str(version))
            server.resume()
            pause = time.monotonic() - began
            nats = parity(server, self.scorer, model, self.bound)
        except BaseException as error:
            state, restored = self._restore(server, model, old, touched=touched)
            if restored:
                write_served(registry.root, Served(url=server.url, version=kept, holds=record.holds))
            if isinstance(error, PushError):
                raise type(error)(f"version {version} was not pushed: {error.what}; {state}", fix=error.fix) from error
            raise
        write_served(registry.root, Served(url=server.url, version=version, holds=(version,)))
        return Outcome(server.url, ok=True, changed=True, parity_nats=nats, pause_s=pause)

    def _transfer(self, registry: PolicyRegistry, version: int, server: VllmControl) -> None:
        server.reload(registry.folder(version).resolve())

    def _restore(self, server: VllmControl, model: str, old: _Old, *, touched: bool) -> tuple[str, bool]:
        """Put back what was served and go on; what came of it in words, and whether it is known to have worked."""
        try:
            if touched:
                self._put_back(server, model, old)
            server.resume()
        except ServerGone:  # or only out of reach, paused on other weights: the record lets the next push go on from it
            return "the server is gone: started anew it has its own weights, else the next push mends it", False
        except PushError as error:
            for act in (server.pause, lambda: server.set_label(UNKNOWN), server.resume):
                with suppress(PushError):  # each on its own: a server that waits for ever helps nobody
                    act()
            return (f"what it served before, {old.label!r}, could not be put back either ({error.what}), so that it "
                    f"serves weights of no version, labelled {UNKNOWN!r}: restart it"), False
        return f"it serves {old.label!r} as before", True

    def _put_back(self, server: VllmControl, model: str, old: _Old) -> None:
        server.pause()
        server.reload(old.folder)
        server.reset_cache()
        server.set_label(old.label)
        server.resume()
        if old.said is not None:
            off = unlike(self._say(server, model), old.said)
            if not off <= self.bound:
                raise PushError(f"the weights in {old.folder} are not those of before, off by {off:.3g} nats")


def unlike(one: tuple[list[int], list[float]], other: tuple[list[int], list[float]]) -> float:
    """Mean absolute difference of log-probs of two greedy answers, up to the first token that differs, nats.

    That one counts: its prefix is the same, and where both models are one, it differs by a near tie alone.

    >>> unlike(([5, 7, 1], [-1.0, -2.0, -9.0]), ([5, 8, 3], [-1.0, -2.5, -1.0]))
    0.25
    """
    shared = next((i for i, (a, b) in enumerate(zip(one[0], other[0], strict=True)) if a != b), len(one[0]) - 1)
    return mean_difference(one[1][:shared + 1], other[1][:shared + 1])
