"""Imports: files of another format into a store. All of them are read and checked before anything is written."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from agentsdpo.errors import ConfigError, FormatError, RowError, TrainForbidden
from agentsdpo.replay.canonical import content_sha256, tokens_sha256
from agentsdpo.replay.formats import archipelago, atif, chat, portable, traces
from agentsdpo.replay.formats.reading import Found, Notes, digest
from agentsdpo.replay.formats.report import ImportReport, Progress, counted
from agentsdpo.replay.ids import uuid7
from agentsdpo.replay.policies import Policies
from agentsdpo.replay.rows import content_of, to_rows
from agentsdpo.replay.rules import check_episode
from agentsdpo.replay.snapshot import Snapshot
from agentsdpo.replay.store import ReplayStore
from agentsdpo.types import Episode, Json

Read = Callable[[Path, Notes, frozenset[Path]], Iterator[Found]]
IMPORTS: dict[str, Read] = {"atif": atif.read, "openai": chat.read, "hf": chat.read, "verifiers": traces.read,
                            "parquet": portable.read, "archipelago": archipelago.read}
"""How each format is read."""
EVALUATION_ONLY = ("mercor/apex-agents",)
"""Tasks of these data sets are never stamped, whoever asks."""
BATCH_TOKENS, BATCH_EPISODES = 1 << 18, 256
"""An append is made once so much has been gathered."""


def import_(store: ReplayStore, fmt: str, paths: str | Path | Sequence[str | Path], *, strict: bool = False,
            train_allowed: bool = False, progress: Progress | None = None) -> ImportReport:
    """Add the episodes of some files, under new ids; ``metadata["source"]`` names the old ones.

    What the store holds already, by ``content_sha256``, is not added again, nor is what a crash left of an episode that
    is whole in the same files. Everything is read and checked before anything is written.

    Args:
        store: to add to.
        fmt: ``archipelago``, ``atif``, ``openai``, ``hf``, ``verifiers`` or ``parquet``.
        paths: a file, or several.
        strict: a field that finds no place is an error.
        train_allowed: the importing person vouches that the licence of data without a stamp allows training.
        progress: told about every episode that is added.

    Raises:
        ConfigError: an unknown format, or no files.
        FormatError: a file is not in the format; with ``strict`` also what would be lost.
        TokenizerMismatch: a policy version that sampled an episode is recorded with another tokenizer.
        TrainForbidden: an episode is stamped ``train_allowed=False``, or not stamped and nobody vouches for it.
        RowError: an episode breaks a row rule.
        StoreError: a file cannot be read, the store not written, or a policy version is other weights there.

    >>> import tempfile
    >>> from agentsdpo.replay import ReplayStore
    >>> from agentsdpo.replay.example import example
    >>> from agentsdpo.replay.formats import export
    >>> file = export(example(), "atif", tempfile.mkdtemp() + "/episodes.jsonl").path
    >>> store = ReplayStore.open(tempfile.mkdtemp())
    >>> import_(store, "atif", file).added, import_(store, "atif", file).added
    (3, 0)
    """
    if fmt not in IMPORTS:
        raise ConfigError(f"there is no import format {fmt!r}", fix=f"use one of {', '.join(IMPORTS)}")
    files = [Path(paths)] if isinstance(paths, (str, Path)) else [Path(path) for path in paths]
    if not files:
        raise ConfigError("there is nothing to import", fix="name a file")
    work = _Import(fmt, files, train_allowed)
    notes, total = work.check(store)
    if strict and (lost := counted(notes.lost)):
        named = ", ".join(f"{path} ({count})" for path, count in lost.items())
        raise FormatError(f"the import would lose {named}", fix="leave strict out to import the rest")
    return work.write(store, notes, total, progress or (lambda done, total: None))


@dataclass
class _Import:
    """One import under way."""

    fmt: str
    files: list[Path]
    train_allowed: bool
    counts: Counter[str] = field(default_factory=Counter)
    untrainable: Counter[str] = field(default_factory=Counter)
    whole: set[tuple[str, int]] = field(default_factory=set)

    def found(self, notes: Notes) -> Iterator[Found]:
        """Every episode of every file, stamped."""
        siblings = frozenset(file.resolve() for file in self.files)
        for file in self.files:
            for found in IMPORTS[self.fmt](file, notes, siblings - {file.resolve()}):
                yield replace(found, episode=found.episode.model_copy(update={"train_allowed": self._stamp(found)}))

    def _stamp(self, found: Found) -> bool:
        """True, or no import at all."""
        names = (found.episode.task_id, found.episode.env_id, found.episode.run_id, found.source_id)
        closed = any(str(name).startswith(EVALUATION_ONLY) for name in names)
        if closed or found.stamp is False:
            raise TrainForbidden(f"{found.where} is for evaluation only", fix="leave it out: nobody can allow it here")
        if found.stamp is None and not self.train_allowed:
            raise TrainForbidden(f"{found.where} does not say train_allowed", fix="say train_allowed=True "
                                 "(--train-allowed) if its licence allows training; nothing was imported")
        return True

    def check(self, store: ReplayStore) -> tuple[Notes, int]:
        """Read everything once; what would be lost, and how many episodes there are."""
        notes, total, policies = Notes(), 0, Policies(store.storage)
        for found in self.found(notes):
            total += 1
            if not found.salvaged:
                self.whole.add((found.source_id, found.episode.attempt))
            try:
                check_episode(found.episode)
                to_rows([found.episode])
                policies.check([found.episode])
                for version, manifest in found.policies.items():
                    policies.agree(version, manifest)
            except RowError as error:
                raise RowError(f"{found.where}: {error.what}", fix=error.fix) from error
        return notes, total

    def write(self, store: ReplayStore, notes: Notes, total: int, progress: Progress) -> ImportReport:
        """Read everything again and append what is new."""
        known = set(_identities(store.snapshot()))
        batches: dict[bool, list[Episode]] = {False: [], True: []}
        for done, found in enumerate(self.found(Notes()), 1):
            identity = identify(found.episode)
            outdone = found.salvaged and (found.source_id, found.episode.attempt) in self.whole
            if outdone or identity in known:
                self.counts["duplicates"] += 1
            else:
                known.add(identity)
                for version, manifest in found.policies.items():
                    store.record_policy(version, manifest)
                batch = batches[found.salvaged]
                batch.append(self._named(found))
                if len(batch) >= BATCH_EPISODES or _tokens(batch) >= BATCH_TOKENS:
                    self._append(store, batch, found.salvaged)
            progress(done, total)
        for salvaged, batch in batches.items():
            self._append(store, batch, salvaged)
        return ImportReport(
            format=self.fmt, files=len(self.files), episodes=total, added=self.counts["added"],
            duplicates=self.counts["duplicates"], branches=self.counts["branches"], tokens=self.counts["tokens"],
            trainable=self.counts["trainable"], untrainable=counted(self.untrainable), lost=counted(notes.lost))

    def _named(self, found: Found) -> Episode:
        """The episode under an id of its own, with the old one in its metadata."""
        episode = found.episode
        source: Json = {"format": self.fmt, "id": found.source_id}
        if "source" in episode.metadata:
            source["source"] = episode.metadata["source"]
        return episode.model_copy(update={"episode_id": uuid7(), "metadata": {**episode.metadata, "source": source}})

    def _append(self, store: ReplayStore, batch: list[Episode], salvaged: bool) -> None:
        """Append a batch, count it, empty it."""
        store.append(batch, salvaged=salvaged)
        for branch in (branch for episode in batch for branch in episode.branches):
            self.counts.update(branches=1, tokens=len(branch.token_ids), trainable=branch.n_trainable)
            self.untrainable.update(call.untrainable_reason for call in branch.calls if call.untrainable_reason)
        self.counts["added"] += len(batch)
        batch.clear()


def _tokens(batch: Iterable[Episode]) -> int:
    return sum(len(branch.token_ids) for episode in batch for branch in episode.branches)


# ------------------------------------------------------------------------------------------------ what is known


def identify(episode: Episode) -> str:
    """What tells whether a store holds an episode: the ``content_sha256`` of its branches.

    Episodes without any token or call have all the same; there it is what was said.
    """
    hashes = [content_of(branch) for branch in episode.branches]
    return _said(episode) if set(hashes) == {_EMPTY} else _joined(hashes)


def _joined(hashes: Sequence[str]) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _said(episode: Episode) -> str:
    about = {name: value for name, value in episode.metadata.items() if name != "source"}
    return digest(episode.task_id, list(episode.messages), about)


_NONE = np.zeros(0, np.int32)
_EMPTY = content_sha256(tokens_sha256(_NONE, _NONE, _NONE, None, None), {}, 0).hex()
"""``content_sha256`` of a branch without tokens and calls."""


def _identities(view: Snapshot) -> Iterator[str]:
    """Identities of all episodes of a store; only those without tokens are read."""
    hashes: dict[tuple[str, int], list[str]] = {}
    for key in sorted(view.rows):
        hashes.setdefault((key.episode_id, key.attempt), []).append(view.rows[key].content_sha256)
    silent = [name for name, values in hashes.items() if set(values) == {_EMPTY}]
    yield from (_joined(values) for values in hashes.values() if set(values) != {_EMPTY})
    yield from map(_said, view.gather(silent))
