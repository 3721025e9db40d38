"""What is said about answers, at once or days later, as what the store keeps: a hint, a reward, a label.

An item is ``{"kind", "turn", "text", "value", "author"}``. Kinds: ``text`` (somebody's words), ``thumb`` (value 1 or
0), ``edit`` (what the answer should have been), ``outcome`` (value and perhaps words), and what is noticed by itself:
``next`` (the user's next message) and ``tool_error``.
"""

import re
from collections.abc import Collection, Sequence
from typing import Any

from agentsdpo.collect.proxy.refusals import Refused
from agentsdpo.collect.turns import failed
from agentsdpo.types import Branch, Grade, Hint, Json, TokenKind

MOST = 8_000
"""Characters of one item's text: the teacher reads it before the turns it speaks of."""
_THUMBS = {"up": 1.0, "down": 0.0, 1: 1.0, 0: 0.0, -1: 0.0}
"""Values of thumbs; yes and no are 1 and 0 to Python."""
_COURTESY = frozenset({
    "a", "all", "alright", "amazing", "and", "awesome", "bye", "cheers", "cool", "day", "excellent", "fine", "for",
    "good", "goodbye", "got", "great", "have", "help", "helpful", "hello", "hi", "i", "is", "it", "it's", "job", "just",
    "lot", "love", "lovely", "many", "much", "nice", "ok", "okay", "perfect", "really", "right", "so", "super", "sure",
    "thank", "thanks", "that", "that's", "the", "this", "very", "was", "well", "wonderful", "work", "works", "yeah",
    "yes", "yep", "you", "your"})
"""A next message of these words alone corrects nothing."""
_REMINDER = re.compile(r"<system-reminder>.*?</system-reminder>", re.DOTALL)
"""What coding agents put into their user's messages; no user said it."""


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
        if message["role"] == "user" and (text := _REMINDER.sub("", text).strip()):
            found.append(item("next", text, turn=turn))
        elif message["role"] == "tool" and text and (message.get("is_error") or failed(text)):
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


def check_turns(items: Sequence[Json], known: Collection[int]) -> None:
    """Refuse feedback on a turn that there is not: no teacher would ever read it.

    Args:
        items: what is said. known: turns of the conversation.

    Raises:
        Refused: 400, with the turns there are.
    """
    for one in items:
        if one["turn"] is not None and one["turn"] not in known:
            last = max(known, default=None)
            raise Refused(400, f"there is no turn {one['turn']} in this conversation, the last one is {last}",
                          fix="count its answers from 0, or name one by its id", param="turn")


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


def hint_of(items: Sequence[Json], branches: Sequence[Branch] = (), before: Hint | None = None) -> Hint | None:
    """The hint that these items make, after one that was there before; None when they say nothing in words.

    What is said about a turn is for what led to it since the user last spoke (:func:`exchange`), a tool's failure for
    that turn alone, and what names no turn for the whole conversation: turns with words of their own read it as well.

    >>> said = hint_of([item("next", "In thousands, please.", turn=0), item("text", "We are a bank."),
    ...                 item("next", "Thanks a lot!", turn=1)])
    >>> said.text, said.turns
    ('We are a bank.', ((0, 'In thousands, please.\\nWe are a bank.'),))
    """
    about: dict[int | None, list[str]] = {None: [before.text] if before and before.text else []}
    about |= {turn: [text] for turn, text in before.turns} if before else {}
    said = [(one, line) for one in items if (line := _line(one))]
    for one, line in said:
        for turn in list(about) if one["turn"] is None else _about(one, branches):
            lines = about.setdefault(turn, list(about[None]))
            if line not in lines:
                lines.append(line)
    if not any(about.values()):
        return None
    author = said[-1][0]["author"] if said else before.author if before else "user"
    bearing = any(one["kind"] == "edit" for one, _ in said) or bool(before and before.answer_bearing)
    turns = {turn: "\n".join(lines) for turn, lines in about.items() if turn is not None}
    return Hint(text="\n".join(about[None]), turns=tuple(sorted(turns.items())), source="user", author=author,
                answer_bearing=bearing)


def exchange(branches: Sequence[Branch], turn: int) -> tuple[int, ...]:
    """A turn and those before it in its branch, back to where something else than a tool's answer was put in: the
    user's words."""
    for branch in branches:
        at = next((i for i, call in enumerate(branch.calls) if call.turn == turn), None)
        if at is None:
            continue
        first = at
        while first and TokenKind.TOOL in branch.token_kind[branch.calls[first - 1].end:branch.calls[first].start]:
            first -= 1
        return tuple(call.turn for call in branch.calls[first:at + 1])
    return (turn,)


def _about(one: Json, branches: Sequence[Branch]) -> Sequence[int]:
    """Turns that an item with a turn speaks of."""
    return (one["turn"],) if one["kind"] == "tool_error" else exchange(branches, one["turn"])


def _line(one: Json) -> str:
    """One item as the teacher reads it: a user's words as they are; "" where it says nothing."""
    if not one["text"] or one["kind"] == "next" and courtesy(one["text"]):
        return ""
    before = {"edit": "The answer should have been:\n", "outcome": "Outcome: ",
              "tool_error": "A tool failed after this: "}
    return before.get(one["kind"], "") + one["text"]


def courtesy(text: str) -> bool:
    """Whether a message is nothing but thanks or praise, in English.

    >>> [courtesy(text) for text in ("Thanks!", "Great, that works.", "Thanks, but in thousands.", "Danke")]
    [True, True, False, False]
    """
    words = re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)?|\d+", text.lower())
    return all(word.replace("’", "'") in _COURTESY for word in words)


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
