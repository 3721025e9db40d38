"""The token record: what was sampled, by which policy version, under which distribution. See ``types.py``.

One episode of two turns, as tokens (P prompt, A sampled by the agent, E answer of the environment)::

    branch.token_ids  = P0 P0 P0 A0 A0 E0 E0 E0 A1 A1
    branch.token_kind =  0  0  0  1  1  2  2  2  1  1
    branch.logprobs   =  -  -  -  x  x  -  -  -  x  x      (NaN where nothing was sampled)
    branch.calls      = [Call(turn=0, start=3, end=5), Call(turn=1, start=8, end=10)]
"""

from datetime import datetime
from enum import IntEnum
from typing import Any, Literal

import numpy as np
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from agentsdpo.errors import RowError

Json = dict[str, Any]
"""A JSON object."""


class Frozen(BaseModel):
    """Immutable record that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class TokenKind(IntEnum):
    """Where a token came from; only ``SAMPLED`` tokens carry loss."""

    CONTEXT = 0
    """Prompt, user or template text."""
    SAMPLED = 1
    """Sampled by the behaviour policy and trained."""
    TOOL = 2
    """Answer of the environment."""
    FORCED = 3
    """Put there by the framework in the agent's place (an end-of-turn the agent did not reach)."""
    MASKED = 4
    """Sampled, with a log-prob, but kept out of the loss."""
    UNUSABLE = 5
    """Sampled without a usable log-prob."""


class VersionSpan(Frozen):
    """Output tokens ``[start, end)`` of one call, sampled by one policy version (-1: unknown)."""

    version: int
    start: int
    end: int


class Sampling(Frozen):
    """How the next token is drawn. The behaviour log-prob is of the distribution after all of these."""

    temperature: float = Field(default=1.0, ge=0.0, description="0 is greedy")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, description="1 is off")
    top_k: int = Field(default=0, ge=0, description="0 is off")
    max_tokens: int = Field(default=256, ge=1, description="tokens of one completion")
    seed: int = Field(default=0, ge=0)

    @property
    def truncated(self) -> bool:
        """Whether some tokens were cut from the distribution, so that a ratio needs the kept set."""
        return self.top_p < 1.0 or self.top_k > 0


class Completion(Frozen):
    """What an engine returns for one call: token ids in, token ids and behaviour log-probs out.

    ``kept`` holds, per sampled token, the ascending ids it was drawn from; None when sampling was not truncated.
    ``finish_reason``: ``stop`` when the last id is an end-of-turn token, ``length`` when ``max_tokens`` ran out.
    ``untrusted``: why the engine does not stand by what its server said (a reason of the store's table): such tokens
    are kept and never trained on.
    ``working_s``: seconds of the attempt that succeeded, without waiting for a slot; None where not measured.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[VersionSpan, ...]
    finish_reason: Literal["stop", "length", "abort", "error"] = "stop"
    kept: tuple[tuple[int, ...], ...] | None = None
    logprob_kind: Literal["processed", "tempered", "raw", "unknown", "none"] = "processed"
    working_s: float | None = None
    untrusted: str | None = None


SUMMARY = "-summary"
"""End of the ``call_id`` of a call that wrote a summary of the turns before it."""


class Call(Frozen):
    """One request to an engine; its completion is ``branch.token_ids[start:end]``.

    ``prompt_sha256`` hashes the exact prompt ids (int32, little-endian); version spans count from ``start``. A summary
    of a history that is cut down has the number of the turn it was written before, which is in the next branch.
    """

    call_id: str
    turn: int
    start: int
    end: int
    prompt_sha256: str
    finish_reason: str
    sampling: Sampling
    versions: tuple[VersionSpan, ...]
    logprob_kind: Literal["processed", "tempered", "raw", "unknown", "none"] = "processed"
    untrainable_reason: str | None = None
    t_request: AwareDatetime | None = Field(default=None, description="when it was asked for; for people")
    t_done: AwareDatetime | None = Field(default=None, description="when its answer was there")

    @property
    def summarises(self) -> bool:
        """Whether it wrote a summary: what is said of its turn is not said of it."""
        return self.call_id.endswith(SUMMARY)


def span_bounds(calls: tuple[Call, ...]) -> tuple[int, int]:
    """Oldest and newest policy version over all sampled tokens; (-1, -1) where none is known.

    An unknown version (-1) makes the oldest unknown only where its call may be trained on: one that was set aside
    leaves the rest of its branch usable.
    """
    versions = [span.version for call in calls for span in call.versions
                if span.end > span.start and (span.version >= 0 or call.untrainable_reason is None)]
    return (min(versions), max(versions)) if versions else (-1, -1)


class Branch(Frozen):
    """A token-append-only sequence of an episode: one row of the store, one training row.

    Shapes: ``token_ids`` int32[T], ``token_kind`` uint8[T], ``logprobs`` float32[T] (NaN unless kind 1 or 4).
    ``kept_ids``/``kept_counts``: sampling support, one count per sampled token in order, None if never truncated.

    Raises:
        RowError: lengths differ, a log-prob is missing, not finite, positive or below -1000 where a token was
            sampled, or present where none was; call spans overlap or do not cover exactly the sampled tokens.

    >>> call = Call(call_id="c0", turn=0, start=1, end=3, prompt_sha256="", finish_reason="stop",
    ...             sampling=Sampling(), versions=(VersionSpan(version=4, start=0, end=2),))
    >>> branch = Branch(token_ids=np.array([7, 8, 9], np.int32), token_kind=np.array([0, 1, 1], np.uint8),
    ...                 logprobs=np.array([np.nan, -0.5, -0.1], np.float32), calls=(call,))
    >>> branch.policy_versions, branch.n_trainable
    ((4, 4), 2)
    """

    branch_id: int = 0
    parent_branch_id: int | None = None
    fork_at: int | None = None
    fork_reason: Literal["compaction", "template_rewrite", "retokenised", "subagent", "retry"] | None = None
    token_ids: np.ndarray
    token_kind: np.ndarray
    logprobs: np.ndarray
    calls: tuple[Call, ...] = ()
    kept_ids: np.ndarray | None = None
    kept_counts: np.ndarray | None = None

    @model_validator(mode="after")
    def _row_rules(self) -> "Branch":
        check_row(self)
        return self

    @property
    def policy_versions(self) -> tuple[int, int]:
        """Oldest and newest policy version that sampled a token here."""
        return span_bounds(self.calls)

    @property
    def n_sampled(self) -> int:
        """Tokens the agent sampled (kinds 1, 4, 5)."""
        return int(_SAMPLED[self.token_kind].sum())

    @property
    def times(self) -> tuple[datetime | None, datetime | None]:
        """When its first call was asked for and its last one answered; None where nobody wrote it down."""
        return (min((call.t_request for call in self.calls if call.t_request), default=None),
                max((call.t_done for call in self.calls if call.t_done), default=None))

    @property
    def n_trainable(self) -> int:
        """Tokens that carry loss (kind 1)."""
        return int((self.token_kind == TokenKind.SAMPLED).sum())

    @property
    def truncated(self) -> bool:
        """Whether any call sampled from a truncated distribution."""
        return any(call.sampling.truncated for call in self.calls)


# Tables over all uint8 kinds: several times faster than np.isin on short branches.
_SCORED, _SAMPLED = (np.isin(np.arange(256), kinds) for kinds in ((1, 4), (1, 4, 5)))


def check_row(branch: Branch) -> None:
    """Row rules (a), (b), (c), (e) of the store on one branch; see :class:`Branch` for what is raised."""
    ids, kind, logp = branch.token_ids, branch.token_kind, branch.logprobs
    if not (ids.shape == kind.shape == logp.shape and ids.ndim == 1):
        raise RowError(f"branch arrays differ in length: {ids.shape} ids, {kind.shape} kinds, {logp.shape} log-probs",
                       fix="record one kind and one log-prob (NaN where nothing was sampled) per token")
    if (ids.dtype, kind.dtype, logp.dtype) != (np.int32, np.uint8, np.float32):
        raise RowError(f"branch dtypes are {ids.dtype}, {kind.dtype}, {logp.dtype}", fix="use int32, uint8, float32")
    scored = _SCORED[kind]
    bad = scored & ~((logp > -1000.0) & (logp <= 1e-4))
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        raise RowError(f"log-prob {logp[at]} of sampled token {at} is not in (-1000, 1e-4]",
                       fix="mark the call untrainable (kind 5) instead of filling a number in")
    if not np.isnan(logp[~scored]).all():
        at = int(np.flatnonzero(~scored & ~np.isnan(logp))[0])
        raise RowError(f"token {at} of kind {kind[at]} carries a log-prob", fix="store NaN: 0.0 means probability one")
    check_spans(branch)


def check_spans(branch: Branch) -> None:
    """Calls are ordered and disjoint and cover exactly the sampled tokens; version spans tile each completion."""
    covered, last = np.zeros(len(branch.token_ids), bool), 0
    for call in branch.calls:
        if not last <= call.start <= call.end <= len(covered):
            raise RowError(f"call {call.call_id} spans [{call.start}, {call.end}), after {last}, of {len(covered)} ids",
                           fix="append calls in token order without overlap")
        edges = [0, *(s.end for s in call.versions)]
        if [s.start for s in call.versions] != edges[:-1] or edges[-1] != call.end - call.start:
            raise RowError(f"version spans of call {call.call_id} do not tile its {call.end - call.start} tokens",
                           fix="give one span per policy version, from 0 to the completion's length")
        covered[call.start:call.end], last = True, call.end
    sampled = _SAMPLED[branch.token_kind]
    if not (covered == sampled).all():
        at = int(np.flatnonzero(covered != sampled)[0])
        raise RowError(f"token {at} of kind {branch.token_kind[at]} disagrees with the call spans",
                       fix="kinds 1, 4, 5 stand exactly inside calls")
