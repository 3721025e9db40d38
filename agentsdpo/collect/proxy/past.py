"""Conversations that have ended, as far as somebody may still answer them: people come back after hours."""

from collections import OrderedDict
from collections.abc import Sequence

from agentsdpo.collect.proxy.conversation import Conversation, Late
from agentsdpo.collect.proxy.feedback import said_next
from agentsdpo.types import Json

MOST = 20_000
"""Answers that are remembered: 7 MB, each the last of one conversation."""


class Past:
    """The answers that stand last in the branches of ended conversations, the newest :data:`MOST` of them."""

    def __init__(self) -> None:
        self._ends: OrderedDict[bytes, tuple[str, int, int]] = OrderedDict()

    def keep(self, ended: Conversation) -> None:
        """Remember where a conversation may be gone on from."""
        for digest, turn in ended.ends():
            self._ends[digest] = ended.name, ended.attempt, turn
            self._ends.move_to_end(digest)
        while len(self._ends) > MOST:
            self._ends.popitem(last=False)

    def late(self, asked: str | None, chain: Sequence[bytes], messages: Sequence[Json]) -> Late | None:
        """What messages say about the answer that they go on from, if that is one of these and they say anything.

        Args:
            asked: the conversation that the request names, if any: it speaks of no other, though both began alike.
            chain: digests of the history after each message. messages: of the request.
        """
        for n in range(len(messages) - 1, 0, -1):
            if messages[n]["role"] == "assistant":
                return None  # and nobody has recorded it
            if chain[n] in self._ends:
                name, attempt, turn = self._ends[chain[n]]
                if asked not in (None, name):
                    return None
                items = said_next(turn, messages[n:])
                return Late(chain[n], name, attempt, items) if items else None
        return None

    def heard(self, late: Late) -> None:
        """It was written down, and is not to be once more when the client asks again."""
        self._ends.pop(late.digest, None)
