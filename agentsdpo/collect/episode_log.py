"""The log of one episode on disk: every event before anybody acts on it, and snapshots to go on from.

::

    FOLDER/events.jsonl          one event a line: seq, type, t_wall, t_working, state_hash, and what happened
    FOLDER/checkpoints/12.ckpt   a line of JSON, then the environment's snapshot after turn 12

The file grows with the episode and repeats nothing: messages, tokens, counts and the context of the policy follow from
the events, so a checkpoint holds the environment alone. One process at a time has the log; the system lets go of it
when that process dies, however it dies.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from agentsdpo.collect.budget import Clock
from agentsdpo.collect.events import TYPES
from agentsdpo.errors import ConfigError, EnvError, StoreError
from agentsdpo.files import FULL, sync, write_bytes
from agentsdpo.replay.journal import sync_data, try_lock
from agentsdpo.types import Json

EVENTS, CHECKPOINTS = "events.jsonl", "checkpoints"
KEEP = 2
"""Checkpoints that stay: the newest, and the one before it in case the newest is damaged."""
_ENCODE = json.JSONEncoder(separators=(",", ":")).encode


class LogError(StoreError):
    """The log of an episode cannot be written, or is that of another episode, or is in use: nothing can be played."""


class EpisodeLog:
    """Events and checkpoints of one episode in a folder; a folder that holds some resumes the episode.

    Args:
        folder: of this attempt alone; made when the episode begins.
        every: turns between two checkpoints, 1 or more. What was done since the last one is done again after a crash,
            and must come out the same: use 1 for an environment whose tools do not repeat themselves.
        sync: wait for the disk after every write; without it an event survives a killed process, not a power cut.

    Attributes:
        events: what the folder held when the log was opened.

    >>> EpisodeLog("attempts/0", every=0)
    Traceback (most recent call last):
    agentsdpo.errors.ConfigError: every is 0; set it to 1 or more turns between two checkpoints
    """

    def __init__(self, folder: Path | str, *, every: int = 16, sync: bool = True) -> None:
        if every < 1:
            raise ConfigError(f"every is {every}", fix="set it to 1 or more turns between two checkpoints")
        self.folder, self.every, self.sync = Path(folder), every, sync
        self.events: list[Json] = []
        self._handle, self._seq, self._starts = -1, 0, [0]

    @property
    def path(self) -> Path:
        """The file of events."""
        return self.folder / EVENTS

    @property
    def is_open(self) -> bool:
        """Whether this object holds the log."""
        return self._handle >= 0

    def open(self) -> list[Json]:
        """Take the log, drop what a crash left of an unfinished write, and return the events it holds.

        Raises:
            LogError: another process has it, or the disk fails. EnvError: a line inside it is damaged.
        """
        try:
            (self.folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            if not try_lock(self._handle):
                raise LogError(f"{self.path} is in use: another process plays this episode",
                               fix="wait for it, or stop it")
            data = self.path.read_bytes()
            self.events, self._starts = _read(data, self.path)
            self._seq = len(self.events)
            if self._starts[-1] < len(data):
                os.ftruncate(self._handle, self._starts[-1])
            if self.sync:
                sync(self.folder)
        except (OSError, EnvError) as error:
            self.close()
            raise error if isinstance(error, LogError | EnvError) else self._failed(error) from error
        return self.events

    def forget(self, seq: int) -> None:
        """Drop the events from number ``seq`` on: results of a turn whose other results were never written."""
        os.ftruncate(self._handle, self._starts[seq])
        self.events, self._seq = self.events[:seq], seq

    def write(self, events: Sequence[tuple[str, Mapping[str, Any]]], clock: Clock, state_hash: str | None) -> None:
        """Append events; they are on the disk when this returns.

        Raises:
            LogError: the disk is full or failing. What was written before is safe.
        """
        lines = []
        for kind, fields in events:
            assert kind in TYPES
            head = {"seq": self._seq + len(lines), "type": kind, "t_wall": round(clock.wall, 6),
                    "t_working": round(clock.working, 6), "state_hash": state_hash}
            lines.append(_ENCODE({**head, **fields}) + "\n")
        try:
            left = memoryview("".join(lines).encode())
            while left:
                left = left[os.write(self._handle, left):]
            if self.sync:
                sync_data(self._handle)
        except OSError as error:
            raise self._failed(error) from error
        self._seq += len(lines)

    def keep(self, turn: int, snapshot: bytes) -> Json:
        """Put a snapshot into a checkpoint, and return the fields of the event that makes it count."""
        fields = {"turn": turn, "sha256": hashlib.sha256(snapshot).hexdigest(), "bytes": len(snapshot)}
        place = self.folder / CHECKPOINTS
        try:
            write_bytes(place / f"{turn}.ckpt", _ENCODE(fields).encode() + b"\n" + snapshot, durable=self.sync)
            have = sorted((int(path.stem), path) for path in place.glob("*.ckpt"))
            for _, path in [pair for pair in have if pair[0] <= turn][:-KEEP]:
                path.unlink()
        except OSError as error:
            raise self._failed(error) from error
        return fields

    def snapshot(self, event: Json) -> bytes | None:
        """The snapshot of a checkpoint event; None when its file is gone or damaged."""
        with suppress(OSError):
            data = (self.folder / CHECKPOINTS / f"{event['turn']}.ckpt").read_bytes().partition(b"\n")[2]
            if hashlib.sha256(data).hexdigest() == event["sha256"]:
                return data
        return None

    def add(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Append one event to a log that nobody is playing, such as ``grade``."""
        events = self.open()
        clock = Clock()
        clock.set(*((events[-1]["t_wall"], events[-1]["t_working"]) if events else (0.0, 0.0)))
        try:
            self.write([(kind, fields)], clock, events[-1]["state_hash"] if events else None)
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the file; harmless when done already."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)

    def _failed(self, error: OSError) -> LogError:
        remedy = "free space" if error.errno in FULL else "check the disk and the permissions"
        return LogError(f"the log {self.path} cannot be written ({error.strerror or error}); its events so far are "
                        "safe", fix=f"{remedy}, then resume")


def read_events(folder: Path | str) -> list[Json]:
    """The events of an attempt, without taking its log; an unfinished last line is left out.

    Raises:
        EnvError: a line inside it is damaged. FileNotFoundError: there is none.
    """
    path = Path(folder) / EVENTS
    return _read(path.read_bytes(), path)[0]


def _read(data: bytes, path: Path) -> tuple[list[Json], list[int]]:
    """Whole events, and the offset of each and of the end."""
    events, starts = [], [0]
    for number, line in enumerate(data.splitlines(keepends=True)):
        try:
            event = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            event = None
        if not isinstance(event, dict) or event.get("seq") != number:
            if starts[-1] + len(line) == len(data):
                break  # a crash cut the last write short
            raise EnvError(f"line {number + 1} of {path} is damaged", fix="delete the folder and play it again")
        events.append(event)
        starts.append(starts[-1] + len(line))
    return events, starts
