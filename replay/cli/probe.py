"""How a local disk behaves where it matters: durable writes, locks, clock, room. ``fitness.py`` tries the rest."""

import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from agentsdpo.types import Json

_SLOW_S = 0.1
"""fsync above this makes every step of an episode wait noticeably."""
_SKEW_S = 2.0
"""Difference between the clock here and that of the file system from which on pins and grace go wrong."""
_LITTLE = 1 << 30
"""Free bytes below which an hour of collecting may not fit."""


def probe(folder: Path) -> list[Json]:
    """Try a folder's file system: ``[{name, state, detail}]`` with ``state`` ok, warning or failed.

    Files are made in a temporary folder inside ``folder`` and removed again.

    >>> found = {each["name"]: each["state"] for each in probe(Path(tempfile.mkdtemp()))}
    >>> found["lock"], sorted(found)
    ('ok', ['clock', 'fsync', 'lock', 'space'])
    """
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-probe-") as name:
            return [_try(label, function, Path(name)) for label, function in _PROBES.items()]
    except OSError as error:
        return [_failed("folder", error)]


def _try(label: str, function: Callable[[Path], tuple[str, str]], folder: Path) -> Json:
    """One probe; what the system refuses is a failure with its reason."""
    try:
        state, detail = function(folder)
    except OSError as error:
        return _failed(label, error)
    return {"name": label, "state": state, "detail": detail}


def _failed(label: str, error: OSError) -> Json:
    detail = f"{error.strerror or error} ({errno.errorcode.get(error.errno or 0, '?')})"
    return {"name": label, "state": "failed", "detail": detail}


def _fsync(folder: Path) -> tuple[str, str]:
    """Times a few small durable writes; the folder itself must be syncable too."""
    times = []
    with (folder / "fsync").open("wb") as file:
        for _ in range(9):
            file.write(b"x" * 4096)
            file.flush()
            start = time.perf_counter()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - start)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    middle = median(times)
    return ("warning" if middle > _SLOW_S else "ok"), f"{middle * 1000:.2f} ms for 4 KiB, median of {len(times)}"


def _lock(folder: Path) -> tuple[str, str]:
    """flock between two open files: how recovery knows that a writer lives."""
    with (folder / "lock").open("wb") as one, (folder / "lock").open("rb") as two:
        fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "ok", "a held lock is refused"
    return "failed", "two holders of one lock: put the spool on a local disk"


def _clock(folder: Path) -> tuple[str, str]:
    """Skew between this machine and the file system; it moves pins and grace, never data."""
    before = time.time()
    (folder / "clock").write_bytes(b"")
    skew = (folder / "clock").stat().st_mtime - before
    return ("warning" if abs(skew) > _SKEW_S else "ok"), f"file times differ from this clock by {skew:+.2f} s"


def _space(folder: Path) -> tuple[str, str]:
    free = shutil.disk_usage(folder).free
    return ("warning" if free < _LITTLE else "ok"), f"{free / 2**30:.1f} GiB free"


_PROBES = {"fsync": _fsync, "lock": _lock, "clock": _clock, "space": _space}
