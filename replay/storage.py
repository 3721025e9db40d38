"""Where a store's files are: a local folder, or a prefix of a bucket. The rest of the store names files by their path.

Paths are relative to the root of the store, with ``/`` between their parts on every system.
"""

import errno
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

import pyarrow as pa

from agentsdpo.errors import CorruptionError, StoreError
from agentsdpo.replay.files import (
    TEMPORARY,
    create_exclusive,
    ensure_folder,
    explain,
    preallocate,
    replace_whole,
    sync_folder,
)

Data = bytes | memoryview | pa.Buffer
"""What can be written: any run of bytes."""


class FileInfo(NamedTuple):
    """One stored file: path from the store's root, size in bytes, time of its last change in microseconds UTC."""

    path: str
    size: int
    mtime_us: int


RESERVE = "reserve.bin"
"""Room that is held back on a disk, so that a full one does not cut off what is being written."""
Files: TypeAlias = list[FileInfo]
Names: TypeAlias = list[str]


class Storage(Protocol):
    """Files of one store. What a method promises holds when it returns; all but :meth:`create` may be repeated.

    Attributes:
        uri: address of the root, as people write it.
        exclusive: whether two concurrent :meth:`create` of one path can never both succeed.

    Every method raises StoreError where the storage fails, with what to do about it.
    """

    uri: str
    exclusive: bool

    def demand_exclusive(self) -> None:
        """Have :attr:`exclusive` from now on. Raises StoreError where it cannot be had, with the reason."""
        ...

    def create(self, path: str, data: Data) -> None:
        """Write a new file, durably and whole or not at all. Raises FileExistsError when the path is taken."""
        ...

    def replace(self, path: str, data: Data) -> None:
        """Write a file over whatever is there, durably; a reader sees the old bytes or the new ones."""
        ...

    def read(self, path: str) -> bytes:
        """All bytes of a file. Raises FileNotFoundError."""
        ...

    def open(self, path: str) -> pa.NativeFile:
        """A file to read from at any position. Raises FileNotFoundError."""
        ...

    def exists(self, path: str) -> bool:
        """Whether there is a file (or, locally, a folder) at this path."""
        ...

    def remove(self, path: str) -> None:
        """Delete a file; a missing one is no error. After a power cut it may be back."""
        ...

    def move(self, path: str, to: str) -> None:
        """Give a file another path. Raises FileExistsError when that is taken, FileNotFoundError without a file."""
        ...

    def folders(self, prefix: str) -> Names:
        """Names of the folders directly below a folder, ascending; none when it does not exist."""
        ...

    def names(self, prefix: str) -> Names:
        """Names of what is directly below a folder, in any order; cheaper than :meth:`list`, as it asks no sizes."""
        ...

    def list(self, prefix: str, *, temporary: bool = False) -> Files:
        """All files below a folder at any depth, by path ascending; ``""`` is the whole store.

        Args:
            prefix: the folder; none are listed when it does not exist.
            temporary: show the files of unfinished or crashed writes as well (``.tmp-...``, local only).
        """
        ...


def storage_for(uri: str | Path) -> Storage:
    """The storage an address names: a local folder, ``file:///folder``, or ``s3://bucket/prefix``.

    Raises:
        StoreError: another scheme, or an address of S3 that cannot be used.

    >>> storage_for("runs/1/replay").uri
    'runs/1/replay'
    >>> storage_for("ftp://host/x")
    Traceback (most recent call last):
    agentsdpo.errors.StoreError: ftp://host/x has the scheme 'ftp'; name a local folder or s3://bucket/prefix
    """
    scheme, found, rest = str(uri).partition("://")
    if isinstance(uri, Path) or not found:
        return LocalStorage(Path(uri))
    if scheme == "file":
        return LocalStorage(Path(rest))
    if scheme == "s3":
        from agentsdpo.replay.s3 import S3Storage

        return S3Storage(str(uri))
    raise StoreError(f"{uri} has the scheme {scheme!r}", fix="name a local folder or s3://bucket/prefix")


def mend(uri: str) -> str:
    """What to do about a damaged data file or overlay of the store at ``uri``."""
    return ("restore it from a backup; or save what is whole in it and go on without the rest: agentsdpo replay verify "
            f"{shlex.quote(uri)} --quarantine --yes")


def listing(uri: str) -> str:
    """What to do about a branch or an episode that is not in the store at ``uri``."""
    return f"list what there is: agentsdpo replay ls {shlex.quote(uri)}"


def read_whole(storage: Storage, path: str) -> bytes:
    """All bytes of a file that the log says exists.

    Raises:
        CorruptionError: it is missing.
        StoreError: it cannot be read.
    """
    try:
        return storage.read(path)
    except FileNotFoundError as error:
        raise CorruptionError(f"{storage.uri}/{path} is missing though the log names it",
                              fix="restore it from a backup") from error


def check_path(path: str, uri: str) -> None:
    """Refuse a path that leaves the store, as only a forged log entry names one.

    >>> check_path("data/../../x", "runs/1")
    Traceback (most recent call last):
    agentsdpo.errors.StoreError: 'data/../../x' is no path inside runs/1; do not use this store: its log was forged
    """
    if path.startswith("/") or ".." in path.split("/"):
        raise StoreError(f"{path!r} is no path inside {uri}", fix="do not use this store: its log was forged")


class LocalStorage:
    """A folder on a file system with hard links and an honest fsync."""

    exclusive = True

    def __init__(self, root: Path) -> None:
        self.root, self.uri = root.absolute(), str(root)  # the process may go to another folder: the store stays
        self._durable: set[Path] = set()

    def demand_exclusive(self) -> None:
        """See :meth:`Storage.demand_exclusive`; a hard link is exclusive always."""

    def create(self, path: str, data: Data) -> None:
        """See :meth:`Storage.create`; by temporary name, fsync, hard link, fsync of the folder."""
        self._write(create_exclusive, path, memoryview(data))

    def replace(self, path: str, data: Data) -> None:
        """See :meth:`Storage.replace`; by temporary name, fsync, rename, fsync of the folder."""
        self._write(replace_whole, path, memoryview(data))

    def _write(self, write: Callable[[Path, memoryview], None], path: str, body: memoryview) -> None:
        """Write; on a full disk give the reserve back and write once more, so that what is under way can finish."""
        try:
            write(self._target(path), body)
        except StoreError as error:
            if not _is_full(error.__cause__) or self._reserved() < len(body):
                raise
            self.remove(RESERVE)
            write(self._target(path), body)

    def reserve(self, size: int) -> None:
        """Hold ``size`` bytes back in ``reserve.bin`` for the day the disk is full; none when that file is there.

        Raises:
            StoreError: there is no such room now.
        """
        if size and not self.exists(RESERVE):
            preallocate(self._target(RESERVE), size)

    def _reserved(self) -> int:
        """Bytes of the reserve, 0 when there is none."""
        try:
            return self.at(RESERVE).stat().st_size
        except FileNotFoundError:
            return 0

    def read(self, path: str) -> bytes:
        """See :meth:`Storage.read`."""
        try:
            return self.at(path).read_bytes()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self._unreadable(error, path) from error

    def open(self, path: str) -> pa.NativeFile:
        """See :meth:`Storage.open`."""
        try:
            return pa.OSFile(str(self.at(path)))
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self._unreadable(error, path) from error

    def exists(self, path: str) -> bool:
        """See :meth:`Storage.exists`."""
        try:
            os.stat(self.at(path))
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise self._unreadable(error, path) from error
        return True

    def remove(self, path: str) -> None:
        """See :meth:`Storage.remove`."""
        try:
            self.at(path).unlink(missing_ok=True)
        except OSError as error:
            raise explain(error, self.at(path), 0) from error

    def move(self, path: str, to: str) -> None:
        """See :meth:`Storage.move`; a crash in between leaves the file under both names."""
        old, new = self.at(path), self._target(to)
        try:
            os.link(old, new)
            sync_folder(new.parent)
            old.unlink()
            sync_folder(old.parent)
        except (FileExistsError, FileNotFoundError):
            raise
        except OSError as error:
            raise explain(error, new, 0) from error

    def folders(self, prefix: str) -> Names:
        """See :meth:`Storage.folders`."""
        try:
            with os.scandir(self.at(prefix)) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._unreadable(error, prefix) from error

    def names(self, prefix: str) -> Names:
        """See :meth:`Storage.names`."""
        try:
            return os.listdir(self.at(prefix))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._unreadable(error, prefix) from error

    def list(self, prefix: str, *, temporary: bool = False) -> Files:
        """See :meth:`Storage.list`."""
        try:
            found = [*_walk(str(self.at(prefix)), f"{prefix}/" if prefix else "")]
        except OSError as error:
            raise self._unreadable(error, prefix) from error
        return sorted(info for info in found if temporary or not _is_temporary(info.path))

    def at(self, path: str) -> Path:
        """The file of a path. Raises what :func:`check_path` does."""
        check_path(path, self.uri)
        return self.root / path

    def _target(self, path: str) -> Path:
        """A file about to be written, in a folder that will survive a power cut."""
        target = self.at(path)
        folder = target.parent
        if folder not in self._durable or not folder.is_dir():
            try:
                ensure_folder(folder, within=self.root)
            except OSError as error:
                raise explain(error, target, 0) from error
            self._durable.add(folder)
        return target

    def _unreadable(self, error: OSError, path: str) -> StoreError:
        return StoreError(f"{self.at(path)} cannot be read: {error.strerror or error}",
                          fix="check permissions and the disk")


def _walk(folder: str, prefix: str) -> Iterator[FileInfo]:
    """Files below a folder; those that vanish meanwhile are left out."""
    try:
        with os.scandir(folder) as entries:
            found = list(entries)
    except FileNotFoundError:
        return
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, f"{prefix}{entry.name}/")
            continue
        try:
            stat = entry.stat()
        except FileNotFoundError:
            continue
        yield FileInfo(prefix + entry.name, stat.st_size, stat.st_mtime_ns // 1000)


def _is_full(cause: BaseException | None) -> bool:
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)


def _is_temporary(path: str) -> bool:
    return path.rpartition("/")[2].startswith(TEMPORARY)
