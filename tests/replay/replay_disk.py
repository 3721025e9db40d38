"""A disk that forgets: stands between ``os`` and the files below one folder, and knows what a power cut would leave.

File bytes last once the file was fsynced, names once their folder was. Everything else may be lost, each piece by
itself. Reads go to the real files, which hold what a running process sees.
"""

import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


class PowerCut(BaseException):
    """Nothing happens any more: raised by the call at which the power went, and by every later one."""


@dataclass(eq=False)
class File:
    data: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    lost: bool = False  # an fsync failed: what was dirty then is gone, whatever later ones say


@dataclass(eq=False)
class Folder:
    names: dict[str, "File | Folder"] = field(default_factory=dict)
    durable: dict[str, "File | Folder"] = field(default_factory=dict)
    pending: list[tuple[str, "File | Folder | None"]] = field(default_factory=list)

    def set(self, name: str, to: "File | Folder | None") -> None:
        self.pending.append((name, to))
        if to is None:
            del self.names[name]
        else:
            self.names[name] = to


class Disk:
    """Counts the calls that change files below ``root`` and lets one of them fail.

    Attributes:
        calls: what was called so far.
        fail: number of the call to fail, what it raises, and whether it takes effect first.
        skip: call site (file name, first line, last line) whose fsyncs do nothing.
    """

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root, self.tree = root, Folder()
        self.calls: list[str] = []
        self.fail: tuple[int, BaseException, bool] | None = None
        self.skip: tuple[str, int, int] | None = None
        self.off = False
        self._handles: dict[int, File | Folder] = {}
        root.mkdir()
        self._real = {name: getattr(os, name) for name in ("open", "close", "write", "fsync", "fdatasync", "link",
                                                          "unlink", "rename", "replace", "mkdir", "rmdir",
                                                          "posix_fallocate")}
        for name in self._real:
            patch.setattr(os, name, getattr(self, f"_{name}"))

    # ------------------------------------------------------------------------------------------------ the calls

    def _do(self, name: str, real: Callable[[], Any], model: Callable[[Any], None]) -> Any:
        """One counted call: fail before it, do it on the real disk and in the model, fail after it."""
        if self.off:
            raise PowerCut
        self.calls.append(name)
        number, error, late = self.fail or (-1, PowerCut(), False)
        now = len(self.calls) - 1 == number
        if now and not late:
            self._broken(error)
        result = real()
        model(result)
        if now:
            self._broken(error)
        return result

    def _broken(self, error: BaseException) -> None:
        self.off = isinstance(error, PowerCut)
        raise error

    def _inside(self, path: Any) -> tuple[Folder, str] | None:
        """Folder and name of a path below the root."""
        path = Path(os.fspath(path))
        if self.root not in path.parents:
            return None
        folder = self.tree
        for part in path.relative_to(self.root).parts[:-1]:
            found = folder.names.get(part)
            if not isinstance(found, Folder):
                return Folder(), path.name
            folder = found
        return folder, path.name

    def _open(self, path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        def real() -> int:
            return self._real["open"](path, flags, mode, **more)

        if Path(os.fspath(path)) == self.root:
            handle = real()
            self._handles[handle] = self.tree
            return handle
        place = self._inside(path)
        if place is None:
            return real()
        folder, name = place

        def model(handle: int) -> None:
            if name not in folder.names:
                folder.set(name, File())
            self._handles[handle] = folder.names[name]

        if flags & os.O_CREAT:
            return self._do("open", real, model)
        handle = real()
        model(handle)
        return handle

    def _close(self, handle: int) -> None:
        self._handles.pop(handle, None)
        self._real["close"](handle)

    def _write(self, handle: int, data: Any) -> int:
        file = self._handles.get(handle)
        if not isinstance(file, File):
            return self._real["write"](handle, data)
        return self._do("write", lambda: self._real["write"](handle, data),
                        lambda done: file.data.extend(memoryview(data)[:done]))

    def _posix_fallocate(self, handle: int, offset: int, size: int) -> None:
        file = self._handles[handle]
        assert isinstance(file, File)
        self._do("fallocate", lambda: self._real["posix_fallocate"](handle, offset, size),
                 lambda _: file.data.extend(bytes(size)))

    def _fsync(self, handle: int) -> None:
        target = self._handles.get(handle)
        if target is None:
            self._real["fsync"](handle)
        else:
            skipped = self._skipped()
            try:
                self._do("fsync", lambda: None, lambda _: None if skipped else _persist(target))
            except OSError:
                if isinstance(target, File):
                    target.lost = True
                raise

    _fdatasync = _fsync

    def _skipped(self) -> bool:
        """Whether the fsync now called was taken out of the program."""
        frame = sys._getframe(2)
        while self.skip and frame is not None:
            name, first, last = self.skip
            if frame.f_code.co_filename.endswith(f"replay/{name}") and first <= frame.f_lineno <= last:
                return True
            frame = frame.f_back
        return False

    def _link(self, old: Any, new: Any, **more: Any) -> None:
        (source, was), (target, name) = self._both(old, new)
        self._do("link", lambda: self._real["link"](old, new, **more), lambda _: target.set(name, source.names[was]))

    def _rename(self, old: Any, new: Any, **more: Any) -> None:
        (source, was), (target, name) = self._both(old, new)

        def model(_: Any) -> None:
            target.set(name, source.names[was])
            source.set(was, None)

        self._do("rename", lambda: self._real["rename"](old, new, **more), model)

    _replace = _rename

    def _both(self, old: Any, new: Any) -> tuple[tuple[Folder, str], tuple[Folder, str]]:
        source, target = self._inside(old), self._inside(new)
        assert source is not None
        assert target is not None
        return source, target

    def _unlink(self, path: Any, **more: Any) -> None:
        self._remove("unlink", path, more)

    def _rmdir(self, path: Any, **more: Any) -> None:
        self._remove("rmdir", path, more)

    def _remove(self, call: str, path: Any, more: dict[str, Any]) -> None:
        place = self._inside(path)
        if place is None:
            self._real[call](path, **more)
        elif self.off or os.path.lexists(path):
            self._do(call, lambda: self._real[call](path, **more), lambda _: place[0].set(place[1], None))
        else:
            raise FileNotFoundError(path)

    def _mkdir(self, path: Any, mode: int = 0o777, **more: Any) -> None:
        place = self._inside(path)
        if place is None or os.path.isdir(path):
            self._real["mkdir"](path, mode, **more)
        else:
            self._do("mkdir", lambda: self._real["mkdir"](path, mode, **more),
                     lambda _: place[0].set(place[1], Folder()))

    # -------------------------------------------------------------------------------------------- the power cut

    def after_power_cut(self, to: Path, chance: random.Random | None = None) -> Path:
        """Write what is left to a new folder: only what is durable, or with ``chance`` some of the rest as well."""
        _materialise(self.tree, to, chance)
        return to


def _persist(target: File | Folder) -> None:
    """What an fsync promises."""
    if isinstance(target, Folder):
        target.durable, target.pending = dict(target.names), []
    elif not target.lost:
        target.durable = bytes(target.data)


def _materialise(folder: Folder, to: Path, chance: random.Random | None) -> None:
    to.mkdir()
    names = dict(folder.durable)
    for name, target in folder.pending if chance else []:
        if chance and chance.random() < 0.5:
            names.pop(name, None) if target is None else names.update({name: target})
    for name, target in names.items():
        if isinstance(target, Folder):
            _materialise(target, to / name, chance)
        else:
            (to / name).write_bytes(_left(target, chance))


def _left(file: File, chance: random.Random | None) -> bytes:
    """Bytes of a file after a power cut: the durable ones, and by chance a part of the others, torn or zeroed."""
    rest = bytes(file.data[len(file.durable):])
    if chance is None or not rest or file.lost:
        return file.durable
    kept = rest[:chance.randrange(len(rest) + 1)]
    return file.durable + (bytes(len(kept)) if chance.random() < 0.3 else kept)
