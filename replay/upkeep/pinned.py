"""Pins: readers that need an old snapshot say so, and ``gc`` leaves its rows alone.

``pins/<reader>.json`` holds the snapshot's position and whatever the reader wants others to see. A pin lapses when its
file has not been written for ``ttl_s``, by the store's own clock: a dead reader holds nothing for ever.
"""

import json
import re
from dataclasses import asdict, dataclass

from agentsdpo.errors import ConfigError, CorruptionError
from agentsdpo.replay.canonical import canonical_json
from agentsdpo.replay.ids import uuid7
from agentsdpo.replay.log import MAINT, RowExpired
from agentsdpo.replay.snapshot import Snapshot
from agentsdpo.replay.storage import Storage
from agentsdpo.replay.store import ReplayStore
from agentsdpo.types import Json

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class Pin:
    """One reader's pin: the position it needs, and when it lapses, in microseconds of the store's clock."""

    reader: str
    snapshot: dict[str, tuple[int, str]]
    ttl_s: float
    state: Json
    lapses_us: int

    @property
    def maintained(self) -> int:
        """Last entry of the maintenance stream this reader has seen, -1 for none."""
        return self.snapshot.get(MAINT, (-1, ""))[0]

    def as_json(self) -> Json:
        """For the command line."""
        return asdict(self)


def pin(store: ReplayStore, reader: str, snapshot: Snapshot, *, ttl_s: float = 3600.0,
        state: Json | None = None) -> None:
    """Keep the rows of a snapshot from being reclaimed; call it again to keep them longer.

    Args:
        store: the snapshot's store.
        reader: who; letters, digits, ``._-``, at most 100.
        snapshot: what is needed.
        ttl_s: seconds until the pin lapses unless it is renewed.
        state: anything others should see, such as the counters of a rate limiter.

    Raises:
        RowExpired: rows of the snapshot were reclaimed before the pin stood: take a new snapshot and pin that.
        ConfigError: a name that is none, or a time that is not positive.
        StoreError: the pin cannot be written.
    """
    if not _NAME.fullmatch(reader) or not ttl_s > 0:
        raise ConfigError(f"no pin for reader {reader!r} with ttl_s={ttl_s}",
                          fix="use up to 100 letters, digits and ._- as the name, and a positive time")
    body = {"v": 1, "reader": reader, "snapshot": snapshot.vector, "ttl_s": ttl_s, "state": state or {}}
    store.storage.replace(_path(reader), canonical_json(body))
    fold = store.fold()  # read after the pin stands: a gc that has not seen the pin is in there, or comes later
    for row in snapshot.rows.values() if fold.gone else ():
        now = fold.rows[row.key]
        if (now if now.content_sha256 == row.content_sha256 else row).path in fold.gone:
            unpin(store, reader)
            raise RowExpired(f"branch {row.key} of the snapshot was reclaimed before the pin of {reader} stood",
                             fix="take a new snapshot and pin that")


def unpin(store: ReplayStore, reader: str) -> None:
    """Let go of a reader's snapshot; a missing pin is no error."""
    store.storage.remove(_path(reader))


def pins(store: ReplayStore) -> list[Pin]:
    """All pins, lapsed ones too, by reader.

    Raises:
        CorruptionError: a pin cannot be read, so that nobody knows what it protects.
    """
    found = []
    for info in store.storage.list("pins"):
        try:
            body = json.loads(store.storage.read(info.path))
            vector = {writer: (int(seq), str(sha)) for writer, (seq, sha) in body["snapshot"].items()}
            lapses = info.mtime_us + int(body["ttl_s"] * 1e6)
            found.append(Pin(body["reader"], vector, body["ttl_s"], body["state"], lapses))
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptionError(f"pin {store.storage.uri}/{info.path} cannot be read: {error!r}",
                                  fix="pin again, or remove it with unpin") from error
    return found


def standing(store: ReplayStore) -> list[Pin]:
    """Pins that have not lapsed. Raises as :func:`pins`."""
    found = pins(store)
    now = clock_us(store.storage) if found else 0
    return [one for one in found if one.lapses_us > now]


def clock_us(storage: Storage) -> int:
    """The store's own clock: the time it gives a file written now, in microseconds. No machine's clock is asked."""
    path = f"clock/{uuid7()}"
    storage.create(path, b"tick")
    try:
        return next(info.mtime_us for info in storage.list("clock") if info.path == path)
    finally:
        storage.remove(path)


def _path(reader: str) -> str:
    return f"pins/{reader}.json"
