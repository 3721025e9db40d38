"""What the files of a checkpoint must be: ``manifest.json``, written last, holds the SHA-256 of each of the others."""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Write down the bytes of all files of a folder as they are now.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "state.json").write_text("{}")
    >>> write_manifest(folder)
    >>> damage(folder) is None
    True
    >>> _ = (folder / "state.json").write_text("{")
    >>> damage(folder)
    'state.json is not what was written'
    """
    files = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n")


def damage(folder: Path) -> str | None:
    """What is wrong with a folder, in words; None when every file is what was written."""
    try:
        files: dict[str, str] = json.loads((folder / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    for name, digest in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _sha256(folder / name) != digest:
            return f"{name} is not what was written"
    return None


def outdated(folders: list[Path], *, keep: int, keep_every: int = 0, spare: Collection[int] = ()) -> list[Path]:
    """Checkpoints that may go.

    Args:
        folders: all, named ``step-<number>``, oldest first.
        keep: newest ones that stay, at least 1.
        keep_every: those of multiples of this many steps stay for good; 0 is none.
        spare: steps whose checkpoints stay in any case.

    >>> [path.name for path in outdated([Path(f"step-{n}") for n in range(5)], keep=1, keep_every=2, spare=[3])]
    ['step-1']
    """
    steps = {path: int(path.name.rpartition("-")[2]) for path in folders[:-keep]}
    return [path for path, step in steps.items()
            if step not in spare and not (keep_every and step % keep_every == 0)]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
