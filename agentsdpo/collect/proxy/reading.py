"""From the engine's JSON to what was sampled. What cannot be trusted is kept, with the reason, and never filled in."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from agentsdpo.collect.proxy.line import Sampled
from agentsdpo.types import Completion, Json, VersionSpan

_FINISH: dict[Any, Literal["stop", "length", "abort", "error"]] = {
    "stop": "stop", "length": "length", "abort": "abort", "tool_calls": "stop", "error": "error"}


def span_of(label: Any) -> int:
    """The policy version of an engine's label, -1 for one that is no number (``default`` before it was ever set).

    >>> span_of("12"), span_of("default"), span_of(None)
    (12, -1, -1)
    """
    text = str(label)
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else -1


def read_choice(answer: Json, *, kind: Any, version: int | None, model: str) -> Sampled:
    """What the first choice of an answer holds.

    Args:
        answer: of ``/inference/v1/generate`` or ``/v1/completions``.
        kind: of the engine's log-probs.
        version: that sampled it, where the route or the adapter's name says so; None reads the spans.
        model: name it was asked under.

    Raises:
        KeyError, TypeError, ValueError: it holds neither token ids nor text.
    """
    choice = answer["choices"][0]
    ids, text = choice.get("token_ids"), choice.get("text")
    finish = _FINISH.get(choice.get("finish_reason") or "stop", "stop")
    if ids is None:
        if not isinstance(text, str):
            raise ValueError("neither token ids nor text")
        return Sampled(Completion(token_ids=(), logprobs=(), versions=(), finish_reason=finish, logprob_kind="none"),
                       "no_token_ids", model, text)
    ids = tuple(map(int, ids))
    logps, top, fault = _logprobs(choice.get("logprobs"), ids)
    counted = (answer.get("usage") or {}).get("completion_tokens")
    if counted is not None and counted != len(ids):
        fault = fault or "length_mismatch"
    versions = _spans(choice.get("weight_versions"), len(ids), version)
    kept, outside = _kept(choice.get("sampling_mask"), ids)
    unknown = "version_unknown" if any(span.version < 0 for span in versions) else None
    completion = Completion(token_ids=ids, logprobs=logps, versions=versions, finish_reason=finish, kept=kept,
                            logprob_kind=kind if logps else "none")
    return Sampled(completion, fault or outside or unknown, model, text, top)


def _logprobs(value: Any, ids: Sequence[int]) -> tuple[tuple[float, ...], Any, str | None]:
    """Log-probs, alternatives, and what is wrong with them; of the wrong number they are none."""
    if not isinstance(value, dict):
        return (), (), "no_logprobs" if ids else None
    entries = value.get("content")
    if entries is None and value.get("token_logprobs") is not None:
        entries = [{"logprob": logp} for logp in value["token_logprobs"]]
    if not entries:
        return (), (), "no_logprobs" if ids else None
    if len(entries) != len(ids) or any(e.get("token_id", i) != i for e, i in zip(entries, ids, strict=True)):
        return (), (), "length_mismatch"
    logps = tuple(math.nan if e.get("logprob") is None else float(e["logprob"]) for e in entries)
    top = tuple(tuple((int(t["token_id"]), float(t["logprob"])) for t in e.get("top_logprobs") or () if "token_id" in t)
                for e in entries)
    return logps, top if any(top) else (), None


def _spans(value: Any, n: int, version: int | None) -> tuple[VersionSpan, ...]:
    """Version spans that tile the completion; anything else is one span of an unknown version."""
    if not n:
        return ()
    if version is not None:
        return (VersionSpan(version=version, start=0, end=n),)
    spans = [VersionSpan(version=span_of(one["version"]), start=int(one["start"]), end=int(one["end"]))
             for one in value or () if one["end"] > one["start"]]
    edges = [0, *(span.end for span in spans)]
    if edges[-1] != n or [span.start for span in spans] != edges[:-1]:
        return (VersionSpan(version=-1, start=0, end=n),)
    return tuple(spans)


def _kept(value: Any, ids: Sequence[int]) -> tuple[tuple[tuple[int, ...], ...] | None, str | None]:
    """Kept set per token, and what is wrong with it."""
    if value is None:
        return None, None
    kept = tuple(tuple(sorted({int(i) for i in one or ()})) for one in value)
    if len(kept) != len(ids):
        return None, "length_mismatch"
    outside = any(one and i not in one for one, i in zip(kept, ids, strict=True))
    return kept, "token_outside_kept_set" if outside else None


def joined(parts: Sequence[Sampled]) -> Sampled:
    """Completions that each went on where the one before was cut off, as one; every token keeps its own version."""
    if len(parts) == 1:
        return parts[0]
    done = [part.completion for part in parts]
    spans, at = list[VersionSpan](), 0
    for one in done:
        spans += [VersionSpan(version=s.version, start=s.start + at, end=s.end + at) for s in one.versions]
        at += len(one.token_ids)
    kept = None if any(one.kept is None and one.token_ids for one in done) else \
        tuple(ids for one in done for ids in one.kept or ())
    completion = Completion(
        token_ids=tuple(i for one in done for i in one.token_ids),
        logprobs=tuple(logp for one in done for logp in one.logprobs),
        versions=tuple(spans), finish_reason=done[-1].finish_reason, kept=kept,
        logprob_kind=next((one for one in done if one.logprob_kind != "none"), done[0]).logprob_kind)
    reason = next((part.reason for part in parts if part.reason), None)
    tops = tuple(top for part in parts for top in part.top)
    return Sampled(completion, reason, parts[-1].model, None, tops if len(tops) == at else ())


def cut(sampled: Sampled, n: int) -> Sampled:
    """The first ``n`` tokens of what was sampled, as if the engine had stopped there."""
    done = sampled.completion
    if n >= len(done.token_ids):
        return sampled
    spans = [VersionSpan(version=s.version, start=s.start, end=min(s.end, n)) for s in done.versions if s.start < n]
    logps = done.logprobs[:n] if len(done.logprobs) == len(done.token_ids) else done.logprobs
    completion = done.model_copy(update={
        "token_ids": done.token_ids[:n], "logprobs": logps, "versions": tuple(spans), "finish_reason": "stop",
        "kept": done.kept[:n] if done.kept is not None else None})
    return Sampled(completion, sampled.reason, sampled.model, sampled.text, sampled.top[:n])
