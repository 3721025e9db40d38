"""Whether a storage keeps the promises the store is built on, tried with one small file before a store is made there.

>>> import tempfile
>>> from agentsdpo.replay.storage import storage_for
>>> [finding.name for finding in examine(storage_for(tempfile.mkdtemp())) if finding.good]
['create', 'exclusive', 'replace', 'list', 'move', 'remove']
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

from agentsdpo.errors import StoreError
from agentsdpo.replay.files import ELSEWHERE, TEMPORARY
from agentsdpo.replay.ids import uuid7
from agentsdpo.replay.storage import Storage
from agentsdpo.types import Json

_FOLDER = "quarantine"


class StorageUnfit(StoreError):
    """A file system or server that cannot keep a store: without hard links, fsync, or reads that see the writes."""

    exit_code = 2


@dataclass(frozen=True)
class Finding:
    """One promise that was tried.

    Attributes:
        name: create, exclusive, replace, list, move or remove.
        good: it was kept.
        needed: no store can be made without it. A bucket does without ``exclusive``; compaction and garbage
            collection then want to be told that nobody else does the same.
        what: what went wrong, empty when nothing did.
        fix: what to do about it.
    """

    name: str
    good: bool
    needed: bool
    what: str = ""
    fix: str = ""

    def as_json(self) -> Json:
        """All fields by name."""
        return asdict(self)


def examine(storage: Storage) -> list[Finding]:
    """Try every promise in turn; after a needed one is broken the rest is not tried.

    Where conditional creates work, the storage makes all its creates so from now on.
    """
    findings: list[Finding] = []
    path = f"{_FOLDER}/{TEMPORARY}probe-{uuid7()}"
    for name, check in _CHECKS:
        needed = name != "exclusive" or storage.exclusive
        findings.append(_try(name, needed, lambda check=check: check(storage, path)))
        if needed and not findings[-1].good:
            break
    return findings


def demand_fit(storage: Storage) -> None:
    """Raise StorageUnfit when :func:`examine` finds a needed promise broken."""
    for finding in examine(storage):
        if finding.needed and not finding.good:
            raise StorageUnfit(f"{storage.uri} cannot keep a store: {finding.what}", fix=finding.fix)


def _try(name: str, needed: bool, check: Callable[[], None]) -> Finding:
    try:
        check()
    except StoreError as error:
        return Finding(name, False, needed, error.what, error.fix)
    except (FileExistsError, FileNotFoundError) as error:
        return Finding(name, False, needed, f"{name} does not work there: {error}", ELSEWHERE)
    return Finding(name, True, needed)


def _create(storage: Storage, path: str) -> None:
    storage.create(path, b"first")
    _expect(storage, path, b"first", "a new file")


def _exclusive(storage: Storage, path: str) -> None:
    storage.demand_exclusive()
    try:
        storage.create(path, b"second")
    except FileExistsError:
        _expect(storage, path, b"first", "a file whose name was wanted again")
        return
    raise StoreError("a create overwrites the file that has its name", fix=ELSEWHERE)


def _replace(storage: Storage, path: str) -> None:
    storage.replace(path, b"third")
    _expect(storage, path, b"third", "a replaced file")


def _list(storage: Storage, path: str) -> None:
    if path not in [info.path for info in storage.list(_FOLDER, temporary=True)]:
        raise StoreError("a new file is not among those listed", fix=ELSEWHERE)


def _move(storage: Storage, path: str) -> None:
    storage.move(path, f"{path}-moved")
    _expect(storage, f"{path}-moved", b"third", "a moved file")


def _remove(storage: Storage, path: str) -> None:
    storage.remove(f"{path}-moved")
    for name in (path, f"{path}-moved"):
        if storage.exists(name):
            raise StoreError("a removed file is still there", fix=ELSEWHERE)


def _expect(storage: Storage, path: str, data: bytes, what: str) -> None:
    have = storage.read(path)
    if have != data:
        raise StoreError(f"{what} reads {have[:16]!r}, {data!r} was written", fix=ELSEWHERE)


_CHECKS: tuple[tuple[str, Callable[[Storage, str], None]], ...] = (
    ("create", _create), ("exclusive", _exclusive), ("replace", _replace), ("list", _list), ("move", _move),
    ("remove", _remove))
