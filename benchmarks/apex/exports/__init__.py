"""Runs in other tools' formats: :func:`export_run` writes a run folder's attempts as one of :data:`EXPORTS`.

| name | what is written |
|---|---|
| ``archipelago`` | a folder per attempt with archipelago's files, without keys of our own |
| ``atif`` | one ATIF trajectory a line |
| ``inspect`` | one Inspect log (``EvalLog`` version 2, JSON) |
| ``verifiers`` | one trace of verifiers a line, with tokens, of tasks that may be trained on |
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from agentsdpo.benchmarks.apex.exports.archipelago import write_archipelago
from agentsdpo.benchmarks.apex.exports.inspect import write_inspect
from agentsdpo.benchmarks.apex.exports.trajectories import write_atif, write_verifiers
from agentsdpo.benchmarks.apex.runfolder import BenchFolder
from agentsdpo.errors import ConfigError
from agentsdpo.files import make_folder

EXPORTS: Mapping[str, Callable[[BenchFolder, Path], Path]] = {
    "archipelago": write_archipelago, "atif": write_atif, "inspect": write_inspect, "verifiers": write_verifiers}
"""Each writes a run into a folder and returns what it wrote."""

__all__ = ["EXPORTS", "export_run"]


def export_run(folder: BenchFolder, to: str, out: Path | None = None) -> Path:
    """Write a run in another format.

    Args:
        folder: the run.
        to: one of :data:`EXPORTS`.
        out: folder to write into; None is ``export/`` of the run.

    Returns:
        The file or folder that was written.

    Raises:
        ConfigError: no such format. OutputError: the folder cannot be made.
        FormatError: files of an attempt are damaged.
        TrainForbidden: see :func:`~agentsdpo.benchmarks.apex.exports.trajectories.write_verifiers`.
    """
    if to not in EXPORTS:
        raise ConfigError(f"there is no export {to!r}", fix=f"choose one of {', '.join(EXPORTS)}")
    place = out or folder.path / "export"
    make_folder(place)
    return EXPORTS[to](folder, place)
