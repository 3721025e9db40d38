"""``STORE.json`` and ``FORMAT.md``: what a store says about itself."""

import json
from pathlib import Path

from agentsdpo.errors import CorruptionError, StoreError, StoreNotFound
from agentsdpo.replay import format_md
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
    for name, data in (("FORMAT.md", format_md.TEXT.encode()), ("STORE.json", canonical_json(about))):
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


def missing(uri: str | Path, *, fix: str) -> StoreNotFound:
    """The error of a place without a store; for the folder of a run, with where its stores are."""
    folder = Path(str(uri).removeprefix("file://"))
    inside = [str(found.parent) for part in ("replay", "arms/*/replay") for found in sorted(
        folder.glob(f"{part}/STORE.json"))]
    if inside:
        fix = (f"the store of this run is {inside[0]}" if len(inside) == 1 else
               f"the stores of this run are {', '.join(inside)}")
    return StoreNotFound(f"{uri} is not a replay store (no STORE.json)", fix=fix)


def read(storage: Storage) -> Json:
    """Contents of ``STORE.json``.

    Raises:
        StoreNotFound: no store there.
        StoreError: one that a newer release made and this one must not read.
        CorruptionError: the file is not what was written.
    """
    try:
        about = json.loads(storage.read("STORE.json"))
        family, release = about["format"].split("/")
        needs, features = max(int(release), int(about["min_reader"])), set(about["features"])
        int(about["min_writer"])
    except FileNotFoundError as error:
        raise missing(storage.uri, fix="check the path") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptionError(f"{storage.uri}/STORE.json is damaged or not ours: {error!r}",
                         fix="restore it from a backup") from error
    if family != FORMAT or needs > RELEASE or features - FEATURES:
        extra = f" with features {sorted(features - FEATURES)}" if features - FEATURES else ""
        raise StoreError(f"{storage.uri} has format {about['format']}{extra} and needs reader {needs}, not {RELEASE}",
                         fix="install a newer agentsdpo (pip install -U agentsdpo)")
    return about
