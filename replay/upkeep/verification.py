"""``verify``: is everything in the store what was written? Three levels, each with all the checks of those before it.

fast: the store's own description; every stream whole and chained; every file there with its size; every ``replace``
moved exactly the live rows of its inputs; no key with two contents; the folded snapshot says what the log says.
full: every byte of data, overlays and archives hashed, every page decoded with its checksum, every row hashed anew.
deep: the row rules of ``FORMAT.md`` on every live episode, targets of overlays, a manifest for every policy version.
"""

import hashlib
import shlex
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from agentsdpo.errors import AgentSdpoError, ConfigError, CorruptionError, StoreError
from agentsdpo.replay import layout, overlay, snapfile
from agentsdpo.replay.folding import Fold
from agentsdpo.replay.ids import Key
from agentsdpo.replay.log import MAINT, entry_path
from agentsdpo.replay.overlay import Overlays
from agentsdpo.replay.rules import check_episode
from agentsdpo.replay.storage import mend
from agentsdpo.replay.store import ReplayStore
from agentsdpo.replay.upkeep.inspection import inspect
from agentsdpo.replay.upkeep.logwalk import RESTORE, Problem, Walk, check_small_files
from agentsdpo.types import Branch, Json

Level = Literal["fast", "full", "deep"]
REASON = "quarantine: "
"""How the reason of rows begins that were evicted because their file is damaged or missing."""
_ASIDE = "it was put aside in quarantine/"


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was checked and what is wrong.

    Attributes:
        problems: everything that is wrong; none: all is well.
        entries, files, rows, bytes: log entries, data files in use, live rows, and bytes of those files.
        orphans: data files that no entry names: left by a crash, harmless, settled by ``recover``.
        quarantined: files moved to ``quarantine/``.
        saved, lost: branches of these that were written anew, and those that were evicted, with their groups.
    """

    level: Level
    problems: tuple[Problem, ...]
    entries: int
    files: int
    rows: int
    bytes: int
    orphans: int
    quarantined: tuple[str, ...] = ()
    saved: int = 0
    lost: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def as_json(self) -> Json:
        """For the command line."""
        return asdict(self) | {"ok": self.ok, "problems": [problem._asdict() for problem in self.problems]}


def verify(store: ReplayStore, level: Level = "full", *, quarantine: bool = False,
           sole_maintainer: bool = False) -> VerifyReport:
    """Check a store; nothing is changed unless ``quarantine``.

    Args:
        store: which.
        level: how thoroughly; ``fast`` reads the log alone, ``full`` every byte, ``deep`` looks at every token.
        quarantine: move damaged data files and overlays to ``quarantine/``, after their whole rows were written anew;
            rows that are lost are evicted, with their groups.
        sole_maintainer: see :func:`~agentsdpo.replay.upkeep.maintain.commit`.

    Raises:
        ConfigError: a level that is none.
        StoreError: the storage could not be read.
    """
    if level not in ("fast", "full", "deep"):
        raise ConfigError(f"there is no level {level!r}", fix="use fast, full or deep")
    walk = Walk(store.storage)
    if walk.problems and store.storage.exists(entry_path(MAINT, walk.state.vector.get(MAINT, (-1, ""))[0] + 1)):
        walk = Walk(store.storage)  # files may have been archived while they were read
    sizes = {info.path: info.size for folder in ("data", "overlay") for info in store.storage.list(folder)}
    problems = [*_about(store), *walk.problems, *check_small_files(store.storage), *_snapfile(walk),
                *_present(walk, sizes)]
    if level != "fast":
        problems += [*_bytes(walk, sizes), *_overlay_bytes(walk, sizes)]
    if level == "deep":
        problems += _deep(store, walk)
    aside = ((), 0, 0)
    if quarantine and problems:
        from agentsdpo.replay.upkeep.quarantine import set_aside

        aside = set_aside(store, walk, problems, sole_maintainer=sole_maintainer)
        problems = [each._replace(fix=_ASIDE) if each.path in aside[0] else each for each in problems]
    state = walk.state
    orphans = [p for p in sizes if p.startswith("data/") and p not in walk.files and p not in state.gone]
    return VerifyReport(level, tuple(problems), walk.entries, len(state.files), len(state.live()),
                        sum(segment.size for segment in state.files.values()), len(orphans), *aside)


# ----------------------------------------------------------------------------------------------------------- fast


def _about(store: ReplayStore) -> Iterator[Problem]:
    try:
        layout.read(store.storage)
    except StoreError as error:
        yield Problem("fast", "STORE.json", None, error.what, error.fix)


def _snapfile(walk: Walk) -> Iterator[Problem]:
    """The folded snapshot is whole and, brought up to date, says what the log says."""
    fix = "write a new one: agentsdpo replay snapshot"
    state = Fold(walk.storage)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            state.refresh()
            snapfile.late(state)
        except RuntimeWarning as warning:
            yield Problem("fast", "snap", None, str(warning), fix)
            return
        except StoreError as error:
            if not walk.problems:
                yield Problem("fast", "snap", None, error.what, error.fix)
            return
    if walk.problems or any(walk.state.vector.get(writer) != at for writer, at in state.vector.items()):
        return  # the log is damaged, or grew while it was read
    for key in sorted(key for key in state.rows.keys() | walk.state.rows.keys()
                      if state.rows.get(key) != walk.state.rows.get(key)):
        yield Problem("fast", "snap", str(key), "the folded snapshot says otherwise than the log", fix)
    if state.evicted != walk.state.evicted or state.conflicts.keys() != walk.state.conflicts.keys() \
            or state.outlived != walk.state.outlived:
        yield Problem("fast", "snap", None, "the folded snapshot hides other rows than the log", fix)


def _present(walk: Walk, sizes: dict[str, int]) -> Iterator[Problem]:
    """Files that are needed are there, with their size; no key has two contents."""
    state, live = walk.state, walk.state.live()
    for key, rows in sorted((key, rows) for key, rows in state.conflicts.items() if key not in state.evicted):
        yield Problem("fast", rows[0].path, str(key), f"two whole rows of unequal content, in {rows[0].path} and "
                      f"{rows[1].path}; both are withheld", "give both up: agentsdpo replay rm "
                      f"{shlex.quote(walk.storage.uri)} {shlex.quote(key.episode_id)} --yes")
    for key, row in sorted(live.items()):
        if row.path in state.gone:
            yield Problem("fast", row.path, str(key), "a live row lies in a file that was reclaimed", RESTORE)
    users = {row.path: key for key, row in sorted(live.items(), reverse=True)}
    for path, segment in sorted(state.files.items()):
        away = path not in users and (walk.storage.exists(f"quarantine/{path}") or _given_up(walk, path))
        if sizes.get(path) != segment.size and not away:
            yield _wrong_size(walk, path, segment.size, sizes.get(path), users.get(path))
    for op in (op for ops in state.overlays.values() for op in ops):
        if sizes.get(op["path"]) != op["bytes"]:
            yield _wrong_size(walk, op["path"], op["bytes"], sizes.get(op["path"]), None)


def _given_up(walk: Walk, path: str) -> bool:
    """Whether a file was missing already when its rows were evicted for that."""
    hidden = [walk.state.evicted.get(row.key) for row in walk.files[path].rows]
    return any(gone and gone.reason.startswith(REASON) for gone in hidden)


def _wrong_size(walk: Walk, path: str, size: int, have: int | None, key: Key | None) -> Problem:
    what = "it is missing" if have is None else f"it has {have} bytes, {size} were written"
    return Problem("fast", path, str(key) if key else None, what, mend(walk.storage.uri))


# ----------------------------------------------------------------------------------------------------------- full


def _bytes(walk: Walk, sizes: dict[str, int]) -> Iterator[Problem]:
    """Every data file in use, down to its rows."""
    for path in sorted(walk.state.files.keys() & sizes.keys() & walk.files.keys()):
        file = walk.files[path]
        try:
            data = walk.storage.read(path)
        except FileNotFoundError:
            continue  # reclaimed meanwhile
        for damage in inspect(data, file.rows, file.sha256):
            yield Problem("full", path, str(damage.key) if damage.key else None, damage.what,
                          mend(walk.storage.uri))


def _overlay_bytes(walk: Walk, sizes: dict[str, int]) -> Iterator[Problem]:
    for op in (op for ops in walk.state.overlays.values() for op in ops if op["path"] in sizes):
        if hashlib.sha256(walk.storage.read(op["path"])).hexdigest() != op["sha256"]:
            yield Problem("full", op["path"], None, "its bytes do not hash to what was committed",
                          mend(walk.storage.uri))


# ----------------------------------------------------------------------------------------------------------- deep


def _deep(store: ReplayStore, walk: Walk) -> Iterator[Problem]:
    """What only a look at the tokens shows, on everything that can be read."""
    yield from _overlay_targets(walk)
    try:
        yield from _late_values(walk)
        view = store.snapshot()
    except StoreError:
        return  # the log or an overlay is damaged, and listed
    versions: dict[int, Key] = {}
    for key in sorted({key._replace(branch_id=0): key for key in view.keys()}.values()):  # noqa: SIM118
        row = view.rows[key]
        try:
            episode = view.episode(key.episode_id, key.attempt)
            check_episode(episode)
        except CorruptionError:
            continue  # listed by the level before
        except AgentSdpoError as error:
            yield Problem("deep", row.path, str(key), error.what, "evict it: it was written by other software")
            continue
        for branch in episode.branches:
            found = view.rows[Key(episode.episode_id, branch.branch_id, episode.attempt)]
            wrong = _summary(branch, found.version_min, found.version_max, found.n_tokens, found.n_trainable)
            if wrong or found.trainable != (found.n_trainable > 0):
                yield Problem("deep", found.path, str(found.key), wrong or "trainable does not say what its tokens do",
                              "evict it: it was written by other software")
            for span in (span for call in branch.calls for span in call.versions if span.version >= 0):
                versions.setdefault(span.version, found.key)
    for version, key in sorted(versions.items()):
        path = f"policies/{version:012d}.json"
        if not store.storage.exists(path):
            yield Problem("deep", path, str(key), f"policy version {version} was never recorded",
                          "record it: store.record_policy(version, manifest)")


def _summary(branch: Branch, low: int, high: int, n_tokens: int, n_trainable: int) -> str:
    """Rules (g), (h): what the log repeats of a row follows from its tokens; "" when it does."""
    oldest, newest = branch.policy_versions
    if low == -1 and any(span.version < 0 for call in branch.calls for span in call.versions):
        oldest = low  # a writer of before may have let calls count that were set aside
    have = (oldest, newest, len(branch.token_ids), int((branch.token_kind == 1).sum()))
    want = (low, high, n_tokens, n_trainable)
    return "" if have == want else f"oldest and newest version, tokens, trained tokens are {have}, recorded as {want}"


def _late_values(walk: Walk) -> Iterator[Problem]:
    """The late values beside the folded snapshot are those of the overlays. Raises CorruptionError: one is damaged."""
    state = Fold(walk.storage)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is damaged is listed by the first level
        state.refresh()
        kept = snapfile.late(state)
    if kept.files and kept.read(state.overlays, state.outdone).latest != Overlays(walk.storage).read(
            state.overlays, state.outdone).latest:
        yield Problem("deep", "snap", None, "the folded snapshot says other late values than the overlays",
                      snapfile.REBUILD)


def _overlay_targets(walk: Walk) -> Iterator[Problem]:
    """Every late value speaks of a row that is in the store, with that content."""
    for op in (op for ops in walk.state.overlays.values() for op in ops):
        try:
            table = overlay.read(walk.storage, op).select([*Key._fields, "target_sha256"])
        except StoreError:
            continue  # listed by the level before
        for record in table.to_pylist():
            key = Key(*(record[name] for name in Key._fields))
            row, target = walk.state.rows.get(key), record["target_sha256"].hex()
            if row is None or (row.content_sha256 != target and (key, target) not in walk.state.outdone):
                what = "is not in the store" if row is None else f"has content {row.content_sha256[:12]} now"
                yield Problem("deep", op["path"], str(key), f"a late value is for a branch that {what}",
                              "write the value again for the present content")
