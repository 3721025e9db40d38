"""Conditional PUT: an object is created or the name is taken, decided by the server. Needs ``obstore``."""

import configparser
import os
from pathlib import Path
from typing import Any

from agentsdpo.errors import StoreError
from agentsdpo.replay.s3_errors import explain

_first_pid = 0
"""The process that used obstore first: its threads do not survive a fork, and a child would wait for them forever."""


class Conditional:
    """Creates objects of one bucket.

    Args:
        bucket: its name.
        endpoint: ``scheme://host:port``, empty for AWS.
        region: of the bucket.
        anonymous: sign nothing.

    Raises:
        StoreError: obstore is not installed.
    """

    def __init__(self, bucket: str, endpoint: str, region: str, *, anonymous: bool) -> None:
        try:
            import obstore
            from obstore.store import S3Store
        except ImportError as error:
            raise StoreError(f"s3://{bucket} needs conditional creates, and obstore is not installed",
                             fix="pip install 'agentsdpo[s3]'; reading works without") from error
        options: dict[str, Any] = {**({} if anonymous else _profile()), "region": region,
                                   "skip_signature": anonymous} | ({"endpoint": endpoint} if endpoint else {})
        self._obstore, self._bucket = obstore, bucket
        self._store = S3Store(bucket, **options, client_options={"allow_http": True, "timeout": "30s"},
                              retry_config={"max_retries": 0})

    def put(self, key: str, body: memoryview) -> bool:
        """Create one object; False when the name is taken.

        Raises:
            S3Fault: it may or may not be there; try again.
            StoreError: the server refuses, or this is a fork of a process that used obstore.
        """
        _check_fork()
        try:
            self._obstore.put(self._store, key, body, mode="create", use_multipart=False)
        except self._obstore.exceptions.AlreadyExistsError:
            return False
        except (self._obstore.exceptions.BaseError, OSError) as error:
            raise explain("creating", f"s3://{self._bucket}/{key}", str(error)) from None
        return True


def _check_fork() -> None:
    global _first_pid
    _first_pid = _first_pid or os.getpid()
    if _first_pid != os.getpid():
        raise StoreError(f"process {os.getpid()} was forked from {_first_pid}, which has written to S3 with obstore",
                         fix='start it with multiprocessing.get_context("spawn"), or write in the child alone')


def _profile() -> dict[str, str]:
    """Keys of AWS_PROFILE from the credentials file, which obstore does not read; empty when the environment has keys.

    A profile that is not there leaves obstore to ask the machine's metadata service, as the AWS tools do.
    """
    if "AWS_ACCESS_KEY_ID" in os.environ:
        return {}
    file = configparser.ConfigParser(interpolation=None)
    file.read(Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials").expanduser())
    name = os.environ.get("AWS_PROFILE", "default")
    section = dict(file[name]) if file.has_section(name) else {}
    names = {"aws_access_key_id": "access_key_id", "aws_secret_access_key": "secret_access_key",
             "aws_session_token": "session_token"}
    return {ours: section[theirs] for theirs, ours in names.items() if theirs in section}
