"""Hints from others: what a successful attempt at the same task, or at one much like it, did or did differently."""

import re

from agentsdpo.calls import call_line
from agentsdpo.hint.config import HintConfig
from agentsdpo.hint.sources import MISSED, SIMILAR, SOLVED, VAIN, fitted
from agentsdpo.types import Episode, Hint

_WORD = re.compile(r"\w+")
_SAME = 2.0  # nearer than equal words


class Peer:
    """Remembers successful episodes and shows one to those that failed: their calls, without their reasoning.

    Another attempt at the same task comes first, then the most similar task: by the share of words two openings have in
    common (Jaccard index), from ``peer_similarity`` on. An episode is never its own peer.

    Args:
        config: ``peer_similarity``, the number of episodes remembered, the longest text.
    """

    def __init__(self, config: HintConfig) -> None:
        self.config = config
        self._known: dict[str, tuple[str, frozenset[str], list[str]]] = {}

    def see(self, episode: Episode) -> None:
        """Remember a success; the oldest makes room."""
        if not (episode.grade and episode.grade.passed and episode.train_allowed) or episode.episode_id in self._known:
            return
        if len(self._known) >= self.config.peers:
            self._known.pop(next(iter(self._known)))
        self._known[episode.episode_id] = episode.task_id, words(asked(episode)), deeds(episode)

    async def close(self) -> None:
        """Nothing is held."""

    async def write(self, episode: Episode) -> Hint | None:
        """What the nearest success did; None for a success, and when there is none near enough."""
        same, done = self._nearest(episode)
        if not done:
            return None
        text = fitted([SOLVED if same else SIMILAR, *done], self.config.max_chars)
        return Hint(text=text, source="peer", author="peer", answer_bearing=same) if text else None

    def _nearest(self, episode: Episode) -> tuple[bool, list[str]]:
        """Whether the nearest success was at the same task, and what it did; nothing for a success of its own."""
        if episode.grade is None or episode.grade.passed:
            return False, []
        own = words(asked(episode))
        best, lines = 0.0, []
        for name, (task, theirs, done) in self._known.items():
            near = _SAME if task == episode.task_id else similarity(own, theirs)
            if name != episode.episode_id and near >= max(best, self.config.peer_similarity):
                best, lines = near, done  # of equally near ones the newest
        return best == _SAME, lines


class Contrast(Peer):
    """What a successful attempt at the same task did and a failed one did not, and the other way round.

    Needs several attempts at each task (``group``); after SGCD's contrast of siblings (2606.12634).
    """

    async def write(self, episode: Episode) -> Hint | None:
        """The differing calls; None without a successful sibling, and where the calls are the same."""
        same, done = self._nearest(episode)
        own = deeds(episode)
        missed, vain = [one for one in done if one not in own], [one for one in own if one not in done]
        if not same or not (missed or vain):
            return None
        lines = [MISSED, *missed] if missed else []
        more = [VAIN, *vain] if vain else []
        lines += ["\n".join(more[:2]), *more[2:]] if lines and more else more  # no heading without a line under it
        text = fitted(lines, self.config.max_chars)
        return Hint(text=text, source="contrast", author="peer", answer_bearing=True) if text else None


def asked(episode: Episode) -> str:
    """What the user asked for at the start."""
    return next((str(m["content"]) for m in episode.messages if m["role"] == "user"), "")


def deeds(episode: Episode) -> list[str]:
    """The calls of an episode and its final words, each in one line."""
    lines = [call_line(**call["function"]) for m in episode.messages for call in m.get("tool_calls") or ()]
    answer = episode.metadata.get("answer")
    return [*lines, *([f"and answered: {answer}"] if answer else [])]


def words(text: str) -> frozenset[str]:
    """Its different words."""
    return frozenset(_WORD.findall(text.lower()))


def similarity(one: frozenset[str], other: frozenset[str]) -> float:
    """Jaccard index, 0 to 1.

    >>> similarity(words("file the tax report"), words("file the cash report"))
    0.6
    """
    union = len(one | other)
    return len(one & other) / union if union else 0.0
