"""archipelago's files, as its grading runner takes them and leaves them behind.

``<task>/<attempt>/`` holds ``initial_messages.json``, ``agent_config.json``, ``trajectory.json``, ``verifiers.json``,
``eval_configs.json``, ``scoring_config.json``, ``grading_settings.json``, both snapshots as zip, and ``grades.json``
where there is a score. Keys of our own are left out: what remains is what its own tools would have written.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from agentsdpo.benchmarks.apex.exports.saved import read, saved
from agentsdpo.benchmarks.apex.runfolder import BenchFolder, folder_name
from agentsdpo.benchmarks.apex.shapes import OURS

PLAIN = ("initial_messages", "agent_config", "trajectory", "verifiers", "eval_configs", "scoring_config",
         "grading_settings")


def write_archipelago(folder: BenchFolder, out: Path) -> Path:
    """Write every attempt that left files; returns the folder."""
    root = out / "archipelago"
    for one in saved(folder):
        place = root / folder_name(one.attempt.task_id) / str(one.attempt.attempt)
        place.mkdir(parents=True, exist_ok=True)
        for name in PLAIN:
            (place / f"{name}.json").write_bytes(text(theirs(read(one.place / f"{name}.json"))))
        if one.grades is not None:
            (place / "grades.json").write_bytes(text(theirs(one.grades)))
        initial = folder.path / "initial" / f"{one.trajectory[OURS]['initial_sha256']}.zip"
        for source, name in ((initial, "initial_snapshot.zip"), (one.place / "final_snapshot.zip",
                                                                 "final_snapshot.zip")):
            if source.is_file():
                shutil.copyfile(source, place / name)
    return root


def theirs(value: Any) -> Any:
    """A value without our keys, at any depth.

    >>> theirs([{"a": 1, "x_agentsdpo": {"b": 2}}])
    [{'a': 1}]
    """
    if isinstance(value, dict):
        return {key: theirs(inner) for key, inner in value.items() if key != OURS}
    return [theirs(inner) for inner in value] if isinstance(value, list) else value


def text(value: Any) -> bytes:
    """JSON as archipelago writes it: two spaces, nothing escaped that need not be."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace")
