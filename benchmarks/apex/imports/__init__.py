"""Attempts that somebody else's tool made, as a benchmark run: :func:`import_run` writes a run folder from them.

| name | what is read |
|---|---|
| ``apex`` | trajectories of archipelago: folders of them, or a file with one a line |
| ``harbor`` | trials of a Harbor job |
| ``inspect`` | logs of Inspect, as JSON |
| ``atif`` | ATIF trajectories |

Nothing imported is ever trained on: its tasks are stamped ``train_allowed=false``, whatever they say.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from agentsdpo.benchmarks.apex.config import BenchConfig
from agentsdpo.benchmarks.apex.imports.dump import read_dump
from agentsdpo.benchmarks.apex.imports.found import Imported
from agentsdpo.benchmarks.apex.imports.samples import read_inspect
from agentsdpo.benchmarks.apex.imports.trials import read_atif, read_harbor
from agentsdpo.benchmarks.apex.imports.write import Writer
from agentsdpo.errors import ConfigError, FormatError
from agentsdpo.replay.formats.reading import Notes
from agentsdpo.replay.formats.report import counted
from agentsdpo.types import Json

IMPORTS: Mapping[str, Callable[[Path, Notes], Iterator[Imported]]] = {
    "apex": read_dump, "harbor": read_harbor, "inspect": read_inspect, "atif": read_atif}
"""Readers by name."""

__all__ = ["IMPORTS", "import_run"]


def import_run(path: Path, fmt: str, out: Path, config: BenchConfig | None = None) -> Json:
    """Write a run folder from attempts of another tool. Every message is kept as it was said.

    Args:
        path: file or folder.
        fmt: one of :data:`IMPORTS`.
        out: folder of the run, which must not hold one.
        config: with the suite whose tasks these are, so that ``bench grade`` can grade them; None where it is not at
            hand: grades that came along can be reported and exported all the same.

    Returns:
        ``attempts``, ``scored``, ``messages``, ``tasks`` as counts, and ``lost``: fields by path that found no place.

    Raises:
        ConfigError: no such format. FormatError: nothing there, or not in the format; a task the suite does not have.
        RunError, OutputError: ``out`` holds something, or cannot be made.

    Nothing is left in ``out`` when anything is raised.
    """
    if fmt not in IMPORTS:
        raise ConfigError(f"there is no import from {fmt!r}", fix=f"choose one of {', '.join(IMPORTS)}")
    if not path.exists():
        raise FormatError(f"{path} is not there", fix="give a file or a folder")
    notes, writer = Notes(), Writer(out, config)
    try:
        for one in IMPORTS[fmt](path, notes):
            writer.add(one)
        if not writer.attempts:
            raise FormatError(f"{path} holds nothing to import from {fmt}",
                              fix=f"choose another of {', '.join(IMPORTS)}")
        return {**writer.finish(fmt, path), "lost": counted(notes.lost)}
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)  # it was empty before
        raise
