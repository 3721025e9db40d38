"""An immutable view of the store: the rows that were live when it was taken."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from agentsdpo.errors import ConfigError, CorruptionError, StoreError
from agentsdpo.replay.canonical import canonical_json
from agentsdpo.replay.ids import Key
from agentsdpo.replay.log import Located, MissingSegment, Vector
from agentsdpo.replay.overlay import Overlays
from agentsdpo.replay.rows import Row, RowReader, Tokens, to_episode
from agentsdpo.replay.schema import SCALARS, SCHEMA, conform
from agentsdpo.replay.segment import GroupCache, open_segment
from agentsdpo.replay.storage import Storage, listing, mend
from agentsdpo.replay.where import select
from agentsdpo.types import Episode

if TYPE_CHECKING:
    import polars

Condition = str | pc.Expression
"""What rows to keep: text in the language of :mod:`agentsdpo.replay.where`, or an Arrow expression."""
_GATHERED = (256, 1 << 18)
"""Branches and tokens of whole episodes that are read at once."""
_HASHED = [*Key._fields, "token_ids", "token_kind", "logprobs", "kept_ids", "kept_counts"]


class Snapshot:
    """Rows addressed by key; later appends do not show. Made by :meth:`ReplayStore.snapshot`.

    Attributes:
        rows: live rows by key, as the log describes them.
        vector: per log stream the last entry that is part of this view.
        conflicts: keys with two whole rows of unequal content; both are withheld.
        late: hints, rewards, labels and trainers' log-probs that came after the rows.
        closures: groups that were closed by name, with the episodes that belong to each.
    """

    def __init__(self, storage: Storage, rows: Mapping[Key, Located], vector: Vector, conflicts: frozenset[Key],
                 late: Overlays, cache: GroupCache, relocate: Callable[[Located], Located],
                 closures: Mapping[str, Sequence[str]]) -> None:
        self.storage, self.rows, self.vector, self.conflicts = storage, rows, vector, conflicts
        self.late, self._cache, self._relocate, self.closures = late, cache, relocate, closures

    @property
    def id(self) -> str:
        """Hash of the position in every stream: equal ids mean equal rows."""
        return hashlib.sha256(canonical_json(sorted((w, *at) for w, at in self.vector.items()))).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def keys(self, where: Condition | None = None, among: Iterable[Key] | None = None) -> list[Key]:
        """Keys of all rows, or of those a condition holds for, ascending. Arguments and errors as :meth:`scalars`."""
        if where is None:
            return sorted(self.rows if among is None else among)
        found = self.scalars(where, among).select(Key._fields).to_pylist()
        return [Key(**row) for row in found]

    def read(self, keys: Iterable[Key]) -> list[Row]:
        """The rows of these keys, in this order, verified: page checksums on the way in, then the token hash.

        Raises:
            StoreError: a key is not part of the snapshot.
            RowExpired: a row was evicted since, and its file reclaimed; :func:`~agentsdpo.replay.pin` prevents that.
            CorruptionError: the bytes are not those that were written; names file, row group and key.
        """
        return [self._read(self.located(key)) for key in keys]

    def located(self, key: Key) -> Located:
        """Where a row is. Raises StoreError when the key is not part of the snapshot."""
        try:
            return self.rows[key]
        except KeyError:
            state = "is in conflict" if key in self.conflicts else "is not part of this snapshot"
            raise StoreError(f"branch {key} {state} of {len(self)} branches",
                             fix=f"refresh, or {listing(self.storage.uri)}") from None

    def tokens(self, keys: Iterable[Key]) -> list[Tokens]:
        """The token columns of these keys alone, in this order, verified like :meth:`read` and several times as fast.

        Row groups that are not in the store's cache are decoded side by side on up to four threads.

        >>> from agentsdpo.replay.example import example
        >>> view = example().snapshot()
        >>> row = view.tokens(view.keys()[:1])[0]
        >>> len(row.token_ids) == len(row.token_kind) == len(row.logprobs)
        True

        Raises:
            StoreError, RowExpired, CorruptionError: as :meth:`read`.
        """
        wanted = [self.located(key) for key in keys]
        groups: dict[tuple[str, int], list[int]] = defaultdict(list)
        for place, at in enumerate(wanted):
            groups[at.path, at.row_group].append(place)

        def decode(places: list[int]) -> list[tuple[int, Tokens]]:
            held: dict[tuple[str, int], RowReader] = {}

            def fetch(at: Located) -> RowReader:
                if (at.path, at.row_group) not in held:
                    held[at.path, at.row_group] = self._cache.tokens(at)
                return held[at.path, at.row_group]

            return [(place, group.tokens(at.index)) for place in places
                    for group, at in [self._verified(wanted[place], fetch)]]

        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            found = dict(chain.from_iterable(pool.map(decode, groups.values())))
        return [found[place] for place in range(len(wanted))]

    def _read(self, at: Located) -> Row:
        group, at = self._verified(at, self._cache.get)
        return self.late.onto_row(group.row(at.index), at)

    def _verified(self, at: Located, fetch: Callable[[Located], RowReader]) -> tuple[RowReader, Located]:
        """The row group of a row and where it is now, once key and token hash are those that were committed."""
        group, at = self._group(at, fetch)
        where = f"{self.storage.uri}/{at.path}, row group {at.row_group}, branch {at.key}"
        if at.index >= len(group) or group.key(at.index) != at.key:
            raise CorruptionError(f"{where}: another row stands in its place", fix=mend(self.storage.uri))
        if at.index not in group.verified:
            if group.tokens_sha256(at.index).hex() != at.tokens_sha256:
                raise _changed(where, self.storage.uri)
            group.verified.add(at.index)
        return group, at

    def _group(self, at: Located, fetch: Callable[[Located], RowReader]) -> tuple[RowReader, Located]:
        """The row group of a row, and where that is by now: compaction may have moved it since."""
        while True:
            try:
                return fetch(at), at
            except MissingSegment:
                at = self._relocate(at)

    def attempt(self, episode_id: str, attempt: int | None = None) -> list[Key]:
        """Keys of one attempt at an episode (the latest unless named), ascending; none when there is none."""
        found = sorted(self._by_episode.get(episode_id, ()))
        attempt = max((key.attempt for key in found), default=0) if attempt is None else attempt
        return [key for key in found if key.attempt == attempt]

    @cached_property
    def _by_episode(self) -> dict[str, list[Key]]:
        """Keys by episode id, in any order: sorting all of them would cost more than whoever asks for one episode."""
        found: dict[str, list[Key]] = defaultdict(list)
        for key in self.rows:
            found[key.episode_id].append(key)
        return found

    def episode(self, episode_id: str, attempt: int | None = None) -> Episode:
        """A whole episode (the latest attempt unless named), with the newest hint and reward.

        Raises:
            StoreError: there is none.
            CorruptionError: as :meth:`read`.
        """
        keys = self.attempt(episode_id, attempt)
        if not keys:
            raise StoreError(f"no attempt {attempt or 0} at episode {episode_id!r} among {len(self)} branches",
                             fix=listing(self.storage.uri))
        return next(self.gather([(episode_id, keys[0].attempt)]))

    # --------------------------------------------------------------------------------------------------- asking

    def branches(self, where: Condition | None = None) -> Iterator[Row]:
        """Rows a condition holds for, by key ascending, read one by one; see :meth:`read` and :meth:`scalars`."""
        return (self._read(self.rows[key]) for key in self.keys(where))

    def episodes(self, where: Condition | None = None) -> Iterator[Episode]:
        """Episodes with a branch that a condition holds for, as :meth:`gather` reads them; every attempt is one."""
        return self.gather(dict.fromkeys((key.episode_id, key.attempt) for key in self.keys(where)))

    def gather(self, names: Iterable[tuple[str, int]]) -> Iterator[Episode]:
        """Whole episodes by id and attempt, in this order, with the newest hint and reward.

        Those that stand together are read together, at most about 262,144 tokens or 256 branches at once.

        Raises:
            StoreError: there is no such episode.
            CorruptionError: as :meth:`read`.
        """
        batch: list[list[Key]] = []
        size = np.zeros(2, np.int64)
        for name in names:
            keys = self.attempt(*name)
            if not keys:
                raise StoreError(f"no attempt {name[1]} at episode {name[0]!r} among {len(self)} branches",
                                 fix=listing(self.storage.uri))
            batch.append(keys)
            size += len(keys), sum(self.rows[key].n_tokens for key in keys)
            if (size >= _GATHERED).any():
                yield from self._whole(batch)
                batch, size = [], np.zeros(2, np.int64)
        yield from self._whole(batch)

    def _whole(self, batch: list[list[Key]]) -> Iterator[Episode]:
        """Episodes from the keys of each."""
        keys = list(chain.from_iterable(batch))
        table, start = self._tables(keys, None), 0
        reader = RowReader(table.select(_HASHED))
        for i, key in enumerate(keys):
            if reader.tokens_sha256(i).hex() != self.rows[key].tokens_sha256:
                raise _changed(f"{self.storage.uri}/{self.rows[key].path}, branch {key}", self.storage.uri)
        for own in batch:
            episode = to_episode(table.slice(start, len(own)))
            start += len(own)
            yield self.late.onto_episode(episode, self.rows[own[0]])

    def relogprobs(self, key: Key) -> dict[tuple[int, str], np.ndarray]:
        """Log-probs that trainers computed later: float32[T] per (policy version, trainer id), NaN where not scored.

        Raises:
            StoreError: the key is not part of the snapshot.
            CorruptionError: an overlay is damaged, or was written for other content.
        """
        return self.late.relogprobs(self.located(key))

    def scalars(self, where: Condition | None = None, among: Iterable[Key] | None = None) -> pa.Table:
        """All columns one filters by, one row per key, keys ascending: no arrays, no JSON, no hashes.

        ``reward`` is the latest; ``label``, and ``t_stored``, when a row was committed, come at the end.

        Args:
            where: which rows; see :mod:`agentsdpo.replay.where`.
            among: look at these rows alone, and read no others.

        Raises:
            ConfigError: the condition is not in the language of filters.
            CorruptionError: damaged pages, or an overlay that was written for other content.
        """
        keys = sorted(self.rows if among is None else among)
        table = self._tables(keys, SCALARS).select(SCALARS)
        return select(self.late.onto_table(table, [self.rows[key] for key in keys]), where)

    def to_arrow(self, where: Condition | None = None) -> pa.Table:
        """Everything, one row per key, keys ascending: the columns of the store with the latest rewards, ``label`` and
        ``t_stored``.

        Hints are those of the append, in ``extra``. Raises as :meth:`scalars`.
        """
        keys = self.keys(where)
        return self.late.onto_table(self._tables(keys, None), [self.rows[key] for key in keys])

    def to_polars(self, where: Condition | None = None) -> "polars.DataFrame":
        """What :meth:`to_arrow` gives, as a polars frame.

        Raises:
            ConfigError: polars is not installed.
        """
        try:
            import polars
        except ImportError as error:
            raise ConfigError("to_polars() needs polars, which is not installed",
                              fix="pip install 'agentsdpo[polars]', or use to_arrow()") from error
        return polars.DataFrame(polars.from_arrow(self.to_arrow(where)))

    def stored(self, keys: Iterable[Key], columns: list[str] | None = None) -> pa.Table:
        """Rows of these keys, in this order, with the columns they were written with: nothing late is merged in."""
        return self._tables(list(keys), columns)

    # -------------------------------------------------------------------------------------------------- reading

    def _tables(self, keys: list[Key], columns: list[str] | None) -> pa.Table:
        """Rows of these keys in this release's columns, page checksums verified."""
        order, found, parts = {key: i for i, key in enumerate(keys)}, list[Located](), [SCHEMA.empty_table()]
        files = _by_file([self.rows[key] for key in keys])
        while files:
            rows = files.pop()
            try:
                parts.append(conform(self._file_rows(rows, columns)))
                found += rows
            except MissingSegment:
                files += _by_file([self._relocate(row) for row in rows])
        return pa.concat_tables(parts).take(np.argsort(np.array([order[row.key] for row in found], np.int64)))

    def _file_rows(self, rows: list[Located], columns: list[str] | None) -> pa.Table:
        """Some rows of one file."""
        with open_segment(self.storage, rows[0]) as file:
            try:
                sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
                wanted = sorted({row.row_group for row in rows})
                starts = {group: sum(sizes[g] for g in wanted if g < group) for group in wanted}
                table = file.read_row_groups(wanted, columns=columns, use_threads=False)
                return table.take([starts[row.row_group] + row.index for row in rows])
            except StoreError:
                raise
            except (pa.ArrowException, OSError, IndexError) as error:
                where = f"{self.storage.uri}/{rows[0].path}, branch {rows[0].key}"
                raise CorruptionError(f"{where} cannot be read: {error}", fix=mend(self.storage.uri)) from error


def _changed(where: str, uri: str) -> CorruptionError:
    return CorruptionError(f"{where}: tokens and log-probs do not hash to what was committed", fix=mend(uri))


def _by_file(rows: Iterable[Located]) -> list[list[Located]]:
    """Rows of one file together."""
    files: dict[str, list[Located]] = defaultdict(list)
    for row in rows:
        files[row.path].append(row)
    return list(files.values())
