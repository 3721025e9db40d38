"""The replay store: agent episodes with exact token ids and behaviour log-probs, as plain Parquet files.

>>> import tempfile
>>> from agentsdpo.replay import ReplayStore
>>> store = ReplayStore.open(tempfile.mkdtemp())
>>> len(store.snapshot())
0
"""

if not __name__.startswith("agentsdpo."):
    raise ImportError("this folder is the package agentsdpo.replay; write `import agentsdpo.replay`, "
                      "not `import replay`")

from importlib import import_module
from typing import TYPE_CHECKING, Any

from agentsdpo.replay.ids import Key, uuid7

if TYPE_CHECKING:
    from agentsdpo.replay.compaction import compact
    from agentsdpo.replay.config import ReplayConfig
    from agentsdpo.replay.maintain import evict, fold, unevict
    from agentsdpo.replay.pinned import pin, pins, unpin
    from agentsdpo.replay.reclaim import gc
    from agentsdpo.replay.rows import Row, to_episode, to_rows
    from agentsdpo.replay.sampler import Sampler
    from agentsdpo.replay.schema import SCHEMA
    from agentsdpo.replay.snapshot import Snapshot
    from agentsdpo.replay.store import ReplayStore
    from agentsdpo.replay.verification import verify

_HOMES = {"ReplayConfig": "config", "Row": "rows", "to_rows": "rows", "to_episode": "rows", "Sampler": "sampler",
          "SCHEMA": "schema", "Snapshot": "snapshot", "ReplayStore": "store",
          "evict": "maintain", "unevict": "maintain", "fold": "maintain", "compact": "compaction", "gc": "reclaim",
          "verify": "verification", "pin": "pinned", "unpin": "pinned", "pins": "pinned"}
__all__ = ["SCHEMA", "Key", "ReplayConfig", "ReplayStore", "Row", "Sampler", "Snapshot", "compact", "evict", "fold",
           "gc", "pin", "pins", "to_episode", "to_rows", "unevict", "unpin", "uuid7", "verify"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use: pyarrow is slow to load, and a command's ``--help`` does without it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
