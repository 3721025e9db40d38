"""The whole of an episode as one JSON object: what ``extra["agentsdpo"]`` holds in formats that have room for it.

    {"v": 1, "sha256": <of the rest and of the document around it>, "status": "sealed",
     "policies": {"3": {"weights_id": ..., ...}},      # what the versions in it were, as far as the store knew
     "episode": {... all fields but the branches ...},
     "branches": [{"branch_id": 0, ..., "token_ids": [7, 8], "token_kind": [0, 1], "logprobs": [null, -0.5],
                   "kept_ids": null, "kept_counts": null, "calls": [{...}]}]}

Log-probs are the shortest decimals that give the same float32 again, null where there is none. Strings with lone
surrogates make the object unreadable for strict readers of JSON; it is then ``{"v": 1, "json": "<the object>"}``.
"""

import hashlib
import json
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from agentsdpo.errors import FormatError, RowError
from agentsdpo.replay.canonical import canonical_json, to_json
from agentsdpo.replay.formats.files import valid_text
from agentsdpo.types import Branch, Episode, Json

NAME = "agentsdpo"
_ARRAYS = {"token_ids": np.int32, "token_kind": np.uint8, "kept_ids": np.int32, "kept_counts": np.int32}


class Stored(NamedTuple):
    """An episode of a store: the status of its rows, and what the policy versions are that sampled it."""

    episode: Episode
    status: str
    policies: dict[int, Json]


def pack(stored: Stored, document: Any) -> Json:
    """An episode as a JSON object that goes into ``document``.

    Args:
        stored: what to keep.
        document: what people may want to edit of what stands around the object. A hash over both tells whether
            somebody changed the one without the other.
    """
    episode, status, policies = stored
    bag: Json = {"v": 1, "status": status, "policies": {str(version): policies[version] for version in policies},
                 "episode": episode.model_dump(mode="json", exclude={"branches"}),
                 "branches": [_branch(branch) for branch in episode.branches]}
    bag["sha256"] = _hash(bag, document)
    return bag if valid_text(bag) == bag else {"v": 1, "json": to_json(bag)}


def unpack(bag: Any, document: Any, where: str) -> Stored:
    """What :func:`pack` packed; the arrays are bit for bit the same.

    Raises:
        FormatError: not such an object, one of a newer release, or the document around it was changed since.
    """
    try:
        if isinstance(bag, dict) and "json" in bag:
            bag = json.loads(bag["json"])
        if bag["v"] != 1:
            raise FormatError(f"{where}: {NAME} data has version {bag['v']!r}, this release reads 1",
                              fix="install a newer agentsdpo")
        branches = tuple(_read_branch(branch) for branch in bag["branches"])
        episode, status = Episode(**bag["episode"], branches=branches), bag["status"]
        policies = {int(version): dict(manifest) for version, manifest in bag["policies"].items()}
        whole = bag["sha256"] == _hash({name: value for name, value in bag.items() if name != "sha256"}, document)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{where}: {NAME} data cannot be read: {describe(error)}",
                          fix=f"export again, or remove {NAME} to import what the format itself says") from error
    if not whole:
        raise FormatError(f"{where} was changed after the export: it does not hash to what its {NAME} data says",
                          fix=f"undo the change, or remove {NAME} to import the rest without its tokens")
    if status not in ("sealed", "truncated", "aborted", "salvaged"):
        raise FormatError(f"{where}: {NAME} data has status {status!r}", fix="export again")
    return Stored(episode, status, policies)


def describe(error: Exception) -> str:
    """An error on one line, with the path of the value where it has one.

    >>> describe(KeyError("v"))
    "KeyError: 'v'"
    """
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{path_of(first['loc'])}: {first['msg']}"
    return f"{error}" if isinstance(error, RowError) else f"{type(error).__name__}: {error}"


def path_of(location: tuple[int | str, ...]) -> str:
    """A place in a document as people write it.

    >>> path_of(("steps", 3, "metrics", "logprob"))
    'steps[3].metrics.logprob'
    """
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".")


def _hash(bag: Json, document: Any) -> str:
    return hashlib.sha256(canonical_json([bag, valid_text(document)])).hexdigest()


def _branch(branch: Branch) -> Json:
    fields = branch.model_dump(mode="json", exclude={*_ARRAYS, "logprobs"})
    arrays = {name: getattr(branch, name) for name in _ARRAYS}
    fields |= {name: None if array is None else array.tolist() for name, array in arrays.items()}
    return fields | {"logprobs": decimals(branch.logprobs)}


def decimals(logprobs: np.ndarray) -> list[float | None]:
    """float32[T] as JSON numbers that read back to the same bits, None for NaN.

    >>> decimals(np.array([-0.1, np.nan, -0.0], np.float32))
    [-0.1, None, -0.0]
    """
    return [None if value != value else float(str(value)) for value in logprobs]


def _read_branch(fields: Json) -> Branch:
    arrays = {name: _array(fields[name], kind) for name, kind in _ARRAYS.items()}
    logprobs = np.array([np.nan if value is None else value for value in fields["logprobs"]], np.float32)
    return Branch(**{**fields, **arrays, "logprobs": logprobs})  # pyright: ignore[reportArgumentType]


def _array(values: Any, kind: type[np.generic]) -> np.ndarray | None:
    """A flat array of integers that fit.

    Raises:
        TypeError, OverflowError: something else.
    """
    if values is None:
        return None
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise TypeError("tokens, kinds and counts are lists of integers")
    return np.array(values, kind)
