"""Side index: uses and priorities of branches in a SQLite file, for whoever is not the learner (eviction, statistics).

The learner's checkpoint is the truth; this is a copy of it that others can ask. It can be deleted at any time: the
learner writes it anew when it continues, and draws the same either way. Local disk only.
"""

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from agentsdpo.errors import StoreError
from agentsdpo.replay.ids import Key

_VERSION = "agentsdpo-side-index/1"
_TABLES = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE branch (episode_id TEXT, branch_id INTEGER, attempt INTEGER, uses INTEGER NOT NULL,
    last_draw INTEGER NOT NULL, priority REAL NOT NULL, PRIMARY KEY (episode_id, branch_id, attempt)) WITHOUT ROWID;
"""


class Use(NamedTuple):
    """Of one branch: draws of its unit so far, number of the last one (-1 never), its priority."""

    uses: int
    last_draw: int
    priority: float


class SideIndex:
    """One file for one store. A damaged file, or one of another store, is made anew.

    Args:
        path: on a local disk; usually beside the store.
        store_id: of the store the keys belong to.
        make: false for those who only read: whatever else the file is, it is left alone.

    Raises:
        StoreError: the file cannot be made, or is no side index of this store and must not be made.

    >>> import tempfile
    >>> index = SideIndex(Path(tempfile.mkdtemp()) / "side.sqlite", "some-store")
    >>> index.put([(Key("e-1", 0, 0), Use(2, 7, 1.0))])
    >>> index.read()
    {Key(episode_id='e-1', branch_id=0, attempt=0): Use(uses=2, last_draw=7, priority=1.0)}
    """

    def __init__(self, path: Path, store_id: str, *, make: bool = True) -> None:
        self.path, self._about = path, {"format": _VERSION, "store_id": store_id}
        try:
            fits = path.exists() and self._fits()
        except sqlite3.DatabaseError:  # not a database any more: nothing in it is needed
            fits = False
        if not fits and not make:
            raise StoreError(f"{path} is no side index of store {store_id}",
                             fix="name the file that the learner of this store writes: uses.sqlite in its run's folder")
        if not fits:
            self._create()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        connection.execute("PRAGMA synchronous = OFF")  # what a power cut takes is written again by the learner
        return connection

    def _fits(self) -> bool:
        with closing(self._connect()) as connection:
            if connection.execute("PRAGMA quick_check").fetchone()[0] != "ok":
                return False
            return dict(connection.execute("SELECT name, value FROM about")) == self._about

    def _create(self) -> None:
        try:
            self.path.unlink(missing_ok=True)
            with closing(self._connect()) as connection:
                connection.executescript(_TABLES)
                connection.executemany("INSERT INTO about VALUES (?, ?)", self._about.items())
        except (sqlite3.Error, OSError) as error:
            raise self._failed(error) from error

    @property
    def lost(self) -> bool:
        """Whether somebody deleted the file, so that all of it should be put anew."""
        return not self.path.exists()

    def put(self, uses: Iterable[tuple[Key, Use]], *, anew: bool = False) -> None:
        """Write uses of some branches, or of all there are: ``anew`` forgets the others.

        Raises:
            StoreError: the file cannot be written.
        """
        if self.lost:
            self._create()
        try:
            with closing(self._connect()) as connection:
                connection.execute("BEGIN IMMEDIATE")
                if anew:
                    connection.execute("DELETE FROM branch")
                connection.executemany("INSERT OR REPLACE INTO branch VALUES (?, ?, ?, ?, ?, ?)",
                                       ((*key, *use) for key, use in uses))
                connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def read(self) -> dict[Key, Use]:
        """All that is known, by key ascending.

        Raises:
            StoreError: the file cannot be read.
        """
        try:
            with closing(self._connect()) as connection:
                rows = connection.execute("SELECT * FROM branch ORDER BY episode_id, branch_id, attempt").fetchall()
        except sqlite3.Error as error:
            raise self._failed(error) from error
        return {Key(*row[:3]): Use(*row[3:]) for row in rows}

    def _failed(self, error: Exception) -> StoreError:
        return StoreError(f"the side index {self.path} cannot be used: {error}",
                          fix="delete it: the learner writes it anew when it continues")
