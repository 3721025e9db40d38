"""The spool: where the journals of running episodes are, and the journals one process holds for one store."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from agentsdpo.replay.config import Durability
from agentsdpo.replay.files import ensure_folder
from agentsdpo.replay.ids import uuid7
from agentsdpo.replay.journal import Journal
from agentsdpo.replay.storage import LocalStorage
from agentsdpo.types import Json

if TYPE_CHECKING:
    from agentsdpo.replay.store import ReplayStore

LOST = "lost+found"
"""Folder beside the writers' ones (and in the store) for what cannot be used and must not be thrown away."""


def default_spool(store: "ReplayStore") -> Path:
    """Where a store's journals are unless a setting says otherwise.

    ``spool/`` inside a local store; for one in a bucket ``$XDG_STATE_HOME/agentsdpo/spool`` on this machine.
    """
    if isinstance(store.storage, LocalStorage):
        return store.storage.root / "spool"
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "agentsdpo" / "spool"


class Spool:
    """The journals of the episodes that this process plays for one store.

    Args:
        store: what the episodes will be appended to.
        durability: ``step`` waits for the disk after every step, ``episode`` leaves that to the system (a step survives
            the death of the process, not a power cut), ``none`` writes no journals.
        folder: on a local disk; None is :func:`default_spool`.
    """

    def __init__(self, store: "ReplayStore", durability: Durability = "step", folder: Path | str | None = None) -> None:
        self.store, self.durability = store, durability
        self.folder = Path(folder).absolute() if folder else default_spool(store)
        self._held: dict[str, Journal] = {}

    def begin(self, about: Json) -> Journal | None:
        """The journal of an episode that begins now; None when the setting is ``none``.

        What an earlier play of the same episode left in this process is set aside.

        Args:
            about: fields of the episode known so far, at least ``episode_id``.

        Raises:
            JournalError: it cannot be written, or another collector plays the same episode.
            StoreError: no log stream can be opened, or the store's disk was full (:meth:`ReplayStore.admit`).
        """
        if self.durability == "none":
            return None
        name = about["episode_id"]
        self.store.admit()
        if name in self._held:
            earlier = self._held.pop(name)
            earlier.close()
            set_aside(earlier.path)
        journal = Journal.open(self.folder, self.store.about["store_id"], self.store.writer_id, name, about,
                               sync=self.durability == "step")
        self._held[name] = journal
        return journal

    def seal(self, episode_ids: Iterable[str]) -> None:
        """These episodes are in the store, or are not wanted there: delete their journals."""
        for name in episode_ids:
            if name in self._held:
                self._held.pop(name).seal()


def set_aside(path: Path) -> Path:
    """Move a journal to ``lost+found/`` of its store's spool, under a name that says whose it was; returns that."""
    folder = path.parent.parent / LOST
    ensure_folder(folder, within=folder.parent)
    aside = folder / f"{path.parent.name}-{path.stem}-{uuid7()}{path.suffix}"
    path.rename(aside)
    return aside
