"""The teacher's context of a branch: the hint in front, every id of the student unchanged behind it.

``teacher_ids = hint_ids + student_ids`` and ``offset = len(hint_ids)``: student token ``t`` (scored by the logit at
``t - 1``) is scored by the teacher's logit at ``t - 1 + offset``. Nothing is rendered or tokenised a second time, so
student and teacher score the same ids; this is asserted all the same. Placement ``system_prefix`` of the objective.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agentsdpo.chat import ChatFormat
from agentsdpo.errors import HintError
from agentsdpo.types import Branch, Hint

LEAK_NGRAM = 8
"""So many hint tokens in a row among the agent's own tokens count as a leak (objective, section 6)."""


@dataclass(frozen=True)
class TeacherContext:
    """What the teacher reads for one branch.

    ``token_ids``: int32[offset + T], the student's T ids at the end. ``offset``: tokens of the hint, 0 without one.
    """

    token_ids: np.ndarray
    offset: int

    @property
    def hint_ids(self) -> tuple[int, ...]:
        """Ids of the hint alone, as the learner takes them.

        >>> TeacherContext(np.array([9, 5, 7], np.int32), 1).hint_ids
        (9,)
        """
        return tuple(self.token_ids[:self.offset].tolist())


def hint_ids(chat: ChatFormat, hint: Hint) -> tuple[int, ...]:
    """Ids of one hint as a leading system message, to stand in front of a branch.

    Whether hint and branch fit the window is for the learner to say, which knows what of the branch it scores.

    Raises:
        HintError: the hint asks for a placement or scope other than the whole episode's system prefix.
    """
    if (hint.placement, hint.scope) != ("system_prefix", "episode"):
        raise HintError(f"a hint has placement {hint.placement!r} and scope {hint.scope!r}",
                        fix="use placement 'system_prefix' with scope 'episode'")
    return tuple(chat.hint(hint.text))


def render_teacher(chat: ChatFormat, hint: Hint, student_ids: np.ndarray, *, window: int) -> TeacherContext:
    """Put one hint in front of a branch as a leading system message.

    Args:
        chat: the format of the model that scores; the same tokenizer that made ``student_ids``.
        hint: its text is defused by ``chat``, so that it cannot close its own message.
        student_ids: int[T], the ids of the branch, untouched.
        window: tokens the teacher's model can read.

    Raises:
        HintError: the hint asks for a placement or scope other than the whole episode's system prefix, or hint and
            branch together exceed the window. Nothing is ever cut.
    """
    head = hint_ids(chat, hint)
    context = TeacherContext(np.concatenate([np.asarray(head, np.int32), np.asarray(student_ids, np.int32)]), len(head))
    if len(context.token_ids) > window:
        raise HintError(f"hint of {len(head)} tokens + branch of {len(student_ids)} tokens = {len(context.token_ids)} "
                        f"exceed the window of {window}", fix="shorten the hint, or drop the row and count it")
    check_aligned(context, student_ids)
    return context


def empty_teacher(student_ids: np.ndarray) -> TeacherContext:
    """The context without any hint: the gap under it must vanish (control ``hint/empty_gap``).

    >>> empty_teacher(np.array([5, 6])).offset
    0
    """
    return TeacherContext(np.array(student_ids, np.int32), 0)


def check_aligned(context: TeacherContext, student_ids: np.ndarray) -> None:
    """Assert, position by position, that the teacher scores exactly the student's ids.

    Raises:
        HintError: lengths disagree, or ids differ; names the first position and both ids.

    >>> check_aligned(TeacherContext(np.array([9, 5, 7]), 1), np.array([5, 6]))
    Traceback (most recent call last):
    agentsdpo.errors.HintError: teacher and student differ at token 1: id 7 against 6 ...
    """
    tail = context.token_ids[context.offset:]
    if len(tail) != len(student_ids):
        raise HintError(f"the teacher's context holds {len(tail)} tokens after its hint of {context.offset}, the "
                        f"branch {len(student_ids)}", fix="put the hint in front and leave the branch as it is")
    wrong = np.flatnonzero(tail != student_ids)
    if wrong.size:
        at = int(wrong[0])
        raise HintError(f"teacher and student differ at token {at}: id {tail[at]} against {student_ids[at]} "
                        f"({wrong.size} of {len(tail)} differ)", fix="never re-tokenise a branch")


def leaks(chat: ChatFormat, hint: Hint, branch: Branch) -> bool:
    """Whether :data:`LEAK_NGRAM` tokens of the hint in a row stand among the tokens the agent sampled.

    A student never read the hint, so a long literal run of it in its own words means the hint reached it. Runs are
    looked for inside one completion at a time. A hint of fewer tokens cannot be told from chance: False.
    """
    return has_run(chat.encode(hint.text), sampled_runs(branch), LEAK_NGRAM)


def sampled_runs(branch: Branch) -> list[list[int]]:
    """Ids of every completion of a branch, one list per call."""
    return [branch.token_ids[call.start:call.end].tolist() for call in branch.calls]


def has_run(needle: Sequence[int], haystacks: Sequence[Sequence[int]], ngram: int) -> bool:
    """Whether any ``ngram`` consecutive items of ``needle`` stand consecutively in one of the haystacks.

    >>> has_run([1, 2, 3, 4], [[0, 2, 3, 4], [9]], 3), has_run([1, 2, 3, 4], [[2, 3], [4, 1]], 3)
    (True, False)
    """
    grams = {tuple(needle[i:i + ngram]) for i in range(len(needle) - ngram + 1)}
    return any(tuple(hay[i:i + ngram]) in grams for hay in haystacks for i in range(len(hay) - ngram + 1))
