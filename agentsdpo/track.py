"""``metrics.jsonl``: one JSON object per line, appended and flushed as it happens.

Three kinds of lines::

    {"kind": "step", "step": 12, "wall_s": 80.1, "learn/loss": 0.02, ...}
    {"kind": "eval", "step": 20, "wall_s": 131.0, "split": "val", "decoding": "sampled", "pass": 0.5, "n": 128}
    {"kind": "tripwire", "step": 30, "wall_s": 160.2, "level": "soft", "alarms": {"probe/best": {...}}, ...}

``step`` counts optimiser steps from 1 (0 is before the first), ``wall_s`` is seconds since the run began, resumed time
included. NaN and infinities are written as null, since JSON has neither.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from agentsdpo.errors import RunError
from agentsdpo.files import write_text
from agentsdpo.metrics import check_keys
from agentsdpo.types import Json

Kind = Literal["step", "eval", "tripwire"]


class MetricsWriter:
    """Appends lines; use as a context manager. ``rows`` are the lines of earlier lives that were kept.

    Args:
        path: the file; its folder must exist.
        resume_step: lines of later steps, repeated lines and a torn last one are removed first, those of this step
            and before stay, evaluations included. None starts an empty file.
        mirror: told every new line once it is written.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> with MetricsWriter(path) as metrics:
    ...     metrics.write("step", 1, {"learn/loss": 0.5, "learn/grad_norm": float("nan")})
    >>> row = read_metrics(path)[0]
    >>> row["kind"], row["step"], row["learn/loss"], row["learn/grad_norm"]
    ('step', 1, 0.5, None)
    """

    def __init__(self, path: Path, *, resume_step: int | None = None,
                 mirror: Callable[[Json], None] | None = None) -> None:
        self.rows = () if resume_step is None else _kept(read_metrics(path), resume_step)
        write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in self.rows))
        self._before = max((float(row["wall_s"]) for row in self.rows), default=0.0)
        self._began = time.monotonic()
        self._file, self._mirror = path.open("a", encoding="utf-8"), mirror

    def write(self, kind: Kind, step: int, values: Mapping[str, Any], *, wall_s: float | None = None) -> None:
        """Append one line.

        Args:
            kind: ``step``, ``eval`` or ``tripwire``.
            step: optimiser steps done.
            values: metric keys of :data:`agentsdpo.metrics.TABLE` and the kind's plain fields.
            wall_s: seconds of the run that the line is about, where that is not now.

        Raises:
            ConfigError: a key is not in the table.
        """
        check_keys(values, kind)
        at = self.wall_s if wall_s is None else wall_s
        row = {"kind": kind, "step": step, "wall_s": round(at, 3), **{k: _plain(v) for k, v in values.items()}}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        if self._mirror is not None:
            self._mirror(row)

    @property
    def wall_s(self) -> float:
        """Seconds since the run began, those before a resume included."""
        return self._before + time.monotonic() - self._began

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def _kept(rows: list[Json], step: int) -> tuple[Json, ...]:
    """Lines up to a step, the first of each (kind, step, split, decoding)."""
    first: dict[tuple[Any, ...], Json] = {}
    for row in rows:
        if row["step"] <= step:
            first.setdefault(tuple(row.get(key) for key in _IDENTITY), row)
    return tuple(first.values())


_IDENTITY = ("kind", "step", "split", "decoding", "hinted", "seed")
"""What no two lines of a run share."""


def read_metrics(path: Path) -> list[Json]:
    """All lines; a torn last one (the run was killed) is left out, a missing file has none.

    Raises:
        RunError: another line is not a JSON object.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = [line for line in text.split("\n") if line.strip()]
    rows: list[Json] = []
    for i, line in enumerate(lines):
        row = _object(line)
        if row is not None:
            rows.append(row)
        elif i < len(lines) - 1:
            raise RunError(f"line {i + 1} of {len(lines)} in {path} is not a JSON object",
                           fix="remove the broken line; only the last one may be torn")
    return rows


class Tail:
    """New lines of a ``metrics.jsonl`` that another process writes; nothing is locked, nothing is written.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> tail = Tail(path)
    >>> tail.look()
    ([], False)
    >>> path.write_text('{"step": 1}\\n{"st') and tail.look()
    ([{'step': 1}], False)
    >>> path.write_text('{"step": 1}\\n{"step": 2}\\n') and tail.look()
    ([{'step': 2}], False)
    >>> path.write_text('{"step": 7}\\n') and tail.look()
    ([{'step': 7}], True)
    """

    def __init__(self, path: Path) -> None:
        self._path, self._at, self._mark = path, 0, b""

    def look(self) -> tuple[list[Json], bool]:
        """Whole lines since the last look, and whether what was read before is no longer what the file begins with.

        A run that is resumed writes its file anew, without the steps it has lost; then all lines come again. A last
        line without its end is left for the next look.

        Raises:
            RunError: a whole line is not a JSON object.
        """
        if not self._path.is_file():
            return [], False
        with self._path.open("rb") as file:
            file.seek(self._at - len(self._mark))
            anew = file.read(len(self._mark)) != self._mark
            if anew:
                self._at = file.seek(0)
            data = file.read()
        whole = data[:data.rfind(b"\n") + 1]
        self._at += len(whole)
        self._mark = (whole if anew else self._mark + whole)[-256:]
        return [_row(line, self._path) for line in whole.splitlines() if line.strip()], anew


def _row(line: bytes, path: Path) -> Json:
    row = _object(line)
    if row is None:
        raise RunError(f"a line of {path} is not a JSON object: {line[:60]!r}", fix="remove the broken line")
    return row


def _object(line: str | bytes) -> Json | None:
    """A JSON object; None where the line is anything else."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _plain(value: Any) -> Any:
    """A JSON value: numpy scalars become numbers, what is not finite becomes null.

    >>> import numpy as np
    >>> _plain(np.float32(0.5)), _plain(float("inf")), _plain("val"), _plain(True)
    (0.5, None, 'val', True)
    """
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
