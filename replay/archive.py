"""Archives: the entries of many closed streams in one file, ``log/archive/<uuid7>.jsonl``, verbatim, one per line.

Ten thousand writers leave ten thousand folders of small files, which would all have to be looked at. An ``archive``
operation of the maintenance stream names the file, its hash, and where each stream in it ends; from then on the stream
is read from there. Its own files are deleted by ``gc``.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from agentsdpo.errors import CorruptionError
from agentsdpo.replay.storage import Storage, read_whole

FOLDER = "archive"
"""Name below ``log/`` that is no stream."""


class Place(NamedTuple):
    """The archive a stream is in, what that file must be, and the stream's last entry."""

    path: str
    size: int
    sha256: str
    seq: int
    sha: str


def pack(streams: Iterable[list[bytes]]) -> bytes:
    """An archive of these streams, each given as its entries from number 0 on."""
    return b"".join(raw + b"\n" for entries in streams for raw in entries)


class Packs:
    """Archives that were read for one pass over the log, each file once."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._streams: dict[str, dict[bytes, list[bytes]]] = {}

    def entry(self, writer: str, seq: int, place: Place) -> bytes | None:
        """Bytes of one entry, None behind the end of its stream.

        Raises:
            CorruptionError: the archive is missing, or not the file that was committed.
        """
        if place.path not in self._streams:
            self._streams[place.path] = _split(self.whole(place))
        entries = self._streams[place.path].get(writer.encode(), [])
        if seq < len(entries):
            return entries[seq]
        if seq <= place.seq:
            raise CorruptionError(f"archive {self._storage.uri}/{place.path} lacks entry {seq} of stream {writer}",
                                  fix="restore it from a backup")
        return None

    def whole(self, place: Place) -> bytes:
        """All of an archive, verified. Raises as :meth:`entry`."""
        data = read_whole(self._storage, place.path)
        if len(data) != place.size or hashlib.sha256(data).hexdigest() != place.sha256:
            raise CorruptionError(f"archive {self._storage.uri}/{place.path} is not the file that was committed",
                                  fix="restore it from a backup")
        return data


def _split(data: bytes) -> dict[bytes, list[bytes]]:
    """Entries by writer; canonical JSON ends with ``"writer":"..."}``, as its keys are sorted."""
    found: dict[bytes, list[bytes]] = defaultdict(list)
    for line in data.splitlines():
        found[line.rsplit(b'"writer":"', 1)[-1][:-2]].append(line)
    return found
