"""Everything a learner needs to continue bit for bit: safetensors and JSON in one folder per step, written atomically.

::

    <root>/step-00000040/weights.safetensors  optimiser.safetensors  teacher.safetensors  rng.safetensors
                         state.json  manifest.json

A folder is filled under a temporary name, flushed to disk and renamed, so a killed process leaves either
the whole checkpoint or none. What a disk does to it afterwards is found by the hashes of the manifest: a damaged newest
checkpoint is set aside as ``damaged-step-*`` and the one before is taken. Nothing is pickled.
"""

import json
import logging
import os
import random
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from agentsdpo.errors import LearnError
from agentsdpo.learn.learner import Learner
from agentsdpo.learn.manifest import damage, outdated, write_manifest
from agentsdpo.learn.records import spread, whole

_FORMAT = 2
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Restored:
    """Where a run continues: optimiser steps done, policy version, and the sampler's own state as it was given."""

    step: int
    version: int
    sampler: dict[str, Any]


def save_checkpoint(root: Path, learner: Learner, *, version: int, sampler: dict[str, Any] | None = None,
                    keep: int = 3, keep_every: int = 0, spare: Collection[int] = ()) -> Path:
    """Write the learner's whole state. Of several processes each must call this, and the first one writes.

    Args:
        root: folder of the run's checkpoints; made when missing.
        learner: between two steps.
        version: policy version of these weights.
        sampler: opaque JSON state of whatever chooses the rows.
        keep: newest checkpoints that stay; older ones are removed.
        keep_every: those of multiples of this many steps stay for good; 0 is none.
        spare: steps whose checkpoints stay whatever their age.

    Returns:
        The new folder.

    Raises:
        LearnError: it could not be written; earlier checkpoints are untouched.
    """
    final = folder_of(root, learner.step_count)
    groups = _groups(learner)

    def write() -> None:
        _write(root, final, learner, groups, version, sampler or {})
        for old in outdated(checkpoints(root), keep=keep, keep_every=keep_every, spare=spare):
            shutil.rmtree(old)

    learner.ranks.first(write)
    return final


def _write(root: Path, final: Path, learner: Learner, groups: dict[str, dict[str, Tensor]], version: int,
           sampler: dict[str, Any]) -> None:
    """A whole checkpoint, or none and what was in its way."""
    work = root / f".writing-{final.name}-{os.getpid()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob(".writing-*"):  # of a process that was killed while writing
            shutil.rmtree(left, ignore_errors=True)
        work.mkdir()
        _fill(work, learner, groups, version, sampler)
        _swap(work, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(work, ignore_errors=True)
        free = shutil.disk_usage(root).free // 2**20 if root.is_dir() else 0
        raise LearnError(f"checkpoint {final} could not be written ({error}); {free} MiB are free on its disk",
                         fix="free space there or mend the disk, then go on with --resume from the checkpoint before"
                         ) from error


def _groups(learner: Learner) -> dict[str, dict[str, Tensor]]:
    """Tensors of the learner by file, whole: every process must ask."""
    groups = {"weights": _weights(learner), "optimiser": _optimiser(learner), "teacher": learner.teacher.state_dict()}
    return {name: {key: whole(value.detach()) for key, value in group.items()} for name, group in groups.items()}


def _fill(work: Path, learner: Learner, groups: dict[str, dict[str, Tensor]], version: int,
          sampler: dict[str, Any]) -> None:
    """Write all files of one checkpoint."""
    rng_tensors, rng_numbers = _rng()
    for name, group in {**groups, "rng": rng_tensors}.items():
        save_file({key: value.contiguous() for key, value in group.items()}, work / f"{name}.safetensors")
    state = {"format": _FORMAT, "step": learner.step_count, "version": version, "sampler": sampler,
             "rng": rng_numbers, "clipper": learner.clipper.state_dict() if learner.clipper else None,
             "config": learner.config.model_dump()}
    (work / "state.json").write_text(json.dumps(state))
    write_manifest(work)


def load_checkpoint(folder: Path, learner: Learner) -> Restored:
    """Put a saved state into a learner that was made with the same model and configuration.

    Args:
        folder: one checkpoint, or a root whose newest whole one is taken; damaged ones newer than it are set aside.
        learner: its weights, optimiser, teacher and clipper are overwritten; so are the global generators of
            torch, numpy and Python.

    Raises:
        LearnError: there is no checkpoint or none is whole, or it belongs to another model, teacher or clipper.
    """
    if not folder.name.startswith("step-"):
        folder = _newest_whole(folder, learner)
    else:
        wrong = damage(folder)
        if wrong:
            raise LearnError(f"checkpoint {folder} is damaged: {wrong}",
                             fix="restore it from a backup, or start a new run")
    state = json.loads((folder / "state.json").read_text())
    if state["format"] != _FORMAT:
        raise LearnError(f"checkpoint {folder} has format {state['format']}, this version reads {_FORMAT}",
                         fix="resume with the version that wrote it")
    if (state["clipper"] is None) != (learner.clipper is None):
        raise LearnError(f"checkpoint {folder} was written with learn.adv_clip {state['config']['adv_clip']}, the "
                         f"configuration has {learner.config.adv_clip}", fix="resume with the same learn.adv_clip")
    _load_weights(learner, load_file(folder / "weights.safetensors"))
    _load_optimiser(learner, load_file(folder / "optimiser.safetensors"))
    learner.teacher.load_state_dict(load_file(folder / "teacher.safetensors"))
    if learner.clipper is not None:
        learner.clipper.load_state_dict(state["clipper"])
    learner.step_count = state["step"]
    _load_rng(load_file(folder / "rng.safetensors"), state["rng"])
    return Restored(step=state["step"], version=state["version"], sampler=state["sampler"])


@contextmanager
def weights_of(folder: Path, learner: Learner) -> Iterator[None]:
    """While it lasts, the learner's model has the weights of a checkpoint. Every process must ask.

    Raises:
        LearnError: the checkpoint is damaged, or of another model.
    """
    wrong = damage(folder)
    if wrong:
        raise LearnError(f"checkpoint {folder} is damaged: {wrong}", fix="restore it from a backup")
    own = _weights(learner)
    present = {name: tensor.clone() for name, tensor in own.items()}
    _load_weights(learner, load_file(folder / "weights.safetensors"))
    try:
        yield
    finally:
        for name, tensor in own.items():
            tensor.copy_(present[name])


def _newest_whole(root: Path, learner: Learner) -> Path:
    """The newest checkpoint whose files are what was written; what is damaged and newer is set aside, aloud."""
    found = checkpoints(root)
    if not found:
        raise LearnError(f"there is no checkpoint in {root}", fix="start the run without resuming")
    wrong: list[tuple[Path, str]] = []
    for folder in reversed(found):
        reason = damage(folder)
        if reason is None:
            break
        wrong.append((folder, reason))
    else:
        told = ", ".join(f"{path.name}: {reason}" for path, reason in wrong)
        raise LearnError(f"every checkpoint in {root} is damaged ({told})",
                         fix="restore one from a backup, or start a new run")

    def set_aside() -> None:
        for path, reason in wrong:
            aside = root / f"damaged-{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            _log.warning("checkpoint %s is damaged (%s): set aside as %s, going on from %s", path, reason, aside.name,
                         folder.name)

    learner.ranks.first(set_aside)
    return folder


def versions_kept(root: Path, newest: int) -> list[int]:
    """Policy versions of the newest checkpoints, oldest first; one that cannot be read has none."""
    found = []
    for folder in checkpoints(root)[-newest:]:
        with suppress(ValueError, OSError, KeyError):
            found.append(int(json.loads((folder / "state.json").read_text())["version"]))
    return found


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return root / f"step-{step:08d}"


def checkpoints(root: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    return sorted(root.glob("step-*"))


def _swap(work: Path, final: Path) -> None:
    """Flush a finished folder and give it its name; a checkpoint of the same step makes room first."""
    for path in [*work.iterdir(), work]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    if final.exists():
        old = work.with_name(work.name + "-old")
        final.rename(old)
        work.rename(final)
        shutil.rmtree(old)
    else:
        work.rename(final)
    handle = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _weights(learner: Learner) -> dict[str, Tensor]:
    """Trained parameters by name, tied ones once; what lies below an adapter is in the model's own folder."""
    return {name: p.detach() for name, p in learner.model.named_parameters() if p.requires_grad}


def _load_weights(learner: Learner, saved: dict[str, Tensor]) -> None:
    own = _weights(learner)
    shapes = {name: tuple(t.shape) for name, t in own.items()}
    other = {name: tuple(t.shape) for name, t in saved.items()}
    if shapes != other:
        odd = sorted(shapes.items() ^ other.items())
        raise LearnError(f"the checkpoint is of another model: {odd[0][0]!r} is {other.get(odd[0][0])} there and "
                         f"{shapes.get(odd[0][0])} here", fix="resume with the model the run was started with")
    for name, tensor in saved.items():
        own[name].copy_(spread(tensor, own[name]))


def _optimiser(learner: Learner) -> dict[str, Tensor]:
    """AdamW's state as ``<parameter>/<quantity>``; empty before the first step."""
    state = learner.optimizer.state
    return {f"{name}/{key}": value for name, p in learner.model.named_parameters() if p in state
            for key, value in state[p].items()}


def _load_optimiser(learner: Learner, saved: dict[str, Tensor]) -> None:
    named = dict(learner.model.named_parameters())
    learner.optimizer.state.clear()
    for path, tensor in saved.items():
        name, key = path.rsplit("/", 1)
        learner.optimizer.state[named[name]][key] = spread(tensor.to(named[name].device), named[name])


def _rng() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State of the global generators: tensors for torch and numpy, numbers for Python and the rest."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # type: ignore[misc]
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64))}
    return tensors, {"numpy": [kind, int(position), int(has_gauss), float(gauss)], "python": random.getstate()}


def _load_rng(tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    kind, position, has_gauss, gauss = numbers["numpy"]
    torch.set_rng_state(tensors["torch"])
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = numbers["python"]
    random.setstate((version, tuple(internal), gauss_next))
