"""Evaluations that a learner asks for and an evaluator plays: two files in the run folder, one writer each.

``due.json`` holds what the learner still waits for, oldest first, replaced as a whole whenever that changes;
``evals.jsonl`` one line per split and decoding that was played, appended by the evaluator. A line that was cut off by a
kill is passed over, and its evaluation played again.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from agentsdpo.files import write_text
from agentsdpo.runfolder import RunFolder
from agentsdpo.types import Json


@dataclass(frozen=True)
class Owed:
    """Evaluations of one policy version.

    Attributes:
        step: optimiser steps behind it. version: what is to be played.
        wall_s: seconds of the run at which it was published.
        wanted: (split, ``sampled`` or ``greedy``, episodes).
        totals: of the run at that time, for the line of each.
        candidate: weights that an alarm holds back, by their number in ``candidates/``; these are played instead.
    """

    step: int
    version: int
    wall_s: float
    wanted: tuple[tuple[str, str, int], ...]
    totals: dict[str, int]
    candidate: int | None = None

    @property
    def keys(self) -> list[tuple[int, int, str, str]]:
        """What each line of the answer is known by: step, version, split, decoding."""
        return [(self.step, self.version, split, decoding) for split, decoding, _ in self.wanted]


def write_owed(folder: RunFolder, owed: Sequence[Owed]) -> None:
    """Say what is still waited for."""
    write_text(folder.path / "due.json", json.dumps([asdict(one) for one in owed], indent=1) + "\n")


def read_owed(folder: RunFolder) -> list[Owed]:
    """What the learner waits for; nothing before it has said so."""
    path = folder.path / "due.json"
    return owed_of(json.loads(path.read_text()) if path.is_file() else [])


def owed_of(saved: Sequence[Json]) -> list[Owed]:
    """What was written as JSON, read back."""
    return [Owed(**{**one, "wanted": tuple((split, decoding, n) for split, decoding, n in one["wanted"])})
            for one in saved]


def key_of(row: Json) -> tuple[int, int, str, str]:
    """What a line of ``evals.jsonl`` answers."""
    return row["step"], row["version"], row["split"], row["decoding"]


def read_answers(folder: RunFolder) -> list[Json]:
    """Whole lines of ``evals.jsonl``."""
    path = folder.path / "evals.jsonl"
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows += [row] if isinstance(row, dict) else []
    return rows


def append_answer(folder: RunFolder, row: Json) -> None:
    """Add one line, on a line of its own whatever a kill left at the end of the file."""
    path = folder.path / "evals.jsonl"
    torn = path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + json.dumps(row, allow_nan=False) + "\n")
