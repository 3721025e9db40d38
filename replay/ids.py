"""Identifiers of the store: time-ordered unique ids and the key of a row."""

import hashlib
import os
import time
import uuid
from typing import NamedTuple


def uuid7() -> str:
    """A fresh version-7 UUID (RFC 9562, section 5.7): 48 bits of milliseconds, 12 of their fraction, 62 random.

    Ids sort roughly by creation time, which is a convenience for people: nothing in the store relies on it.

    >>> import uuid
    >>> made = uuid.UUID(uuid7())
    >>> made.version, made.variant == uuid.RFC_4122
    (7, True)
    """
    ms, rest = divmod(time.time_ns(), 1_000_000)
    fraction = rest * 4096 // 1_000_000
    tail = int.from_bytes(os.urandom(8), "big") & (1 << 62) - 1
    return str(uuid.UUID(int=(ms & (1 << 48) - 1) << 80 | 0x7 << 76 | fraction << 64 | 0b10 << 62 | tail))


def derived_uuid(*parts: str | int) -> str:
    """A version-8 UUID (RFC 9562, section 5.8) that depends on its parts alone: 122 bits of their hash.

    >>> derived_uuid("run", 3) == derived_uuid("run", 3) != derived_uuid("run", 4)
    True
    """
    text = "\x1f".join(str(part) for part in parts)
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")
    return str(uuid.UUID(int=number & ~(0xF << 76) & ~(0b11 << 62) | 0x8 << 76 | 0b10 << 62))


class Key(NamedTuple):
    """Address of one row, never reused: one branch of one attempt at one episode.

    >>> key = Key("e-1", 0, 2)
    >>> str(key), Key.parse("e-1/0/2") == key
    ('e-1/0/2', True)
    """

    episode_id: str
    branch_id: int
    attempt: int

    def __str__(self) -> str:
        return f"{self.episode_id}/{self.branch_id}/{self.attempt}"

    @classmethod
    def parse(cls, text: str) -> "Key":
        """The key a ``str(key)`` came from.

        Raises:
            ValueError: the text has not the form ``episode/branch/attempt``.
        """
        episode_id, branch_id, attempt = text.rsplit("/", 2)
        return cls(episode_id, int(branch_id), int(attempt))
