"""What is said about answers, at once or days later, as what the store keeps: a hint, a reward, a label.

An item is ``{"kind", "turn", "text", "value", "author"}``. Kinds: ``text`` (somebody's words), ``thumb`` (value 1 or
0), ``edit`` (what the answer should have been), ``outcome`` (value and perhaps words), and what is noticed by itself:
``next`` (the user's next message) and ``tool_error``.
"""

from collections.abc import Sequence
from typing import Any

from agentsdpo.collect.proxy.refusals import Refused
from agentsdpo.collect.turns import failed
from agentsdpo.types import Grade, Hint, Json

MOST = 8_000
"""Characters of one item's text: it is read by the teacher in front of the whole conversation."""
_THUMBS = {"up": 1.0, "down": 0.0, 1: 1.0, 0: 0.0, -1: 0.0}
"""Values of thumbs; yes and no are 1 and 0 to Python."""


def item(kind: str, text: str = "", *, turn: int | None = None, value: float | None = None,
         author: str = "user") -> Json:
    """One thing that was said."""
    return {"kind": kind, "turn": turn, "text": text[:MOST], "value": value, "author": author}


def said_next(turn: int | None, news: Sequence[Json]) -> list[Json]:
    """What messages after an answer say about it: the user's words, and tools that failed.

    >>> [found["kind"] for found in said_next(0, [{"role": "tool", "content": "Error: no such file"},
    ...                                           {"role": "user", "content": "wrong folder"}])]
    ['tool_error', 'next']
    """
    found = []
    for message in news:
        text = message["content"].strip()
        if message["role"] == "user" and text:
            found.append(item("next", text, turn=turn))
        elif message["role"] == "tool" and failed(text):
            found.append(item("tool_error", text, turn=turn, author="tool"))
    return found


def read_feedback(body: Json) -> list[Json]:
    """The items of a feedback request.

    Raises:
        Refused: 400, it says nothing, or not in a known form.

    >>> read_feedback({"conversation": "c", "thumb": "up"})[0]["value"]
    1.0
    """
    turn, author = body.get("turn"), body.get("author", "user")
    if turn is not None and (isinstance(turn, bool) or not isinstance(turn, int) or turn < 0):
        raise Refused(400, "turn is not a number of 0 or more", param="turn")
    if not isinstance(author, str) or len(author) > 100:
        raise Refused(400, "author is not a text of at most 100 characters", param="author")
    made = [_READ[name](body[name]) for name in _READ if body.get(name) is not None]
    if not made:
        raise Refused(400, "the feedback says nothing", fix=f"give one of {', '.join(_READ)}")
    return [{**one, "turn": turn, "author": author} for one in made]


def _words(value: Any, param: str) -> str:
    if not isinstance(value, str) or not 0 < len(value.strip()) <= MOST:
        raise Refused(400, f"{param} is not a text of 1 to {MOST} characters", param=param)
    return value.strip()


def _thumb(value: Any) -> Json:
    if not isinstance(value, str | bool | int) or value not in _THUMBS:
        raise Refused(400, "thumb is neither 'up' nor 'down'", param="thumb")
    return item("thumb", value=_THUMBS[value])


def _edit(value: Any) -> Json:
    """The corrected answer as text or as a message."""
    words = value.get("content") if isinstance(value, dict) else value
    return item("edit", _words(words, "edit"))


def _outcome(value: Any) -> Json:
    """A number, a yes or no, or an object of ``reward`` or ``passed``, and ``text``."""
    said = value if isinstance(value, dict) else {"reward": value}
    number = said.get("reward", said.get("passed"))
    if not isinstance(number, bool | int | float) or not -1e9 < float(number) < 1e9:
        raise Refused(400, "outcome has no reward that is a finite number", param="outcome",
                      fix='send a number, true or false, or {"reward": 1.0, "text": "..."}')
    text = said.get("text")
    return item("outcome", "" if text is None else _words(text, "outcome.text"), value=float(number))


_READ = {"text": lambda value: item("text", _words(value, "text")), "thumb": _thumb, "edit": _edit,
         "outcome": _outcome}


# ---------------------------------------------------------------------------------------------------------- writing


def hint_of(items: Sequence[Json], before: Hint | None = None) -> Hint | None:
    """The hint that these items make, after one that was there before; None when they say nothing in words.

    >>> hint_of([item("next", "In thousands, please."), item("thumb", value=0.0)]).text
    'In thousands, please.'
    """
    lines = [before.text] if before else []
    for one in items:
        text = _line(one)
        if text and text not in lines:
            lines.append(text)
    if not lines:
        return None
    said = [one["author"] for one in items if _line(one)]
    author = said[-1] if said else before.author if before else "user"
    bearing = any(one["kind"] == "edit" for one in items) or bool(before and before.answer_bearing)
    return Hint(text="\n".join(lines), source="user", author=author, answer_bearing=bearing)


def _line(one: Json) -> str:
    """One item as the teacher reads it: a user's words as they are."""
    if not one["text"]:
        return ""
    place = "" if one["turn"] is None else f" of turn {one['turn']}"
    before = {"edit": f"The answer{place} should have been:\n", "outcome": "Outcome: ",
              "tool_error": f"After the answer{place} a tool failed: "}
    return before.get(one["kind"], "") + one["text"]


def grade_of(items: Sequence[Json]) -> Grade | None:
    """The reward they give: the last outcome, or without one the mean of the thumbs; None when there is neither.

    >>> grade_of([item("thumb", value=1.0), item("thumb", value=0.0)]).mean
    0.5
    """
    outcomes = [one["value"] for one in items if one["kind"] == "outcome"]
    thumbs = [one["value"] for one in items if one["kind"] == "thumb"]
    if not outcomes and not thumbs:
        return None
    mean = outcomes[-1] if outcomes else sum(thumbs) / len(thumbs)
    return Grade(results=(), mean=mean, passed=None)


def label_of(items: Sequence[Json]) -> str | None:
    """``thumb_up`` or ``thumb_down`` for the last thumb, None without one."""
    thumbs = [one["value"] for one in items if one["kind"] == "thumb"]
    return None if not thumbs else "thumb_up" if thumbs[-1] else "thumb_down"
