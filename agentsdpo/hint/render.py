"""A hint as token ids: one leading system message, to stand in front of a branch.

The teacher reads ``hint_ids + student_ids``. Nothing of the branch is rendered or tokenised a second time, so student
and teacher score the same ids; the learner puts them together and checks it token by token (``learn/batch.py``).
"""

from agentsdpo.chat import ChatFormat
from agentsdpo.errors import HintError
from agentsdpo.types import Hint


def hint_ids(chat: ChatFormat, hint: Hint) -> tuple[int, ...]:
    """Ids of one hint; placement ``system_prefix`` of the objective (section 6).

    Whether hint and branch fit the window is for the learner to say, which knows what of the branch it scores.

    Args:
        chat: the format of the model that scores; the hint's text is defused by it, so that it cannot close its own
            message.
        hint: what the teacher shall read.

    Raises:
        HintError: the hint asks for a placement or scope other than the whole episode's system prefix.
    """
    if (hint.placement, hint.scope) != ("system_prefix", "episode"):
        raise HintError(f"a hint has placement {hint.placement!r} and scope {hint.scope!r}",
                        fix="use placement 'system_prefix' with scope 'episode'")
    return tuple(chat.hint(hint.text))
