"""Where conversations go when they have ended: into the replay store, or beside it where nobody may train on them.

The store takes nothing that must not be trained on. Such conversations become one Parquet file each below
``recordings/``, with the store's columns; nothing that reads a store looks there.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from agentsdpo.collect.proxy.feedback import check_turns, grade_of, hint_of, label_of
from agentsdpo.replay.canonical import canonical_json
from agentsdpo.replay.formats.redact import Redactor
from agentsdpo.replay.ids import Key, uuid7
from agentsdpo.replay.journal import SUFFIX, Journal, try_lock
from agentsdpo.replay.log import Located
from agentsdpo.replay.rows import content_of, to_rows
from agentsdpo.replay.salvage import Salvage, salvage
from agentsdpo.replay.segment import encode
from agentsdpo.replay.spool import LOST, Spool, set_aside
from agentsdpo.replay.storage import storage_for
from agentsdpo.replay.store import ReplayStore
from agentsdpo.replay.upkeep.recover import PROXY, recover
from agentsdpo.types import Episode, Json

log = logging.getLogger("agentsdpo.proxy")
RECORDINGS = "recordings"
Clean = Callable[[Episode], Episode]
"""Takes secrets out of an episode; the identity where nothing is to be redacted."""


class Shelf(Protocol):
    """Keeps the conversations of one tenant; ``identity`` is the same for as long as it exists."""

    identity: str

    def begin(self, about: Json) -> Journal:
        """The journal of a conversation that begins. Raises JournalError, StoreError."""
        ...

    def drop(self, episode_id: str) -> None:
        """Let go of the journal of a conversation in which nothing was answered. Raises StoreError."""
        ...

    def put(self, episodes: Sequence[Episode]) -> None:
        """Keep conversations that have ended, durably, and let go of their journals. Raises StoreError."""
        ...

    def rescue(self, episode_id: str, journal: Path) -> None:
        """Keep what a closed journal holds of a conversation that :meth:`put` refused, and let go of it; a journal that
        is refused as well is set aside. Raises StoreError."""
        ...

    def attempts(self, episode_id: str) -> int:
        """How often this conversation has ended before."""
        ...

    def say(self, episode_id: str, items: Sequence[Json], attempt: int | None = None) -> bool:
        """Attach what is said about a conversation that has ended, the latest attempt unless named; False when there is
        none. Raises StoreError, and Refused for a turn that it has not."""
        ...

    def recover(self) -> int:
        """Keep what a proxy that was killed left behind; how many conversations that were. Raises StoreError."""
        ...

    def close(self) -> None:
        """Nothing more will come."""
        ...


def finished(episode: Episode, clean: Clean) -> Episode:
    """The episode with the hint and reward of what was said about it, without its secrets."""
    items = episode.metadata.get("feedback", [])
    return clean(episode.model_copy(update={"hint": hint_of(items, episode.branches), "grade": grade_of(items)}))


class StoreShelf:
    """The replay store of one tenant.

    Args:
        uri: of the store, made when it is not there. clean: see :data:`Clean`. words: takes secrets out of a text.
        durability, spool: see :class:`agentsdpo.replay.spool.Spool`.
    """

    def __init__(self, uri: str, clean: Clean, *, durability: Any, spool: str, words: Callable[[str], str]) -> None:
        self.store, self._clean, self._words = ReplayStore.open(uri), clean, words
        self.identity: str = self.store.about["store_id"]
        self._spool = Spool(self.store, durability, spool or None)

    def begin(self, about: Json) -> Journal:
        """See :meth:`Shelf.begin`."""
        journal = self._spool.begin(about)
        assert journal is not None  # there is one at every durability the proxy knows
        return journal

    def drop(self, episode_id: str) -> None:
        """See :meth:`Shelf.drop`."""
        self._spool.seal([episode_id])

    def put(self, episodes: Sequence[Episode]) -> None:
        """See :meth:`Shelf.put`."""
        done = [finished(episode, self._clean) for episode in episodes]
        self._append(done)
        self._spool.seal(episode.episode_id for episode in episodes)

    def rescue(self, episode_id: str, journal: Path) -> None:
        """See :meth:`Shelf.rescue`."""
        _settle(journal, self._salvaged)
        self.drop(episode_id)

    def _append(self, episodes: Sequence[Episode], *, salvaged: bool = False) -> None:
        """Into the store, and what is known of the policies that sampled them."""
        rows = self.store.fold().rows
        episodes = [self._placed(episode, rows) for episode in episodes]
        self.store.append(episodes, salvaged=salvaged)
        for version, episode in {v: e for e in episodes for b in e.branches for c in b.calls for s in c.versions
                                 if (v := s.version) >= 0}.items():
            if self.store.policy(version) is None:
                size = {"vocab_size": episode.vocab_size} if episode.vocab_size else {}
                self.store.record_policy(version, {
                    "tokenizer_sha256": episode.tokenizer_sha256, "model_id": episode.model_id,
                    "chat_template_sha256": episode.chat_template_sha256, **size})
        self._label(episodes)

    def _placed(self, episode: Episode, rows: Mapping[Key, Located]) -> Episode:
        """The episode, under the next attempt where another proxy on this store has kept one of that name meanwhile."""
        name, attempt = episode.episode_id, episode.attempt
        held = [rows.get(Key(name, branch.branch_id, attempt)) for branch in episode.branches]
        if Key(name, 0, attempt) not in rows or all(
                row and row.content_sha256 == content_of(branch)
                for row, branch in zip(held, episode.branches, strict=True)):
            return episode
        log.warning("attempt %d of %s in %s is another conversation of that name: give each proxy a --store of its own",
                    attempt, name, self.store.storage.uri)
        return episode.model_copy(update={"attempt": self.attempts(name)})

    def _label(self, episodes: Sequence[Episode]) -> None:
        """Mark those that got a thumb."""
        marks: dict[Any, str] = {e.episode_id: label for e in episodes
                                 if (label := label_of(e.metadata.get("feedback", [])))}
        if marks:
            self.store.add_labels(marks, author="user")

    def attempts(self, episode_id: str) -> int:
        """See :meth:`Shelf.attempts`."""
        rows, attempt = self.store.fold().rows, 0
        while Key(episode_id, 0, attempt) in rows:
            attempt += 1
        return attempt

    def say(self, episode_id: str, items: Sequence[Json], attempt: int | None = None) -> bool:
        """See :meth:`Shelf.say`: late values, which replace those that were there."""
        view = self.store.snapshot()
        keys = view.attempt(episode_id, attempt)
        if not keys:
            return False
        items = _said(items, self._words)
        rows = view.read(keys)
        check_turns(items, {call.turn for row in rows for call in row.branch.calls})
        hint = hint_of(items, [row.branch for row in rows], rows[0].hint)
        grade, label = grade_of(items), label_of(items)
        author = items[-1]["author"]
        if hint not in (None, rows[0].hint):
            self.store.add_hints({key: hint for key in keys})
        if grade is not None:
            self.store.add_rewards({key: grade for key in keys}, author=author)
        if label is not None:
            self.store.add_labels({key: label for key in keys}, author=author)
        return True

    def recover(self) -> int:
        """See :meth:`Shelf.recover`: conversations, with hints and redaction; then the store's own for the rest."""
        folder = self._spool.folder / self.store.about["store_id"]
        found = sum(_settle(path, self._salvaged) for path in _left(folder))
        recover(self.store, spool=self._spool.folder)
        return found

    def _salvaged(self, left: Salvage) -> None:
        if left.episode is not None:
            self._append([finished(left.episode, self._clean)], salvaged=True)

    def close(self) -> None:
        """See :meth:`Shelf.close`."""
        self.store.close()


class FolderShelf:
    """Recordings that nobody may train on.

    Args:
        uri: folder or prefix that a store would have. clean: see :data:`Clean`. words: takes secrets out of a text.
        sync: wait for the disk after every call. spool: folder for journals; "" is below ``uri``.
    """

    identity = RECORDINGS

    def __init__(self, uri: str, clean: Clean, *, sync: bool, spool: str, words: Callable[[str], str]) -> None:
        self._storage, self._clean, self._sync, self._words = storage_for(uri), clean, sync, words
        self._spool, self._journals = _journals(uri, spool)
        self._writer = uuid7()
        self._held: dict[str, Journal] = {}

    def begin(self, about: Json) -> Journal:
        """See :meth:`Shelf.begin`."""
        journal = Journal.open(self._spool, self._journals, self._writer, about["episode_id"], about, sync=self._sync)
        self._held[about["episode_id"]] = journal
        return journal

    def drop(self, episode_id: str) -> None:
        """See :meth:`Shelf.drop`."""
        journal = self._held.pop(episode_id, None)
        if journal is not None:
            journal.seal()

    def put(self, episodes: Sequence[Episode]) -> None:
        """See :meth:`Shelf.put`."""
        for episode in episodes:
            self._write(episode)
            self.drop(episode.episode_id)

    def rescue(self, episode_id: str, journal: Path) -> None:
        """See :meth:`Shelf.rescue`."""
        _settle(journal, self._salvaged)
        self.drop(episode_id)

    def _write(self, episode: Episode) -> None:
        """Write an episode, under the next attempt where another proxy on this folder has written one meanwhile."""
        episode = finished(episode, self._clean)
        while True:
            rows, path = to_rows([episode], self._writer), self._path(episode.episode_id, episode.attempt)
            try:
                return self._storage.create(path, encode(rows)[0])
            except FileExistsError:
                if self._holds(path, rows):  # written before a crash that came before its journal was deleted
                    return None
            log.warning("%s/%s is of another conversation of that name: give each proxy a --store of its own",
                        self._storage.uri, path)
            episode = episode.model_copy(update={"attempt": self.attempts(episode.episode_id)})

    def _holds(self, path: str, rows: pa.Table) -> bool:
        """Whether a recording says the same."""
        names = ["content_sha256", "messages_json"]
        return self._read(path, names).to_pylist() == rows.select(names).to_pylist()

    def _read(self, path: str, names: list[str]) -> pa.Table:
        """Columns of a recording."""
        return pq.read_table(pa.BufferReader(self._storage.read(path)), columns=names)

    def _path(self, episode_id: str, attempt: int) -> str:
        return f"recordings/{episode_id}-{attempt:04d}.parquet"

    def attempts(self, episode_id: str) -> int:
        """See :meth:`Shelf.attempts`."""
        attempt = 0
        while self._storage.exists(self._path(episode_id, attempt)):
            attempt += 1
        return attempt

    def say(self, episode_id: str, items: Sequence[Json], attempt: int | None = None) -> bool:
        """See :meth:`Shelf.say`: one more small file beside the recording."""
        latest = self.attempts(episode_id) - 1
        attempt = latest if attempt is None else attempt
        if not 0 <= attempt <= latest:
            return False
        calls = self._read(self._path(episode_id, attempt), ["calls"])["calls"].to_pylist()
        check_turns(items, {call["turn"] for branch in calls for call in branch})
        said = {"episode_id": episode_id, "attempt": attempt, "items": _said(items, self._words)}
        self._storage.create(f"recordings/feedback/{uuid7()}.json", canonical_json(said))
        return True

    def recover(self) -> int:
        """See :meth:`Shelf.recover`."""
        folder, old = self._spool / self._journals, self._spool / RECORDINGS
        if folder != old and _left(old):
            log.warning("the journals in %s are of an earlier release and do not say of which store: move the folders "
                        "of those of %s to %s and start again", old, self._storage.uri, folder)
        return sum(_settle(path, self._salvaged) for path in _left(folder))

    def _salvaged(self, left: Salvage) -> None:
        if left.episode is not None:
            self._write(left.episode)

    def close(self) -> None:
        """See :meth:`Shelf.close`."""


def _journals(uri: str, spool: str) -> tuple[Path, str]:
    """Where the journals of recordings are, and their folder in there: below a local folder they are alone; the folder
    of a setting, or of all buckets of this machine, they share with those of other stores and tenants."""
    scheme, found, rest = uri.partition("://")
    local = Path(rest if found else uri) if not found or scheme == "file" else None
    if local is not None and not spool:
        return local / "spool", RECORDINGS
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "agentsdpo" / "spool"
    whose = sha256((uri.rstrip("/") if local is None else str(local.resolve())).encode()).hexdigest()[:16]
    return Path(spool) if spool else state, f"{RECORDINGS}-{whose}"


def _left(folder: Path) -> list[Path]:
    """Journals in there, but those that were set aside for people to look at."""
    return [path for path in sorted(folder.glob(f"*/*{SUFFIX}")) if path.parent.name != LOST]


def _settle(path: Path, keep: Callable[[Salvage], None]) -> bool:
    """Have a dead proxy's journal kept, then delete it; False where its writer lives or nothing was in it.

    One that cannot be read to its end is set aside once what can be believed of it is kept.
    """
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        if not try_lock(handle) or not os.fstat(handle).st_nlink:
            return False
        left = salvage(path)
        if left.about.get("env_id", PROXY) != PROXY:  # a collector's, with a hint and a grade of its own
            return False
        try:
            keep(left)
        except (ValueError, PermissionError):  # refused for what it is: kept for people to look at
            set_aside(path)
            return False
        if left.lost and path.stat().st_size:
            set_aside(path)
        else:
            path.unlink(missing_ok=True)
        return left.episode is not None
    finally:
        os.close(handle)


def make_shelf(uri: str, redactor: Redactor | None, *, train_allowed: bool, durability: Any, spool: str) -> Shelf:
    """The shelf that a setting asks for.

    Raises:
        StoreError: the store cannot be opened or made.
    """
    clean: Clean = (lambda episode: redactor.episode(episode)[0]) if redactor else lambda episode: episode
    words = _words(redactor)
    if train_allowed:
        return StoreShelf(uri, clean, durability=durability, spool=spool, words=words)
    return FolderShelf(uri, clean, sync=durability == "step", spool=spool, words=words)


def _said(items: Sequence[Json], words: Callable[[str], str]) -> list[Json]:
    """What is said late, without its secrets."""
    return [{**one, "text": words(one["text"])} for one in items]


def _words(redactor: Redactor | None) -> Callable[[str], str]:
    """Takes secrets out of a text."""
    if redactor is None:
        return lambda text: text
    return lambda text: redactor.text(text, {}, Counter())
