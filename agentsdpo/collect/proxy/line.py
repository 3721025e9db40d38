"""One branch of a conversation while it grows: ids, kinds and log-probs at its end, and nothing ever rendered again.

Unlike an episode that this package plays itself, a conversation may go on in any of its branches: a harness with
sub-agents asks for them in turn.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np

from agentsdpo.collect.branch import untrainable
from agentsdpo.replay.journal import Growth
from agentsdpo.types import Branch, Call, Completion, Json, Sampling, TokenKind

_MASKED = {"greedy", "kept_set_missing", "kept_set_mismatch", "token_outside_kept_set", "kind_tempered_filtered",
           "kind_raw", "version_unknown", "masked_by_policy"}
"""Reasons that leave the log-probs what they are; the others make them no log-probs."""


@dataclass(frozen=True)
class Sampled:
    """What the engine sampled for one call.

    Attributes:
        completion: ids, log-probs, versions.
        model: name of the model or adapter that sampled it. text: the engine's own text, where there are no ids.
        top: per token the likeliest alternatives ``(id, log-prob)``; () unless asked for.
    """

    completion: Completion
    model: str = ""
    text: str | None = None
    top: tuple[tuple[tuple[int, float], ...], ...] = ()


@dataclass
class Line:
    """A branch as it grows.

    Attributes:
        branch_id: index in its conversation. fork: where and why it left another branch; {} for the first.
        ids: all token ids so far.
        messages: what they stand for; [] where a client sends text or ids instead of messages.
        tools: digest of the tools it was rendered with.
        text: what they spell, where a client sends text; None elsewhere.
        busy: a call that goes on from its end is under way.
        ended: it cannot be gone on from, as the engine did not say which tokens it sampled.
        turns: turn number by the place of the answer in ``messages``.
    """

    branch_id: int
    fork: Json
    ids: list[int] = field(default_factory=list)
    messages: list[Json] = field(default_factory=list)
    tools: bytes = b""
    text: str | None = None
    busy: bool = False
    ended: bool = False
    turns: dict[int, int] = field(default_factory=dict)
    _kinds: list[int] = field(default_factory=list)
    _logps: list[float] = field(default_factory=list)
    _calls: list[Call] = field(default_factory=list)
    _kept: list[tuple[int, ...]] = field(default_factory=list)
    _told: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        self._hash = hashlib.sha256()

    def context(self, ids: Sequence[int], kind: TokenKind) -> None:
        """Append tokens the agent did not sample."""
        self._append(ids, kind, [float("nan")] * len(ids))

    def sampled(self, sampled: Sampled, sampling: Sampling, *, call_id: str, turn: int, asked: datetime) -> Call:
        """Append what one call sampled; what cannot be trusted is kept, with the reason."""
        completion, start = sampled.completion, len(self.ids)
        n = len(completion.token_ids)
        reason = untrainable(completion, sampling)
        kind = TokenKind.SAMPLED if reason is None else TokenKind.MASKED if _usable(completion, reason) else \
            TokenKind.UNUSABLE
        logps = [float("nan")] * n if kind == TokenKind.UNUSABLE else list(completion.logprobs)
        call = Call(call_id=call_id, turn=turn, start=start, end=start + n, prompt_sha256=self._hash.hexdigest(),
                    finish_reason=completion.finish_reason, sampling=sampling, versions=completion.versions,
                    logprob_kind=completion.logprob_kind, untrainable_reason=reason, t_request=asked,
                    t_done=datetime.now(UTC))
        self._append(completion.token_ids, kind, logps)
        self._kept += (completion.kept if reason is None else None) or [()] * n
        self._calls.append(call)
        return call

    def _append(self, ids: Sequence[int], kind: TokenKind, logps: list[float]) -> None:
        self.ids += ids
        self._kinds += [int(kind)] * len(ids)
        self._logps += logps
        self._hash.update(np.asarray(ids, "<i4").tobytes())

    def grown(self) -> Growth:
        """What was appended since this was last asked: the journal's share of a step."""
        ids, calls, kept = self._told
        self._told = (len(self.ids), len(self._calls), len(self._kept))
        new = self._kept[kept:]
        return Growth(self.branch_id, self.fork, self.ids[ids:], self._kinds[ids:], self._logps[ids:],
                      self._calls[calls:], new if any(new) else ())

    def branch(self) -> Branch:
        """The branch as it stands."""
        kept = any(self._kept)
        return Branch(
            branch_id=self.branch_id, **self.fork, token_ids=np.array(self.ids, np.int32),
            token_kind=np.array(self._kinds, np.uint8), logprobs=np.array(self._logps, np.float32),
            calls=tuple(self._calls),
            kept_ids=np.array([i for ids in self._kept for i in ids], np.int32) if kept else None,
            kept_counts=np.array([len(ids) for ids in self._kept], np.int32) if kept else None)

    def common(self, ids: Sequence[int]) -> int:
        """Tokens that this branch and another prompt begin with."""
        n = min(len(self.ids), len(ids))
        differ = np.flatnonzero(np.asarray(self.ids[:n], np.int32) != np.asarray(ids[:n], np.int32))
        return int(differ[0]) if len(differ) else n


def _usable(completion: Completion, reason: str) -> bool:
    """Whether the log-probs of a call that is not trained on may stand in the record."""
    return (reason in _MASKED and len(completion.logprobs) == len(completion.token_ids)
            and all(-1000.0 < logp <= 1e-4 for logp in completion.logprobs))
