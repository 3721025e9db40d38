"""A store under a prefix of a bucket, through ``pyarrow.fs``; conditional creates through ``obstore`` (extra ``s3``).

Keys and region come from where the AWS tools take them: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE and
``~/.aws``, AWS_REGION, AWS_ENDPOINT_URL. Keys never stand in an address, and never in a message.

Transient faults are retried under the same name: an object is whole or absent, so that writing it again is harmless.
An answer may be lost after the server has done its work: where a name is taken, the object is read, and equal bytes
are our own earlier success.
"""

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa
from pyarrow import fs
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from agentsdpo.errors import StoreError
from agentsdpo.replay.s3_errors import S3Fault, explain
from agentsdpo.replay.storage import Data, FileInfo, Files, Names, check_path

if TYPE_CHECKING:
    from agentsdpo.replay.s3_create import Conditional

T = TypeVar("T")
OPTIONS = ("endpoint_override", "region", "scheme", "anonymous")
"""What may follow the ``?`` of an address."""
_WHOLE = 8 << 20
"""Bytes up to which opening a file fetches it at once; segments of single appends are far smaller."""
_IMMUTABLE = ("data/", "log/", "overlay/", "aux/", "policies/")
"""Folders whose files are never replaced."""
_ATTEMPTS, _PAUSE_S = 7, 0.2
"""Attempts at one request, and the longest pause after the first; it doubles up to 5 s, some 8 s in all."""
_abandoned: list[pa.NativeFile] = []
"""Streams of failed writes, kept for good: when pyarrow destroys one it closes it once more, and then what is left in
it, nothing mostly, becomes the object. At exit S3 is shut down before they go."""


class S3Storage:
    """Objects under ``s3://bucket/prefix[?endpoint_override=http://host:port&region=...&anonymous=true]``.

    ``exclusive`` is false at first: a create looks whether the name is taken and then writes, which is enough for an
    append, whose names are its own, but not for two maintainers. From :meth:`demand_exclusive` on, or when a store is
    opened that was made with it, a create is one conditional PUT.

    Raises:
        StoreError: no bucket, an unknown option, a ``#``, or keys in the address.
    """

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        self._options = dict(parse_qsl(parts.query, keep_blank_values=True))
        _check_address(parts.netloc, self._options)
        self.bucket, self.prefix = parts.netloc, parts.path.strip("/")
        self.uri = f"s3://{self.bucket}/{self.prefix}".rstrip("/")
        if "#" in address:  # what follows is no part of a URL's path: s3://b/run#1 and s3://b/run#2 would be one store
            raise StoreError("an address of S3 holds a '#'", fix="use a prefix without; what an earlier build wrote to "
                             f"such an address lies in {self.uri}")
        self.exclusive = False
        self._system: tuple[int, fs.S3FileSystem] | None = None
        self._conditional: Conditional | None = None

    # -------------------------------------------------------------------------------------------------- writing

    def create(self, path: str, data: Data) -> None:
        """See :meth:`Storage.create`. A name taken by equal bytes is no error: they are our own."""
        body = memoryview(data).cast("B")
        _retry(lambda: self._create_conditional(path, body) if self.exclusive else self._create_plain(path, body))

    def _create_plain(self, path: str, body: memoryview) -> None:
        if not self._holds(path, body):
            self._put(path, body)

    def _create_conditional(self, path: str, body: memoryview) -> None:
        if not self._creator().put(self._name(path), body) and not self._holds(path, body):
            raise S3Fault(f"{self.uri}/{path} is taken by a write that is not finished", fix="try again")

    def _creator(self) -> "Conditional":
        if self._conditional is None:
            from agentsdpo.replay.s3_create import Conditional

            self._conditional = Conditional(self.bucket, self.endpoint, self.region,
                                            anonymous="anonymous" in self._options)
        return self._conditional

    def demand_exclusive(self) -> None:
        """See :meth:`Storage.demand_exclusive`; tries it on an object of its own, which is removed again.

        A store is made with conditional creates or stays without: one writer that overwrites is enough to break them.
        """
        if self.exclusive:
            return
        if self.exists("STORE.json"):
            raise StoreError(f"{self.uri} was made without conditional creates, so that two may take the same slot",
                             fix="say that nobody else maintains it (--sole-maintainer), or copy it into a new store, "
                                 "with obstore installed and on a server that knows If-None-Match")
        path = f".tmp-probe-{os.urandom(8).hex()}"
        try:
            if not (self._creator().put(self._name(path), memoryview(b"first"))
                    and not self._creator().put(self._name(path), memoryview(b"second"))
                    and self.read(path) == b"first"):
                raise StoreError(f"the server of {self.uri} lets a conditional PUT overwrite an object",
                                 fix="use one that knows If-None-Match; appending works without")
        finally:
            with suppress(StoreError):  # keys that may not delete can still write a store; a few bytes stay
                self.remove(path)
        self.exclusive = True

    def _holds(self, path: str, body: memoryview) -> bool:
        """Whether the object is there with these bytes. Raises FileExistsError for others."""
        try:
            have = self._fetch(path)
        except FileNotFoundError:
            return False
        if have != body:
            raise FileExistsError(errno.EEXIST, "the name is taken by other bytes", f"{self.uri}/{path}")
        return True

    def replace(self, path: str, data: Data) -> None:
        """See :meth:`Storage.replace`; one PUT."""
        _retry(lambda: self._put(path, memoryview(data)))

    def _put(self, path: str, body: memoryview) -> None:
        def write(system: fs.S3FileSystem, key: str) -> None:
            stream = system.open_output_stream(key)
            try:
                stream.write(body)
                stream.close()  # not by `with`: that would finish the upload of a write that failed
            except BaseException:
                _abandoned.append(stream)
                raise

        self._once("writing", path, write)

    def remove(self, path: str) -> None:
        """See :meth:`Storage.remove`."""
        with suppress(FileNotFoundError):
            self._call("removing", path, lambda system, key: system.delete_file(key))

    def move(self, path: str, to: str) -> None:
        """See :meth:`Storage.move`; a copy by the server, then a removal."""
        if self.exists(to):
            raise FileExistsError(errno.EEXIST, "the name is taken", f"{self.uri}/{to}")
        self._call("moving", path, lambda system, key: system.copy_file(key, self._key(to)))
        self.remove(path)

    # -------------------------------------------------------------------------------------------------- reading

    def read(self, path: str) -> bytes:
        """See :meth:`Storage.read`."""
        return _retry(lambda: self._fetch(path))

    def _fetch(self, path: str) -> bytes:
        """Size, bytes, and for a file that may be replaced a second look: a mixture of two versions is read again."""
        def fetch(system: fs.S3FileSystem, key: str) -> bytes:
            with system.open_input_file(key) as file:
                data, version = file.read(), file.metadata()
            if not path.startswith(_IMMUTABLE):
                with system.open_input_file(key) as file:
                    if file.metadata() != version:
                        raise S3Fault(f"{self.uri}/{path} was replaced while it was read", fix="read it again")
            return data

        return self._once("reading", path, fetch)

    def open(self, path: str) -> pa.NativeFile:
        """See :meth:`Storage.open`; a small file is fetched whole, a large one as it is read."""
        file = self._call("reading", path, lambda system, key: system.open_input_file(key))
        if file.size() > _WHOLE:
            return pa.PythonFile(_Ranges(self, path, file), mode="r")
        return pa.BufferReader(self._call("reading", path, lambda *_: file.read_at(file.size(), 0)))

    def exists(self, path: str) -> bool:
        """See :meth:`Storage.exists`."""
        try:
            self._call("looking for", path, lambda system, key: system.open_input_file(key).close())
        except FileNotFoundError:
            return False
        return True

    def folders(self, prefix: str) -> Names:
        """See :meth:`Storage.folders`."""
        found = self._select(prefix, recursive=False)
        return sorted(info.base_name for info in found if info.type == fs.FileType.Directory)

    def names(self, prefix: str) -> Names:
        """See :meth:`Storage.names`."""
        return [info.base_name for info in self._select(prefix, recursive=False)]

    def list(self, prefix: str, *, temporary: bool = False) -> Files:
        """See :meth:`Storage.list`; nothing unfinished is ever seen in a bucket."""
        start = len(self._key("")) + 1
        return sorted(FileInfo(info.path[start:], info.size, info.mtime_ns // 1000)
                      for info in self._select(prefix, recursive=True) if info.type == fs.FileType.File)

    def _select(self, prefix: str, *, recursive: bool) -> "list[fs.FileInfo]":
        return self._call("listing", prefix, lambda system, key: system.get_file_info(
            fs.FileSelector(key, recursive=recursive, allow_not_found=True)))

    # ------------------------------------------------------------------------------------------------- requests

    def _call(self, doing: str, path: str, action: Callable[[fs.S3FileSystem, str], T]) -> T:
        return _retry(lambda: self._once(doing, path, action))

    def _once(self, doing: str, path: str, action: Callable[[fs.S3FileSystem, str], T]) -> T:
        """One attempt; what went wrong is told without the server's own text, which may quote keys."""
        try:
            return action(self._connect(), self._key(path))
        except (FileNotFoundError, StoreError):
            raise
        except OSError as error:
            if "NO_SUCH_KEY" in str(error):
                raise FileNotFoundError(errno.ENOENT, "no such object", f"{self.uri}/{path}") from None
            raise explain(doing, f"{self.uri}/{path}".rstrip("/"), str(error)) from None

    def _connect(self) -> fs.S3FileSystem:
        """The file system of this process: connections are not shared with a parent."""
        if self._system is None or self._system[0] != os.getpid():
            scheme, _, host = self.endpoint.partition("://")
            options = {"endpoint_override": host, "scheme": scheme} if host else {}
            self._system = os.getpid(), fs.S3FileSystem(
                region=self.region, anonymous="anonymous" in self._options, background_writes=False,
                allow_delayed_open=True, retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1), **options)
            # a delayed open makes one PUT of a small file, not three requests; attempts are counted here alone
        return self._system[1]

    @property
    def endpoint(self) -> str:
        """``scheme://host:port`` of the server, empty for AWS."""
        where = self._options.get("endpoint_override") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get(
            "AWS_ENDPOINT_URL") or ""
        return where if "://" in where or not where else f"{self._options.get('scheme', 'https')}://{where}"

    @property
    def region(self) -> str:
        """Region of the bucket: as told, else asked of AWS."""
        known = self._options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        return known or ("us-east-1" if self.endpoint else fs.resolve_s3_region(self.bucket))

    def _name(self, path: str) -> str:
        """Key of an object inside the bucket."""
        check_path(path, self.uri)
        return f"{self.prefix}/{path}".strip("/")

    def _key(self, path: str) -> str:
        return f"{self.bucket}/{self._name(path)}".rstrip("/")


class _Ranges:
    """A large object as a Python file; every range is read with retries."""

    closed = False

    def __init__(self, storage: S3Storage, path: str, file: pa.NativeFile) -> None:
        self._storage, self._path, self._file, self._size, self._at = storage, path, file, file.size(), 0

    def read(self, n: int = -1) -> bytes:
        n = self._size - self._at if n is None or n < 0 else min(n, self._size - self._at)
        at, file = self._at, self._file
        data = self._storage._call("reading", self._path, lambda *_: file.read_at(n, at))
        self._at += len(data)
        return data

    def seek(self, to: int, whence: int = 0) -> int:
        self._at = to + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True
        self._file.close()


def _retry(action: Callable[[], T]) -> T:
    """Several attempts with growing, random pauses."""
    return Retrying(stop=stop_after_attempt(_ATTEMPTS), wait=wait_random_exponential(multiplier=_PAUSE_S, max=5),
                    retry=retry_if_exception_type(S3Fault), reraise=True)(action)


def _check_address(netloc: str, options: dict[str, str]) -> None:
    unknown = sorted(set(options) - set(OPTIONS))
    if "@" in netloc or {"access_key", "secret_key", "session_token"} & set(unknown):
        raise StoreError("the address of a bucket holds keys, and addresses end up in logs",
                         fix="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, instead")
    if unknown or not netloc:
        raise StoreError(f"an address of S3 has {f'the option {unknown[0]!r}' if unknown else 'no bucket'}",
                         fix=f"write s3://bucket/prefix?option=value with the options {', '.join(OPTIONS)}")
