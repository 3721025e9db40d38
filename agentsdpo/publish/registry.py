"""The policy registry: one folder per policy version, and one small file that says which is the latest.

::

    policies/  LATEST                    the number of the latest version, replaced atomically
               000000000012/             model.safetensors, manifest.json; complete or absent, never changed
               000000000013/             adapter_model.safetensors, adapter_config.json, manifest.json
               served/                   what each inference server holds, see publish/served.py
               .tmp-*/  LOCK             a publish in progress, or what a killed one left behind

A version is written to a temporary folder, synced, renamed, and only then announced in ``LATEST``. A writer that is
killed anywhere in between leaves the old ``LATEST`` with its complete version; the next publish sweeps up. Readers
need no lock. One program at a time publishes; a second one is refused.

An adapter names the version of full weights it stands on. That one stays as long as the adapter does, and readers of
weights get both, merged.
"""

import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from agentsdpo.errors import CorruptionError, RegistryError
from agentsdpo.files import sync as _sync
from agentsdpo.publish import adapter as low_rank
from agentsdpo.publish.manifest import (
    ADAPTER,
    ADAPTER_CONFIG,
    MANIFEST,
    WEIGHTS,
    Manifest,
    adapter_weights_id,
    file_sha256,
    read_manifest,
    verify_files,
)
from agentsdpo.publish.served import Served, in_use, read_served
from agentsdpo.publish.tensors import dtype_of, read_tensors, untie, unwritten, write_tensors
from agentsdpo.types import Json

FOLDER = re.compile(r"\d{12}")
"""Name of a version's folder."""
_Fill = Callable[[Path], Json]
"""Writes the files of a version into a folder and returns what its manifest says of them."""


def behaviour_version(latest: int, *, staleness: int) -> int:
    """The version a collector must sample from so that its data is ``staleness`` versions old when consumed.

    >>> behaviour_version(20, staleness=16), behaviour_version(5, staleness=16)
    (4, 0)
    """
    return max(0, latest - staleness)


class PolicyRegistry:
    """Published policy versions under one folder, usually ``<run>/policies``.

    Args:
        root: made at the first publish; reading a folder that does not exist finds no version.
        base_model, tokenizer_sha256, chat_template_sha256: written into every manifest published from here.
        first: number of the first version, 0 unless older ones were published elsewhere.

    >>> import numpy as np, tempfile
    >>> registry = PolicyRegistry(tempfile.mkdtemp(), base_model="seed")
    >>> [registry.publish({"w": np.full(2, step, np.float32)}, learner_step=step) for step in range(3)]
    [0, 1, 2]
    >>> registry.latest(), registry.load(1, framework="np")["w"].tolist(), registry.manifest(2).parent
    (2, [1.0, 1.0], 1)
    """

    def __init__(self, root: Path | str, *, base_model: str = "", tokenizer_sha256: str = "",
                 chat_template_sha256: str = "", first: int = 0) -> None:
        self.root, self._first = Path(root), first
        self._stamp: dict[str, Any] = {"base_model": base_model, "tokenizer_sha256": tokenizer_sha256,
                                       "chat_template_sha256": chat_template_sha256}

    # ------------------------------------------------------------------------------------------------- reading

    def latest(self) -> int | None:
        """The announced version; None before the first publish.

        Raises:
            CorruptionError: ``LATEST`` does not hold a number. RegistryError: it cannot be read.
        """
        path = self.root / "LATEST"
        try:
            return int(path.read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            raise CorruptionError(f"{path} holds {path.read_text()[:40]!r} instead of a version",
                                  fix=f"write the number of the newest good version into it: {self._on_disk()}"
                                  ) from None
        except OSError as error:
            raise RegistryError(f"{path} cannot be read: {error.strerror}",
                                fix="give the folder policies/ of a run, and let this user read it") from error

    def versions(self) -> list[int]:
        """Versions that can be read, ascending; a folder newer than ``LATEST`` was never announced and is left out."""
        latest = self.latest()
        return [] if latest is None else [version for version in self._on_disk() if version <= latest]

    def folder(self, version: int) -> Path:
        """The folder of one version.

        Raises:
            RegistryError: no such version is announced, or it was pruned.
        """
        known = self.versions()
        if version not in known:
            span = f"versions {known[0]} to {known[-1]}" if known else "no version"
            raise RegistryError(f"policy version {version} is not in {self.root}, which holds {span}",
                                fix="raise publish.keep, or use a version that is there")
        return self._path(version)

    def manifest(self, version: int) -> Manifest:
        """Identity and provenance of one version; weights are not read.

        Raises:
            RegistryError: no such version. CorruptionError: its manifest cannot be read.
        """
        return read_manifest(self.folder(version))

    def load(self, version: int, *, framework: Literal["pt", "np"] = "pt") -> dict[str, Any]:
        """All tensors of one version, on the CPU, tied ones included, after every file's hash was compared.

        Of an adapter, the full weights it stands for: those of its base with the products added.

        Args:
            version: an announced version.
            framework: ``pt`` for torch tensors, ``np`` for numpy arrays (numpy has no bfloat16).

        Raises:
            RegistryError: no such version. CorruptionError: its bytes, or those of its base, are not those that were
                published.
        """
        folder = self.folder(version)
        manifest = read_manifest(folder)
        verify_files(folder, manifest)
        if manifest.base is None:
            tensors = read_tensors(folder / WEIGHTS, framework)
            return tensors | {name: tensors[source] for name, source in manifest.tied.items()}
        found = self.manifest(manifest.base).weights_id
        if found != manifest.base_weights_id:
            raise CorruptionError(f"policy version {version} is an adapter on weights {manifest.base_weights_id}, but "
                                  f"version {manifest.base} holds {found}", fix="restore both from one copy")
        base = self.load(manifest.base, framework=framework)
        config = json.loads((folder / ADAPTER_CONFIG).read_text())
        return base | dict(low_rank.merge(base, read_tensors(folder / ADAPTER, framework), config))

    def base(self) -> int | None:
        """The version that adapters of the policy learnt here stand on.

        That of the latest version when this is an adapter, else the latest itself when no step was taken yet; None when
        there is no such version.
        """
        latest = self.latest()
        if latest is None:
            return None
        manifest = self.manifest(latest)
        return manifest.base if manifest.kind == "adapter" else latest if manifest.learner_step == 0 else None

    def served(self, url: str) -> Served:
        """What a server was given of this registry.

        Raises:
            CorruptionError: the record cannot be read.
        """
        return read_served(self.root, url)

    def share(self) -> None:
        """Let other machines know what servers hold: who reads this folder knows already."""

    # ------------------------------------------------------------------------------------------------- writing

    def publish(self, weights: Mapping[str, Any], *, learner_step: int, parent: int | None = None) -> int:
        """Write the next version and announce it.

        Args:
            weights: name -> torch tensor or numpy array, as in a state dict; tensors that share memory (a tied LM
                head) are stored once.
            learner_step: optimiser steps behind these weights.
            parent: the version they were trained from; the latest when not given.

        Returns:
            The new version: the latest plus one, ``first`` when there is none.

        Raises:
            RegistryError: there is nothing to publish, or another program is publishing here, or no room is left.
        """
        if not weights:
            raise RegistryError("there are no tensors to publish", fix="pass the model's state dict")
        def fill(folder: Path) -> Json:
            stored, tied = untie(weights)
            write_tensors(stored, folder / WEIGHTS)
            digest = file_sha256(folder / WEIGHTS)
            return {"weights_id": digest, "dtype": dtype_of(stored), "tied": tied, "files": {WEIGHTS: digest}}

        return self._publish(fill, learner_step, parent)

    def publish_adapter(self, factors: Mapping[str, Any], config: Mapping[str, Any], *, base: int, learner_step: int,
                        parent: int | None = None) -> int:
        """Write a low-rank adapter as the next version and announce it.

        Args:
            factors: tensors by peft's names, see ``publish/adapter.py``.
            config: content of ``adapter_config.json``.
            base: the version of full weights it was trained on.
            learner_step, parent: see :meth:`publish`.

        Returns:
            The new version.

        Raises:
            RegistryError: vLLM could not serve it, it does not fit the base, or the base is itself an adapter or is not
                there; what :meth:`publish` raises.
        """
        low_rank.refuse_unservable(config, factors)
        below = self.manifest(base)
        if below.kind != "full":
            raise RegistryError(f"policy version {base} is an adapter itself, no base for one",
                                fix=f"name the version it stands on, {below.base}")
        low_rank.refuse_misfit(self._path(base) / WEIGHTS, factors)

        def fill(folder: Path) -> Json:
            write_tensors(factors, folder / ADAPTER)
            (folder / ADAPTER_CONFIG).write_text(json.dumps(dict(config), indent=1, sort_keys=True) + "\n")
            files = {name: file_sha256(folder / name) for name in (ADAPTER, ADAPTER_CONFIG)}
            return {"kind": "adapter", "base": base, "base_weights_id": below.weights_id, "dtype": dtype_of(factors),
                    "weights_id": adapter_weights_id(below.weights_id, files), "files": files}

        return self._publish(fill, learner_step, parent)

    def prune(self, keep: int, *, staleness: int = 0, spare: Collection[int] = ()) -> list[int]:
        """Delete old versions, oldest first.

        Those a collector may still ask for always stay, and those that a server holds, and the bases of adapters that
        stay.

        Args:
            keep: newest versions to keep, at least 1.
            staleness: policy versions that collected data may be old: ``latest - staleness`` and later stay.
            spare: versions that stay whatever their age.

        Returns:
            The versions deleted.

        Raises:
            CorruptionError: the latest version is not there, so that nobody can tell which ones are old.
        """
        latest = self.latest()
        if latest is None:
            return []
        with self._writing():
            if not self._path(latest).is_dir():
                raise CorruptionError(f"{self.root / 'LATEST'} names version {latest}, which is not there; no version "
                                      "was deleted", fix=f"write the number of one that is: {self._on_disk()}")
            first = min(latest - max(keep, 1) + 1, behaviour_version(latest, staleness=staleness))
            known, spared = self.versions(), {*spare, *in_use(self.root)}
            kept = [version for version in known if version >= first or version in spared]
            kept += [base for base in map(self._base_of, kept) if base is not None]
            old = [version for version in known if version not in kept]
            for version in old:
                self._remove(version)
        return old

    def rewind(self, version: int) -> list[int]:
        """Make an earlier version the latest again and delete the later ones, to repeat steps after a crash.

        Only for a run whose collectors are stopped: their data names versions that will be published anew.

        Returns:
            The versions deleted.

        Raises:
            RegistryError: no such version.
        """
        self.folder(version)
        with self._writing():
            self._announce(version)
            later = [v for v in self._on_disk() if v > version]
            for newer in reversed(later):
                self._remove(newer)
        return later

    # ------------------------------------------------------------------------------------------------- details

    def _path(self, version: int) -> Path:
        return self.root / f"{version:012d}"

    def _on_disk(self) -> list[int]:
        names = os.listdir(self.root) if self.root.is_dir() else []
        return sorted(int(name) for name in names if FOLDER.fullmatch(name))

    def _base_of(self, version: int) -> int | None:
        return read_manifest(self._path(version)).base

    def _publish(self, fill: _Fill, learner_step: int, parent: int | None) -> int:
        """The next version from whatever writes its files; announced when every byte is on the disk."""
        with self._writing():
            latest = self.latest()
            version = self._first if latest is None else latest + 1
            final = self._path(version)
            temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=self.root))
            try:
                self._seal(temporary, {**fill(temporary), "version": version, "learner_step": learner_step,
                                       "parent": latest if parent is None else parent})
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)  # half a version would keep a full disk full
                raise
            if final.exists():
                shutil.rmtree(final)  # complete but never announced: its writer died just before it could be
            temporary.rename(final)
            _sync(self.root)
            self._announce(version)
        return version

    def _seal(self, folder: Path, about: Json) -> None:
        """The manifest, then every byte synced."""
        manifest = Manifest(**about, **self._stamp)
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n")
        folder.chmod(0o755)
        for path in (*(folder / name for name in manifest.files), folder / MANIFEST, folder):
            _sync(path)

    def try_writing(self) -> None:
        """Make the folder, for whoever must know early that a publish can succeed.

        Raises:
            RegistryError: it cannot be made or written to, or another program is publishing.
        """
        with self._writing():
            pass

    def _announce(self, version: int) -> None:
        """Flip ``LATEST``; readers see the old or the new number, nothing else."""
        temporary = self.root / ".LATEST"
        temporary.write_text(f"{version}\n")
        _sync(temporary)
        temporary.replace(self.root / "LATEST")
        _sync(self.root)

    def _remove(self, version: int) -> None:
        """Take a version out of sight in one rename, then delete it."""
        doomed = self.root / f".tmp-gone-{version}"
        self._path(version).rename(doomed)
        shutil.rmtree(doomed)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One writer at a time; what an earlier, killed writer left behind is swept up first."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = (self.root / "LOCK").open("w")
        except OSError as error:
            raise unwritten(error, self.root) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RegistryError(f"another program is publishing into {self.root}",
                                    fix="let one learner publish at a time, or give this one its own folder"
                                    ) from error
            for leftover in self.root.glob(".tmp-*"):
                shutil.rmtree(leftover)
            yield
