"""``branches.npz``: the tokens of one attempt, read back without pickle."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agentsdpo.errors import FormatError
from agentsdpo.types import Branch, Call

HEAD = ("branch_id", "parent_branch_id", "fork_at", "fork_reason")
"""Fields of a branch beside its arrays."""


def pack(branches: Sequence[Branch], *, train_allowed: bool) -> bytes:
    """The file's bytes: the same for the same branches.

    Arrays: ``token_ids`` int32, ``token_kind`` uint8, ``logprobs`` float32 (NaN unless kind 1 or 4), all branches after
    each other; ``offsets`` int64[K + 1]; ``heads`` and ``calls`` as one JSON text per branch; ``kept_ids``,
    ``kept_counts`` with their offsets where sampling was truncated; ``train_allowed``.
    """
    offsets = np.cumsum([0, *(len(b.token_ids) for b in branches)])
    kept = [(b.kept_ids, b.kept_counts) if b.kept_ids is not None and b.kept_counts is not None else None
            for b in branches]
    none = np.array([], np.int32)
    arrays = {
        "token_ids": _joined([b.token_ids for b in branches], np.int32),
        "token_kind": _joined([b.token_kind for b in branches], np.uint8),
        "logprobs": _joined([b.logprobs for b in branches], np.float32), "offsets": offsets.astype(np.int64),
        "heads": np.array([b.model_dump_json(include=set(HEAD)) for b in branches], np.str_),
        "calls": np.array([json.dumps([c.model_dump(mode="json") for c in b.calls]) for b in branches], np.str_),
        "kept_ids": _joined([pair[0] if pair else none for pair in kept], np.int32),
        "kept_counts": _joined([pair[1] if pair else none for pair in kept], np.int32),
        "kept_sizes": np.array([[len(pair[0]), len(pair[1])] if pair else [-1, -1] for pair in kept], np.int64),
        "train_allowed": np.array(train_allowed),
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def _joined(parts: Sequence[np.ndarray], kind: type[np.generic]) -> np.ndarray:
    return np.concatenate([np.array([], kind), *parts]).astype(kind)


def read(path: Path) -> tuple[Branch, ...]:
    """The branches of one attempt; none where the agent sampled no tokens.

    Raises:
        FormatError: the file is damaged, or a branch breaks a row rule.
    """
    if not path.is_file():
        return ()
    try:
        with np.load(path, allow_pickle=False) as data:
            return tuple(_branches({name: data[name] for name in data.files}))
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise FormatError(f"{path} is not a file of branches: {error}", fix="play the attempt again") from error


def _branches(data: dict[str, np.ndarray]) -> list[Branch]:
    found, at = [], np.zeros(2, np.int64)
    for i, (head, calls) in enumerate(zip(data["heads"], data["calls"], strict=True)):
        low, high = data["offsets"][i:i + 2]
        sizes = data["kept_sizes"][i]
        kept: dict[str, Any] = {}
        if sizes[0] >= 0:
            kept = {"kept_ids": data["kept_ids"][at[0]:at[0] + sizes[0]],
                    "kept_counts": data["kept_counts"][at[1]:at[1] + sizes[1]]}
            at = at + sizes
        arrays: dict[str, Any] = {name: data[name][low:high] for name in ("token_ids", "token_kind", "logprobs")}
        found.append(Branch(**json.loads(str(head)), **arrays, **kept,
                            calls=tuple(Call(**one) for one in json.loads(str(calls)))))
    return found
