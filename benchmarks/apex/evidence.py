"""What a judge gets to see of an attempt: the answer and the files that changed, as plain harmless text.

Agents write both, so nothing of it is trusted: characters that hide or reorder text are taken out, everything is cut
to a length, documents are read without running anything in them.
"""

import io
import unicodedata
import zipfile
from collections.abc import Iterator

from agentsdpo.envs.documents import readable
from agentsdpo.types import Frozen, Outcome

ANSWER, FILE, ALL = 40_000, 20_000, 160_000
"""Characters kept of the answer, of one file, and of all files together."""
_UNPACKED = 32 << 20
"""Bytes of one file that are read."""
_FILES, _APPS = "filesystem/", ".apps_data/"


class Change(Frozen):
    """One file that is not as it was. ``text`` is what can be shown of it, empty for a removed one."""

    path: str
    kind: str
    text: str = ""


class Evidence(Frozen):
    """What the agent left behind, fit to be shown."""

    answer: str
    changes: tuple[Change, ...] = ()


def clean(text: str, most: int) -> str:
    """The text without characters that are invisible, reorder their neighbours or control a terminal; the middle cut.

    >>> clean("a\\u200bb\\u202ec\\x1b[0m\\td", 100), clean("0123456789", 4)
    ('abc[0m\\td', '01\\n[6 characters left out]\\n89')
    """
    kept = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn"))
    if len(kept) <= most:
        return kept
    half = most // 2
    return f"{kept[:half]}\n[{len(kept) - 2 * half} characters left out]\n{kept[-half:]}"


def gather(outcome: Outcome) -> Evidence:
    """The answer, and the changes between both snapshots where those are archives, by path.

    The room is given to files first, then to what apps keep for themselves, which may be far more than was asked for.
    """
    changes: dict[str, Change] = {}
    room = ALL
    for path, kind, data in _changes(outcome.initial, outcome.final):
        if data and room <= 0:
            text = f"[{len(data)} bytes left out]"
        else:
            text = clean(readable(path, data), min(FILE, room)) if data else ""
            room -= len(text)
        changes[path] = Change(path=clean(path, 300), kind=kind, text=text)
    by_path = tuple(changes[path] for path in sorted(changes))
    return Evidence(answer=clean(outcome.answer or "", ANSWER), changes=by_path)


def _changes(initial: bytes, final: bytes) -> Iterator[tuple[str, str, bytes]]:
    """``(path, kind, data)`` of every file that is not as it was, those of apps last."""
    before, after = _members(initial), _members(final)
    for path in sorted(before.keys() | after.keys(), key=lambda path: (path.startswith(_APPS), path)):
        old, new = before.get(path), after.get(path)
        if new is None:
            yield path, "removed", b""
        elif old is None or (old.CRC, old.file_size) != (new.CRC, new.file_size):
            with zipfile.ZipFile(io.BytesIO(final)) as archive, archive.open(new) as file:
                yield path, "added" if old is None else "changed", file.read(_UNPACKED)


def _members(state: bytes) -> dict[str, zipfile.ZipInfo]:
    """Files of a snapshot: those of the file system by their path there; empty for a state that is no archive."""
    if not state.startswith(b"PK"):
        return {}
    with zipfile.ZipFile(io.BytesIO(state)) as archive:
        return {info.filename.removeprefix(_FILES): info for info in archive.infolist() if not info.is_dir()}
