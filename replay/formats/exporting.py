"""Exports: episodes of a store, one after another, into one file that appears when it is whole."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from agentsdpo.errors import ConfigError, TrainForbidden
from agentsdpo.replay.canonical import to_json
from agentsdpo.replay.formats import atif, chat, pairs, portable, sts, verifiers
from agentsdpo.replay.formats.bag import Stored
from agentsdpo.replay.formats.files import whole_file
from agentsdpo.replay.formats.redact import Redactor, demand_redaction
from agentsdpo.replay.formats.report import ExportReport, Progress, counted
from agentsdpo.replay.policies import IDENTITY
from agentsdpo.replay.snapshot import Condition, Snapshot
from agentsdpo.replay.store import ReplayStore
from agentsdpo.types import Episode, Json


@dataclass
class Tally:
    """What is counted on the way."""

    episodes: int = 0
    records: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    redacted: Counter[str] = field(default_factory=Counter)


def export(store: ReplayStore, fmt: str, out: str | Path, *, where: Condition | None = None,
           redact: Redactor | None = None, limit: int | None = None, checked: bool = False,
           progress: Progress | None = None) -> ExportReport:
    """Write episodes to a file of another format; memory holds a few of them at a time.

    Args:
        store: to read from.
        fmt: ``atif``, ``openai``, ``hf``, ``pairs``, ``sts``, ``verifiers`` or ``parquet``.
        out: the file, replaced when the export is whole.
        where: episodes with a branch that this holds for.
        redact: takes secrets out of everything on its way; see :class:`agentsdpo.replay.formats.redact.Redactor`.
        limit: at most so many episodes.
        checked: somebody looked for secrets: ``sts`` may be written without ``redact``.
        progress: told about every episode.

    Raises:
        ConfigError: an unknown format, or ``sts`` neither redacted nor checked.
        TrainForbidden: an episode of a task whose licence forbids training.
        StoreError: the file cannot be written; what was there is untouched.
        CorruptionError: a stored episode is damaged.

    >>> import tempfile
    >>> from agentsdpo.replay.example import example
    >>> report = export(example(), "hf", tempfile.mkdtemp() + "/chats.jsonl", where="reward > 0")
    >>> report.episodes, report.records
    (2, 2)
    """
    if fmt not in EXPORTS:
        raise ConfigError(f"there is no export format {fmt!r}", fix=f"use one of {', '.join(EXPORTS)}")
    if fmt == "sts":
        demand_redaction("sts", redact, checked)
    view, tally, path = store.snapshot(), Tally(), Path(out)
    work = _Work(store, view, redact, tally, limit, progress or (lambda done, total: None))
    with whole_file(path) as file:
        EXPORTS[fmt](work, where, file)
        size = file.tell()
    return ExportReport(fmt, str(path), tally.episodes, tally.records, size, counted(tally.skipped),
                        None if redact is None else counted(tally.redacted))


LATE = {"label": "labels", "relogprob": "log-probs of trainers"}
"""Late values that no other format has room for; ``merge`` copies them from store to store."""


@dataclass
class _Work:
    """One export under way."""

    store: ReplayStore
    view: Snapshot
    redact: Redactor | None
    tally: Tally
    limit: int | None
    progress: Progress

    def names(self, where: Condition | None) -> list[tuple[str, int]]:
        """Episodes to write, as (id, attempt)."""
        found = dict.fromkeys((key.episode_id, key.attempt) for key in self.view.keys(where))
        names = dict.fromkeys(islice(found, self.limit))
        for slot in self.view.late.latest:
            if slot.kind in LATE and (slot.key.episode_id, slot.key.attempt) in names:
                self.tally.skipped[LATE[slot.kind]] += 1
        return list(names)

    def stored(self, names: Iterable[tuple[str, int]], total: int) -> Iterator[Stored]:
        """The episodes, redacted, one by one."""
        for done, episode in enumerate(self.view.gather(names), 1):
            yield self.ready(episode)
            self.progress(done, total)

    def ready(self, episode: Episode) -> Stored:
        """An episode as it may leave: allowed, and redacted."""
        if not episode.train_allowed:
            raise TrainForbidden(f"episode {episode.episode_id} of task {episode.task_id} has train_allowed=False",
                                 fix="keep evaluation-only episodes out of training data")
        status = self.view.rows[self.view.attempt(episode.episode_id, episode.attempt)[0]].status
        if self.redact is not None:
            episode, hits = self.redact.episode(episode)
            self.tally.redacted.update(hits)
        return Stored(episode, status, self._policies(episode))

    def _policies(self, episode: Episode) -> dict[int, Json]:
        """What the policy versions of an episode are: which weights, tokenizer, template and vocabulary."""
        versions = {span.version for branch in episode.branches for call in branch.calls for span in call.versions}
        known = {version: self.store.policy(version) for version in sorted(versions)}
        return {version: {name: manifest[name] for name in IDENTITY if name in manifest}
                for version, manifest in known.items() if manifest}


Write = Callable[[_Work, Condition | None, BinaryIO], None]


def _by_line(lines: Callable[[Stored], Iterable[Json]], *, messages: bool = False) -> Write:
    """A format of one or more lines an episode; ``messages``: episodes without any are left out."""
    def write(work: _Work, where: Condition | None, file: BinaryIO) -> None:
        names = work.names(where)
        for stored in work.stored(names, len(names)):
            if messages and not stored.episode.messages:
                work.tally.skipped["episodes without messages"] += 1
                continue
            work.tally.episodes += 1
            for line in lines(stored):
                write_line(file, line)
                work.tally.records += 1
    return write


def write_line(file: BinaryIO, line: Json) -> None:
    """One JSON object and a newline, ASCII only."""
    file.write(to_json(line).encode() + b"\n")


def _pairs(work: _Work, where: Condition | None, file: BinaryIO) -> None:
    """Preference pairs; both episodes of a pair are read when it is written."""
    found = pairs.plan(work.view.scalars(where), work.tally.skipped)
    found = found[:None if work.limit is None else work.limit // 2]
    for done, (better, worse) in enumerate(found, 1):
        chosen, rejected = (work.ready(episode).episode for episode in work.view.gather([better, worse]))
        line = pairs.line(chosen, rejected)
        if line is None:
            work.tally.skipped["pairs without a shared prompt"] += 1
        else:
            write_line(file, line)
            work.tally.records += 1
            work.tally.episodes += 2
        work.progress(done, len(found))


def _portable(work: _Work, where: Condition | None, file: BinaryIO) -> None:
    """Rows of the store; as they are, unless something has to be taken out."""
    names = work.names(where)
    with portable.Writer(file) as writer:
        for stored in work.stored(names, len(names)):
            work.tally.episodes += 1
            work.tally.records += len(stored.episode.branches)
            writer.write(stored)


EXPORTS: dict[str, Write] = {
    "atif": _by_line(lambda stored: [atif.document(stored)]),
    "openai": _by_line(lambda stored: [chat.openai_line(stored.episode)], messages=True),
    "hf": _by_line(lambda stored: [chat.hf_line(stored.episode)], messages=True),
    "pairs": _pairs,
    "sts": _by_line(lambda stored: sts.lines(stored.episode), messages=True),
    "verifiers": _by_line(lambda stored: [verifiers.document(stored)]),
    "parquet": _portable,
}
"""How each format is written."""
