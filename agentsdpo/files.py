"""Small files replaced as a whole: a reader, or a crash, finds the old text or the new one, never a part."""

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agentsdpo.errors import OutputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a write for which there is no room: disk, quota, limit on a file's size."""


def write_text(path: Path, text: str) -> Path:
    """Replace a file by temporary name, fsync and rename, durable when this returns; readable by everyone.

    Args:
        path: the file, or a link to it; its folder must exist. A device or a pipe is written to as it is.
        text: all of its content, written as UTF-8.

    Returns:
        ``path``.

    Raises:
        OSError: the text could not be written; the old file is untouched and the temporary one gone.

    >>> folder = Path(tempfile.mkdtemp())
    >>> write_text(folder / "a.txt", "new").read_text(), [p.name for p in folder.iterdir()]
    ('new', ['a.txt'])
    """
    return write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> Path:
    """:func:`write_text` for bytes; without ``durable`` it survives the death of the process, not a power cut."""
    if special(path):
        path.write_bytes(data)
        return path
    final = Path(os.path.realpath(path))
    handle, name = tempfile.mkstemp(prefix=f".{final.name[:40]}-", dir=final.parent)
    temporary = Path(name)
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(handle, 0o644)
            if durable:
                os.fsync(handle)
        temporary.replace(final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync(final.parent)
    return path


def write_out(path: Path, text: str) -> Path:
    """:func:`write_text` to a place that a user named; folders that are missing are made.

    Raises:
        OutputError: it cannot be written.
        OSError: there is no room.
    """
    with named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_text(path, text)


@contextmanager
def named(path: Path, fix: str = "name a file in a folder with permission to write") -> Iterator[None]:
    """Write to a place that a user named.

    Raises:
        OutputError: it cannot be written.
        OSError: there is no room.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            error.filename = str(path)
            raise
        raise OutputError(f"{path} cannot be written: {error.strerror or error}", fix=fix) from error


def make_folder(path: Path) -> None:
    """Make a folder that a user named, with its parents; one that is there will do.

    Raises:
        OutputError, OSError: see :func:`named`.
    """
    with named(path, "name a folder in one with permission to write"):
        path.mkdir(parents=True, exist_ok=True)


def special(path: Path) -> bool:
    """Whether something stands there that no file may replace: a device, a pipe, a folder; links are followed."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        return False


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def last_line(log: Path) -> str:
    """The last line of a log that has words, at most 300 characters; only the file's end is read.

    >>> log = Path(tempfile.mkdtemp()) / "hints.log"
    >>> log.write_text("started\\n3 hints\\n\\n") and last_line(log)
    '3 hints'
    """
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        lines = [line for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1][-300:] if lines else "it said nothing"
