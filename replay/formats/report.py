"""What an export or an import did, for people and for programs."""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from agentsdpo.types import Json

Progress = Callable[[int, int], None]
"""Told after each episode how many are done, and of how many (0: not known beforehand)."""


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        format: name of the format.
        path: the file.
        episodes: that are in it.
        records: lines (rows, for Parquet) of the file.
        bytes: its size.
        skipped: what is not in it: episodes, pairs of them, late values, by reason or kind.
        redacted: what the redactor found, by rule, and what it did to tokens; None without one.
    """

    format: str
    path: str
    episodes: int
    records: int
    bytes: int
    skipped: dict[str, int] = field(default_factory=dict)
    redacted: dict[str, int] | None = None

    def as_json(self) -> Json:
        """All of it as a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class ImportReport:
    """What an import read, added and could not keep.

    Attributes:
        format: name of the format.
        files: that were read.
        episodes: in them.
        added: that are new in the store.
        duplicates: that the store already held, or that came twice.
        branches: added.
        tokens: added.
        trainable: tokens among them that carry loss.
        untrainable: calls added that cannot be trained on, by reason.
        lost: fields that found no place, by path, with how many of each; over all episodes that were read.
    """

    format: str
    files: int
    episodes: int
    added: int
    duplicates: int
    branches: int
    tokens: int
    trainable: int
    untrainable: dict[str, int] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)

    def as_json(self) -> Json:
        """All of it as a JSON object."""
        return asdict(self)


def counted(counter: Counter[str]) -> dict[str, int]:
    """The counts as a plain dictionary, by name, without zeros.

    >>> counted(Counter({"b": 2, "a": 1, "c": 0}))
    {'a': 1, 'b': 2}
    """
    return {name: counter[name] for name in sorted(counter) if counter[name]}
