"""The policy registry in a bucket: whoever learns copies each version there, whoever serves or plays fetches it.

The bucket holds what the registry's folder holds, ``LATEST`` and one prefix per version. Objects appear whole; those of
a version are there before ``LATEST`` names it. The learner's folder stays what it writes to and goes on from;
readers keep a copy of what they need on their own disk, and hashes are compared whenever weights are loaded.
"""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from agentsdpo.errors import AgentSdpoError, CorruptionError, RegistryError, StoreError
from agentsdpo.files import sync
from agentsdpo.publish.manifest import MANIFEST, Manifest, read_manifest
from agentsdpo.publish.registry import FOLDER, PolicyRegistry
from agentsdpo.publish.served import Served, in_use, served_path
from agentsdpo.replay.storage import Storage, storage_for

CACHE_VARIABLE = "AGENTSDPO_CACHE"
"""Environment variable: folder for copies of versions; ``~/.cache/agentsdpo`` without it."""
LOOK_S = 0.25
"""Seconds for which what the bucket said holds."""
CHUNK = 8 << 20
KEPT = 2
"""Newest versions whose copies stay, beside those that a server holds and their bases."""


def is_bucket(address: Path | str) -> bool:
    """Whether an address names a bucket.

    >>> is_bucket("s3://models/run"), is_bucket("runs/first")
    (True, False)
    """
    return str(address).startswith("s3://")


def open_registry(address: Path | str) -> PolicyRegistry:
    """The registry to read at an address: a folder, or ``s3://bucket/prefix``.

    Raises:
        StoreError: an address that cannot be used.
    """
    return BucketRegistry(str(address)) if is_bucket(address) else PolicyRegistry(address)


class MirroredRegistry(PolicyRegistry):
    """A registry whose versions are copied into a bucket as they are announced, and deleted there with the local ones.

    A copy that fails is raised, since nobody else would ever see the version.

    Args:
        root: as of :class:`PolicyRegistry`. to: ``s3://bucket/prefix``. more: as of :class:`PolicyRegistry`.
    """

    def __init__(self, root: Path | str, to: str, **more: Any) -> None:
        super().__init__(root, **more)
        self._bucket = storage_for(to)

    def _announce(self, version: int) -> None:
        super()._announce(version)
        base = self._base_of(version)
        for wanted in sorted({version, version if base is None else base}):
            self._ship(wanted)
        self._bucket.replace("LATEST", f"{version}\n".encode())

    def _ship(self, version: int) -> None:
        """Copy one version unless it is there, its manifest last: a prefix without one is no version."""
        folder, manifest = self._path(version), f"{version:012d}/{MANIFEST}"
        if _found(self._bucket, manifest) == (folder / MANIFEST).read_bytes():
            return
        self._bucket.remove(manifest)  # of a version that was given up, and whose number is used again
        for name in (*read_manifest(folder).files, MANIFEST):
            with pa.memory_map(str(folder / name)) as file:
                self._bucket.replace(f"{version:012d}/{name}", file.read_buffer())

    def _remove(self, version: int) -> None:
        names = (MANIFEST, *read_manifest(self._path(version)).files)  # first: what has none is no version
        super()._remove(version)
        for name in names:
            self._bucket.remove(f"{version:012d}/{name}")


class BucketRegistry(PolicyRegistry):
    """A registry in a bucket, read through copies on this machine's disk.

    Args:
        address: ``s3://bucket/prefix``, that a learner mirrors to.
        cache: folder for copies; one per address, shared by all programs of this machine.
    """

    def __init__(self, address: str, cache: Path | None = None) -> None:
        name = hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:16]
        super().__init__((cache or cache_folder()) / "policies" / name)
        self.address, self._bucket = address, storage_for(address)
        self._seen: tuple[float, int | None, list[int]] = (float("-inf"), None, [])

    def latest(self) -> int | None:
        """See :meth:`PolicyRegistry.latest`. Raises StoreError where the bucket cannot be reached, too."""
        return self._look()[1]

    def folder(self, version: int) -> Path:
        """The local copy of one version, fetched with its base where they are missing.

        A learner that went back uses numbers again: a copy whose manifest is another one is replaced.

        Raises:
            RegistryError: no such version is announced, or it was pruned.
            CorruptionError: a file of it is missing. StoreError: the bucket cannot be reached, or not be copied from.
        """
        path = self._path(version)
        if path.exists() and version in in_use(self.root) and version not in self.versions():
            return path  # pruned elsewhere, while a server here goes on with it
        super().folder(version)
        if not path.exists() or (path / MANIFEST).read_bytes() != self._read(version, MANIFEST):
            self._fetch(version)
        return path

    def manifest(self, version: int) -> Manifest:
        """See :meth:`PolicyRegistry.manifest`; of a version that is not here yet it alone is read."""
        if self._path(version).exists():
            return super().manifest(version)
        super().folder(version)  # whether there is such a version
        return Manifest.model_validate_json(self._read(version, MANIFEST))

    def served(self, url: str) -> Served:
        """See :meth:`PolicyRegistry.served`; what a publisher on any machine has shared."""
        said = _found(self._bucket, served_path(Path(), url).as_posix())
        return Served(url=url) if said is None else Served.model_validate_json(said)

    def share(self) -> None:
        """Tell the other machines what servers hold, as far as this one pushed it."""
        for path in sorted((self.root / "served").glob("*.json")):
            self._bucket.replace(f"served/{path.name}", path.read_bytes())

    def _on_disk(self) -> list[int]:
        return self._look()[2]

    def _look(self) -> tuple[float, int | None, list[int]]:
        """What the bucket holds, asked at most every :data:`LOOK_S`."""
        if time.monotonic() - self._seen[0] > LOOK_S:
            said = _found(self._bucket, "LATEST")
            if said is not None and not said.strip().isdigit():
                raise CorruptionError(f"{self.address}/LATEST holds {said[:40]!r} instead of a version",
                                      fix="let the learner publish again")
            known = [] if said is None else _versions(self._bucket)
            self._seen = (time.monotonic(), None if said is None else int(said), known)
        return self._seen

    def _read(self, version: int, name: str) -> bytes:
        found = _found(self._bucket, f"{version:012d}/{name}")
        if found is None:
            raise CorruptionError(f"{self.address}/{version:012d} has no {name}",
                                  fix="let the learner publish again, or ask for another version")
        return found

    def _fetch(self, version: int) -> None:
        """Copy a version, and the one it stands on, onto this disk; whole or not at all."""
        about = Manifest.model_validate_json(self._read(version, MANIFEST))
        if about.base is not None:
            self.folder(about.base)
        self.root.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=self.root))
        try:
            for name in (*about.files, MANIFEST):
                _copy(self._bucket, f"{version:012d}/{name}", temporary / name)
            temporary.chmod(0o755)
            if self._path(version).exists():
                self._remove(version)
            temporary.rename(self._path(version))
        except FileNotFoundError as error:
            raise CorruptionError(f"{self.address}/{version:012d} is not whole: {error}",
                                  fix="let the learner publish again, or ask for another version") from error
        except AgentSdpoError:
            raise
        except OSError as error:
            if not self._path(version).exists():  # else another program of this machine was faster
                raise StoreError(f"{self.address}/{version:012d} was not copied to {self.root}: {error}",
                                 fix="look after the network, or the room on this disk") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync(self.root)
        self._forget(version)

    def _forget(self, newest: int) -> None:
        """Delete copies that nobody here needs any more."""
        here = sorted(int(path.name) for path in self.root.iterdir() if FOLDER.fullmatch(path.name))
        kept = {*[version for version in here if version <= newest][-KEPT:], *in_use(self.root),
                *(version for version in here if version > newest)}
        kept |= {base for base in map(self._base_of, kept & set(here)) if base is not None}
        for version in set(here) - kept:
            shutil.rmtree(self._path(version), ignore_errors=True)

    def _refused(self) -> RegistryError:
        return RegistryError(f"{self.address} is a copy to read", fix="publish on the learner's machine, with "
                             "publish.mirror = \"s3://...\"")

    def _publish(self, *_: Any) -> int:
        raise self._refused()

    def prune(self, *_: Any, **__: Any) -> list[int]:
        """Refused: the learner prunes."""
        raise self._refused()

    def rewind(self, version: int) -> list[int]:
        """Refused: the learner rewinds."""
        raise self._refused()


def cache_folder() -> Path:
    """Where copies of versions are kept on this machine."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "agentsdpo")


def _versions(bucket: Storage) -> list[int]:
    """Versions whose manifest is there; emptied prefixes may go on existing."""
    parts = (info.path.split("/") for info in bucket.list(""))
    return sorted(int(part[0]) for part in parts if part[1:] == [MANIFEST] and FOLDER.fullmatch(part[0]))


def _found(bucket: Storage, path: str) -> bytes | None:
    try:
        return bucket.read(path)
    except FileNotFoundError:
        return None


def _copy(bucket: Storage, path: str, to: Path) -> None:
    """One object onto the disk, a piece at a time."""
    with bucket.open(path) as source, to.open("wb") as target:
        target.writelines(_pieces(source))
        target.flush()
        os.fsync(target.fileno())


def _pieces(source: pa.NativeFile) -> Iterable[bytes]:
    while piece := source.read(CHUNK):
        yield piece
