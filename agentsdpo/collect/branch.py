"""Building branches: ids, kinds and log-probs grow at the end only; a rewritten history opens a new branch."""

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

import numpy as np

from agentsdpo.errors import EngineError
from agentsdpo.record import SUMMARY
from agentsdpo.replay.journal import Growth
from agentsdpo.types import Branch, Call, Completion, Json, Sampling, TokenKind

ForkReason = Literal["compaction", "template_rewrite", "retokenised", "subagent", "retry"]

_KIND_REASONS = {"raw": "kind_raw", "unknown": "kind_unknown", "none": "no_logprobs"}
_MASKED = {"greedy", "kept_set_missing", "kept_set_mismatch", "token_outside_kept_set", "kind_tempered_filtered",
           "kind_raw", "version_unknown"}
"""Reasons that leave the log-prob a number worth keeping: such tokens are masked, others are without one."""


def untrainable(completion: Completion, sampling: Sampling) -> str | None:
    """Why no ratio may be formed from this completion (names of the store's table), None when one may.

    >>> Tokens = dict(token_ids=(1,), logprobs=(-0.1,), versions=())
    >>> untrainable(Completion(**Tokens, logprob_kind="raw"), Sampling(temperature=0.0))
    'greedy'
    >>> untrainable(Completion(**Tokens), Sampling(top_p=0.9))
    'kept_set_missing'
    >>> untrainable(Completion(**Tokens, untrusted="no_token_ids"), Sampling())
    'no_token_ids'
    """
    if completion.untrusted:
        return completion.untrusted
    if len(completion.logprobs) != len(completion.token_ids):
        return "length_mismatch" if completion.logprobs else "no_logprobs"
    if not all(-1000.0 < lp <= 1e-4 for lp in completion.logprobs):
        return "logprob_sentinel"
    if sampling.temperature == 0.0:
        return "greedy"
    if completion.logprob_kind in _KIND_REASONS:
        return _KIND_REASONS[completion.logprob_kind]
    if completion.logprob_kind == "tempered" and sampling.truncated:
        return "kind_tempered_filtered"
    if sampling.truncated:
        problem = _kept_problem(completion)
        if problem:
            return problem
    return "version_unknown" if any(span.version < 0 for span in completion.versions) else None


def _kept_problem(completion: Completion) -> str | None:
    """What is wrong with the sets the tokens were drawn from; None when they say what they should."""
    kept = completion.kept
    if kept is None or len(kept) != len(completion.token_ids) or not all(kept):
        return "kept_set_missing"
    if not all(token in ids for token, ids in zip(completion.token_ids, kept, strict=True)):
        return "token_outside_kept_set"
    alone = [logp for logp, ids in zip(completion.logprobs, kept, strict=True) if len(ids) == 1]
    return "kept_set_mismatch" if any(logp < -1e-4 for logp in alone) else None


class BranchBuilder:
    """The branches of one episode while it runs. The last one is open; only its end can grow.

    Attributes:
        ids: token ids of the open branch.
        rendered: the messages these ids stand for, to notice a rewritten history.
        tools: names of the tools the opening was rendered with.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.rendered: list[Json] = []
        self.tools: tuple[str, ...] = ()
        self._kinds: list[int] = []
        self._logps: list[float] = []
        self._calls: list[Call] = []
        self._kept: list[tuple[int, ...]] = []
        self._hash = hashlib.sha256()
        self._header: dict[str, Any] = {"branch_id": 0}
        self._closed: list[Branch] = []
        self._told = _Told()

    @property
    def branch_id(self) -> int:
        """Index of the open branch."""
        return len(self._closed)

    def context(self, ids: Sequence[int], kind: TokenKind) -> None:
        """Append tokens the agent did not sample."""
        self._append(ids, [int(kind)] * len(ids), [np.nan] * len(ids))

    def completion(self, completion: Completion, sampling: Sampling, *, turn: int, masked: bool = False,
                   summary: bool = False, asked: datetime | None = None) -> Call:
        """Append what one call sampled; exact rows are trainable, others say why not.

        Args:
            completion: as sampled.
            sampling: how it was asked for.
            turn: of the episode.
            masked: keep it out of the loss though it could be trained on (a summary nobody used).
            summary: it sums up the turns before this one.
            asked: when; it was answered just now.

        Raises:
            EngineError: version spans do not cover the completion.
        """
        n, start = len(completion.token_ids), len(self.ids)
        if (completion.versions[-1].end if completion.versions else 0) != n:
            raise EngineError(f"version spans end at {completion.versions[-1:]} but {n} tokens were sampled",
                              fix="give one span per policy version, up to the completion's length")
        reason = untrainable(completion, sampling)
        known = reason is None or reason in _MASKED
        kind = TokenKind.UNUSABLE if not known else TokenKind.MASKED if reason or masked else TokenKind.SAMPLED
        name = f"b{self.branch_id}t{turn}{SUMMARY if summary else ''}"
        call = Call(call_id=name, turn=turn, start=start, end=start + n, prompt_sha256=self._hash.hexdigest(),
                    finish_reason=completion.finish_reason, sampling=sampling,
                    versions=completion.versions, logprob_kind=completion.logprob_kind, untrainable_reason=reason,
                    t_request=asked, t_done=asked and datetime.now(UTC))
        logps = [np.nan] * n if kind == TokenKind.UNUSABLE else list(completion.logprobs)
        self._append(completion.token_ids, [int(kind)] * n, logps)
        self._kept += (completion.kept if reason is None else None) or [()] * n  # what is wrong serves nobody
        self._calls.append(call)
        return call

    def _append(self, ids: Sequence[int], kinds: Sequence[int], logps: Sequence[float]) -> None:
        self.ids += ids
        self._kinds += kinds
        self._logps += logps
        self._hash.update(np.asarray(ids, "<i4").tobytes())

    def fork(self, ids: Sequence[int], reason: ForkReason) -> None:
        """Close the open branch and open one with this prompt, all of it context."""
        parent = self.branch_id
        shared = next((i for i, (a, b) in enumerate(zip(self.ids, ids, strict=False)) if a != b),
                      min(len(self.ids), len(ids)))
        self._close()
        self._header = {"branch_id": self.branch_id, "parent_branch_id": parent, "fork_at": shared,
                        "fork_reason": reason}
        self.context(ids, TokenKind.CONTEXT)

    def _close(self) -> None:
        kept = any(self._kept)
        self._closed.append(Branch(
            **self._header, token_ids=np.array(self.ids, np.int32), token_kind=np.array(self._kinds, np.uint8),
            logprobs=np.array(self._logps, np.float32), calls=tuple(self._calls),
            kept_ids=np.array([i for ids in self._kept for i in ids], np.int32) if kept else None,
            kept_counts=np.array([len(ids) for ids in self._kept], np.int32) if kept else None))
        self.ids, self._kinds, self._logps, self._calls, self._kept = [], [], [], [], []
        self._hash = hashlib.sha256()

    def grown(self) -> list[Growth]:
        """What was appended since this was last asked, one entry per branch that grew: the journal's share of a step.

        Must be asked before :meth:`finish` where the end of the open branch matters.
        """
        told, new = self._told, []
        for branch in self._closed[told.branches:]:
            new.append(_rest(branch, told))
            told = _Told(told.branches + 1)
        new.append(Growth(self.branch_id, _fork(self._header), self.ids[told.ids:], self._kinds[told.ids:],
                          self._logps[told.ids:], self._calls[told.calls:], self._kept[told.kept:]))
        self._told = _Told(self.branch_id, len(self.ids), len(self._calls), len(self._kept))
        return [growth for growth in new if len(growth.token_ids) or growth.calls]

    def regrow(self, grown: Sequence[Growth]) -> None:
        """Append what :meth:`grown` once told: the record of an earlier process, token for token."""
        for growth in grown:
            if growth.branch_id > self.branch_id:
                self._close()
                self._header = {"branch_id": growth.branch_id, **growth.fork}
            self._append(growth.token_ids, growth.token_kind, growth.logprobs)
            self._calls += growth.calls
            self._kept += [tuple(ids) for ids in growth.kept]

    def finish(self) -> tuple[Branch, ...]:
        """Close the open branch and return all of them, in order."""
        if self.ids:
            self._close()
        return tuple(self._closed)


class _Told(NamedTuple):
    """How much of the branches the journal knows: whole closed ones, then ids, calls and kept sets of the next."""

    branches: int = 0
    ids: int = 0
    calls: int = 0
    kept: int = 0


def _fork(header: Mapping[str, Any]) -> Json:
    return {name: value for name, value in header.items() if name != "branch_id"}


def _rest(branch: Branch, told: _Told) -> Growth:
    """What a closed branch grew by beyond what was told."""
    kept: list[Sequence[int]] = []
    if branch.kept_ids is not None and branch.kept_counts is not None:
        kept = [part.tolist() for part in np.split(branch.kept_ids, np.cumsum(branch.kept_counts)[:-1])][told.kept:]
    fork = {name: getattr(branch, name) for name in ("parent_branch_id", "fork_at", "fork_reason")}
    return Growth(branch.branch_id, {} if branch.parent_branch_id is None else fork,
                  branch.token_ids[told.ids:].tolist(), branch.token_kind[told.ids:].tolist(),
                  branch.logprobs[told.ids:].tolist(), branch.calls[told.calls:], kept)
