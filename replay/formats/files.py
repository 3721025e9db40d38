"""Files of other formats: written under a temporary name and renamed when whole, read line by line."""

import errno
import gzip
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from agentsdpo.errors import FormatError, StoreError
from agentsdpo.files import special, sync
from agentsdpo.replay.ids import uuid7

MAX_DEPTH = 128
"""Levels of nesting a JSON value may have; what is deeper is hostile, and some reader down the line would fail."""


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears, durable, when the block ends without an error, in the place of what was there.

    A link stays one: what it points to is replaced. A device or a pipe gets the bytes when they are whole.

    Raises:
        StoreError: it cannot be written; nothing is left behind then.
    """
    try:
        with _passed_on(path) if special(path) else _renamed(Path(os.path.realpath(path))) as file:
            yield file
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror or error}",
                         fix="name a file in a folder that exists, with room and permission") from error


@contextmanager
def _renamed(path: Path) -> Iterator[BinaryIO]:
    """A temporary file that takes the place of another."""
    temporary = path.parent / f".tmp-{uuid7()}"
    with open(temporary, "xb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync(path.parent)


@contextmanager
def _passed_on(path: Path) -> Iterator[BinaryIO]:
    """A temporary file, copied to where nobody can seek, as writers of Parquet must."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with tempfile.TemporaryFile() as file:
        yield file
        file.seek(0)
        with open(path, "wb") as out:
            shutil.copyfileobj(file, out)


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """JSON values of a file with where each stands: one a line, or the only one in a ``.json`` file.

    Blank lines are passed over; ``.gz`` is unpacked.

    Raises:
        FormatError: not UTF-8, not JSON, NaN or an infinity, nested more than 128 levels.
        StoreError: the file cannot be read.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            if path.name.removesuffix(".gz").endswith(".json"):
                yield str(path), parse(file.read(), str(path))
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path}:{number}"
                    yield where, parse(line, where)
    except (OSError, EOFError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}",
                         fix="name a readable file") from error


def parse(data: bytes, where: str) -> Any:
    """One JSON value; raises FormatError as :func:`read_lines`.

    >>> parse(b'{"a": [1]}', "x:1")
    {'a': [1]}
    """
    try:
        value = json.loads(data.decode(), parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is no JSON: {error}", fix="one JSON value a line, in UTF-8") from error
    if depth(value) > MAX_DEPTH:
        raise FormatError(f"{where} is nested more than {MAX_DEPTH} levels", fix="flatten it")
    return value


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)


def depth(value: Any) -> int:
    """Levels of nesting of a JSON value; 0 for a plain one.

    >>> depth({"a": [1]})
    2
    """
    level, layer = 0, [value]
    while layer := [each for each in layer if isinstance(each, (dict, list))]:
        level += 1
        layer = [inner for each in layer for inner in (each.values() if isinstance(each, dict) else each)]
    return level


def valid_text(value: Any) -> Any:
    """The JSON value with lone surrogates replaced, which strict readers of JSON refuse.

    >>> valid_text({"a": ["b" + chr(0xd800), 1]})
    {'a': ['b?', 1]}
    """
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {valid_text(key): valid_text(inner) for key, inner in value.items()}
    return [valid_text(inner) for inner in value] if isinstance(value, (list, tuple)) else value
