"""Hints as token ids, and where in a branch the teacher reads them.

The teacher reads the student's ids with a hint inserted. Nothing of the branch is rendered or tokenised a second time,
so student and teacher score the same ids; the learner puts them together and checks it token by token
(``learn/batch.py``). Placements of the objective, section 5:

* ``system_prefix``: one system message in front of everything;
* ``last_user_suffix``: at the end of the last message of the opening, before it is closed;
* of single turns: one system message right before the turn, read for that turn alone. Turns in a row that are told the
  same read it once, before the first of them; from the first turn of a branch on, it stands where one of the whole
  episode would.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from agentsdpo.chat import ChatFormat
from agentsdpo.errors import HintError
from agentsdpo.types import Branch, Call, Hint, Json, ToolSpec


@dataclass(frozen=True)
class Placed:
    """Hint ids to be inserted in front of token ``at`` of a branch, and the turns that are scored with it."""

    ids: tuple[int, ...]
    at: int
    turns: frozenset[int]


def place(chat: ChatFormat, hint: Hint, branch: Branch) -> list[Placed]:
    """Everything a hint says about one branch; each of its turns is scored with one of them at most.

    Whether hint and branch fit the window is for the learner to say, which knows what of the branch it scores.

    Args:
        chat: the format of the model that scores; the hint's text is defused by it, so that it cannot close its own
            message.
        hint: what the teacher shall read; turns that the branch does not have are for another branch.
        branch: as it was recorded.

    Returns:
        That of the whole episode first, then those of single turns; empty when the hint says nothing about the branch.

    Raises:
        HintError: the branch does not have the place that the hint asks for.
    """
    if hint.scope == "turn" or hint.placement == "turn_local":
        raise HintError(f"a hint has placement {hint.placement!r} and scope {hint.scope!r} but does not say which turn",
                        fix="give it as turns = ((turn, text), ...)")
    calls = {call.turn: call for call in reversed(branch.calls)}  # the first call of each turn
    told = {turn: text for turn, text in hint.turns if turn in calls and not calls[turn].summarises}
    opening = branch.token_ids[:branch.calls[0].start].tolist() if branch.calls else []
    placed = []
    if hint.text and calls.keys() - told.keys():
        ids, at = whole(chat, hint, opening)
        placed.append(Placed(ids, at, frozenset(calls) - told.keys()))
    for text, run in groupby(sorted(calls, key=lambda turn: calls[turn].start), told.get):
        turns = list(run)
        if text is None:
            continue
        if calls[turns[0]] is branch.calls[0]:
            ids, at = whole(chat, hint.model_copy(update={"text": text}), opening)
        else:
            ids, at = tuple(chat.hint(text)), _before(chat, branch, calls[turns[0]])
        placed.append(Placed(ids, at, frozenset(turns)))
    return placed


def whole(chat: ChatFormat, hint: Hint, opening: list[int]) -> tuple[tuple[int, ...], int]:
    """Ids of a hint that speaks of the whole episode, and where in the opening they are inserted.

    Raises:
        HintError: the opening has no message that is closed.
    """
    if hint.placement == "system_prefix":
        return tuple(chat.hint(hint.text)), 0
    if chat.eos_id not in opening:
        raise HintError(f"no message of the opening of {len(opening)} tokens is closed by the end-of-turn token "
                        f"{chat.eos_id}", fix="use placement 'system_prefix' with this chat template")
    at = len(opening) - 1 - opening[::-1].index(chat.eos_id)
    return tuple(chat.encode("\n\n" + chat.defuse(hint.text))), at


class HintedChat(ChatFormat):
    """Opens every conversation with a hint, exactly as the teacher reads it: what a hinted model plays with.

    Args:
        chat: of the model.
        hint: of the whole episode.
    """

    def __init__(self, chat: ChatFormat, hint: Hint) -> None:
        vars(self).update(vars(chat))
        self._hint = hint

    def open(self, messages: Sequence[Json], tools: Sequence[ToolSpec]) -> list[int]:
        """The student's ids with the hint inserted."""
        ids = super().open(messages, tools)
        inserted, at = whole(self, self._hint, ids)
        return [*ids[:at], *inserted, *ids[at:]]


def _before(chat: ChatFormat, branch: Branch, call: Call) -> int:
    """Where the header of a turn begins: behind all that was there to be answered.

    Raises:
        HintError: what stands before the turn is not the template's header.
    """
    header, start = chat.header_ids, call.start
    found: Sequence[int] = branch.token_ids[max(0, start - len(header)):start].tolist()
    if list(found) != header:
        raise HintError(f"turn {call.turn} begins behind {chat.decode(found)!r}, not behind the template's "
                        f"{chat.decode(header)!r}", fix="give this hint to the whole episode")
    return start - len(header)
