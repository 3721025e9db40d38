"""Files that came from somebody: zip and tar archives and folders as a flat map of paths, checked before they are used.

Nothing is ever unpacked to disk: members are read into memory one by one when they are asked for, so that no path of an
archive can lead anywhere. Links, devices, passwords, repeated and escaping names are refused, and so is what is too
large or expands too much.
"""

import io
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from agentsdpo.errors import FormatError

MOST_FILES, MOST_BYTES, MOST_FILE = 50_000, 8 << 30, 1 << 30
"""Files of an archive, bytes of all together and of one, when unpacked."""
MOST_RATIO, SMALL = 200, 1 << 20
"""How many times larger a member may be than its packed form, and bytes below which nobody asks."""
_DATE = (1980, 1, 1, 0, 0, 0)


class UnsafePath(FormatError):
    """A path that leads out of its root, or that some system reads differently."""


class UnsafeArchive(FormatError):
    """An archive that holds links or devices, or expands to more than it may."""


@dataclass(frozen=True)
class Entry:
    """One file: bytes when unpacked, CRC-32, and how to read it."""

    size: int
    crc: int
    load: Callable[[], bytes]

    @classmethod
    def of(cls, data: bytes) -> "Entry":
        """A file that is in memory."""
        return cls(len(data), zlib.crc32(data), lambda: data)


Files = Mapping[str, Entry]
"""Files by relative path with ``/``, as :func:`safe_path` writes it."""


def safe_path(path: str) -> str:
    """A path below a root, normalised.

    Raises:
        UnsafePath: absolute, with ``..``, a NUL, a control character or a backslash, too long, not writable as UTF-8.

    >>> safe_path("a//b/./c.txt")
    'a/b/c.txt'
    >>> safe_path("a/../../etc/passwd")
    Traceback (most recent call last):
    agentsdpo.envs.archives.UnsafePath: path 'a/../../etc/passwd' goes up; use a path below the root, without '..'
    """
    shown = repr(path[:200])
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if path.startswith("/") or path[1:3] in (":/", ":"):
        raise UnsafePath(f"path {shown} is absolute", fix="use a path below the root")
    if ".." in parts:
        raise UnsafePath(f"path {shown} goes up", fix="use a path below the root, without '..'")
    if "\\" in path or any(ord(c) < 32 or ord(c) == 127 for c in path):
        raise UnsafePath(f"path {shown} holds a backslash or a control character", fix="use / and printable characters")
    try:
        sizes = [len(part.encode()) for part in parts]
    except UnicodeEncodeError:
        raise UnsafePath(f"path {shown} cannot be written as UTF-8", fix="rename the file") from None
    if not parts or max(sizes) > 255 or sum(sizes) > 3000:
        raise UnsafePath(f"path {shown} has {len(parts)} names, the longest of {max(sizes, default=0)} bytes",
                         fix="use at least one name, each of 255 bytes at most")
    return "/".join(parts)


def open_archive(path: Path) -> Files:
    """Files of a ``.zip``, ``.tar`` or ``.tar.gz``, or of a folder.

    Raises:
        UnsafePath, UnsafeArchive: see the module. FormatError: no such file, or none of these formats.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "a.txt").write_text("five")
    >>> open_archive(folder)["a.txt"].load()
    b'five'
    """
    try:
        if path.is_dir():
            return dict(_folder(path))
        if path.name.endswith(".zip"):
            return _zip(zipfile.ZipFile(path), str(path))
        with tarfile.open(path) as archive:
            return dict(_tar(archive, str(path), path.stat().st_size))
    except (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile, NotImplementedError) as error:
        raise FormatError(f"{path} cannot be read as an archive: {error}",
                          fix="give a folder, a .zip, a .tar or a .tar.gz") from error


def unzip(data: bytes, where: str) -> Files:
    """Files of a zip archive in memory; raises what :func:`open_archive` does."""
    try:
        return _zip(zipfile.ZipFile(io.BytesIO(data)), where)
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise FormatError(f"{where} is no zip archive: {error}", fix="fetch it again") from error


def untar(data: bytes, where: str) -> Files:
    """Files of a tar or tar.gz archive in memory; raises what :func:`open_archive` does."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            return dict(_tar(archive, where, len(data)))
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise FormatError(f"{where} is no tar archive: {error}", fix="fetch it again") from error


def zip_bytes(files: Files) -> bytes:
    """The files as a zip archive; the same files give the same bytes.

    >>> sorted(unzip(zip_bytes({"b": Entry.of(b"2"), "a": Entry.of(b"1")}), "x"))
    ['a', 'b']
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in sorted(files):
            archive.writestr(zipfile.ZipInfo(path, _DATE), files[path].load(), zipfile.ZIP_DEFLATED, 1)
    return buffer.getvalue()


def tar_bytes(files: Files) -> bytes:
    """The files as a tar.gz archive, as archipelago's containers take it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for path in sorted(files):
            info = tarfile.TarInfo(path)
            info.size = files[path].size
            archive.addfile(info, io.BytesIO(files[path].load()))
    return buffer.getvalue()


class _Count:
    """Counts what an archive expands to, and refuses more than it may."""

    def __init__(self, where: str) -> None:
        self._where, self._seen, self.bytes = where, set[str](), 0

    def member(self, name: str, size: int) -> str:
        """The safe path of the next member."""
        path = safe_path(name)
        self.bytes += size
        if path in self._seen:
            raise UnsafeArchive(f"{self._where}: {path!r} is in it twice", fix="keep one of them")
        self._seen.add(path)
        if len(self._seen) > MOST_FILES or self.bytes > MOST_BYTES or size > MOST_FILE:
            raise UnsafeArchive(f"{self._where} expands to more than {MOST_FILES} files, {MOST_BYTES} bytes, or "
                                f"{MOST_FILE} bytes in one", fix="it looks like a bomb: see where it comes from")
        return path


def _zip(archive: zipfile.ZipFile, where: str) -> dict[str, Entry]:
    """Members of a zip; its directory is believed, since no more than it says is ever read."""
    count, found = _Count(where), {}
    for info in archive.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR) or info.flag_bits & 1:
            raise UnsafeArchive(f"{where}: {info.filename[:200]!r} is a link, a device or has a password",
                                fix="pack plain files alone")
        if info.is_dir():
            continue
        if info.file_size > SMALL and info.file_size > MOST_RATIO * max(1, info.compress_size):
            raise UnsafeArchive(f"{where}: {info.filename[:200]!r} has {info.file_size} bytes in {info.compress_size}",
                                fix="it looks like a bomb: see where it comes from")
        found[count.member(info.filename, info.file_size)] = Entry(
            info.file_size, info.CRC, lambda info=info: archive.read(info))
    return found


def _tar(archive: tarfile.TarFile, where: str, packed: int) -> Iterator[tuple[str, Entry]]:
    """Members of a tar of so many bytes, each checked before it is read."""
    count = _Count(where)
    for member in archive:
        if member.isdir():
            continue
        if not member.isreg():
            raise UnsafeArchive(f"{where}: {member.name[:200]!r} is a link or a device", fix="pack plain files alone")
        path = count.member(member.name.removeprefix("./"), member.size)
        if count.bytes > SMALL and count.bytes > MOST_RATIO * packed:
            raise UnsafeArchive(f"{where} has {packed} bytes and expands to {count.bytes} by {path!r}",
                                fix="it looks like a bomb: see where it comes from")
        file = archive.extractfile(member)
        assert file is not None
        yield path, Entry.of(file.read())


def _folder(root: Path) -> Iterator[tuple[str, Entry]]:
    """Files of a folder; a link in it is refused, not followed."""
    count = _Count(str(root))
    for folder, names, files in os.walk(root):
        for name in (*names, *files):
            path = Path(folder, name)
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise UnsafeArchive(f"{path} is a link or a device", fix="put the file itself there")
        for name in files:
            path = Path(folder, name)
            inside = count.member(path.relative_to(root).as_posix(), path.stat().st_size)
            yield inside, Entry(path.stat().st_size, zlib.crc32(path.read_bytes()), path.read_bytes)
