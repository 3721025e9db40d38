"""Numbers about the hints of the rows a step draws: how long they are, and whether one reached the student."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from agentsdpo.chat import ChatFormat
from agentsdpo.hint.render import place
from agentsdpo.hint.sources import JOINT, QUOTING
from agentsdpo.types import Branch, Hint

LEAK_NGRAM = 8
"""So many hint tokens in a row among the agent's own tokens count as a leak."""


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
        HintError: a branch does not have the place that its hint asks for.
    """
    hinted = [(row.hint, row.branch) for row in rows if row.hint is not None]
    if not hinted:
        return {}
    leaked = sum(leaks(chat, hint, branch) for hint, branch in hinted)
    tokens = sum(len(one.ids) for hint, branch in hinted for one in place(chat, hint, branch))
    return {"hint/leak_frac": leaked / len(hinted), "hint/tokens/mean": tokens / len(hinted)}


def leaks(chat: ChatFormat, hint: Hint, branch: Branch) -> bool:
    """Whether :data:`LEAK_NGRAM` tokens of the hint in a row stand among the tokens the agent sampled.

    A student never read the hint, so a long literal run of it in its own words means the hint reached it. Runs are
    looked for inside one completion at a time. A hint of fewer tokens cannot be told from chance: False. Nor can calls
    and answers that it quotes: an agent that acts as another did says them by itself, and its own it has said. Of such
    a part the heading alone counts.
    """
    said = [branch.token_ids[call.start:call.end].tolist() for call in branch.calls]
    parts = (part for text in (hint.text, *(text for _, text in hint.turns)) for part in text.split(JOINT))
    texts = [part.partition("\n")[0] if part.startswith(QUOTING) else part for part in parts]
    return any(has_run(chat.encode(text), said, LEAK_NGRAM) for text in texts)


def has_run(needle: Sequence[int], haystacks: Sequence[Sequence[int]], ngram: int) -> bool:
    """Whether any ``ngram`` consecutive items of ``needle`` stand consecutively in one of the haystacks.

    >>> has_run([1, 2, 3, 4], [[0, 2, 3, 4], [9]], 3), has_run([1, 2, 3, 4], [[2, 3], [4, 1]], 3)
    (True, False)
    """
    grams = {tuple(needle[i:i + ngram]) for i in range(len(needle) - ngram + 1)}
    return any(tuple(hay[i:i + ngram]) in grams for hay in haystacks for i in range(len(hay) - ngram + 1))
