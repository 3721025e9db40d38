"""The store's own rows in one Parquet file: everything an episode holds, as of the export, late values merged in.

Any Parquet reader can open it. When it is read back, each row's ``content_sha256`` and ``tokens_sha256`` are checked,
and the hash of everything else, which stands in the file's metadata under ``agentsdpo.sha256``; beside it,
``agentsdpo.policies`` says what the policy versions in the file are.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from agentsdpo.errors import AgentSdpoError, FormatError
from agentsdpo.replay.canonical import canonical_json
from agentsdpo.replay.formats.bag import Stored
from agentsdpo.replay.formats.reading import Found, Notes
from agentsdpo.replay.rows import to_episode, to_rows
from agentsdpo.replay.schema import SCHEMA, WRITE_OPTIONS, conform
from agentsdpo.replay.segment import GROUP_ROWS, GROUP_TOKENS
from agentsdpo.types import Episode, Json

_HASHES = ["tokens_sha256", "content_sha256"]
_SHA, _POLICIES = "agentsdpo.sha256", "agentsdpo.policies"


class Writer:
    """Writes episodes into one file, row groups of about 65,536 tokens."""

    def __init__(self, file: BinaryIO) -> None:
        self._writer = pq.ParquetWriter(file, SCHEMA, use_content_defined_chunking=True, **WRITE_OPTIONS)
        self._held: list[pa.Table] = []
        self._rows, self._tokens = 0, 0
        self._digest, self._policies = hashlib.sha256(), dict[int, Json]()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if kind is None:
            self._flush()
            policies = canonical_json({str(version): manifest for version, manifest in self._policies.items()})
            self._digest.update(policies)
            self._writer.add_key_value_metadata({_SHA: self._digest.hexdigest(), _POLICIES: policies.decode()})
        self._writer.close()

    def write(self, stored: Stored) -> None:
        """Add all branches of an episode."""
        episode, salvaged = stored.episode, stored.status == "salvaged"
        self._policies |= stored.policies
        table = to_rows([episode], salvaged=salvaged)
        self._digest.update(_said(episode, salvaged))
        self._held.append(table)
        self._rows, self._tokens = self._rows + len(table), self._tokens + sum(
            len(branch.token_ids) for branch in episode.branches)
        if self._tokens >= GROUP_TOKENS or self._rows >= GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            self._writer.write_table(pa.concat_tables(self._held), row_group_size=self._rows)
        self._held, self._rows, self._tokens = [], 0, 0


def read(path: Path, notes: Notes, siblings: frozenset[Path]) -> Iterator[Found]:
    """Episodes of a file; the rows of one stand together, as :class:`Writer` and the store itself leave them.

    Raises:
        FormatError: no such file, damaged pages, rows that do not hash to what they say, or an episode torn apart.
    """
    seen: set[tuple[str, int]] = set()
    digest, (stated, policies, raw) = hashlib.sha256(), _stated(path)
    for table in _runs(path, notes):
        name = (table["episode_id"][0].as_py(), table["attempt"][0].as_py())
        where = f"{path}: episode {name[0]}"
        if name in seen:
            raise FormatError(f"{where} stands in two places of the file", fix="sort it by episode_id, attempt")
        seen.add(name)
        try:
            episode = to_episode(table)
            salvaged = table["status"][0].as_py() == "salvaged"
            same = to_rows([episode], salvaged=salvaged).select(_HASHES).equals(
                table.sort_by("branch_id").select(_HASHES).combine_chunks())
        except (AgentSdpoError, ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{where} cannot be read: {error}", fix="export it again") from error
        if not same:
            raise FormatError(f"{where} does not hash to what its rows say", fix="export it again: it is damaged")
        digest.update(_said(episode, salvaged))
        versions = {span.version for branch in episode.branches for call in branch.calls for span in call.versions}
        yield Found(episode, episode.train_allowed, episode.episode_id, where, salvaged,
                    {version: policies[version] for version in versions & policies.keys()})
    digest.update(raw)
    if stated is not None and stated != digest.hexdigest():
        raise FormatError(f"{path} does not hash to what it says", fix="export it again: it is damaged")


def _said(episode: Episode, salvaged: bool) -> bytes:
    """All of an episode that the hashes of its rows leave out."""
    forks = [branch.model_dump(include={"branch_id", "parent_branch_id", "fork_at", "fork_reason"})
             for branch in episode.branches]
    return canonical_json([episode.model_dump(mode="json", exclude={"branches"}), forks, salvaged])


def _stated(path: Path) -> tuple[str | None, dict[int, Json], bytes]:
    """Hash and policies in the file's metadata, and the latter as they stand there; files of others have neither."""
    try:
        found = pq.read_metadata(path).metadata or {}
        raw = found.get(_POLICIES.encode(), b"")
        policies = {int(version): dict(manifest) for version, manifest in json.loads(raw or "{}").items()}
        return found[_SHA.encode()].decode() if _SHA.encode() in found else None, policies, raw
    except (pa.ArrowException, OSError, ValueError, AttributeError, TypeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> FormatError:
    return FormatError(f"{path} cannot be read as a Parquet file of this format: {error}",
                       fix="name a file that `export parquet` wrote, or a data file of a store")


def _runs(path: Path, notes: Notes) -> Iterator[pa.Table]:
    """Tables of the rows of one episode each."""
    rest = SCHEMA.empty_table()
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            known = set(SCHEMA.names)
            for name in file.schema_arrow.names:
                if name not in known:
                    notes.lose(f"column {name}")
            for group in range(file.num_row_groups):
                table = pa.concat_tables([rest, conform(file.read_row_group(group, use_threads=False))])
                cuts = _cuts(table)
                for start, stop in zip(cuts, cuts[1:], strict=False):
                    yield table.slice(start, stop - start)
                rest = table.slice(cuts[-1])
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from error
    if len(rest):
        yield rest


def _cuts(table: pa.Table) -> list[int]:
    """Where each episode of a table begins."""
    names = list(zip(table["episode_id"].to_pylist(), table["attempt"].to_pylist(), strict=True))
    return [0, *(i for i in range(1, len(names)) if names[i] != names[i - 1])]
