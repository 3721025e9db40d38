"""The hint writer as a program: every episode of a store that lacks a hint gets one, or is passed over for good.

    agentsdpo hint write CONFIG.toml --store URI [--follow]

Hints go into the store's overlay; episodes are never rewritten. Its pin says how many episodes it has looked at, so
that whoever waits for hints knows how many are still to come. It keeps no state: killed and started again it reads the
episodes without a hint once more and writes what is missing; where hints go by other episodes, those with a hint too.
"""

import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

from agentsdpo.config import RunConfig
from agentsdpo.hint.hinter import Hinter, make_hinter
from agentsdpo.programs.flow import HINTS, TTL_S, episodes_in
from agentsdpo.replay.ids import Key
from agentsdpo.replay.log import Located
from agentsdpo.replay.overlay import Slot
from agentsdpo.replay.snapshot import Snapshot
from agentsdpo.replay.store import ReplayStore
from agentsdpo.replay.upkeep.pinned import pin
from agentsdpo.suites import make_suite
from agentsdpo.types import Hint, Json

POLL_S = 0.25
"""Seconds between two looks at a store that did not grow."""
AT_ONCE = 256
"""Most episodes whose hints are written together."""


class HintWriter:
    """Goes through the episodes of one store.

    Args:
        store: read, and added to.
        hinter: makes the hints.

    Attributes:
        written, silent: hints written; episodes for which there is nothing to say.
        broken: episodes of which a source failed, as a model that does not answer; not asked again in this life.
    """

    def __init__(self, store: ReplayStore, hinter: Hinter) -> None:
        self.store, self.hinter = store, hinter
        self.written = self.silent = self.broken = 0
        self._looked: set[tuple[str, str]] = set()
        self._pinned = float("-inf")
        view = store.snapshot()
        self.hinter.remember(view.gather(dict.fromkeys(
            (slot.key.episode_id, slot.key.attempt) for slot in view.late.latest
            if slot.kind == "hint" and slot.key in view.rows)))

    def look(self) -> int:
        """Write the hints that are missing now; returns how many episodes were looked at."""
        view = self.store.snapshot()
        fresh = list(self._fresh(view))
        names = iter(dict.fromkeys((row.key.episode_id, row.key.attempt) for row in fresh))
        count = 0
        while some := list(islice(names, AT_ONCE)):
            self._write(view, some)
            count += len(some)
        self._looked.update((row.content_sha256, row.status) for row in fresh)
        if fresh or time.monotonic() - self._pinned > TTL_S / 10:
            pin(self.store, HINTS, view, ttl_s=TTL_S, state={"episodes": episodes_in(view)})
            self._pinned = time.monotonic()
        return count

    def _fresh(self, view: Snapshot) -> Iterable[Located]:
        """Rows that were not looked at and have no late hint. What replaces a salvaged row is looked at anew."""
        return (row for key, row in view.rows.items()
                if (row.content_sha256, row.status) not in self._looked and Slot("hint", key) not in view.late.latest)

    def _write(self, view: Snapshot, names: list[tuple[str, int]]) -> None:
        some = list(view.gather(names))
        self.hinter.remember(episode for episode in some if episode.hint)
        bare = [episode for episode in some if not episode.hint]
        broken = self.hinter.counts["broken"]
        found = [(episode, hint) for episode, hint in zip(bare, self.hinter.hints(bare), strict=True) if hint]
        hints: dict[Key | str, Hint] = {key: hint for episode, hint in found  # of this attempt, not of the latest one
                                        for key in view.attempt(episode.episode_id, episode.attempt)}
        self.store.add_hints(hints)
        broken = self.hinter.counts["broken"] - broken
        self.silent += len(bare) - len(found) - broken
        self.broken += broken
        self.written += len(found)

    def words(self) -> str:
        """What came of it so far, for people."""
        failed = f", {self.broken} without a hint because a source failed" if self.broken else ""
        return f"{self.written} hints written, {self.silent} episodes with nothing to say{failed}"

    def json(self) -> Json:
        """The same as numbers."""
        return {"written": self.written, "silent": self.silent, "broken": self.broken}


def write_hints(config: RunConfig, uri: Path | str, *, follow: bool = False,
                say: Callable[[str], None] = lambda text: None) -> Json:
    """Write hints to the episodes of a store that lack one.

    Args:
        config: the suite, whose grader speaks, and ``[hint]``.
        uri: folder of a replay store or ``s3://bucket/prefix``.
        follow: go on with what is appended later, until interrupted.
        say: told of progress, one line at a time.

    Returns:
        ``store``, ``written``, ``silent``, ``broken``, and ``words``, which say it to people.

    Raises:
        StoreError: no such store. ConfigError: no such suite.
        KeyboardInterrupt: interrupted; all hints made are in the store.
    """
    store = ReplayStore.open(uri, create=False)
    writer = HintWriter(store, make_hinter(config.hint, make_suite(config)))
    told = 0.0
    try:
        while True:
            looked = writer.look()
            if looked and time.monotonic() - told > 10.0:
                told = time.monotonic()
                say(writer.words())
            if not follow:
                break
            if not looked:
                time.sleep(POLL_S)
    finally:
        store.close()
    return {"store": store.storage.uri, **writer.json(), "words": writer.words()}
