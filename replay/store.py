"""The store: append episodes, take snapshots, keep late hints and policy manifests.

    store = ReplayStore.open("runs/1/replay")
    store.append(episodes)                  # durable and visible when it returns
    view = store.snapshot()                 # never changes
    rows = view.read(view.keys()[:32])      # verified

An append is one Parquet file and one log entry. A crash between the two leaves a file that nothing names.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import RLock

import pyarrow as pa

from agentsdpo.errors import CorruptionError, RowError, StoreError
from agentsdpo.replay import layout, overlay, snapfile
from agentsdpo.replay.asking import Asking
from agentsdpo.replay.folding import Fold
from agentsdpo.replay.ids import uuid7
from agentsdpo.replay.late import LateValues
from agentsdpo.replay.log import Located, LogWriter, RowExpired, Vector, WriterFenced, located
from agentsdpo.replay.overlay import Entry, Overlays
from agentsdpo.replay.policies import Policies
from agentsdpo.replay.rows import to_rows
from agentsdpo.replay.rules import check_episode
from agentsdpo.replay.segment import GroupCache, encode
from agentsdpo.replay.snapshot import Snapshot
from agentsdpo.replay.storage import LocalStorage, Storage, mend, storage_for
from agentsdpo.types import Episode, Json


class ReplayStore(Asking, LateValues):
    """Episodes in one folder, or under one prefix of a bucket; open it by :meth:`open`.

    Any number of processes may append and read at once. An object may be shared by threads; after a fork the child
    writes a log stream of its own.

    >>> import tempfile
    >>> from agentsdpo.replay.example import episode
    >>> store = ReplayStore.open(tempfile.mkdtemp())
    >>> store.append([episode(0), episode(1)])
    >>> len(store), store.episode("e-1").reward
    (2, 0.5)
    """

    def __init__(self, storage: Storage, *, cache_bytes: int) -> None:
        self.storage, self.about = storage, layout.read(storage)
        storage.exclusive = storage.exclusive or layout.CONDITIONAL in self.about["features"]
        self._fold, self._cache, self._lock = Fold(storage), GroupCache(storage, cache_bytes), RLock()
        self._late = Overlays(storage)
        self._writer: LogWriter | None = None
        self._policies = Policies(storage)

    @classmethod
    def open(cls, uri: str | Path, create: bool = True, *, cache_bytes: int = 256 << 20,
             reserve_bytes: int = 0) -> "ReplayStore":
        """Open a store, making it first if nothing is there and ``create`` is true. Nothing is read yet.

        Args:
            uri: folder of the store, on a file system with hard links and an honest fsync, or ``s3://bucket/prefix``.
            cache_bytes: bytes of decoded rows to keep in memory.
            reserve_bytes: room a new store holds back on its disk: when that is full, it is given back so that what is
                under way can be finished, and :meth:`admit` refuses new episodes. An old store takes its own again.

        Raises:
            StorageUnfit: a store is to be made where none can be kept.
            StoreError: no store and ``create`` is false, a folder of something else, or a newer format.
        """
        storage = storage_for(uri)
        if create:
            layout.create(storage, reserve_bytes=reserve_bytes)
        store = cls(storage, cache_bytes=cache_bytes)
        if reserve_bytes:
            layout.take_reserve(storage, store.about)
        return store

    def admit(self) -> None:
        """Let a new episode begin. Raises StoreError when the disk was full and the reserve has been spent since."""
        layout.check_reserve(self.storage, self.about)

    @property
    def root(self) -> Path:
        """Folder of a local store. Raises StoreError for a store elsewhere."""
        if not isinstance(self.storage, LocalStorage):
            raise StoreError(f"{self.storage.uri} is no local folder", fix="use store.storage")
        return self.storage.root

    # -------------------------------------------------------------------------------------------------- writing

    def append(self, episodes: Sequence[Episode], *, salvaged: bool = False) -> None:
        """Write episodes, all or none: durable and visible to every reader when this returns.

        Appending an episode again with the same content is harmless.

        Args:
            episodes: what to write.
            salvaged: they are what a crash left of them (:mod:`agentsdpo.replay.upkeep.recover`); a whole episode that
                is appended under the same id replaces them.

        Raises:
            TrainForbidden: an episode is not stamped ``train_allowed``.
            TokenizerMismatch: an episode's tokenizer is not that of the recorded policy that sampled it.
            RowError: a row rule is broken, or a key was used before for other content.
            StoreError: no space, no permission or a failing disk; nothing of this append is visible then.
        """
        if not episodes:
            return
        with self._lock:
            for episode in episodes:
                check_episode(episode)
            self._policies.check(episodes)
            self.append_rows(lambda writer_id: to_rows(episodes, writer_id, salvaged=salvaged))

    def append_rows(self, rows: Callable[[str], pa.Table]) -> None:
        """Write rows as they are, all or none: the end of :meth:`append`, whose RowError and StoreError it raises.

        Args:
            rows: makes the table, given the id of the writer; the caller has checked what it holds.
        """
        with self._lock:
            self.check_writable()
            try:
                self._seal(rows)
            except WriterFenced:  # somebody took this writer for dead: the same again under a new one
                self._seal(rows)

    def _seal(self, rows: Callable[[str], pa.Table]) -> None:
        """Segment first, then the log entry that makes it count."""
        writer = self._own_writer()
        data, op = encode(rows(writer.writer_id))
        path = f"data/{datetime.now(UTC):%Y%m%d}/{writer.writer_id}-{uuid7()}.parquet"
        self._check_keys(op)
        self.storage.create(path, data)
        try:
            self._commit({**op, "path": path}, again=False)  # the file is named after its writer
        except StoreError:
            if not writer.names(path):
                self.storage.remove(path)
            raise

    def _commit(self, op: Json, *, again: bool = True) -> None:
        """Commit one operation, under a new writer (``again``) where somebody closed ours; a failed one is given up."""
        writer, self._writer = self._own_writer(), None  # after a failure its last entry is in doubt
        try:
            writer.commit([op])
            self._writer = writer
        except WriterFenced:
            if not again:
                raise
            self._commit(op, again=False)

    @property
    def writer_id(self) -> str:
        """Id of the log stream that the next append goes to; opened now if there is none, or StoreError is raised."""
        with self._lock:
            self.check_writable()
            return self._own_writer().writer_id

    def _own_writer(self) -> LogWriter:
        if self._writer is None or self._writer.pid != os.getpid():
            self._writer = LogWriter(self.storage)
        return self._writer

    def check_writable(self) -> None:
        """Raises StoreError when only a newer release may write here."""
        if int(self.about["min_writer"]) > layout.RELEASE:
            raise StoreError(f"{self.storage.uri} needs writer {self.about['min_writer']}, "
                             f"this is writer {layout.RELEASE}",
                             fix="install a newer agentsdpo; reading works")

    def _check_keys(self, op: Json) -> None:
        """Refuse a key that stands twice in one append, or that the log already gives to other content."""
        rows = located({**op, "path": ""}, 0)
        if len({row.key for row in rows}) < len(rows):
            raise RowError("an append holds the same branch of the same attempt twice",
                           fix="give every episode an id of its own (agentsdpo.replay.uuid7)")
        self._fold.refresh()
        for row in rows:
            have = self._fold.rows.get(row.key)
            if have and have.content_sha256 != row.content_sha256 and have.status != "salvaged":
                raise RowError(f"branch {row.key} is already stored with other content",
                               fix="never reuse an episode id; count attempts up for a second try")

    def _overlay(self, kind: str, make: Callable[[Snapshot], list[Entry]]) -> None:
        """Write late values, made from the store as it is now, and commit them."""
        with self._lock:
            self.check_writable()
            view = self.snapshot()
            entries = make(view)
            if not entries:
                return
            marked = [(entry, view.located(entry.slot.key), self._late.revision(entry.slot)) for entry in entries]
            self.append_overlay(kind, overlay.encode(kind, marked), len(marked))

    def append_overlay(self, kind: str, data: bytes, rows: int) -> None:
        """Commit an overlay file of late values as it is; the caller has checked that its ``rows`` fit rows here."""
        with self._lock:
            self.check_writable()
            path = f"overlay/{kind}/{uuid7()}.parquet"
            self.storage.create(path, data)
            self._commit({"op": "overlay", "kind": kind, "path": path, "bytes": len(data), "rows": rows,
                          "sha256": hashlib.sha256(data).hexdigest()})

    def close(self) -> None:
        """Close this object's log stream, so that readers stop looking at it. Appending again opens a new one."""
        with self._lock:
            if self._writer is not None and self._writer.pid == os.getpid():
                with suppress(WriterFenced):  # closed by somebody else
                    self._commit({"op": "close"}, again=False)
            self._writer = None

    # -------------------------------------------------------------------------------------------------- reading

    def snapshot(self, at: Mapping[str, Sequence] | None = None) -> Snapshot:
        """The rows that are live now, or were at the position ``at`` (a snapshot's ``vector``).

        Costs the log entries that are new since the last call.

        Raises:
            CorruptionError: a log entry or an overlay is damaged or missing.
            StoreError: the log does not reach ``at``, or holds operations of a newer release.
        """
        with self._lock:
            if at is not None:
                fold = Fold(self.storage)
                fold.refresh({writer: (int(seq), str(sha)) for writer, (seq, sha) in at.items()})
                return self._view(fold, snapfile.late(fold).read(fold.overlays, fold.outdone))
            self._fold.refresh()
            begun = self._late if self._late.files else snapfile.late(self._fold)
            self._late = begun.read(self._fold.overlays, self._fold.outdone)
            return self._view(self._fold, self._late)

    def _view(self, fold: Fold, late: Overlays) -> Snapshot:
        vector: Vector = dict(fold.vector)
        return Snapshot(self.storage, fold.live(), vector, frozenset(fold.conflicts), late, self._cache, self._relocate,
                        dict(fold.closures))

    def fold(self) -> Fold:
        """What the log says now, for maintenance; not to be changed. It moves on with the next snapshot or append.

        Raises:
            CorruptionError, StoreError: as :meth:`snapshot`.
        """
        with self._lock:
            self._fold.refresh()
            return self._fold

    def close_group(self, group_id: str, episode_ids: Sequence[str]) -> None:
        """Say that a group has these members and will get no more, though fewer than its size came to an end.

        Raises:
            StoreError: the entry cannot be written.
        """
        with self._lock:
            self.check_writable()
            self._commit({"op": "group_close", "group_id": group_id, "episode_ids": sorted(set(episode_ids))})

    def _relocate(self, row: Located) -> Located:
        """Where a row of an older snapshot is now that its file is gone.

        Raises:
            RowExpired: it was evicted, and its file reclaimed.
            CorruptionError: no maintenance took the file away: it is lost.
        """
        with self._lock:
            self._fold.refresh()
            now = self._fold.rows.get(row.key, row)
        if now.path != row.path and now.content_sha256 == row.content_sha256:
            return now
        if row.path in self._fold.gone:
            raise RowExpired(f"branch {row.key} was evicted since this snapshot was taken, and its file {row.path} "
                             "reclaimed", fix="take a new snapshot; a pin keeps the rows of an old one")
        raise CorruptionError(f"{self.storage.uri}/{row.path} is missing though the log names it",
                              fix=mend(self.storage.uri))

    # ------------------------------------------------------------------------------------------------- policies

    def record_policy(self, version: int, manifest: Json) -> None:
        """Say what a policy version is: ``weights_id``, ``tokenizer_sha256``, ``chat_template_sha256``, ``vocab_size``.

        Recording the same version again is harmless as long as these four agree.

        Raises:
            StoreError: the version was recorded with other weights, tokenizer, template or vocabulary, or is negative.
        """
        self._policies.record(version, manifest)

    def policy(self, version: int) -> Json | None:
        """The manifest of a policy version, None when it was not recorded.

        Raises:
            CorruptionError: the file is not JSON.
        """
        return self._policies.get(version)
