"""Run folders: where everything goes, opening one to write, and reading one back.

::

    RUN/  config.toml        every setting, with the commit of the first start in its first line
          environment.json   one entry per start: versions of Python and packages, commit, machine, command
          metrics.jsonl      replay/   policies/   checkpoint/
          uses.sqlite        draws of each branch, for ``agentsdpo replay evict --max-uses``; may be deleted
          due.json  evals.jsonl  candidates/  logs/   of programs side by side: what is and was evaluated, what they say
          FINISHED           written last; a run without it was stopped and can be resumed
          LOCK               held by the process that runs here; names its pid
          summary.json       report.html

A demo holds several such folders, one per arm: ``RUN/config.toml  summary.json  report.html  arms/<arm>/...``.
Both are read by :func:`read_run`; what is missing is empty there, so that a run that was killed can be looked at.
"""

import fcntl
import json
import os
import tomllib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from agentsdpo import __version__
from agentsdpo.config import KEEPING, RunConfig
from agentsdpo.errors import RunError
from agentsdpo.files import FULL, write_text
from agentsdpo.provenance import describe_environment
from agentsdpo.settings_io import flat
from agentsdpo.track import read_metrics
from agentsdpo.types import Json

EXTENDABLE = ("steps", *KEEPING)
"""Settings and tables that may differ when a run is resumed; any other would make two runs of one."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def config(self) -> Path:
        """Resolved settings."""
        return self.path / "config.toml"

    @property
    def environment(self) -> Path:
        """What the run was started with, each time."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """One line per step and evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def replay(self) -> Path:
        """The replay store."""
        return self.path / "replay"

    @property
    def uses(self) -> Path:
        """The sampler's side index."""
        return self.path / "uses.sqlite"

    @property
    def policies(self) -> Path:
        """The policy registry."""
        return self.path / "policies"

    @property
    def checkpoint(self) -> Path:
        """The learner's state."""
        return self.path / "checkpoint"

    @property
    def candidates(self) -> Path:
        """A registry of weights that are evaluated while an alarm holds them back."""
        return self.path / "candidates"

    @property
    def logs(self) -> Path:
        """What the programs of a run say that collects, hints, learns and evaluates side by side."""
        return self.path / "logs"

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.path / "FINISHED").is_file()

    def finish(self) -> None:
        """Mark the run as complete and let go of the folder."""
        write_text(self.path / "FINISHED", datetime.now(UTC).isoformat(timespec="seconds") + "\n")
        self.release()

    def release(self) -> None:
        """Let another process run here; the end of this process does it as well."""
        held = _HELD.pop(self.path.resolve(), None)
        if held is not None:
            os.close(held)


# ----------------------------------------------------------------------------------------------------------- writing


def open_run(path: Path | str, config: RunConfig, *, resume: bool = False) -> RunFolder:
    """Make the folder of a new run, or open that of a stopped one, for this process alone.

    Args:
        path: the folder; made with its parents.
        config: resolved settings, written into it.
        resume: go on with the run that is there. A run that finished may go on when ``steps`` was raised.

    Raises:
        RunError: there is a run already and ``resume`` is off; or there is none to resume; or it was started with
            other settings (named with both values), or has done more steps than asked for; or another process runs
            there; or the folder cannot be made or written.
    """
    folder = RunFolder(Path(path))
    if resume and not folder.config.is_file():
        raise RunError(f"{folder.path} holds no run to resume", fix="start it without --resume")
    ours = folder.path.resolve() in _HELD
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        hold(folder.path)
        _prepare(folder, config, resume)
    except (OSError, RunError) as error:
        if not ours:
            folder.release()
        if isinstance(error, RunError) or error.errno in FULL:
            raise
        raise RunError(f"{folder.path} cannot be used as the folder of a run: {error.strerror}",
                       fix="give --out a folder that can be written") from error
    return folder


def _prepare(folder: RunFolder, config: RunConfig, resume: bool) -> None:
    """Refuse what cannot go on; write down the settings and this start."""
    if folder.config.is_file() and not resume:
        state = "finished" if folder.finished else "stopped"
        raise RunError(f"{folder.path} holds a {state} run", fix="choose another --out, or go on with it by --resume")
    head = f"# agentsdpo {__version__}, commit {{}}\n"
    if resume:
        _same_settings(folder, config)
        head = folder.config.read_text().partition("\n")[0] + "\n"
    starts = read_starts(folder.environment)
    starts.append(describe_environment())
    write_text(folder.environment, json.dumps(starts, indent=1) + "\n")
    text = head.replace("{}", starts[-1]["commit"] or "not a checkout") + config.to_toml()
    if not resume or text != folder.config.read_text():
        write_text(folder.config, text)
    (folder.path / "FINISHED").unlink(missing_ok=True)


def read_starts(path: Path) -> list[Json]:
    """What ``environment.json`` holds of each start of a run, oldest first; nothing where it is not there.

    Raises:
        RunError: the file is not JSON.
    """
    try:
        found = json.loads(path.read_text()) if path.is_file() else []
    except ValueError as error:
        raise RunError(f"{path} is not JSON: {error}", fix="restore it, or write [] into it") from error
    return found if isinstance(found, list) else [found]


def _same_settings(folder: RunFolder, config: RunConfig) -> None:
    """Refuse to resume under other settings, or for fewer steps than were done."""
    default, written, now = (flat(parsed(text, folder.path)) for text in (
        RunConfig().to_toml(), _read_text(folder.config), config.to_toml()))
    before = default | written  # a setting may be newer than the run
    changed = [key for key in now if before[key] != now[key] and key.partition(".")[0] not in EXTENDABLE]
    if changed:
        key, more = changed[0], f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise RunError(f"{folder.path} was started with {key} = {before[key]!r}, resuming asks for {now[key]!r}"
                       f"{more}", fix="resume with the settings of its config.toml, or start a new run")
    done = max((row["step"] for row in read_metrics(folder.metrics) if row.get("kind") == "step"), default=0)
    if config.steps < done:
        raise RunError(f"{folder.path} has done {done} steps, resuming asks for steps = {config.steps}",
                       fix=f"set steps to {done} or more, or start a new run")


_HELD: dict[Path, int] = {}
"""File handles of this process's locks: what it holds it may open again, as after an interrupt in a notebook."""


def hold(path: Path) -> None:
    """Hold ``LOCK`` until the process ends or lets go; the kernel frees it even if the process is killed."""
    lock, held = path / "LOCK", _HELD.get(path.resolve())
    if held is not None and lock.exists() and os.path.samestat(os.fstat(held), lock.stat()):
        return
    RunFolder(path).release()  # of a folder that was deleted since
    handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        pid = os.read(handle, 32).decode("ascii", "replace").strip()
        os.close(handle)
        if not isinstance(error, BlockingIOError):
            raise
        raise RunError(f"another process{f' (pid {pid})' if pid else ''} is running in {path}",
                       fix="wait for it or stop it, or choose another --out") from error
    os.ftruncate(handle, 0)
    os.write(handle, f"{os.getpid()}\n".encode())
    _HELD[path.resolve()] = handle


# ----------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Arm:
    """One trained variant: its name, its configuration as TOML text, its metric rows, its part of the summary."""

    name: str
    config: str
    rows: tuple[Json, ...]
    summary: Json


@dataclass(frozen=True)
class RunData:
    """One run folder as read; ``main`` is the arm the top-level numbers of the summary speak of."""

    path: Path
    config: str
    summary: Json
    arms: tuple[Arm, ...]

    @property
    def main(self) -> Arm:
        """The arm named by ``summary["arm"]``, else the first."""
        named = [arm for arm in self.arms if arm.name == self.summary.get("arm")]
        return (named or list(self.arms))[0]


def read_run(run_dir: Path | str) -> RunData:
    """Everything of a run folder that is text; missing files are empty, not errors.

    The folder of one training run, with its ``metrics.jsonl`` directly in it, is a run of one arm that has the
    configuration's name; finished without a summary, as an arm of a demo is, it gets one from its files.

    Raises:
        RunError: there is no arm with metrics and no summary, or a file is not what it should be.
    """
    path = Path(run_dir)
    summary, config = _read_json(path / "summary.json"), _read_text(path / "config.toml")
    if not summary and config and RunFolder(path).finished:
        from agentsdpo.results import concluded

        summary = concluded(path)
    of_arms = arm_records(summary) if summary.get("arms") else {}
    folders = {found.parent.name: found.parent for found in sorted(path.glob("arms/*/metrics.jsonl"))}
    if not folders and (path / "metrics.jsonl").is_file():
        folders = {_name(config): path}
    ordered = list(dict.fromkeys([name for name in of_arms if name in folders] + [*folders, *of_arms]))
    if not ordered and not summary:
        raise RunError(f"{path} holds neither summary.json nor metrics.jsonl, nor arms/<arm>/metrics.jsonl",
                       fix="give the folder that a run wrote, for example runs/demo")
    arms = [_read_arm(name, folders.get(name), of_arms.get(name) or {}) for name in ordered]
    return RunData(path, config, summary, tuple(arms) or (Arm("run", "", (), summary),))


def parsed(config: str, path: Path) -> Json:
    """The settings in the text of a run's ``config.toml``.

    Args:
        path: of the run, for the error.

    Raises:
        RunError: the text is not TOML.
    """
    try:
        return tomllib.loads(config)
    except tomllib.TOMLDecodeError as error:
        raise RunError(f"config.toml of {path} is not TOML: {error}", fix="restore what the run wrote") from None


def arm_records(summary: Json) -> dict[str, Json]:
    """Every arm's part of a summary; a lone arm also has what only the run as a whole measured (memory, seed).

    >>> arm_records({"peak_rss_mib": 900, "arms": {"robust": {"steps": 3}}})
    {'robust': {'peak_rss_mib': 900, 'steps': 3}}
    """
    arms = summary.get("arms") or {"run": {}}
    whole = {key: value for key, value in summary.items() if key != "arms"}
    return {name: {**whole, **record} if len(arms) == 1 else record for name, record in arms.items()}


def _read_arm(name: str, folder: Path | None, summary: Json) -> Arm:
    """An arm with or without a folder; a name that only the summary knows is never used as a path."""
    if folder is None:
        return Arm(name, "", (), summary)
    return Arm(name, _read_text(folder / "config.toml"), tuple(read_metrics(folder / "metrics.jsonl")), summary)


def _name(config: str) -> str:
    """The run's own name in its settings."""
    try:
        return str(tomllib.loads(config).get("name") or "run")
    except tomllib.TOMLDecodeError:
        return "run"


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _read_json(path: Path) -> Json:
    try:
        data = json.loads(_read_text(path) or "{}")
    except ValueError as error:
        raise RunError(f"{path} is not JSON: {error}", fix="restore it, or delete it to go by the metrics") from None
    if not isinstance(data, dict):
        raise RunError(f"{path} holds a {type(data).__name__}", fix="a summary is one JSON object")
    return data
