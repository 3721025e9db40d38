"""Speed, size and safety of the replay store, with peers in the same run.

    make bench                                                     # installs the peers, then runs all benchmarks
    python -m agentsdpo.benchmarks.perf.replay [--only size read ...] [--json]

``kill9_lost`` and ``bitflips_silent`` are counts that must be 0. Sizes count every byte of the store's folder.
"""

import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agentsdpo.benchmarks.perf import bitflips
from agentsdpo.benchmarks.perf.figure import Figure, run_all
from agentsdpo.benchmarks.perf.killloop import kill_loop, step_times
from agentsdpo.benchmarks.perf.startup import help_seconds
from agentsdpo.benchmarks.perf.transcripts import LONG, Transcripts, lengths, zipf_episode
from agentsdpo.replay import ReplayStore, fold, uuid7
from agentsdpo.types import Episode

EPISODES, PICKED, ROUNDS = 200, 32, 9
KILLS, SEGMENTS, STREAMS, STEPS = 1000, 10_000, 4, 2000
APPENDED = 8
"""Episodes per append: what a collector hands over at once."""


def size() -> Iterator[Figure]:
    """Bytes a token, everything counted: segments, log, manifests."""
    rng, transcripts = np.random.default_rng(0), Transcripts()
    cases: dict[str, Callable[[], Episode]] = {
        "zipf": lambda: zipf_episode(rng), "real": lambda: transcripts.episode(rng)}
    for name, draw in cases.items():
        episodes = [draw() for _ in range(EPISODES // 2)]
        with tempfile.TemporaryDirectory() as folder:
            _fill(folder, episodes)
            held, tokens = _bytes(folder), sum(_length(episode) for episode in episodes)
        sampled = sum(int((e.branches[0].token_kind == 1).sum()) for e in episodes) / tokens
        yield Figure(f"bytes_per_token_{name}", round(held / tokens, 3), "bytes/token", None,
                     {"tokens": tokens, "sampled": round(sampled, 3), "episodes": len(episodes)})


def read() -> Iterator[Figure]:
    """Random reads of whole episodes' token columns, verified; the file cache is warm and no row is kept decoded."""
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        _fill(folder, [zipf_episode(rng) for _ in range(EPISODES)])
        picker = _Picker(folder, cache_bytes=0)
        times = [_timed(picker.prepared(turn)) for turn in range(ROUNDS + 1)][1:]
    yield Figure("read_32_of_200_ms", _ms(times), "ms", None, {"rounds": ROUNDS, "tokens_each": LONG})
    yield _against_memmap(lengths(rng, EPISODES), rng)


def _against_memmap(sizes: Sequence[int], rng: np.random.Generator) -> Figure:
    """Ragged episodes, both sides warm: ours with its default cache, TorchRL's mapped file in the system's.

    TorchRL's storage is padded to the longest episode, as it needs one shape for all.
    """
    import tensordict
    import torch
    import torchrl
    from torchrl.data import LazyMemmapStorage

    logging.getLogger("torchrl").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    episodes = [zipf_episode(rng, tokens=n, calls=max(1, n // 400)) for n in sizes]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as mapped:
        _fill(folder, episodes)
        storage = LazyMemmapStorage(EPISODES, scratch_dir=mapped)
        for i, episode in enumerate(episodes):
            storage.set(i, tensordict.TensorDict(_padded(episode, max(sizes)), []))

        def theirs(turn: int) -> Callable[[], object]:
            picked = torch.from_numpy(_picked(turn))

            def go() -> object:
                rows: Any = storage.get(picked)  # pyright: ignore[reportArgumentType]
                return [[rows[name][i][:n].sum() for name in ("ids", "kinds", "logprobs")]
                        for i, n in enumerate(rows["n"].tolist())]
            return go

        held, decoding = _Picker(folder), _Picker(folder, cache_bytes=0)
        each = [(_timed(held.prepared(turn)), _timed(theirs(turn)), _timed(decoding.prepared(turn)))
                for turn in range(ROUNDS + 1)][1:]
        mine, peer, decoded = (statistics.median(times) for times in zip(*each, strict=True))
        disk = {"mib": round(_bytes(folder) / 2**20, 1), "peer_mib": round(_bytes(mapped) / 2**20, 1)}
    return Figure("read_vs_lazymemmap", round(peer / mine, 2), "ratio", f"torchrl {torchrl.__version__}",
                  {"ms": _ms([mine]), "peer_ms": _ms([peer]), "ms_without_cache": _ms([decoded]),
                   "longest_over_mean": round(max(sizes) / float(np.mean(sizes)), 1), **disk})


def _padded(episode: Episode, longest: int) -> dict:
    """One episode as TorchRL needs it."""
    import torch

    branch = episode.branches[0]
    arrays = {"ids": branch.token_ids, "kinds": branch.token_kind, "logprobs": np.nan_to_num(branch.logprobs)}
    padded = {name: torch.nn.functional.pad(torch.from_numpy(np.array(array)), (0, longest - len(array)))
              for name, array in arrays.items()}
    return {**padded, "n": torch.tensor(len(branch.token_ids))}


def _picked(turn: int) -> np.ndarray:
    return np.random.default_rng(turn).choice(EPISODES, PICKED, replace=False)


class _Picker:
    """A store that a learner holds open and has read once."""

    def __init__(self, folder: str, **settings: int) -> None:
        self._view = ReplayStore.open(folder, create=False, **settings).snapshot()
        self._keys = self._view.keys()
        self._view.tokens(self._keys)

    def prepared(self, turn: int) -> Callable[[], object]:
        """Read some episodes and look at every value once."""
        wanted = [self._keys[i] for i in _picked(turn)]

        def go() -> object:
            return [(row.token_ids.sum(), row.token_kind.sum(), np.nansum(row.logprobs))
                    for row in self._view.tokens(wanted)]
        return go


def kill() -> Iterator[Figure]:
    """Acknowledged episodes and steps that were lost, and rows that are not what was written, after SIGKILLs."""
    report = kill_loop(KILLS)
    yield Figure("kill9_lost", len(report.lost) + len(report.wrong), "count", None,
                 {"rounds": report.rounds, "lost": len(report.lost), "wrong": len(report.wrong),
                  "episodes": report.episodes, "steps": report.steps, "salvaged": report.salvaged})


def open_many() -> Iterator[Figure]:
    """Opening a store of 10,000 segments by its folded snapshot, in a process that had not seen it."""
    rng = np.random.default_rng(0)
    tiny = zipf_episode(rng, tokens=40, calls=1)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(STREAMS):
            with_stream = ReplayStore.open(folder)
            for _ in range(SEGMENTS // STREAMS):
                with_stream.append([tiny.model_copy(update={"episode_id": uuid7()})])
        fold(ReplayStore.open(folder))
        command = [sys.executable, "-c", _OPEN, folder, str(SEGMENTS)]
        times = [float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                 for _ in range(ROUNDS + 1)][1:]
    yield Figure("open_10k_segments_ms", _ms(times), "ms", None,
                 {"segments": SEGMENTS, "streams": STREAMS, "rounds": ROUNDS, "fastest_ms": _ms([min(times)])})


_OPEN = """
import sys, time
from agentsdpo.replay.store import ReplayStore
import agentsdpo.replay.snapfile
began = time.perf_counter()
assert len(ReplayStore.open(sys.argv[1], create=False).snapshot()) == int(sys.argv[2])
print(time.perf_counter() - began)
"""


def step() -> Iterator[Figure]:
    """One durable step of a running episode, beside a bare write and fdatasync of as many bytes to the same disk."""
    mine, bare = step_times(STEPS)
    p99 = [float(np.percentile(np.array(times) * 1000, 99)) for times in (mine, bare)]
    yield Figure("append_p99_over_fsync_ms", round(p99[0] - p99[1], 3), "ms", "write and fdatasync",
                 {"p99_ms": round(p99[0], 3), "peer_p99_ms": round(p99[1], 3), "steps": len(mine)})


def _fill(folder: str | Path, episodes: Sequence[Episode]) -> None:
    store = ReplayStore.open(folder)
    for start in range(0, len(episodes), APPENDED):
        store.append(episodes[start:start + APPENDED])
    store.close()


def _length(episode: Episode) -> int:
    return sum(len(branch.token_ids) for branch in episode.branches)


def _bytes(folder: str | Path) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _ms(times: Iterable[float]) -> float:
    return round(1000 * statistics.median(times), 2)


def start() -> Iterator[Figure]:
    """The command's help."""
    yield help_seconds("replay")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run_all(__doc__ or "", {"kill": kill, "bitflips": bitflips.measure, "size": size, "read": read, "open": open_many,
                            "step": step, "help": start})
