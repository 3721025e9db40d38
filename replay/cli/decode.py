"""Token ids as text, for people: which tokenizer a store was written with, and what each token says."""

import hashlib
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from agentsdpo.errors import ModelError, TokenizerMismatch

SEED = Path(__file__).resolve().parents[2] / "envs" / "desk" / "assets" / "seed"
"""Folder of the shipped model, whose tokenizer the built-in runs use."""
_PART = "\ufffd"
"""What a decoder puts in the place of bytes that are no whole character."""
_LONGEST = 8
"""Tokens that may share one character of UTF-8 (4 bytes), with room for spaces before it."""


class Decoder(Protocol):
    """Text of ids, special tokens included."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = ...) -> str:
        """Text of these ids."""
        ...


def decoder_for(tokenizer_sha256: str, hints: Sequence[str | Path], model: str | Path | None = None) -> Decoder | None:
    """The tokenizer with this hash, None when it is in none of the folders.

    Args:
        tokenizer_sha256: recorded in the row.
        hints: model folders to look in; those that lack the tokenizer are passed over.
        model: the only folder to look in, when somebody named one.

    Raises:
        ModelError: ``model`` has no ``tokenizer.json``.
        TokenizerMismatch: ``model`` has another tokenizer.
    """
    if model is None:
        return next((found for hint in hints if (found := _load(Path(hint), tokenizer_sha256))), None)
    if not (Path(model) / "tokenizer.json").is_file():
        raise ModelError(f"there is no tokenizer.json in {str(model)!r}", fix="name the folder of the model that "
                         "sampled these tokens")
    found = _load(Path(model), tokenizer_sha256)
    if found is None:
        raise TokenizerMismatch(f"the tokenizer in {model} is not {tokenizer_sha256[:12]!r}, which the tokens are of",
                                fix="name the folder of the model that sampled them")
    return found


def _load(folder: Path, tokenizer_sha256: str) -> Decoder | None:
    """The tokenizer of a folder if it has this hash."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    from tokenizers import Tokenizer

    found = Tokenizer.from_file(str(path))
    return found if hashlib.sha256(found.to_str().encode()).hexdigest() == tokenizer_sha256 else None


def model_folders(store: str, model_id: str) -> list[Path]:
    """Where the model of a store may lie: beside it as its run's ``config.toml`` says, as the rows say, as shipped."""
    config, named = Path(store).parent / "config.toml", [model_id]
    if config.is_file():
        try:
            named.append(str(tomllib.loads(config.read_text()).get("model", "")))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError):
            named.append("")
    return [*(Path(name) for name in named if name and name != "seed"), SEED]


def pieces(decoder: Decoder, ids: Sequence[int]) -> Iterator[tuple[int, int, str]]:
    """``(start, end, text)``: the smallest runs of tokens that are whole characters, in order, without gaps.

    >>> class Bytes:
    ...     def decode(self, ids, skip_special_tokens=True):
    ...         return bytes(ids).decode(errors="replace")
    >>> list(pieces(Bytes(), "aé!".encode()))
    [(0, 1, 'a'), (1, 3, 'é'), (3, 4, '!')]
    """
    start = 0
    while start < len(ids):
        for end in range(start + 1, min(start + _LONGEST, len(ids)) + 1):
            text = _tail(decoder, ids, start, end)
            if not text.endswith(_PART):
                break
        else:  # no run of tokens makes a whole character here: the bytes are not UTF-8
            end, text = start + 1, _tail(decoder, ids, start, start + 1)
        yield start, end, text
        start = end


def _tail(decoder: Decoder, ids: Sequence[int], start: int, end: int) -> str:
    """Text of ``ids[start:end]`` behind the token before it: some tokenizers drop the space of a first token."""
    head = decoder.decode(list(ids[max(start - 1, 0):start]), skip_special_tokens=False)
    whole = decoder.decode(list(ids[max(start - 1, 0):end]), skip_special_tokens=False)
    if whole.startswith(head) and not head.endswith(_PART):
        return whole[len(head):]
    return decoder.decode(list(ids[start:end]), skip_special_tokens=False)
