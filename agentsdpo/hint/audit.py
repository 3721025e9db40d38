"""Numbers about the hints of the rows a step draws: how long they are, and whether one reached the student."""

from collections.abc import Iterable
from typing import Protocol

from agentsdpo.chat import ChatFormat
from agentsdpo.hint.render import hint_ids, leaks
from agentsdpo.types import Branch, Hint


class Hinted(Protocol):
    """A branch with its hint: a row of the replay store is one."""

    @property
    def branch(self) -> Branch:
        """The token record."""
        ...

    @property
    def hint(self) -> Hint | None:
        """None when the episode has none."""
        ...


def hint_metrics(chat: ChatFormat, rows: Iterable[Hinted]) -> dict[str, float]:
    """Leaks and lengths over the rows that have a hint; empty when none has.

    Args:
        chat: the format of the model that scores.
        rows: rows of the store as they were drawn.

    Returns:
        ``hint/leak_frac``: share of rows whose agent says eight or more tokens of its hint in a row, which it never
        read (alarm: any); ``hint/tokens/mean``: length of the hint as the teacher reads it, in tokens.

    Raises:
        HintError: a hint asks for a placement that is not built.
    """
    hinted = [(row.hint, row.branch) for row in rows if row.hint is not None]
    if not hinted:
        return {}
    leaked = sum(leaks(chat, hint, branch) for hint, branch in hinted)
    tokens = sum(len(hint_ids(chat, hint)) for hint, _ in hinted)
    return {"hint/leak_frac": leaked / len(hinted), "hint/tokens/mean": tokens / len(hinted)}
