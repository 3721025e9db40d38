"""Bodies of requests and what an answer may be trusted with. Pure: no network here.

Whatever an answer lacks or gets wrong is given a reason instead of being filled in: a log-prob of 0.0 would mean
probability one, and a guessed version would be trained on as if it were known.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from agentsdpo.errors import EngineError
from agentsdpo.types import Completion, Json, Sampling, VersionSpan

GENERATE, COMPLETIONS = "/inference/v1/generate", "/v1/completions"
Route = Literal["/inference/v1/generate", "/v1/completions"]
Kind = Literal["processed", "tempered", "raw", "unknown", "none"]
UNKNOWN = -1
"""Version of tokens nobody can say the weights of."""
_ADAPTER = re.compile(r"@v(\d+)$")
_LABEL = re.compile(r"(?:.*@)?v?(\d+)$")
_FINISH: dict[str, Literal["stop", "length", "abort", "error"]] = {
    "stop": "stop", "length": "length", "abort": "abort", "error": "error"}


def adapter_version(model: str) -> int | None:
    """Policy version in an adapter's name; None for a model whose weights are swapped under one name.

    >>> adapter_version("pol@v12"), adapter_version("seed")
    (12, None)
    """
    found = _ADAPTER.search(model)
    return int(found[1]) if found else None


def label_version(label: Any, initial: int | None = None) -> int:
    """Policy version of a server's weight label, :data:`UNKNOWN` when it names none.

    Args:
        label: what the server calls its weights; ``default`` until somebody sets it.
        initial: version of weights still labelled ``default``.

    >>> label_version("42"), label_version("pol@v7"), label_version("default"), label_version("default", 3)
    (42, 7, -1, 3)
    """
    if label == "default" and initial is not None:
        return initial
    found = _LABEL.fullmatch(str(label))
    return int(found[1]) if found else UNKNOWN


def generate_body(prompt_ids: Sequence[int], sampling: Sampling, *, model: str, request_id: str, salt: str,
                  stop_ids: Sequence[int] = (), logprobs: int = 0, seeded: bool = False) -> Json:
    """A request to :data:`GENERATE`. Every parameter is sent: none is left to a model's ``generation_config.json``.

    The seed alone is sent only when ``seeded``: with chunked prefill, one seed in a request ends a server on CPUs
    (its generators cannot be wound back).
    """
    return {"token_ids": list(prompt_ids), "model": model, "request_id": request_id, "cache_salt": salt,
            "sampling_params": {**_drawing(sampling, seeded), "logprobs": logprobs, "stop_token_ids": list(stop_ids),
                                "skip_special_tokens": False, "detokenize": False}}


def completions_body(prompt_ids: Sequence[int], sampling: Sampling, *, model: str, request_id: str, salt: str,
                     stop_ids: Sequence[int] = (), logprobs: int = 0, seeded: bool = False) -> Json:
    """A request to :data:`COMPLETIONS`, with ids both ways; the log-probs' own ids cross-check the others."""
    return {"prompt": list(prompt_ids), "model": model, "request_id": request_id, "cache_salt": salt,
            **_drawing(sampling, seeded), "logprobs": logprobs, "stop_token_ids": list(stop_ids),
            "skip_special_tokens": False, "return_token_ids": True, "return_tokens_as_token_ids": True}


def _drawing(sampling: Sampling, seeded: bool) -> Json:
    return {"max_tokens": sampling.max_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p,
            "top_k": sampling.top_k, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
            "frequency_penalty": 0.0, "ignore_eos": False, "n": 1, **({"seed": sampling.seed} if seeded else {})}


def read_answer(body: Any, route: Route, *, kind: Kind, vocab_size: int = 0, adapter: int | None = None,
                initial: int | None = None, around: tuple[int, int] | None = None) -> Completion:
    """A server's answer as a completion; what cannot be trusted says so.

    Args:
        body: decoded JSON.
        route: which endpoint answered.
        kind: what the server's log-probs are of (``Completion.logprob_kind``).
        vocab_size: ids lie below it; 0 does not check.
        adapter: version of the adapter that was asked for, which alone names the weights then.
        initial: see :func:`label_version`.
        around: versions read before and after the call, for a route that gives no spans.

    Raises:
        EngineError: this is no completion, or holds no token ids at all.
    """
    choice, usage = _choice(body)
    pairs = _logprobs(choice, route)
    ids, untrusted = _token_ids(choice, pairs)
    if ids and not 0 <= min(ids) <= max(ids) < (vocab_size or 2**31):
        raise EngineError(f"the server answered with id {max(ids, key=abs)}, the vocabulary has {vocab_size} ids",
                          fix="serve the model the tokenizer belongs to")
    told = usage.get("completion_tokens", len(ids)) if isinstance(usage, Mapping) else len(ids)
    if untrusted is None and told != len(ids):
        untrusted = "length_mismatch"
    if untrusted is None and len(pairs) == len(ids) and any(
            i != t and i is not None for (i, _), t in zip(pairs, ids, strict=True)):
        untrusted = "logprobs_misaligned"
    return Completion(
        token_ids=tuple(ids), logprobs=tuple(logp for _, logp in pairs), versions=_versions(
            choice, len(ids), adapter, initial, around),
        finish_reason=_FINISH.get(choice.get("finish_reason") or "stop", "stop"), kept=_kept(choice, ids),
        logprob_kind=kind if pairs or not ids else "none", untrusted=untrusted)


def _choice(body: Any) -> tuple[Mapping[str, Any], Any]:
    """The one choice of an answer, and the usage."""
    choices = body.get("choices") if isinstance(body, Mapping) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], Mapping):
        raise EngineError(f"the server answered with {str(body)[:120]!r}, which is no completion",
                          fix="check that the address is a vLLM server's: agentsdpo doctor URL")
    return choices[0], body.get("usage")


def _logprobs(choice: Mapping[str, Any], route: Route) -> list[tuple[int | None, float]]:
    """Pairs of id and log-prob, in order; the id is None where the server did not say it, the number NaN likewise."""
    told = choice.get("logprobs")
    if not isinstance(told, Mapping):
        return []
    if route == GENERATE:
        entries = told.get("content") or []
        return [(_whole(entry.get("token_id")), _number(entry.get("logprob"))) if isinstance(entry, dict)
                else (None, math.nan) for entry in entries]
    numbers, names = told.get("token_logprobs") or [], told.get("tokens") or []
    named = names if len(names) == len(numbers) else [None] * len(numbers)
    return [(_named(name), _number(number)) for name, number in zip(named, numbers, strict=True)]


def _whole(value: Any) -> int | None:
    return value if type(value) is int else None


def _number(value: Any) -> float:
    return float(value) if type(value) is float or type(value) is int else math.nan


def _named(name: Any) -> int | None:
    """The id in ``token_id:123``."""
    text = name.removeprefix("token_id:") if isinstance(name, str) and name.startswith("token_id:") else ""
    return int(text) if text.isdecimal() else None


def _token_ids(choice: Mapping[str, Any], pairs: list[tuple[int | None, float]]) -> tuple[list[int], str | None]:
    """The sampled ids; without them those of the log-probs, which nothing can confirm."""
    ids = choice.get("token_ids")
    if isinstance(ids, list) and all(_whole(token) is not None for token in ids):
        return ids, None
    known = [token for token, _ in pairs if token is not None]
    if not pairs or len(known) != len(pairs):
        raise EngineError(f"the server sent token_ids {str(ids)[:60]} and no ids beside its log-probs",
                          fix="use a vLLM that returns token ids for this model (0.32 does), or serve with "
                              "--enable-scale-out: text cannot be turned back into what was sampled")
    return known, "no_token_ids"


def _versions(choice: Mapping[str, Any], n: int, adapter: int | None, initial: int | None,
              around: tuple[int, int] | None) -> tuple[VersionSpan, ...]:
    """Version spans over the ``n`` sampled tokens; one of :data:`UNKNOWN` where the server's word has holes."""
    if n == 0:
        return ()
    whole = adapter if adapter is not None else around[0] if around and around[0] == around[1] else UNKNOWN
    told = choice.get("weight_versions")
    if adapter is not None or not isinstance(told, list):
        return (VersionSpan(version=whole, start=0, end=n),)
    spans: list[VersionSpan] = []
    for one in told:
        start, end = (_whole(one.get(key)) if isinstance(one, Mapping) else None for key in ("start", "end"))
        if start is None or end is None or start != (spans[-1].end if spans else 0) or end <= start:
            return (VersionSpan(version=UNKNOWN, start=0, end=n),)
        spans.append(VersionSpan(version=label_version(one.get("version"), initial), start=start, end=end))
    return tuple(spans) if spans and spans[-1].end == n else (VersionSpan(version=UNKNOWN, start=0, end=n),)


def _kept(choice: Mapping[str, Any], ids: Sequence[int]) -> tuple[tuple[int, ...], ...] | None:
    """The set each token was drawn from, ascending; None when the server gave none for some token."""
    mask = choice.get("sampling_mask")
    if not isinstance(mask, list) or len(mask) != len(ids) or not all(isinstance(row, list) for row in mask):
        return None
    return tuple(tuple(sorted({token for token in row if _whole(token) is not None})) for row in mask)


def joined(parts: Sequence[Completion]) -> Completion:
    """One completion from parts of which each continued the one before; the last one says how it ended.

    >>> one = Completion(token_ids=(5,), logprobs=(-1.0,), versions=(VersionSpan(version=1, start=0, end=1),))
    >>> [(span.version, span.start, span.end) for span in joined([one, one]).versions]
    [(1, 0, 2)]
    """
    if len(parts) == 1:
        return parts[0]
    spans: list[VersionSpan] = []
    done = 0
    for part in parts:
        for span in part.versions:
            if spans and spans[-1].version == span.version:
                spans[-1] = spans[-1].model_copy(update={"end": done + span.end})
            else:
                spans.append(VersionSpan(version=span.version, start=done + span.start, end=done + span.end))
        done += len(part.token_ids)
    kinds = {part.logprob_kind for part in parts}
    flaws = [part.untrusted or "length_mismatch" for part in parts
             if part.untrusted or len(part.logprobs) != len(part.token_ids)] + ["kind_unknown"] * (len(kinds) > 1)
    kept = [part.kept for part in parts if part.token_ids]
    return Completion(
        token_ids=tuple(t for part in parts for t in part.token_ids), versions=tuple(spans),
        untrusted=flaws[0] if flaws else None,
        logprobs=tuple(logp for part in parts for logp in part.logprobs), finish_reason=parts[-1].finish_reason,
        kept=None if any(one is None for one in kept) else tuple(ids for one in kept for ids in one or ()),
        working_s=sum(part.working_s or 0.0 for part in parts),
        logprob_kind=parts[0].logprob_kind)
