"""Words of the desk world: client names, periods, kinds, and sentences. Pure data and pure functions.

Names are three syllables out of 18 (5 832 names). They are built from shared tokens on purpose: a name that is a
token of its own and never asked for in training is unlearned, and held-out clients are lost.
"""

import hashlib
import itertools
import json
from typing import Any

SYLLABLES = ("ba", "co", "da", "fe", "go", "ka", "li", "ma", "mi", "no", "pa", "ri", "so", "ta", "ve", "wo", "yu", "za")
KINDS = ("revenue", "cost", "margin", "hours", "tax", "cash", "debt", "sales")
SOURCES = ("ledger", "summary", "bank", "audit")
UNITS = ("usd", "k_usd", "m_usd", "eur")
FOLDERS = ("reports", "board", "share", "archive")
PEOPLE = ("cfo", "client", "partner", "team")
ROUNDS = ("nearest", "up", "down", "exact")
BEFORE = ("review", "memo", "check", "mail")
DAYS = ("mon", "tue", "wed", "thu", "fri")
SEEN_NAMES = 5_000
"""Names of the seen pool; the other 832 are held out."""

SYSTEM = "You work at a desk. Use the tools, then submit."


def digest(*parts: Any) -> int:
    """A 64-bit number that depends on its parts alone: the only source of chance in this world.

    >>> digest("tax", 7) == digest("tax", 7) != digest("tax", 8)
    True
    """
    text = json.dumps(parts, separators=(",", ":"), sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def pick(options: tuple[str, ...] | list[str], *parts: Any) -> str:
    """One of the options, drawn by :func:`digest`."""
    return options[digest(*parts) % len(options)]


def all_names() -> list[str]:
    """All 5 832 names in one fixed shuffled order; the first 5 000 are seen, the rest held out."""
    names = ["".join(s) for s in itertools.product(SYLLABLES, repeat=3)]
    return sorted(names, key=lambda name: digest("name", name))


_NAMES = all_names()


def names(*, held_out: bool) -> list[str]:
    """Pool of client names."""
    return _NAMES[SEEN_NAMES:] if held_out else _NAMES[:SEEN_NAMES]


def period(quarter: int, year: int) -> str:
    """Third quarter of year 4.

    >>> period(3, 4)
    'q3-4'
    """
    return f"q{quarter}-{year}"


def year_of(name: str) -> str:
    """Year digit of a period.

    >>> year_of("q3-4")
    '4'
    """
    return name.rsplit("-", 1)[1]


def listing(clients: list[str]) -> str:
    """Clients as they stand in a prompt.

    >>> listing(["tamori", "bakoli"])
    '@tamori @bakoli'
    """
    return " ".join(f"@{client}" for client in clients)
