"""Whole files that appear at once or not at all, and never replace another."""

import errno
import os
from pathlib import Path

from agentsdpo.errors import CorruptionError, StoreError
from agentsdpo.replay.ids import uuid7

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_WRITE = (errno.EROFS, errno.EACCES, errno.EPERM)


def create_exclusive(path: Path, data: bytes | memoryview) -> None:
    """Write a new file durably: temporary name, fsync, hard link to the final name, fsync of the directory.

    Nothing is visible under ``path`` before the link, and everything is on disk when this returns. A failed fsync is
    never retried on the same file, since its pages may be gone: the call fails and the caller writes a new file.

    Raises:
        FileExistsError: the name is taken; the file there is untouched.
        StoreError: no space, no permission, or a file system without hard links.
    """
    try:
        _ensure_folder(path.parent)
        temporary = path.parent / f".tmp-{uuid7()}"
        try:
            _write_durable(temporary, data)
            os.link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise _explain(error, path, len(data)) from error


def _write_durable(path: Path, data: bytes | memoryview) -> None:
    """Create a file, write all bytes, fsync it."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(handle, left):]
        os.fsync(handle)
    finally:
        os.close(handle)


def _ensure_folder(folder: Path) -> None:
    """Make a folder and its parents, each one durable in its own parent."""
    if folder.is_dir():
        return
    _ensure_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """fsync of a directory, which makes the names in it durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _explain(error: OSError, path: Path, size: int) -> StoreError:
    """The sentence for a failed write; nothing of it is visible."""
    if error.errno in _NO_SPACE:
        return StoreError(f"no room for {size} bytes at {path} ({error.strerror}); nothing of this write is visible",
                          fix="free space (or raise the quota or file size limit) and append again; "
                              "what was acknowledged before is safe")
    if error.errno in _NO_WRITE:
        return StoreError(f"{path.parent} cannot be written ({error.strerror})",
                          fix="give this user write permission there; reading the store works without it. "
                              "The file system must support hard links")
    return StoreError(f"writing {path} failed: {error}", fix="check the disk; nothing was acknowledged")


def read_whole(path: Path) -> bytes:
    """All bytes of a file that the log says exists.

    Raises:
        CorruptionError: it is missing.
        StoreError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CorruptionError(f"{path} is missing though the log names it", fix="restore it from a backup") from error
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}", fix="check permissions and the disk") from error
