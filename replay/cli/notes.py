"""Late rewards, labels and hints from a file of JSON lines.

    {"episode_id": "...", "reward": 0.5}
    {"episode_id": "...", "branch_id": 0, "attempt": 0, "label": "reviewed"}
    {"episode_id": "...", "hint": "..."}
    {"episode_id": "...", "hint": {"text": "...", "source": "user", "author": "me"}}

Without ``branch_id`` all branches of the episode's latest attempt are meant. A hint that is a text is the user's.
What does not say its author is by whoever adds it.
"""

import json
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from agentsdpo.errors import ConfigError
from agentsdpo.replay.ids import Key
from agentsdpo.types import Hint, Json

KINDS = ("reward", "label", "hint")
_SHAPES = {"reward": "0.5", "label": '"..."', "hint": '"..."} or {"episode_id": "...", "hint": {"text": "...", '
                                                      '"source": "user", "author": "me"}'}
_PLACE = ("episode_id", "branch_id", "attempt")


def read(lines: Iterable[str], kind: str, author: str = "") -> dict[Key | str, Any]:
    """Values of one kind by key, or by episode id; ``author`` is that of hints without one. Empty lines do not count.

    Raises:
        ConfigError: a line is not of the form above, or two are about the same; names the line.

    >>> read(['{"episode_id": "e", "reward": 1}', '{"episode_id": "f", "branch_id": 2, "reward": 0.5}'], "reward")
    {'e': 1.0, Key(episode_id='f', branch_id=2, attempt=0): 0.5}
    """
    found: dict[Key | str, Any] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            place, value = _record(json.loads(line), kind, author)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            shape = f'{{"episode_id": "...", "{kind}": {_SHAPES[kind]}}}'
            raise ConfigError(f"line {number} is no {kind}: {_reason(error)}",
                              fix=f"write {shape}, one object a line") from error
        if place in found:
            raise ConfigError(f"line {number} is about {place}, as a line before it is", fix="keep one of them")
        found[place] = value
    return found


def _record(record: Json, kind: str, author: str) -> tuple[Key | str, Any]:
    if not isinstance(record, dict):
        raise TypeError("not an object")
    if unknown := record.keys() - {*_PLACE, kind}:
        raise ValueError(f"it has {sorted(unknown)[0]!r}")
    episode, value = record["episode_id"], record[kind]
    if not isinstance(episode, str) or (kind == "label" and not isinstance(value, str)):
        raise TypeError("episode_id and label are texts")
    if isinstance(value, bool):
        raise TypeError("a reward is a number")
    numbers = [record.get(name, 0) for name in _PLACE[1:]]
    if any(type(number) is not int for number in numbers):  # 0.9 is not branch 0
        raise TypeError("branch_id and attempt are integers")
    place = Key(episode, *numbers) if "branch_id" in record or "attempt" in record else episode
    return place, _hint(value, author) if kind == "hint" else {"reward": float, "label": str}[kind](value)


def _hint(value: Any, author: str) -> Hint:
    """A hint from its fields, or from its text alone."""
    if not isinstance(value, str | dict) or not value:
        raise TypeError("a hint is a text or an object, and not empty")
    said = {"text": value, "source": "user", "author": author or "user"} if isinstance(value, str) else value
    return Hint(**({"author": author} if author else {}) | said)


def _reason(error: Exception) -> str:
    """What is wrong, in one line."""
    if isinstance(error, KeyError):
        return f"{error.args[0]!r} is missing"
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error).splitlines()[0]
