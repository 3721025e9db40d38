"""An immutable view of the store: the rows that were live when it was taken."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa

from agentsdpo.errors import CorruptionError, StoreError
from agentsdpo.replay.canonical import canonical_json
from agentsdpo.replay.ids import Key
from agentsdpo.replay.log import Located, Vector
from agentsdpo.replay.overlay import LateHint, resolve
from agentsdpo.replay.rows import Row, to_episode
from agentsdpo.replay.schema import SCALARS, SCHEMA, conform
from agentsdpo.replay.segment import GroupCache, open_segment
from agentsdpo.replay.storage import Storage
from agentsdpo.types import Episode


class Snapshot:
    """Rows addressed by key; later appends do not show. Made by :meth:`ReplayStore.snapshot`.

    Attributes:
        rows: live rows by key, as the log describes them.
        vector: per log stream the last entry that is part of this view.
        conflicts: keys with two whole rows of unequal content; both are withheld.
    """

    def __init__(self, storage: Storage, rows: Mapping[Key, Located], vector: Vector, conflicts: frozenset[Key],
                 hints: Mapping[Key, LateHint], cache: GroupCache) -> None:
        self.storage, self.rows, self.vector, self.conflicts = storage, rows, vector, conflicts
        self._hints, self._cache = hints, cache

    @property
    def id(self) -> str:
        """Hash of the position in every stream: equal ids mean equal rows."""
        return hashlib.sha256(canonical_json(sorted((w, *at) for w, at in self.vector.items()))).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def keys(self) -> list[Key]:
        """Keys of all rows, ascending."""
        return sorted(self.rows)

    def read(self, keys: Iterable[Key]) -> list[Row]:
        """The rows of these keys, in this order, verified: page checksums on the way in, then the token hash.

        Raises:
            StoreError: a key is not part of the snapshot.
            CorruptionError: the bytes are not those that were written; names file, row group and key.
        """
        return [self._read(self.located(key)) for key in keys]

    def located(self, key: Key) -> Located:
        """Where a row is. Raises StoreError when the key is not part of the snapshot."""
        try:
            return self.rows[key]
        except KeyError:
            state = "is in conflict" if key in self.conflicts else "is not part of this snapshot"
            raise StoreError(f"branch {key} {state} of {len(self)} branches", fix="refresh, or list keys()") from None

    def _read(self, at: Located) -> Row:
        group = self._cache.get(at)
        where = f"{self.storage.uri}/{at.path}, row group {at.row_group}, branch {at.key}"
        if at.index >= len(group) or group.key(at.index) != at.key:
            raise CorruptionError(f"{where}: another row stands in its place", fix="restore the file from a backup")
        if group.tokens_sha256(at.index).hex() != at.tokens_sha256:
            raise CorruptionError(f"{where}: tokens and log-probs do not hash to what was committed",
                                  fix="restore the file from a backup")
        return group.row(at.index, resolve(self._hints.get(at.key), at))

    def episode(self, episode_id: str, attempt: int | None = None) -> Episode:
        """A whole episode (the latest attempt unless named), with the newest hint.

        Raises:
            StoreError: there is none.
            CorruptionError: as :meth:`read`.
        """
        found = [key for key in self.keys() if key.episode_id == episode_id]
        attempt = max((key.attempt for key in found), default=0) if attempt is None else attempt
        keys = [key for key in found if key.attempt == attempt]
        if not keys:
            raise StoreError(f"no attempt {attempt} at episode {episode_id!r} among {len(self)} branches",
                             fix="list keys()")
        rows = self.read(keys)
        return to_episode(self._tables(keys, None)).model_copy(update={"hint": rows[0].hint})

    def scalars(self) -> pa.Table:
        """All columns one filters by, one row per key, keys ascending: no arrays, no JSON, no hashes."""
        return self._tables(self.keys(), SCALARS).select(SCALARS)

    def to_arrow(self) -> pa.Table:
        """Everything, one row per key, keys ascending. Hints are those of the append; overlays are not merged in."""
        return self._tables(self.keys(), None)

    def _tables(self, keys: list[Key], columns: list[str] | None) -> pa.Table:
        """Rows of these keys in this release's columns, page checksums verified."""
        files: dict[str, list[Located]] = defaultdict(list)
        for key in keys:
            files[self.rows[key].path].append(self.rows[key])
        parts = [SCHEMA.empty_table()]
        parts += [conform(self._file_rows(rows, columns)) for rows in files.values()]
        order = {key: i for i, key in enumerate(keys)}
        place = np.array([order[row.key] for rows in files.values() for row in rows], np.int64)
        return pa.concat_tables(parts).take(np.argsort(place))

    def _file_rows(self, rows: list[Located], columns: list[str] | None) -> pa.Table:
        """Some rows of one file."""
        with open_segment(self.storage, rows[0]) as file:
            try:
                sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
                wanted = sorted({row.row_group for row in rows})
                starts = {group: sum(sizes[g] for g in wanted if g < group) for group in wanted}
                table = file.read_row_groups(wanted, columns=columns, use_threads=False)
                return table.take([starts[row.row_group] + row.index for row in rows])
            except (pa.ArrowException, OSError, IndexError) as error:
                where = f"{self.storage.uri}/{rows[0].path}, branch {rows[0].key}"
                raise CorruptionError(f"{where} cannot be read: {error}",
                                      fix="restore the file from a backup") from error
