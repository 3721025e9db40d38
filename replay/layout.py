"""``STORE.json`` and ``FORMAT.md``: what a store says about itself."""

import json

from agentsdpo.errors import StoreError
from agentsdpo.replay.canonical import canonical_json
from agentsdpo.replay.fitness import demand_fit
from agentsdpo.replay.ids import uuid7
from agentsdpo.replay.storage import RESERVE, LocalStorage, Storage
from agentsdpo.types import Json

FORMAT, RELEASE = "agentsdpo-replay", 1
CONDITIONAL = "conditional-create"
"""Feature of a store in a bucket: every writer creates with a condition, so that two can never have the same name."""
FEATURES: frozenset[str] = frozenset({CONDITIONAL})
"""Features of the format this release understands beyond the base."""
RESERVE_BYTES = 64 << 20
"""Room that a store meant to last holds back on its disk (``agentsdpo replay init``)."""


def create(storage: Storage, *, reserve_bytes: int = 0) -> None:
    """Turn an empty or missing folder into a store; another process doing the same at once is no error.

    Args:
        storage: where; it is tried first (:mod:`agentsdpo.replay.fitness`).
        reserve_bytes: room to hold back on a local disk. When the disk is full, it lets writes under way finish.

    Raises:
        StorageUnfit: the file system or the server cannot keep a store.
        StoreError: the folder holds something else, or cannot be written.
    """
    if storage.exists("STORE.json"):
        return
    if any(info.path not in ("FORMAT.md", RESERVE) for info in storage.list("")) and not storage.exists("STORE.json"):
        raise StoreError(f"{storage.uri} holds files but no STORE.json", fix="name an empty or missing folder")
    demand_fit(storage)
    local = isinstance(storage, LocalStorage)
    if local:
        storage.reserve(reserve_bytes)
    about = {"format": f"{FORMAT}/{RELEASE}", "store_id": uuid7(), "min_reader": RELEASE, "min_writer": RELEASE,
             "features": [CONDITIONAL] if storage.exclusive and not local else [],
             "reserve_bytes": reserve_bytes if local else 0}
    for name, data in (("FORMAT.md", _FORMAT_MD.encode()), ("STORE.json", canonical_json(about))):
        try:
            storage.create(name, data)
        except FileExistsError:
            continue


def take_reserve(storage: Storage, about: Json) -> None:
    """Hold back again what a store was made with. Raises StoreError when there is no room."""
    if isinstance(storage, LocalStorage):
        storage.reserve(int(about.get("reserve_bytes", 0)))


def check_reserve(storage: Storage, about: Json) -> None:
    """Raise StoreError when a store was made with a reserve and has none."""
    size = int(about.get("reserve_bytes", 0))
    if size and not storage.exists(RESERVE):
        raise StoreError(f"the disk of {storage.uri} was full: its reserve of {size} bytes is spent",
                         fix="free space, then take the reserve again with `agentsdpo replay init`; episodes under "
                             "way may still be appended")


def read(storage: Storage) -> Json:
    """Contents of ``STORE.json``.

    Raises:
        StoreError: no store there, or one that a newer release made and this one must not read.
    """
    try:
        about = json.loads(storage.read("STORE.json"))
        family, release = about["format"].split("/")
        needs, features = max(int(release), int(about["min_reader"])), set(about["features"])
        int(about["min_writer"])
    except FileNotFoundError as error:
        raise StoreError(f"{storage.uri} is not a replay store (no STORE.json)",
                         fix="check the path, or pass create=True") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{storage.uri}/STORE.json is damaged or not ours: {error!r}",
                         fix="restore it from a backup") from error
    if family != FORMAT or needs > RELEASE or features - FEATURES:
        extra = f" with features {sorted(features - FEATURES)}" if features - FEATURES else ""
        raise StoreError(f"{storage.uri} has format {about['format']}{extra} and needs reader {needs}, not {RELEASE}",
                         fix="install a newer agentsdpo (pip install -U agentsdpo)")
    return about


_FORMAT_MD = """\
# Replay store, format agentsdpo-replay/1

Agent episodes with exact token ids and the log-prob of every sampled token, as plain Parquet files.
One row is one branch (a token sequence that only ever grew) of one episode; the key is
`(episode_id, branch_id, attempt)`.

| path | what |
|---|---|
| `STORE.json` | format, store id, oldest reader and writer that may touch it, features |
| `data/<yyyymmdd>/<writer>-<uuid7>.parquet` | segments of whole rows, never changed |
| `log/<writer>/<seq>.json` | commit entries: a row counts once an `add` operation names it |
| `overlay/hint/<uuid7>.parquet` | hints that came later; the highest `revision` wins |
| `policies/<version>.json` | what a policy version is: weights, tokenizer, template, vocabulary |

## Read it without this package

A glob over `data/` reads whole files only. It shows a file whose commit was cut off by a crash as well, so take the
paths from the log where that matters.

DuckDB:

    SELECT episode_id, reward, n_trainable, token_ids, logprobs FROM read_parquet('STORE/data/*/*.parquet');
    -- committed files alone
    SET VARIABLE f = (SELECT list('STORE/' || o.path) FROM (SELECT unnest(ops) AS o FROM
        read_json('STORE/log/*/*.json', columns = {ops: 'STRUCT(op VARCHAR, path VARCHAR)[]'})) WHERE o.op = 'add');
    SELECT count(*) FROM read_parquet(getvariable('f'));

Polars: `polars.read_parquet("STORE/data/*/*.parquet")`; pandas: `pandas.read_parquet("STORE/data")`.
These readers do not check page checksums unless told to; `agentsdpo.replay` always does.

## Columns that need a word

- `token_ids` int32, `token_kind` uint8, `logprobs` float32: three lists of length `n_tokens`.
- `token_kind`: 0 context, 1 sampled and trained, 2 answer of the environment, 3 put in by the framework, 4 sampled but
  kept out of the loss, 5 sampled without a usable log-prob.
- `logprobs` holds the behaviour policy's log-prob where the kind is 1 or 4 and NaN elsewhere (0.0 would mean
  probability one). `logprob_kind`: `processed` (of the distribution drawn from), `tempered` (before filters), `raw`
  (before temperature), `unknown`, `none`.
- `calls`: one struct per request to the engine; `start`, `end` are positions in the branch, `versions` say which policy
  version sampled which part of the completion. `prompt_sha256` hashes the ids before `start` (int32, little-endian).
- `kept_ids`, `kept_counts`: the ids each sampled token was drawn from, one count per sampled token, 0: nothing was cut.
- `policy_version_min` is the oldest version in the row (-1 unknown); staleness is counted from it.
- `rewards_json` is the grade with every criterion, `extra` has the hint, the vocabulary size and the metadata.

## Row rules

(a) the three lists have length `n_tokens`; (b) a finite log-prob exactly at kinds 1 and 4; (c) it is in
(-1000, 1e-4]; (d) 0 <= id < vocabulary size; (e) call spans are ordered, disjoint and cover exactly kinds 1, 4, 5;
(f) version spans tile each completion; (g) `policy_version_min`/`_max` follow from them; (h) `n_sampled` counts kinds
1, 4, 5 and `n_trainable` kind 1; (i) kept sets hold the sampled id, ascend, and a single id has log-prob 0; (j) a child
branch equals its parent before `fork_at` and samples nothing there; (k) `prompt_sha256` fits; (l) `trainable` is
`n_trainable > 0`, otherwise `untrainable_reason` says why.

## Hashes

`tokens_sha256`: token_ids, token_kind, logprobs, kept_ids, kept_counts in this order; each as one byte (0 null,
1 present), then the number of elements (u32), then the elements; all little-endian, NaN as 0x7fc00000.
`content_sha256`: `tokens_sha256`, then the calls: their number (u32); for every field in schema order that is not null
in all of them, its name (u32 length, bytes), one byte per call (0 null, 1 present), then the present values: numbers;
all lengths (u32) and then all bytes of strings and hashes; all lengths (u32) and then the fields of the structs in the
same way for lists of structs. t_request, t_first_token, t_done and mono_ns are left out.
A log entry's `sha` hashes its other fields as JSON with sorted keys and no spaces; `prev` is the `sha` before it.
`footer_sha256` hashes the last `footer_len + 8` bytes of a segment, `sha256` all of it.
"""
