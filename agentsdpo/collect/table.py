"""Bookkeeping of the slots: whose tokens are where, how much of them is cached, who waits.

A row is ``known`` tokens long, of which the first ``cached`` have keys and values. The rest is *pending*: a prompt
to encode has many pending tokens, a row that decodes has one. After a weight swap ``cached`` is 0 everywhere, and
the same rule encodes everything again under the new weights. Numpy only.
"""

import asyncio
import time
from dataclasses import dataclass, field

import numpy as np

from agentsdpo.collect.sampler import Draw, SamplingRows
from agentsdpo.types import Completion, Sampling, VersionSpan

MIN_SHARED = 16
"""Shortest common prefix, in tokens, worth copying from another slot."""
PATIENCE = 64
"""Ticks a session may sit idle, its environment at work, before its slot is given to one that waits."""


@dataclass
class Request:
    """One call in flight: prompt int64[P], its sampling, its session, who waits for the completion, and since when (a
    monotonic time) it has had a slot."""

    prompt: np.ndarray
    sampling: Sampling
    session: str
    future: "asyncio.Future[Completion]"
    kept: list[tuple[int, ...]] = field(default_factory=list)
    seated: float = 0.0


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common prefix of two id arrays.

    >>> common_prefix(np.array([1, 2, 3]), np.array([1, 2, 4, 5]))
    2
    """
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    return int(differ.argmax()) if differ.any() else n


def version_spans(versions: np.ndarray) -> tuple[VersionSpan, ...]:
    """Runs of equal versions as spans over the completion.

    >>> [(s.version, s.start, s.end) for s in version_spans(np.array([3, 3, 4]))]
    [(3, 0, 2), (4, 2, 3)]
    """
    cuts = np.flatnonzero(np.diff(versions)) + 1
    edges = [0, *cuts.tolist(), len(versions)]
    return tuple(VersionSpan(version=int(versions[a]), start=a, end=b)
                 for a, b in zip(edges[:-1], edges[1:], strict=True))


class SlotTable:
    """State of S slots of W tokens.

    Attributes:
        tokens: int64[S, W]; known, cached, start, limit: int64[S] (start: prompt length, limit: longest total).
        logps: float32[S, W]; versions: int64[S, W]; uniforms: float64[S, W], one number per position to sample.
        active: bool[S], whether a request is in flight.
        used: int64[S], tick at which the slot's last request began or ended; clock: ticks so far.
        requests: slot to the request in flight there; slot_of: session to its slot.
    """

    def __init__(self, slots: int, window: int) -> None:
        self.tokens = np.zeros((slots, window), np.int64)
        self.logps = np.zeros((slots, window), np.float32)
        self.versions = np.zeros((slots, window), np.int64)
        self.uniforms = np.zeros((slots, window))
        self.known, self.cached, self.start, self.limit, self.used = (np.zeros(slots, np.int64) for _ in range(5))
        self.active = np.zeros(slots, bool)
        self.sampling = SamplingRows(np.ones(slots, np.float32), np.zeros(slots, np.int64), np.ones(slots))
        self.requests: dict[int, Request] = {}
        self.slot_of: dict[str, int] = {}
        self._owner: list[str | None] = [None] * slots
        self.clock = 0

    @property
    def pending(self) -> np.ndarray:
        """Tokens still to encode, int64[S]; 0 where nothing is in flight."""
        return np.where(self.active, self.known - self.cached, 0)

    def seat(self, request: Request) -> int | None:
        """Give the request a slot and load its prompt; None when every slot is busy.

        The session's own slot first, then the lowest free one, then the longest idle one of another session, once
        its patience is over (it will encode its prompt again). What the slot holds of the prompt stays cached.
        """
        slot = self.slot_of.get(request.session)
        if slot is None:
            slot = self._vacant()
            if slot is None:
                return None
            self._owner[slot], self.slot_of[request.session] = request.session, slot
        self._load(slot, request)
        return slot

    def _vacant(self) -> int | None:
        for slot, owner in enumerate(self._owner):
            if owner is None:
                return slot
        idle = np.flatnonzero(~self.active & (self.clock - self.used > PATIENCE))
        if not idle.size:
            return None
        slot = int(idle[self.used[idle].argmin()])
        self.forget(self._owner[slot] or "")
        return slot

    def _load(self, slot: int, request: Request) -> None:
        prompt, sampling, n = request.prompt, request.sampling, len(request.prompt)
        same = common_prefix(self.tokens[slot, :self.cached[slot]], prompt)
        self.cached[slot] = min(same, n - 1)
        self.tokens[slot, :n] = prompt
        self.known[slot] = self.start[slot] = n
        self.limit[slot] = limit = min(n + sampling.max_tokens, self.tokens.shape[1])
        self.uniforms[slot, n:limit] = np.random.Generator(np.random.Philox(key=sampling.seed)).random(limit - n)
        self.sampling.temperature[slot] = sampling.temperature
        self.sampling.top_k[slot], self.sampling.top_p[slot] = sampling.top_k, sampling.top_p
        self.requests[slot], self.active[slot] = request, True
        request.seated = time.monotonic()
        self.used[slot] = self.clock

    def best_source(self, slot: int) -> tuple[int, int]:
        """Slot that caches the longest prefix of this slot's prompt, and that length (at most prompt - 1)."""
        n = int(self.known[slot]) - 1
        differ = self.tokens[:, :n] != self.tokens[slot, :n]
        length = np.where(differ.any(1), differ.argmax(1), n)
        length = np.minimum(length, self.cached)
        source = int(length.argmax())
        return source, int(length[source])

    def prompt_overlap(self, slot: int, others: list[int]) -> list[int]:
        """Of the other slots, those whose prompts share at least ``MIN_SHARED`` leading tokens with this one's."""
        prompt = self.tokens[slot, :self.known[slot]]
        return [o for o in others if common_prefix(self.tokens[o, :self.known[o]], prompt) >= MIN_SHARED]

    def append(self, rows: np.ndarray, drawn: Draw, version: int) -> None:
        """Write one drawn token per row of ``rows`` int64[R]."""
        at = self.known[rows]
        self.tokens[rows, at], self.logps[rows, at], self.versions[rows, at] = drawn.ids, drawn.logps, version
        self.known[rows] += 1
        for row, kept in zip(rows.tolist(), drawn.kept, strict=True):
            if kept is not None:
                self.requests[row].kept.append(tuple(kept.tolist()))

    def finish(self, slot: int, *, stopped: bool) -> tuple[Request, Completion]:
        """Take the request out of its slot, which stays with its session, and build the completion."""
        request = self.requests.pop(slot)
        self.active[slot], self.used[slot] = False, self.clock
        span = slice(int(self.start[slot]), int(self.known[slot]))
        greedy = request.sampling.temperature == 0.0
        completion = Completion(
            token_ids=tuple(self.tokens[slot, span].tolist()), logprobs=tuple(self.logps[slot, span].tolist()),
            versions=version_spans(self.versions[slot, span]), finish_reason="stop" if stopped else "length",
            kept=tuple(request.kept) if request.kept else None, logprob_kind="raw" if greedy else "processed",
            working_s=time.monotonic() - request.seated)
        return request, completion

    def drop(self, slot: int) -> None:
        """Forget a request nobody waits for any more."""
        self.requests.pop(slot)
        self.active[slot], self.used[slot] = False, self.clock

    def forget(self, session: str) -> None:
        """Free the session's slot; its tokens stay cached until the slot is used again."""
        slot = self.slot_of.pop(session, None)
        if slot is not None:
            self._owner[slot] = None
