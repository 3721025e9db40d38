"""A store as a dataset for others: one Parquet file and a card, in the layout that the Hugging Face Hub reads.

    datasets.load_dataset("FOLDER", split="train")
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from agentsdpo.errors import StoreError
from agentsdpo.files import write_text
from agentsdpo.replay.formats import ExportReport, Progress, export
from agentsdpo.replay.formats.redact import Redactor, demand_redaction
from agentsdpo.replay.snapshot import Condition
from agentsdpo.replay.store import ReplayStore
from agentsdpo.types import Json

_FILE = "data/train-00000-of-00001.parquet"
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


@dataclass(frozen=True)
class PublishReport:
    """What was written: the folder, the export inside it, and the snapshot it was taken from."""

    folder: str
    snapshot: str
    export: ExportReport

    def as_json(self) -> Json:
        """For the command line."""
        return asdict(self)


def publish(store: ReplayStore, folder: Path, *, title: str, licence: str = "other", where: Condition | None = None,
            redact: Redactor | None = None, checked: bool = False, limit: int | None = None,
            progress: Progress | None = None) -> PublishReport:
    """Write a dataset folder with its card.

    Args:
        store: to read from.
        folder: missing or empty.
        title: of the card.
        licence: identifier of the Hub, as ``apache-2.0``; ``other`` when it is not settled.
        where: episodes with a branch that this holds for.
        redact: takes secrets out.
        checked: somebody has looked for secrets.
        limit: at most so many episodes.
        progress: told about every episode.

    Raises:
        ConfigError: neither redacted nor checked.
        StoreError: the folder is not empty, or cannot be written.
        TrainForbidden, CorruptionError: as :func:`~agentsdpo.replay.formats.export`.
    """
    demand_redaction("a dataset", redact, checked)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StoreError(f"{folder} is not an empty folder", fix="name a new one")
    (folder / "data").mkdir(parents=True, exist_ok=True)
    view = store.snapshot()
    report = export(store, "parquet", folder / _FILE, where=where, redact=redact, limit=limit, checked=checked,
                    progress=progress)
    write_text(folder / "README.md", card(report, title, licence, view.id))
    return PublishReport(str(folder), view.id, report)


def card(report: ExportReport, title: str, licence: str, snapshot: str) -> str:
    """The dataset card: metadata the Hub reads, and what a reader must know."""
    size = next((name for most, name in _SIZES if report.records < most), "n>1M")
    if report.redacted is None:
        looked = "Not redacted: the publisher states to have looked through it."
    else:
        found = ", ".join(f"{name} {count}" for name, count in report.redacted.items()) or "nothing was found"
        looked = f"Secrets were looked for in all texts and tokens, and taken out: {found}."
    quoted = title.replace("\\", "\\\\").replace('"', '\\"')
    return f"""---
pretty_name: "{quoted}"
license: {licence}
size_categories:
- {size}
tags:
- agents
- reinforcement-learning
- tool-use
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
---
# {title}

{report.episodes} agent episodes in {report.records} branches, with exact token ids and the log-prob of every sampled
token under the policy that sampled it. One row is one branch: a token sequence that only ever grew.

```python
import datasets
rows = datasets.load_dataset("FOLDER", split="train")
```

{looked}

| column | what |
|---|---|
| `episode_id`, `branch_id`, `attempt` | the key of a row |
| `token_ids`, `token_kind`, `logprobs` | three lists of one length; kind 0 context, 1 sampled, 2 answer of the \
environment, 3 put in by the framework, 4 sampled and kept out of the loss, 5 sampled without a usable log-prob; NaN \
where nothing was sampled |
| `calls` | one entry per request to the engine: span, sampling parameters, policy versions |
| `reward`, `rewards_json` | the grade, and its criteria |
| `policy_version_min`, `policy_version_max` | versions that sampled tokens here |
| `messages_json`, `tools_json` | the conversation as messages, on the first branch of an episode |

Written by agentsdpo from snapshot `{snapshot[:16]}` of a replay store (format agentsdpo-replay/1);
`agentsdpo replay import STORE parquet data/*.parquet` takes it back in.
"""
