"""Calls that somebody else recorded, as branches: each prompt extends what was recorded so far, or opens a branch.

Nothing here is trained on: log-probs of unknown kind are no behaviour log-probs. Tokens are kept all the same, with
the log-probs (kind 4) where there is a usable number for each of them, without (kind 5) where there is not.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agentsdpo.errors import FormatError
from agentsdpo.types import Branch, Call, Sampling, TokenKind, VersionSpan

MAX_ID = 2**31 - 1


@dataclass(frozen=True)
class Recorded:
    """One call of a foreign recorder.

    Attributes:
        call_id: unique in the episode.
        turn: number of the message it wrote, from 0.
        prompt_ids: exact prompt; None when it was not recorded.
        completion_ids: what was sampled; None when it was not recorded.
        logprobs: one per sampled token; None without.
        reason: why it cannot be trained on, when that is known from elsewhere.
        finish_reason: as recorded.
        sampling: as recorded.
        version: policy version, -1 when unknown.
    """

    call_id: str
    turn: int
    prompt_ids: Sequence[int] | None = None
    completion_ids: Sequence[int] | None = None
    logprobs: Sequence[float] | None = None
    reason: str | None = None
    finish_reason: str = "unknown"
    sampling: Sampling = Sampling()
    version: int = -1

    @property
    def scored(self) -> bool:
        """Whether there is a usable log-prob for every sampled token."""
        return bool(self.logprobs) and len(self.logprobs or ()) == len(self.completion_ids or ()) and _finite(
            self.logprobs or ())


def why(call: Recorded) -> str:
    """Why a foreign call is not trained on.

    >>> why(Recorded("a", 0)), why(Recorded("b", 0, [1], [2], [-0.5])), why(Recorded("c", 0, [1], [2], [-9999.0]))
    ('no_token_ids', 'kind_unknown', 'logprob_sentinel')
    """
    if call.reason is not None:
        return call.reason
    if call.prompt_ids is None or call.completion_ids is None:
        return "no_token_ids"
    if not call.logprobs:
        return "no_logprobs" if call.completion_ids else "imported"
    if len(call.logprobs) != len(call.completion_ids):
        return "length_mismatch"
    return "kind_unknown" if _finite(call.logprobs) else "logprob_sentinel"


def _finite(logprobs: Sequence[float]) -> bool:
    values = np.asarray(logprobs, np.float64).astype(np.float32)
    return bool(((values > -1000.0) & (values <= 1e-4)).all())


def assemble(calls: Sequence[Recorded], *, first_id: int = 0, parent_id: int | None = None) -> list[Branch]:
    """Branches of one conversation, at least one, in the order they were opened.

    Args:
        calls: in the order they were made.
        first_id: branch id of the first branch.
        parent_id: branch that a sub-agent's conversation belongs to; its first branch forks there, at token 0.
    """
    fork = {} if parent_id is None else {"parent_branch_id": parent_id, "fork_at": 0, "fork_reason": "subagent"}
    open_ = [_Growing(first_id, fork)]
    for call in calls:
        if call.prompt_ids is None or call.completion_ids is None:
            open_[-1].note(call)
            continue
        prompt = np.asarray(call.prompt_ids, np.int32)
        shared = [_common(branch.ids, prompt) for branch in open_]
        best = max(range(len(open_)), key=lambda i: (shared[i], i))
        if shared[best] < len(open_[best].ids):
            header = {"parent_branch_id": open_[best].branch_id, "fork_at": shared[best],
                      "fork_reason": "template_rewrite"}
            open_.append(_Growing(first_id + len(open_), header))
            best = -1
        open_[best].extend(prompt, call)
    return [branch.finish() for branch in open_]


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


class _Growing:
    """A branch while it grows."""

    def __init__(self, branch_id: int, fork: dict[str, Any]) -> None:
        self.branch_id, self._fork = branch_id, fork
        self.ids, self._kinds, self._logps = np.empty(0, np.int32), np.empty(0, np.uint8), np.empty(0, np.float32)
        self.calls: list[Call] = []

    def note(self, call: Recorded) -> None:
        """A call without tokens: its reason is kept, at the place where its tokens would stand."""
        self._call(call, len(self.ids), "")

    def extend(self, prompt: np.ndarray, call: Recorded) -> None:
        """The rest of a prompt that begins with the tokens so far, and what was sampled after it."""
        between = TokenKind.TOOL if len(self.ids) else TokenKind.CONTEXT
        added = prompt[len(self.ids):]
        self._append(added, np.full(len(added), between, np.uint8), np.full(len(added), np.nan, np.float32))
        start, completion = len(self.ids), np.asarray(call.completion_ids, np.int32)
        kind = TokenKind.MASKED if call.scored else TokenKind.UNUSABLE
        logps = np.asarray(call.logprobs, np.float32) if call.scored else np.full(len(completion), np.nan, np.float32)
        self._append(completion, np.full(len(completion), kind, np.uint8), logps)
        self._call(call, start, hashlib.sha256(prompt.astype("<i4").tobytes()).hexdigest())

    def _append(self, ids: np.ndarray, kinds: np.ndarray, logps: np.ndarray) -> None:
        self.ids = np.concatenate([self.ids, ids])
        self._kinds, self._logps = np.concatenate([self._kinds, kinds]), np.concatenate([self._logps, logps])

    def _call(self, call: Recorded, start: int, prompt_sha256: str) -> None:
        n = len(self.ids) - start
        spans = (VersionSpan(version=call.version, start=0, end=n),) if n else ()
        self.calls.append(Call(
            call_id=call.call_id, turn=call.turn, start=start, end=len(self.ids), prompt_sha256=prompt_sha256,
            versions=spans,
            finish_reason=call.finish_reason, sampling=call.sampling, untrainable_reason=why(call),
            logprob_kind="unknown" if call.logprobs else "none"))

    def finish(self) -> Branch:
        return Branch(branch_id=self.branch_id, **self._fork, token_ids=self.ids, token_kind=self._kinds,
                      logprobs=self._logps, calls=tuple(self.calls))


def check_ids(ids: Any, where: str) -> list[int]:
    """Token ids of a foreign file.

    Raises:
        FormatError: no list of integers from 0 to 2**31 - 1.
    """
    if not isinstance(ids, list) or any(type(value) is not int or not 0 <= value <= MAX_ID for value in ids):
        raise FormatError(f"{where} is no list of token ids", fix="give integers from 0 to 2147483647")
    return ids
