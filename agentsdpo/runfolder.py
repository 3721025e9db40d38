"""The folder a run writes: what was asked for, with what code, and where everything goes.

::

    RUN/  config.toml        every setting, with the commit in its first line
          environment.json   versions of Python and packages, commit, machine, command
          metrics.jsonl      replay/   policies/   checkpoint/
          FINISHED           written last; a run without it was stopped and can be resumed
"""

import json
import platform
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from agentsdpo import __version__
from agentsdpo.config import RunConfig
from agentsdpo.errors import RunError
from agentsdpo.types import Json

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "accelerate", "peft", "pyarrow", "numpy", "pydantic",
            "litellm")
EXTENDABLE = ("steps", "name")
"""Settings that may differ when a run is resumed; any other would make two runs of one."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def config(self) -> Path:
        """Resolved settings."""
        return self.path / "config.toml"

    @property
    def metrics(self) -> Path:
        """One line per step and evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def replay(self) -> Path:
        """The replay store."""
        return self.path / "replay"

    @property
    def policies(self) -> Path:
        """The policy registry."""
        return self.path / "policies"

    @property
    def checkpoint(self) -> Path:
        """The learner's state."""
        return self.path / "checkpoint"

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.path / "FINISHED").is_file()

    def finish(self) -> None:
        """Mark the run as complete."""
        (self.path / "FINISHED").write_text(datetime.now(UTC).isoformat(timespec="seconds") + "\n")


def open_run(path: Path | str, config: RunConfig, *, resume: bool = False) -> RunFolder:
    """Make the folder of a new run, or open that of a stopped one.

    Args:
        path: the folder; made with its parents.
        config: resolved settings, written into it.
        resume: go on with the run that is there. A run that finished may go on when ``steps`` was raised.

    Raises:
        RunError: there is a run already and ``resume`` is off; or there is none to resume; or it was started with
            other settings (named with both values).
    """
    folder = RunFolder(Path(path))
    there = folder.config.is_file()
    if there and not resume:
        state = "finished" if folder.finished else "stopped"
        raise RunError(f"{folder.path} holds a {state} run", fix="choose another --out, or go on with it by --resume")
    if resume and not there:
        raise RunError(f"{folder.path} holds no run to resume", fix="start it without --resume")
    if resume:
        _same_settings(folder.config, config)
    folder.path.mkdir(parents=True, exist_ok=True)
    (folder.path / "FINISHED").unlink(missing_ok=True)
    environment = describe_environment()
    (folder.path / "environment.json").write_text(json.dumps(environment, indent=1) + "\n")
    commit = environment["commit"] or "not a checkout"
    folder.config.write_text(f"# agentsdpo {__version__}, commit {commit}\n{config.to_toml()}")
    return folder


def _same_settings(path: Path, config: RunConfig) -> None:
    """Refuse to resume under other settings."""
    before, now = (dict(_flat(tomllib.loads(text))) for text in (path.read_text(), config.to_toml()))
    changed = [key for key in now if before.get(key) != now[key] and key not in EXTENDABLE]
    if changed:
        key, more = changed[0], f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise RunError(f"{path.parent} was started with {key} = {before.get(key)!r}, resuming asks for {now[key]!r}"
                       f"{more}", fix="resume with the settings of its config.toml, or start a new run")


def _flat(table: Json, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def describe_environment() -> Json:
    """What produced a run: code, packages, machine, command. No user name, no environment variables."""
    return {"agentsdpo": __version__, "commit": git_commit(), "python": platform.python_version(),
            "packages": {name: _installed(name) for name in PACKAGES}, "platform": platform.platform(),
            "machine": platform.machine(), "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "started": datetime.now(UTC).isoformat(timespec="seconds")}


def git_commit() -> str | None:
    """Commit of the code that runs, with ``+changes`` when files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return None
    try:
        head = _git(here, "rev-parse", "HEAD")
        return head + ("+changes" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True,
                          timeout=10).stdout.strip()


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
