"""The replay store: agent episodes with exact token ids and behaviour log-probs, as plain Parquet files.

>>> import tempfile
>>> from agentsdpo.replay import ReplayStore
>>> from agentsdpo.replay.example import episode
>>> store = ReplayStore.open(tempfile.mkdtemp())
>>> store.append([episode(0), episode(1), episode(2)])              # durable when it returns
>>> store.add_rewards({"e-0": 0.75}, author="second grader")        # late; what was sampled is never rewritten
>>> [(row.key.episode_id, row.reward) for row in store.branches("reward >= 0.5")]
[('e-0', 0.75), ('e-1', 0.5), ('e-2', 1.0)]
>>> store.to_arrow("n_tokens > 12").select(["episode_id", "n_tokens"]).to_pylist()
[{'episode_id': 'e-1', 'n_tokens': 16}, {'episode_id': 'e-2', 'n_tokens': 20}]
>>> sampler = store.sampler(seed=7)                                 # its position goes into the learner's checkpoint
>>> len(sampler.sample(2, learner_version=2))
2
"""

if not __name__.startswith("agentsdpo."):
    raise ImportError("this folder is the package agentsdpo.replay; write `import agentsdpo.replay`, "
                      "not `import replay`")

from importlib import import_module
from typing import TYPE_CHECKING, Any

from agentsdpo.replay.ids import Key, uuid7

if TYPE_CHECKING:
    from agentsdpo.replay.config import ReplayConfig
    from agentsdpo.replay.journal import Journal
    from agentsdpo.replay.rows import Row, to_episode, to_rows
    from agentsdpo.replay.sampling.index import SideIndex
    from agentsdpo.replay.sampling.limiter import Limit, RateLimiter
    from agentsdpo.replay.sampling.sampler import Sampler
    from agentsdpo.replay.schema import SCHEMA
    from agentsdpo.replay.snapshot import Snapshot
    from agentsdpo.replay.spool import Spool
    from agentsdpo.replay.store import ReplayStore
    from agentsdpo.replay.upkeep.compaction import compact
    from agentsdpo.replay.upkeep.maintain import evict, fold, unevict
    from agentsdpo.replay.upkeep.pinned import pin, pins, unpin
    from agentsdpo.replay.upkeep.reclaim import gc
    from agentsdpo.replay.upkeep.recover import recover
    from agentsdpo.replay.upkeep.verification import verify

_HOMES = {
    "ReplayConfig": "config", "Row": "rows", "to_rows": "rows", "to_episode": "rows", "SCHEMA": "schema",
    "Snapshot": "snapshot", "ReplayStore": "store", "Journal": "journal", "Spool": "spool",
    "Sampler": "sampling.sampler", "SideIndex": "sampling.index", "Limit": "sampling.limiter",
    "RateLimiter": "sampling.limiter", "evict": "upkeep.maintain", "unevict": "upkeep.maintain",
    "fold": "upkeep.maintain", "compact": "upkeep.compaction", "gc": "upkeep.reclaim",
    "verify": "upkeep.verification", "recover": "upkeep.recover", "pin": "upkeep.pinned", "unpin": "upkeep.pinned",
    "pins": "upkeep.pinned"}
__all__ = ["SCHEMA", "Journal", "Key", "Limit", "RateLimiter", "ReplayConfig", "ReplayStore", "Row", "Sampler",
           "SideIndex", "Snapshot", "Spool", "compact", "evict", "fold", "gc", "pin", "pins", "recover", "to_episode",
           "to_rows", "unevict", "unpin", "uuid7", "verify"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use: pyarrow is slow to load, and a command's ``--help`` does without it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
