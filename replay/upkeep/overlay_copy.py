"""Late values of one store, in another: byte for byte, with their revisions, for rows that both hold."""

from collections import defaultdict
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.parquet as pq

from agentsdpo.replay import overlay
from agentsdpo.replay.ids import Key
from agentsdpo.replay.overlay import Late, Slot
from agentsdpo.replay.snapshot import Snapshot
from agentsdpo.replay.store import ReplayStore


def missing(view: Snapshot, there: Snapshot, keys: Iterable[Key]) -> dict[Slot, Late]:
    """Late values of these keys that the other store lacks, or has in an older revision.

    Values for content that the other store does not hold under that key are left out.
    """
    chosen = set(keys)
    return {slot: late for slot, late in view.late.latest.items()
            if slot.key in chosen and _news(slot, late, view, there)}


def _news(slot: Slot, late: Late, view: Snapshot, there: Snapshot) -> bool:
    row, have = there.rows.get(slot.key), there.late.latest.get(slot)
    gives_way = row is not None and row.status == "salvaged" != view.rows[slot.key].status
    fits = row is None or gives_way or row.content_sha256 == late.target_sha256
    return fits and (have is None or have.target_sha256 != late.target_sha256 or have.revision < late.revision)


def copy_overlays(view: Snapshot, into: ReplayStore, found: dict[Slot, Late]) -> None:
    """Append these late values of a snapshot to a store that holds their rows.

    Raises:
        CorruptionError: an overlay is not the file that was committed.
        StoreError: they cannot be written.
    """
    places: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for slot, late in found.items():
        places[slot.kind][late.path].append(late.row)
    for kind, files in places.items():
        tables = [overlay.read(view.storage, view.late.files[path]).take(sorted(rows)) for path, rows in files.items()]
        table = pa.concat_tables(tables, promote_options="default")
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        into.append_overlay(kind, sink.getvalue().to_pybytes(), len(table))
