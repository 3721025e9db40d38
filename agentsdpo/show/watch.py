"""Looking on at a run from another terminal: what ``agentsdpo watch RUN`` shows.

Only ``metrics.jsonl`` and small files of the run folder are read; nothing is written, nothing locked, and the run does
not notice. A half-written line is left until it is whole. A run that was killed is waited for; one that goes on from a
checkpoint, and so has lost steps, is shown anew.
"""

import os
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from agentsdpo.errors import RunError
from agentsdpo.files import last_line
from agentsdpo.formats import duration, interval, is_number, number, percent
from agentsdpo.results import eval_interval
from agentsdpo.runfolder import RunFolder
from agentsdpo.show import console
from agentsdpo.show.console import SHOWN
from agentsdpo.track import Tail
from agentsdpo.types import Json

POLL_S = 0.5
"""Seconds between two looks at the file."""
STORE_S = 10.0
"""Seconds between two looks at the size of the store."""
HISTORY = 5
"""Lines of the past that a plain view begins with; a live one draws them all."""


@dataclass
class Seen:
    """What the lines of one run say, added one by one; small however long the run is."""

    total: int
    step: Json = field(default_factory=dict)
    newest: Json = field(default_factory=dict)
    evals: dict[tuple[str, str], list[Json]] = field(default_factory=dict)
    alarms: list[Json] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._pace = console.Pace(self.total)

    def add(self, row: Json) -> None:
        """Take in one line of ``metrics.jsonl``; evaluations may come late and speak of an earlier step."""
        if row.get("step", 0) >= self.newest.get("step", 0):
            self.newest = row
        if row.get("kind") == "step":
            self.step, self.rates = row, self._pace.rates(row)
        elif row.get("kind") == "eval":
            key = row.get("split", ""), row.get("decoding", "sampled")
            self.evals[key] = [*self.evals.get(key, [])[:1], row]
        else:
            self.alarms.append(row)

    def numbers(self) -> Json:
        """The newest step's numbers that are worth a glance, by metric key."""
        return {key: self.step[key] for key, _, _ in SHOWN if is_number(self.step.get(key))}


class Sight:
    """One run folder as it stands, looked at again and again.

    Args:
        path: folder of one run, with ``config.toml`` in it.
    """

    def __init__(self, path: Path) -> None:
        self.folder, self._tail = RunFolder(path), Tail(path / "metrics.jsonl")
        self.begin()
        self._sized: tuple[float, Json | None] = (-STORE_S, None)

    def begin(self) -> None:
        """Forget what was seen; name and planned steps are read again, since a resumed run may do more."""
        try:
            settings = tomllib.loads(self.folder.config.read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise RunError(f"{self.folder.config} cannot be read: {error}",
                           fix="give the folder of a run, such as runs/demo") from None
        self.name, self.total = str(settings.get("name", "run")), int(settings.get("steps", 1))
        self.seen = Seen(self.total)

    def look(self) -> tuple[list[Json], bool]:
        """New lines, and whether the run goes on from an earlier step: then all that is left comes again."""
        rows, anew = self._tail.look()
        if anew:
            self.begin()
        for row in rows:
            self.seen.add(row)
        return rows, anew

    @property
    def pid(self) -> int | None:
        """The process of this machine that runs here, by the number in ``LOCK``; None when there is none."""
        try:
            pid = int((self.folder.path / "LOCK").read_text())
            os.kill(pid, 0)
        except (OSError, ValueError) as error:
            return pid if isinstance(error, PermissionError) else None
        return pid

    @property
    def state(self) -> str:
        """``finished``, ``running``, or ``silent``: no process of this machine runs it."""
        return "finished" if self.folder.finished else "running" if self.pid else "silent"

    @property
    def silent_s(self) -> float | None:
        """Seconds since the newest line was written."""
        path = self.folder.metrics
        return max(0.0, time.time() - path.stat().st_mtime) if path.is_file() else None

    def store(self) -> Json | None:
        """Files and bytes of the run's own store, looked at every ten seconds; None without one."""
        if time.monotonic() - self._sized[0] >= STORE_S:
            sizes = [size for path in self.folder.replay.glob("data/**/*.parquet") if (size := _size(path)) is not None]
            there = {"files": len(sizes), "bytes": sum(sizes)} if self.folder.replay.is_dir() else None
            self._sized = time.monotonic(), there
        return self._sized[1]

    def programs(self) -> list[Json]:
        """Programs side by side, by their logs: name, last words, seconds since."""
        return [{"name": log.stem, "said": last_line(log), "age_s": round(time.time() - log.stat().st_mtime, 1)}
                for log in sorted(self.folder.logs.glob("*.log"))]

    def as_json(self) -> Json:
        """All of it as data; what is not known is null."""
        seen = self.seen
        evals = [{"split": split, "decoding": decoding, "step": rows[-1].get("step"), "n": rows[-1].get("n"),
                  "pass": rows[-1].get("pass"), "score": rows[-1].get("score"), "first_pass": rows[0].get("pass")}
                 for (split, decoding), rows in seen.evals.items()]
        totals = {key: seen.newest.get(key) for key in ("version", "episodes", "env_steps", "tokens", "wall_s")}
        return {"run": str(self.folder.path), "name": self.name, "state": self.state, "pid": self.pid,
                "step": seen.newest.get("step", 0), "steps": self.total, **totals, "silent_s": self.silent_s,
                "metrics": seen.numbers(), "rates": seen.rates, "evals": evals, "store": self.store(),
                "alarms": seen.alarms, "restrained": bool(seen.step.get("tripwire/restrained")),
                "programs": self.programs()}


def _size(path: Path) -> int | None:
    """Bytes of a file; None when it went away meanwhile, as after compaction."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def runs_in(path: Path) -> list[Path]:
    """Folders of the runs below a folder, the one written to last at the end: itself, or the arms of a demo.

    Raises:
        RunError: there is none.
    """
    found = [path] if (path / "metrics.jsonl").is_file() or not (path / "arms").is_dir() else [
        arm for arm in path.glob("arms/*") if (arm / "config.toml").is_file()]
    if not found or not (found[0] / "config.toml").is_file():
        raise RunError(f"{path} holds no run", fix="give the folder that a run writes to, such as runs/demo")
    return sorted(found, key=_written)


def _written(run: Path) -> float:
    lines = run / "metrics.jsonl"
    return (lines if lines.is_file() else run / "config.toml").stat().st_mtime


def snapshot(path: Path | str) -> Json:
    """A run as it stands now; of a demo, the arm that was written to last.

    Raises:
        RunError: no run is there, or a line of its metrics is broken.
    """
    sight = Sight(runs_in(Path(path))[-1])
    sight.look()
    return sight.as_json()


def changes(path: Path | str, poll_s: float = POLL_S) -> Iterator[tuple[Sight, list[Json], bool]]:
    """Look at a run again and again until nothing more will come: it has finished, or a demo with all its arms.

    Yields:
        The run in sight; its new lines, perhaps none; whether these are the first to be seen of it, or all that is left
        of it since it goes on from an earlier step.

    Raises:
        RunError: no run is there, or a line of its metrics is broken.
    """
    place = Path(path)
    sight, begun = Sight(runs_in(place)[-1]), True
    while True:
        ended = over(place)  # asked before the look, so that the last lines are seen
        rows, anew = sight.look()
        yield sight, rows, begun or anew
        newest = runs_in(place)[-1]
        begun = newest != sight.folder.path and sight.state != "running"  # arms may run side by side
        if begun:
            yield sight, sight.look()[0], False  # what it wrote before the next one began
            sight = Sight(newest)
        elif ended:
            return
        else:
            time.sleep(poll_s)


def over(place: Path) -> bool:
    """Whether a run has finished; a demo has when all arms have and its summary is written."""
    runs = runs_in(place)
    return all(RunFolder(run).finished for run in runs) and (runs == [place] or (place / "summary.json").is_file())


def follow(path: Path | str, *, mode: str = "auto", out: TextIO | None = None, poll_s: float = POLL_S) -> None:
    """Show a run until it has finished; a demo arm after arm.

    Args:
        path: run folder.
        mode: ``auto``, ``rich``, ``plain`` or ``none``, as in :func:`agentsdpo.show.console.training`.
        out: where to; None is stdout.
        poll_s: seconds between two looks, above 0.

    Raises:
        RunError: no run is there, or a line of its metrics is broken. ConfigError: the mode is unknown.
        KeyboardInterrupt: the user has seen enough; the run goes on.
    """
    stream = out or sys.stdout
    mode = console.settled(mode, stream)
    with ExitStack() as shown:
        view, said, before = None, "", None
        for sight, rows, begun in changes(path, poll_s):
            if begun or view is None:
                shown.close()  # what was shown so far stays on the screen
                view = shown.enter_context(console.training(sight.total, sight.name, mode=mode, file=stream))
                if sight is before:
                    view.note("goes on from a checkpoint: later steps were lost with its process")
                said, before, rows = "", sight, rows[-HISTORY:] if mode == "plain" else rows
            for row in rows:
                console.show_row(view, row)
            if mode == "rich" or sight.state != said:
                view.stage("  ".join(state_words(sight)))
                said = sight.state


def state_words(sight: Sight) -> list[str]:
    """How the run stands: process, age of the newest line, size of the store."""
    found = [{"finished": "finished", "running": f"running, process {sight.pid}",
              "silent": "no process of this machine runs it"}[sight.state]]
    if sight.state != "finished" and sight.silent_s is not None:
        found.append(f"last line {duration(sight.silent_s)} ago")
    return found + _store_words(sight.store())


def _store_words(store: Json | None) -> list[str]:
    return [f"store {number(store['bytes'] / 1e6)} MB in {number(store['files'])} files"] if store else []


def words(about: Json) -> list[str]:
    """A snapshot in lines, for people and for logs.

    >>> lines = words({"name": "a", "state": "silent", "step": 3, "steps": 9, "wall_s": 61.0, "metrics": {},
    ...                "rates": {}, "evals": [], "store": None, "alarms": [], "programs": []})
    >>> lines
    ['a: step 3/9, silent, 1 min 1 s', 'alarms: none']
    """
    lines = [f"{about['name']}: step {about['step']}/{about['steps']}, {about['state']}, {duration(about['wall_s'])}"]
    lines.append("  ".join(console.step_words(about["metrics"])))
    lines.append("  ".join(console.rate_words(about["rates"])))
    lines += [_eval_words(one) for one in about["evals"]]
    lines += _store_words(about["store"])
    lines += [f"{one['name']}, {duration(one['age_s'])} ago: {one['said']}" for one in about["programs"]]
    alarms = about["alarms"]
    newest = [f", the newest {one.get('level')} at step {one.get('step')}: {one.get('action')}" for one in alarms[-1:]]
    lines.append(f"alarms: {len(alarms) or 'none'}{''.join(newest)}")
    return [console.clean(line) for line in lines if line]


def _eval_words(one: Json) -> str:
    ends = interval(eval_interval(one))
    return (f"{one['split']} {one['decoding']}: pass {percent(one['first_pass'])} at first, {percent(one['pass'])}"
            f"{' ' if ends else ''}{ends} at step {one['step']}")
