"""The policy registry: one folder per policy version, and one small file that says which is the latest.

::

    policies/  LATEST                    the number of the latest version, replaced atomically
               000000000012/             model.safetensors, manifest.json; complete or absent, never changed
               .tmp-*/  LOCK             a publish in progress, or what a killed one left behind

A version is written to a temporary folder, synced, renamed, and only then announced in ``LATEST``. A writer that is
killed anywhere in between leaves the old ``LATEST`` with its complete version; the next publish sweeps up. Readers
need no lock. One program at a time publishes; a second one is refused.
"""

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from agentsdpo.errors import CorruptionError, RegistryError
from agentsdpo.files import sync as _sync
from agentsdpo.publish.manifest import MANIFEST, WEIGHTS, Manifest, file_sha256, read_manifest, verify_files
from agentsdpo.publish.tensors import dtype_of, read_tensors, untie, write_tensors

_FOLDER = re.compile(r"\d{12}")


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
            CorruptionError: ``LATEST`` does not hold a number.
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

        Args:
            version: an announced version.
            framework: ``pt`` for torch tensors, ``np`` for numpy arrays (numpy has no bfloat16).

        Raises:
            RegistryError: no such version. CorruptionError: its bytes are not those that were published.
        """
        folder = self.folder(version)
        manifest = read_manifest(folder)
        verify_files(folder, manifest)
        tensors = read_tensors(folder / WEIGHTS, framework)
        return tensors | {name: tensors[source] for name, source in manifest.tied.items()}

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
        with self._writing():
            latest = self.latest()
            version = self._first if latest is None else latest + 1
            final = self._path(version)
            temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=self.root))
            try:
                self._write(temporary, weights, version, learner_step, latest if parent is None else parent)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)  # half a version would keep a full disk full
                raise
            if final.exists():
                shutil.rmtree(final)  # complete but never announced: its writer died just before it could be
            temporary.rename(final)
            _sync(self.root)
            self._announce(version)
        return version

    def prune(self, keep: int, *, staleness: int = 0, spare: Collection[int] = ()) -> list[int]:
        """Delete old versions, oldest first; those a collector may still ask for always stay.

        Args:
            keep: newest versions to keep, at least 1.
            staleness: policy versions that collected data may be old: ``latest - staleness`` and later stay.
            spare: versions that stay whatever their age.

        Returns:
            The versions deleted.
        """
        latest = self.latest()
        if latest is None:
            return []
        with self._writing():
            first = min(latest - max(keep, 1) + 1, behaviour_version(latest, staleness=staleness))
            old = [version for version in self.versions() if version < first and version not in spare]
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
        return sorted(int(name) for name in names if _FOLDER.fullmatch(name))

    def _write(self, folder: Path, weights: Mapping[str, Any], version: int, step: int, parent: int | None) -> None:
        """Weights and manifest into a folder, every byte synced."""
        stored, tied = untie(weights)
        write_tensors(stored, folder / WEIGHTS)
        digest = file_sha256(folder / WEIGHTS)
        manifest = Manifest(version=version, parent=parent, weights_id=digest, dtype=dtype_of(stored), tied=tied,
                            learner_step=step, files={WEIGHTS: digest}, **self._stamp)
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n")
        folder.chmod(0o755)
        for path in (folder / WEIGHTS, folder / MANIFEST, folder):
            _sync(path)

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
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / "LOCK").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RegistryError(f"another program is publishing into {self.root}",
                                    fix="let one learner publish at a time, or give this one its own folder"
                                    ) from error
            for leftover in self.root.glob(".tmp-*"):
                shutil.rmtree(leftover)
            yield
