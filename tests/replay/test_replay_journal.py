"""The journal: what a step wrote is what salvage reads, or nothing of it, wherever the file is cut or flipped."""

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from replay_factories import same_branch

from agentsdpo.collect.branch import BranchBuilder
from agentsdpo.replay.journal import Growth, Journal, JournalError
from agentsdpo.replay.salvage import read_batches, salvage
from agentsdpo.types import Completion, Episode, Json, Sampling, StopReason, TokenKind, VersionSpan

ABOUT = {"task_id": "t", "env_id": "desk", "train_allowed": True, "vocab_size": 100, "metadata": {"index": 3}}


def played(rng: np.random.Generator, *, kept: bool = False,
           forks: int = 0) -> Iterator[tuple[BranchBuilder, list[Json]]]:
    """An episode as it grows: the builder and the messages after every step."""
    builder, messages = BranchBuilder(), [{"role": "user", "content": "naïve \U0001f600"}]
    sampling = Sampling(top_k=3 if kept else 0, seed=2**62)
    for turn in range(4):
        if turn and turn <= forks:
            messages = [messages[0], {"role": "user", "content": f"summary {turn}"}]
            builder.fork([*builder.ids[:2], *rng.integers(0, 100, 4).tolist()], "compaction")
        else:
            builder.context(rng.integers(0, 100, 5).tolist(), TokenKind.TOOL if turn else TokenKind.CONTEXT)
        ids = rng.integers(0, 100, 3).tolist()
        builder.completion(Completion(
            token_ids=tuple(ids), logprobs=tuple((-rng.exponential(1.0, 3)).tolist()),
            versions=(VersionSpan(version=turn, start=0, end=1), VersionSpan(version=turn + 1, start=1, end=3)),
            kept=tuple(tuple(sorted({i, (i + 1) % 100, 7})) for i in ids) if kept else None), sampling, turn=turn)
        messages = [*messages, {"role": "assistant", "content": f"turn {turn}"}]
        yield builder, messages
        messages = [*messages, {"role": "tool", "tool_call_id": "c", "content": "ok"}]
        yield builder, messages


def journal(folder: Path, **about: Any) -> Journal:
    return Journal.open(folder, "store", "writer", "e-1", ABOUT | about)


@pytest.mark.parametrize("name", ["", "half a \ud83d"])
def test_an_episode_that_could_not_be_stored_does_not_begin(tmp_path: Path, name: str) -> None:
    with pytest.raises(JournalError, match="no episode can have the id"):
        Journal.open(tmp_path, "store", "writer", name, ABOUT)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kept", "forks"), [(False, 0), (True, 0), (False, 2), (True, 3)])
def test_every_step_is_read_back_as_the_episode_was_then(tmp_path: Path, kept: bool, forks: int) -> None:
    one, builder = journal(tmp_path), BranchBuilder()
    for step, (builder, messages) in enumerate(played(np.random.default_rng(0), kept=kept, forks=forks), 1):
        one.step(builder.grown(), messages)
        left = salvage(one.path)
        assert (left.steps, left.lost, left.finished) == (step, "", False)
        assert left.episode is not None
        assert list(left.episode.messages) == messages
        assert left.episode.branches[-1].token_ids.tolist() == builder.ids
    one.step(about={"stop_reason": "completed", "metadata": {"answer": "4"}})
    left, whole = salvage(one.path), builder.finish()
    assert left.finished
    assert left.episode is not None
    assert left.episode.stop_reason == StopReason.COMPLETED
    assert left.episode.metadata == {"answer": "4", "salvaged": {"steps": 9, "finished": True}}
    assert len(left.episode.branches) == len(whole) == forks + 1
    assert all(same_branch(a, b) for a, b in zip(left.episode.branches, whole, strict=True))
    assert (whole[-1].kept_ids is not None) == kept


def test_a_fork_inside_a_step_is_told_with_what_came_before_it(tmp_path: Path) -> None:
    one, builder = journal(tmp_path), BranchBuilder()
    builder.context([1, 2, 3], TokenKind.CONTEXT)
    builder.fork([1, 2, 9], "subagent")
    builder.context([4], TokenKind.FORCED)
    one.step(builder.grown())
    assert builder.grown() == []
    one.step(builder.grown(), [])
    left = salvage(one.path)
    assert left.steps == 1
    assert left.episode is not None
    assert all(same_branch(a, b) for a, b in zip(left.episode.branches, builder.finish(), strict=True))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A journal of five batches."""
    one = journal(tmp_path_factory.mktemp("small"))
    for step, (builder, messages) in enumerate(played(np.random.default_rng(1), kept=True, forks=1), 1):
        one.step(builder.grown(), messages)
        if step == 4:
            break
    return one.path.read_bytes()


def plain(batches: list[list[Json]]) -> list[str]:
    """Batches as text, arrays bit for bit."""
    return [repr([{k: v.tobytes() if isinstance(v, np.ndarray) else v for k, v in row.items()} for row in batch])
            for batch in batches]


def test_a_cut_at_any_byte_leaves_whole_steps_only(small: bytes) -> None:
    truth, lost = read_batches(small)
    assert (len(truth), lost) == (5, "")
    want, seen = plain(truth), set()
    for cut in range(len(small)):
        batches, lost = read_batches(small[:cut])
        assert plain(batches) == want[:len(batches)], f"cut at {cut}"
        assert lost or len(batches) < 5
        seen.add(len(batches))
    assert seen == {0, 1, 2, 3, 4}


def test_no_flipped_bit_is_believed(small: bytes) -> None:
    """One random bit in every byte: what is read is the truth up to some step."""
    want, rng, wrong, harmless = plain(read_batches(small)[0]), random.Random(0), [], 0
    for at in range(len(small)):
        data = bytearray(small)
        data[at] ^= 1 << rng.randrange(8)
        batches, lost = read_batches(bytes(data))
        if plain(batches) != want[:len(batches)]:
            wrong.append(at)
        harmless += not lost
    assert wrong == []
    assert harmless < len(small) / 3  # padding, and parts of Arrow's metadata that nobody reads


def test_dropped_and_swapped_batches_are_noticed(small: bytes) -> None:
    import pyarrow as pa
    source, ends = pa.BufferReader(small), []
    while source.tell() < len(small):
        pa.ipc.read_message(source)
        ends.append(source.tell())
    head, *parts = [small[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    for order in ((0, 2, 3, 4), (0, 2, 1, 3, 4), (0, 1, 1, 2), (1, 2, 3)):
        batches, lost = read_batches(head + b"".join(parts[i] for i in order))
        assert lost
        assert len(batches) == next((i for i, part in enumerate(order) if part != i), len(order))


def test_after_a_failed_write_nothing_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, steps = journal(tmp_path), played(np.random.default_rng(0))
    builder, messages = next(steps)
    one.step(builder.grown(), messages)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    builder, messages = next(steps)
    monkeypatch.setattr(os, "fdatasync", full)
    with pytest.raises(JournalError, match="its steps so far are safe; free space"):
        one.step(builder.grown(), messages)
    with pytest.raises(JournalError, match="is closed"):
        one.step([], [])
    assert salvage(one.path).steps >= 1


def test_one_id_has_one_journal_and_a_failed_beginning_leaves_none(tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", broken)
        with pytest.raises(JournalError, match="check the disk"):
            journal(tmp_path)
    one = journal(tmp_path)
    with pytest.raises(JournalError, match="two episodes of one writer share an id"):
        journal(tmp_path)
    one.seal()
    journal(tmp_path).seal()
    assert not list(tmp_path.rglob("*.arrows"))


def test_a_folder_that_a_recovery_removed_is_made_durable_again(tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    one = journal(tmp_path)
    one.seal()
    one.path.parent.rmdir()
    synced, fsync = list[Path](), os.fsync

    def note(handle: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    journal(tmp_path).close()
    assert one.path.parents[1] in synced, "the name of the folder was not made durable"


def test_unusable_tokens_keep_their_kind(tmp_path: Path) -> None:
    one = journal(tmp_path)
    one.step([Growth(0, {}, [1, 2], [0, 3], [float("nan")] * 2)])
    episode = salvage(one.path).episode
    assert isinstance(episode, Episode)
    assert episode.branches[0].token_kind.tolist() == [0, 3]
    assert episode.stop_reason == StopReason.ENGINE_ERROR
