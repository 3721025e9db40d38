"""Takes secrets out of episodes before they leave: out of every text, and out of the tokens that spell them.

Tokens are found through their text. Where the tokenizer is not at hand, nobody can tell what they spell: all token
arrays are left out then. What a rule found in one place is looked for, letter by letter, in all places of the episode.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from agentsdpo.errors import ConfigError
from agentsdpo.replay.canonical import to_json
from agentsdpo.replay.cli.decode import Decoder, pieces
from agentsdpo.replay.formats.secret_rules import EMAIL, RULES, Rule, parts, spans
from agentsdpo.types import Branch, Call, Episode, TokenKind, VersionSpan

UNTOUCHED = {"episode_id", "tokenizer_sha256", "chat_template_sha256"}
"""Fields of an episode that are ids and hashes of this package's own making."""
FILLER = 0
"""Token id that stands in the place of a masked one."""


def demand_redaction(what: str, redact: "Redactor | None", checked: bool) -> None:
    """Refuse to make something public that nobody looked through.

    Raises:
        ConfigError: no redactor, and ``checked`` is false.
    """
    if redact is None and not checked:
        raise ConfigError(f"{what} is made to be shown to others, and nothing took secrets out of it",
                          fix="redact it (--redact), or say that you have looked through it (--i-have-checked)")


class Redactor:
    """Takes secrets out of episodes.

    Args:
        extra: rules beyond :data:`~agentsdpo.replay.formats.secret_rules.RULES`, say from ``load_rules`` beside them.
        emails: whether addresses are secrets too.
        decoder: gives the tokenizer with a hash, None when there is none; None for no tokenizers at all.
        tokens: what happens to a branch whose tokens spell a secret. ``drop`` leaves all its tokens out; ``mask``
            puts token 0 (kind 0) in the place of those that spell it, and keeps what was sampled after that, whose
            context is no longer the one it was sampled in, out of training (kind 4).

    >>> from agentsdpo.replay.example import episode
    >>> leaky = episode(0).model_copy(update={"messages": ({"role": "user", "content": "use sk-" + 40 * "a"},)})
    >>> clean, hits = Redactor().episode(leaky)
    >>> clean.messages[0]["content"], hits["openai_key"], hits["branches without a tokenizer"]
    ('use [redacted:openai_key]', 1, 1)
    """

    def __init__(self, extra: Sequence[Rule] = (), *, emails: bool = False, tokens: Literal["drop", "mask"] = "drop",
                 decoder: Callable[[str], Decoder | None] | None = None) -> None:
        if tokens not in ("drop", "mask"):
            raise ConfigError(f"tokens={tokens!r}", fix="use 'drop' or 'mask'")
        self.rules = (*RULES, *extra, *((EMAIL,) if emails else ()))
        self._decoder, self._tokens = decoder, tokens
        self._decoders: dict[str, Decoder | None] = {}

    def episode(self, episode: Episode) -> tuple[Episode, Counter[str]]:
        """An episode without secrets, and what was found, by rule; no secret is part of what is returned."""
        hits: Counter[str] = Counter()
        decoder = self._decoder_for(episode.tokenizer_sha256)
        texts = [] if decoder is None else [_decode(decoder, branch) for branch in episode.branches]
        fields = json.loads(to_json(episode.model_dump(mode="json", exclude={"branches", *UNTOUCHED})))
        called = [call.model_dump(include=_CALL_TEXTS) for branch in episode.branches for call in branch.calls]
        secrets = self._secrets([*_strings(fields), *_strings(called), *chain.from_iterable(texts)])
        fields = self._clean(fields, secrets, hits)
        branches = self._branches(episode.branches, decoder, texts, secrets, hits)
        branches = [branch.model_copy(update={"calls": tuple(self._call(c, secrets, hits) for c in branch.calls)})
                    for branch in branches]
        kept = {name: getattr(episode, name) for name in UNTOUCHED}
        try:
            return Episode(**fields, **kept, branches=tuple(branches)), +hits
        except ValidationError as error:
            name = ".".join(map(str, error.errors()[0]["loc"]))
            raise ConfigError(f"a rule takes out the {name} of episode {episode.episode_id}, which is no free text",
                              fix="make the rule's pattern narrower") from None

    def _decoder_for(self, tokenizer_sha256: str) -> Decoder | None:
        if tokenizer_sha256 not in self._decoders:
            self._decoders[tokenizer_sha256] = self._decoder(tokenizer_sha256) if self._decoder else None
        return self._decoders[tokenizer_sha256]

    # ---------------------------------------------------------------------------------------------------- texts

    def _secrets(self, texts: Iterable[str]) -> dict[str, str]:
        """Secrets found in any of the texts, longest first, with the rule that found them."""
        found = {part: rule for text in texts for _, _, rule, secret in spans(self.rules, text)
                 for part in parts(secret)}
        return {part: found[part] for part in sorted(found, key=len, reverse=True)}

    def text(self, text: str, secrets: dict[str, str], hits: Counter[str]) -> str:
        """A text with its secrets replaced by the names of their rules."""
        for rule in self.rules:
            text, count = rule.pattern.subn(f"[redacted:{rule.name}]", text)
            hits[rule.name] += count
        for secret, name in secrets.items():
            if secret in text:
                hits[name] += text.count(secret)
                text = text.replace(secret, f"[redacted:{name}]")
        return text

    def _clean(self, value: Any, secrets: dict[str, str], hits: Counter[str]) -> Any:
        """A JSON value with all its texts cleaned, names of fields included."""
        if isinstance(value, str):
            return self.text(value, secrets, hits)
        if isinstance(value, list):
            return [self._clean(inner, secrets, hits) for inner in value]
        if not isinstance(value, dict):
            return value
        made: dict[str, Any] = {}
        for name, inner in value.items():
            own = self.text(name, secrets, hits)
            while own in made:
                own += "'"
            made[own] = self._clean(inner, secrets, hits)
        return made

    def _call(self, call: Call, secrets: dict[str, str], hits: Counter[str]) -> Call:
        return call.model_copy(update={name: self.text(getattr(call, name), secrets, hits) for name in _CALL_TEXTS
                                       if getattr(call, name)})

    # --------------------------------------------------------------------------------------------------- tokens

    def _branches(self, branches: Sequence[Branch], decoder: Decoder | None, texts: Sequence[Sequence[str]],
                  secrets: dict[str, str], hits: Counter[str]) -> list[Branch]:
        """Branches whose tokens spell no secret; a child is cut off its parent where the two no longer agree."""
        made: dict[int, Branch] = {}
        for i, branch in enumerate(branches):
            if decoder is None:
                hits["branches without a tokenizer"] += bool(len(branch.token_ids))
                clean = dropped(branch)
            elif not self._leaks(texts[i], secrets):
                clean = branch
            else:
                self._count(texts[i][0], secrets, hits)
                clean = self._masked(branch, decoder, secrets) if self._tokens == "mask" else None
                hits["branches dropped" if clean is None else "branches masked"] += 1
                clean = dropped(branch) if clean is None else clean
            made[branch.branch_id] = _refork(clean, made)
        return list(made.values())

    def _leaks(self, texts: Iterable[str], secrets: dict[str, str]) -> bool:
        """Whether a text holds a secret; spaces that a tokenizer puts in or leaves out do not hide it."""
        squeezed = [_squeeze(secret) for secret in secrets]
        return any(any(spans(self.rules, text)) or any(secret in _squeeze(text) for secret in squeezed)
                   for text in texts)

    def _count(self, text: str, secrets: dict[str, str], hits: Counter[str]) -> None:
        before = hits.total()
        self.text(text, secrets, hits)
        hits["secrets torn apart"] += hits.total() == before

    def _masked(self, branch: Branch, decoder: Decoder, secrets: dict[str, str]) -> Branch | None:
        """The branch with the tokens of its secrets replaced; None when that does not get rid of them."""
        placed = list(pieces(decoder, branch.token_ids.tolist()))
        text = "".join(piece for _, _, piece in placed)
        found = [(start, end) for start, end, _, _ in spans(self.rules, text)]
        found += [match.span() for secret in secrets for match in re.finditer(re.escape(secret), text)]
        mask, at = np.zeros(len(branch.token_ids), bool), 0
        for first, last, piece in placed:
            here, at = at, at + len(piece)
            mask[first:last] = any(start < max(at, here + 1) and here < end for start, end in found)
        clean = masked(branch, mask)
        return None if self._leaks(_decode(decoder, clean), secrets) else clean


_CALL_TEXTS = {"call_id", "finish_reason", "untrainable_reason"}


def _strings(value: Any) -> Iterable[str]:
    """All texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _decode(decoder: Decoder, branch: Branch) -> list[str]:
    """Text of a branch, with its special tokens and without: one may stand in the middle of a secret."""
    ids = branch.token_ids.tolist()
    whole, plain = (decoder.decode(ids, skip_special_tokens=skip) for skip in (False, True))
    return [whole] if whole == plain else [whole, plain]


def _squeeze(text: str) -> str:
    return re.sub(r"\s+", "", text).casefold()


def dropped(branch: Branch) -> Branch:
    """A branch without its tokens; its calls stay, with the reason.

    >>> from agentsdpo.replay.example import branch
    >>> empty = dropped(branch(0))
    >>> len(empty.token_ids), empty.calls[0].untrainable_reason
    (0, 'redacted')
    """
    calls = tuple(call.model_copy(update={"start": 0, "end": 0, "versions": (), "prompt_sha256": "",
                                          "untrainable_reason": "redacted"}) for call in branch.calls)
    return Branch(branch_id=branch.branch_id, parent_branch_id=branch.parent_branch_id, fork_at=branch.fork_at,
                  fork_reason=branch.fork_reason, token_ids=np.zeros(0, np.int32), token_kind=np.zeros(0, np.uint8),
                  logprobs=np.zeros(0, np.float32), calls=calls)


def masked(branch: Branch, mask: np.ndarray) -> Branch:
    """A branch with the tokens of ``mask`` (bool[T]) replaced, and nothing behind the first of them trained.

    A call with replaced tokens becomes one call per run of tokens that are left.
    """
    if not mask.any():
        return branch
    first = int(np.argmax(mask))
    kinds = np.where(mask, np.uint8(TokenKind.CONTEXT), branch.token_kind)
    kinds[first:][kinds[first:] == TokenKind.SAMPLED] = TokenKind.MASKED
    calls = [part for call in branch.calls for part in _split(call, mask, first)]
    kept_ids, kept_counts = _kept(branch, mask)
    return Branch(branch_id=branch.branch_id, parent_branch_id=branch.parent_branch_id, fork_at=branch.fork_at,
                  fork_reason=branch.fork_reason, token_ids=np.where(mask, np.int32(FILLER), branch.token_ids),
                  token_kind=kinds, logprobs=np.where(mask, np.float32(np.nan), branch.logprobs), calls=tuple(calls),
                  kept_ids=kept_ids, kept_counts=kept_counts)


def _kept(branch: Branch, mask: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Kept sets (ids, counts) without those of the replaced tokens, which would name them."""
    if branch.kept_ids is None or branch.kept_counts is None:
        return None, None
    stays = ~mask[np.isin(branch.token_kind, (TokenKind.SAMPLED, TokenKind.MASKED, TokenKind.UNUSABLE))]
    return branch.kept_ids[np.repeat(stays, branch.kept_counts)], branch.kept_counts[stays]


def _split(call: Call, mask: np.ndarray, first: int) -> list[Call]:
    """The runs of a call's tokens that are left; behind the first replaced token they are not trained on."""
    if call.end <= first:
        return [call]
    inside = np.concatenate([[False], ~mask[call.start:call.end], [False]])
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    runs = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
    runs = runs or [(0, 0)]
    names = [call.call_id, *(f"{call.call_id}#{i}" for i in range(1, len(runs)))]
    whole = call.start < first
    return [call.model_copy(update={
        "call_id": name, "start": call.start + a, "end": call.start + b, "versions": _clip(call.versions, a, b),
        "prompt_sha256": call.prompt_sha256 if whole and a == 0 else "",
        "untrainable_reason": call.untrainable_reason or (None if call.start + b <= first else "redacted")})
        for name, (a, b) in zip(names, runs, strict=True)]


def _clip(versions: Sequence[VersionSpan], start: int, end: int) -> tuple[VersionSpan, ...]:
    """Version spans of output tokens ``[start, end)``."""
    cut = [VersionSpan(version=v.version, start=max(v.start, start) - start, end=min(v.end, end) - start)
           for v in versions if v.start < end and start < v.end]
    return tuple(cut)


def _refork(branch: Branch, parents: dict[int, Branch]) -> Branch:
    """A child whose fork stands where it and its parent still agree."""
    if branch.parent_branch_id is None:
        return branch
    parent, fork = parents[branch.parent_branch_id], branch.fork_at or 0
    n = min(fork, len(parent.token_ids), len(branch.token_ids))
    differ = np.flatnonzero(parent.token_ids[:n] != branch.token_ids[:n])
    return branch.model_copy(update={"fork_at": int(differ[0]) if len(differ) else n})
