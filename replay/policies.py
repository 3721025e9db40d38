"""``policies/<version>.json``: what a policy version is, so that no row is stored under the wrong one."""

import json
import re
from collections.abc import Sequence

from agentsdpo.errors import CorruptionError, StoreError, TokenizerMismatch
from agentsdpo.replay.canonical import canonical_json
from agentsdpo.replay.rules import check_vocabulary
from agentsdpo.replay.storage import Storage
from agentsdpo.types import Episode, Json

IDENTITY = ("weights_id", "tokenizer_sha256", "chat_template_sha256", "vocab_size")
"""Fields of a manifest that say which policy it is."""


class Policies:
    """The manifests of one store, each read once."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._known: dict[int, Json] = {}

    def record(self, version: int, manifest: Json) -> None:
        """See :meth:`ReplayStore.record_policy`."""
        if version < 0:
            raise StoreError(f"policy version {version} is negative, which means unknown", fix="count from 0")
        if self._storage.exclusive or self.get(version) is None:
            try:
                self._storage.create(_path(version), canonical_json(manifest))
                return
            except FileExistsError:  # it is durable now, though whoever wrote it may not have come to that
                pass
        self.agree(version, manifest)

    def agree(self, version: int, manifest: Json) -> None:
        """Refuse a manifest of other weights, tokenizer, template or vocabulary than were recorded for a version.

        Raises:
            StoreError: it is of others; a version that was never recorded is nobody's.
        """
        have = self.get(version) or {}
        other = [n for n in IDENTITY if n in have and n in manifest and have[n] != manifest[n]]
        if other:
            raise StoreError(f"policy version {version} is recorded with {other[0]} {have[other[0]]!r}, "
                             f"not {manifest[other[0]]!r}", fix="publish under the next version number")

    def get(self, version: int) -> Json | None:
        """See :meth:`ReplayStore.policy`."""
        if version not in self._known and version >= 0:
            try:
                self._known[version] = json.loads(self._storage.read(_path(version)))
            except FileNotFoundError:
                return None
            except ValueError as error:
                raise CorruptionError(f"{self._storage.uri}/{_path(version)} is damaged: {error}",
                                      fix="restore it from a backup") from error
        return self._known.get(version)

    def check(self, episodes: Sequence[Episode]) -> None:
        """Tokenizer and vocabulary agree with the recorded policies that sampled each episode.

        Raises:
            TokenizerMismatch: an episode's tokenizer is not that of a policy that sampled it.
            RowError: a token id lies outside the policy's vocabulary.
        """
        sampled = [({span.version for branch in episode.branches for call in branch.calls for span in call.versions},
                    episode) for episode in episodes]
        known = {version: self.get(version) for version in set().union(*(versions for versions, _ in sampled))}
        for version, episode in ((version, episode) for versions, episode in sampled for version in versions):
            manifest = known[version] or {}
            theirs = manifest.get("tokenizer_sha256")
            if theirs and theirs != episode.tokenizer_sha256:
                raise TokenizerMismatch(
                    f"episode {episode.episode_id} has tokenizer {episode.tokenizer_sha256[:12]!r}, policy {version} "
                    f"has {theirs[:12]!r}", fix="collect with the tokenizer of the policy's own model folder")
            for branch in episode.branches:
                check_vocabulary(branch, int(manifest.get("vocab_size") or 0))


def recorded(storage: Storage) -> dict[int, str]:
    """The path of each version's manifest, versions ascending; other files that lie there are nobody's."""
    found = (re.fullmatch(r"policies/(\d{12})\.json", info.path, re.ASCII) for info in storage.list("policies"))
    return dict(sorted((int(match[1]), match[0]) for match in found if match))


def _path(version: int) -> str:
    return f"policies/{version:012d}.json"
