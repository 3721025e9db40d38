"""Flip single bits in every kind of byte a store is made of: does ``verify`` find it, can a learner read it wrong?

    python -m agentsdpo.benchmarks.perf.bitflips [--json]
"""

import json
import random
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from agentsdpo.benchmarks.perf.figure import Figure, run_all
from agentsdpo.benchmarks.perf.transcripts import zipf_episode
from agentsdpo.errors import StoreError
from agentsdpo.replay import ReplayStore, compact, evict, fold, snapfile, verify

FLIPS = 2_000
HEADER = 16
"""Bytes at the start of a page that are taken for its header, which is longer."""
CLASSES = ("data page", "page header", "footer", "log entry", "maintenance entry", "archive", "folded snapshot",
           "late values", "latest", "overlay")


@dataclass
class Count:
    """What became of the flips in one class of bytes.

    Attributes:
        flips: bits flipped, one at a time.
        found: flips that ``verify`` at level ``full`` found.
        raised: flips at which a learner's read of everything raised.
        silent: flips after which it returned other bytes than were written, and raised nothing. Must be 0.
    """

    flips: int = 0
    found: int = 0
    raised: int = 0
    silent: int = 0


def build(root: Path) -> Path:
    """A small store that has every class of bytes; returns its folder."""
    rng, store = np.random.default_rng(0), ReplayStore.open(root)
    episodes = [zipf_episode(rng, tokens=300, calls=3) for _ in range(6)]
    for episode in episodes[:3]:
        store.append([episode])
    store.add_rewards({episodes[0].episode_id: 0.5})
    store.close()
    compact(store)
    for episode in episodes[3:]:
        store.append([episode])
    store.add_labels({episodes[4].episode_id: "read"})
    evict(store, [key for key in store.snapshot().keys() if key.episode_id == episodes[5].episode_id],  # noqa: SIM118
          reason="an evicted row belongs to the log as well")
    fold(store)
    return root


def sweep(root: Path, *, flips: int, seed: int) -> dict[str, Count]:
    """Flip bits one at a time, the classes in turn, and put each back.

    Args:
        root: a store made by :func:`build`.
        flips: how many in all.
        seed: of the places.
    """
    rng, places, truth = random.Random(seed), _places(root), _everything(root)
    counts = {name: Count() for name in CLASSES}
    for i in range(flips):
        name = CLASSES[i % len(CLASSES)]
        path, ranges = rng.choice(places[name])
        at = rng.choice(rng.choice(ranges))
        data = path.read_bytes()
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:])
        _count(counts[name], root, truth)
        path.write_bytes(data)
    return counts


def _count(count: Count, root: Path, truth: list[bytes]) -> None:
    """One flip: what verify says, and what a learner sees."""
    count.flips += 1
    count.found += not verify(ReplayStore.open(root, create=False), "full").ok
    try:
        count.silent += _everything(root) != truth
    except StoreError:
        count.raised += 1


def _everything(root: Path) -> list[bytes]:
    """All that a learner reads, as bytes; falling back from the folded snapshot to the log is no fault."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        view = ReplayStore.open(root, create=False).snapshot()
    return [row.branch.token_ids.tobytes() + row.branch.token_kind.tobytes() + row.branch.logprobs.tobytes()
            + repr((row.key, row.branch.calls, row.hint, row.grade, row.policy_versions, row.label)).encode()
            for row in view.read(view.keys())]


def _places(root: Path) -> dict[str, list[tuple[Path, list[range]]]]:
    """By class the files, and the byte ranges in them."""
    whole = {"log entry": "log/*-*/*.json", "maintenance entry": "log/maint/*.json", "archive": "log/archive/*",
             "latest": "snap/LATEST.json", "overlay": "overlay/*/*"}
    places = {name: [(path, [range(path.stat().st_size)]) for path in sorted(root.glob(pattern))]
              for name, pattern in whole.items()}
    latest = root / json.loads((root / snapfile.LATEST).read_bytes())["file"]
    places["folded snapshot"] = [(latest, [range(latest.stat().st_size)])]
    late = root / snapfile.beside(latest.relative_to(root).as_posix())
    places["late values"] = [(late, [range(late.stat().st_size)])]
    live = {row.path for row in ReplayStore.open(root).snapshot().rows.values()}
    for path in sorted(root / name for name in live):
        for name, ranges in _parquet(path).items():
            places.setdefault(name, []).append((path, ranges))
    return places


def _parquet(path: Path) -> dict[str, list[range]]:
    """Byte ranges of one data file by class."""
    meta, size = pq.ParquetFile(path).metadata, path.stat().st_size
    chunks = [meta.row_group(i).column(j) for i in range(meta.num_row_groups) for j in range(meta.num_columns)]
    headers, pages, end = list[range](), list[range](), 0
    for chunk in chunks:
        starts = sorted(at for at in (chunk.dictionary_page_offset, chunk.data_page_offset) if at)
        end = max(end, starts[0] + chunk.total_compressed_size)
        stops = [*starts[1:], starts[0] + chunk.total_compressed_size]
        headers += [range(start, start + HEADER) for start in starts]
        bodies = [range(start + HEADER, stop) for start, stop in zip(starts, stops, strict=True)]
        pages += [body for body in bodies if body]
    return {"page header": headers, "data page": pages, "footer": [range(end, size)]}


def figure(counts: dict[str, Count]) -> Figure:
    """Flips that nobody noticed: by ``verify``, or by a learner that read other bytes than were written."""
    total: dict[str, int] = {name: sum(getattr(count, name) for count in counts.values())
                             for name in ("flips", "found", "raised", "silent")}
    missed = {name: count.flips - count.found for name, count in counts.items() if count.found < count.flips}
    return Figure("bitflips_silent", total["silent"] + sum(missed.values()), "count", None,
                  total | {"missed_by_verify": missed, "classes": len(counts)})


def measure(flips: int = FLIPS, seed: int = 0) -> Iterable[Figure]:
    """The figure of this benchmark, on a store in a temporary folder."""
    folder = Path(tempfile.mkdtemp(prefix="agentsdpo-flips-"))
    try:
        yield figure(sweep(build(folder / "store"), flips=flips, seed=seed))
    finally:
        shutil.rmtree(folder)


def _measure() -> Iterator[Figure]:
    yield from measure()


if __name__ == "__main__":
    run_all(__doc__ or "", {"bitflips": _measure})
