"""What produced a run: commit of the code, versions, machine and command."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from agentsdpo import __version__
from agentsdpo.types import Json

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "accelerate", "peft", "pyarrow", "numpy", "pydantic",
            "litellm")
CODE = ("agentsdpo", "envs", "replay", "benchmarks")
"""Folders of a checkout whose new, not yet added modules count as changes."""


def describe_environment() -> Json:
    """What runs now: code, packages, machine, command. No user name, no environment variables."""
    return {"agentsdpo": __version__, "commit": git_commit(), "python": platform.python_version(),
            "packages": {name: _installed(name) for name in PACKAGES}, "platform": platform.platform(),
            "machine": platform.machine(), "hardware": hardware(), "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "started": datetime.now(UTC).isoformat(timespec="seconds")}


def git_commit() -> str | None:
    """Commit of the code that runs, with ``+changes`` when files differ from it; None outside a checkout.

    A module under :data:`CODE` that git does not know yet counts as a change; notes and results beside them do not.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        changed = (_git(root, "status", "--porcelain", "--untracked-files=no")
                   or _git(root, "ls-files", "--others", "--exclude-standard", "--",
                           *(f":(glob){folder}/**/*.py" for folder in CODE)))
        return head + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def hardware() -> str:
    """Processor and how many of it this process may use, in words."""
    return f"{cpu_name()}, {cores()} cores"


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """Name of the processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines()
             if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True,
                          timeout=10).stdout.strip()


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
