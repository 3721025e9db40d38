"""Scripted agents on the tasks of a run: the scale on which its numbers are read."""

import asyncio
import json

from agentsdpo.benchmarks.apex.agents import scripted
from agentsdpo.benchmarks.apex.player import Player
from agentsdpo.benchmarks.apex.records import by_task
from agentsdpo.benchmarks.apex.runner import Bench
from agentsdpo.benchmarks.apex.statistics import table
from agentsdpo.benchmarks.apex.summary import estimate_json
from agentsdpo.files import write_text
from agentsdpo.types import Json

NAMES = ("null", "random", "oracle")
"""Who does nothing, who knows nothing, who knows everything."""


def play_references(bench: Bench) -> Json:
    """Play them once per task and keep their scores in ``references.json``; only where programs grade: judges cost.

    Returns:
        ``{name: {n, pass@1, mean_score}}``, empty where a judge grades or the settings ask for none.
    """
    path = bench.folder.path / "references.json"
    if not bench.config.references or bench.about["judge"].get("model"):
        return {}
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    agents = scripted(bench.taskset)
    found: Json = {}
    for name in NAMES:
        if name in agents:
            player = Player(bench.config, bench.taskset, agents[name])
            records = asyncio.run(player.all_once(bench.taskset.tasks))
            numbers = table(by_task(records), 1, "conditional")
            found[name] = {"n": sum(record.scored for record in records),
                           **{key: estimate_json(number) for key, number in numbers.items()}}
    write_text(path, json.dumps(found, indent=1) + "\n")
    return found
