"""The hint writer: asks the sources in order, and counts what they made and why there was nothing.

An episode whose hint cannot be made is dropped and counted, never given an empty hint: with nothing to read the teacher
equals the student, the gap is zero, and the fault would hide in a healthy-looking loss.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from agentsdpo.collect.waiting import waited
from agentsdpo.errors import AgentSdpoError, ConfigError, TrainForbidden
from agentsdpo.hint.config import HintConfig
from agentsdpo.hint.critic import Critic, NextStep, hosted
from agentsdpo.hint.peers import Contrast, Peer
from agentsdpo.hint.sources import JOINT, Alone, Criteria, Expert, Feedback, Source
from agentsdpo.types import Episode, Hint, Suite

_log = logging.getLogger(__name__)


def make_hinter(config: HintConfig, suite: Suite) -> "Hinter":
    """The hint writer that a configuration names.

    Raises:
        ConfigError: a source needs what the suite or the configuration does not have.
    """
    return Hinter({name: _make(name, config, suite) for name in config.sources}, config)


def _make(name: str, config: HintConfig, suite: Suite) -> Source:
    if name == "criteria":
        return Criteria(f"{suite.name} grader")
    if name == "feedback":
        return Feedback(config)
    if name == "peer":
        return Peer(config)
    if name == "contrast":
        return Contrast(config)
    if name in ("judge", "next_step"):
        return (Critic if name == "judge" else NextStep)(hosted(config.judge), config)
    if not hasattr(suite, name):
        raise ConfigError(f"hint.sources names {name!r} but suite {suite.name} has none",
                          fix=f"give the suite a method {name}(task) that returns a text")
    return Expert(suite, name, config)


class Hinter:
    """Writes hints for a stream of episodes.

    An episode that already carries a hint keeps it: it was written when the attempt was graded.

    Args:
        sources: by name, in order.
        config: ``pick``, ``min_chars``, ``placement``.

    Attributes:
        broken: what the last source that broke said; logged when it is news.

    >>> from agentsdpo.types import Grade, StopReason
    >>> episode = Episode(episode_id="e", task_id="t", env_id="desk", branches=(), stop_reason=StopReason.COMPLETED,
    ...                   train_allowed=True, grade=Grade.of([], feedback="For tax work: unit k_usd."))
    >>> hinter = Hinter({"criteria": Criteria("grader")}, HintConfig())
    >>> hinter.hint(episode).text, hinter.hint(episode.model_copy(update={"train_allowed": False}))
    ('For tax work: unit k_usd.', None)
    >>> hinter.metrics()
    {'hint/made': 1.0, 'hint/dropped_frac': 0.5, 'hint/novelty': 1.0}
    """

    def __init__(self, sources: Mapping[str, Source], config: HintConfig) -> None:
        self.sources, self.config = dict(sources), config
        self.counts: Counter[str] = Counter()
        self.broken: str = ""
        self._texts: set[tuple[Any, ...]] = set()

    def hint(self, episode: Episode) -> Hint | None:
        """The hint of one episode; None when it is dropped, with the reason counted.

        Reasons: ``forbidden`` (the task may not be trained on), ``unscored`` (no grade), ``silent`` (no source says
        enough), ``broken`` (a source raised).
        """
        return self.hints([episode])[0]

    def remember(self, episodes: Iterable[Episode]) -> None:
        """Take in what an earlier life of the program saw, oldest first; not read where no source goes by others."""
        learning = [source for source in self.sources.values() if not isinstance(source, Alone)]
        for episode in episodes if learning else ():
            for source in learning:
                source.see(episode)

    def hints(self, episodes: Sequence[Episode]) -> list[Hint | None]:
        """Hints of several episodes, at once; each may be a peer of the others."""
        for episode in episodes:
            for source in self.sources.values():
                source.see(episode)
        found = waited(self._all(episodes))
        for hint in found:
            if hint is not None:
                self.counts["made"] += 1
                self._texts.add((hint.text, hint.turns))
        return found

    async def _all(self, episodes: Sequence[Episode]) -> list[Hint | None]:
        try:
            return list(await asyncio.gather(*map(self._one, episodes)))
        finally:
            for source in self.sources.values():
                await source.close()

    async def _one(self, episode: Episode) -> Hint | None:
        """One episode's hint, its drop counted; what a source raises on purpose drops this episode alone."""
        if not episode.train_allowed:
            self.counts["forbidden"] += 1
            return None
        try:
            hint = episode.hint or await self.write(episode)
        except (ConfigError, TrainForbidden):
            raise
        except AgentSdpoError as error:
            self.counts["broken"] += 1
            if str(error) != self.broken:
                self.broken = str(error)
                _log.warning("no hint for episode %s: %s", episode.episode_id, error)
            return None
        if hint is None:
            self.counts["silent" if episode.grade else "unscored"] += 1
        return hint

    async def write(self, episode: Episode) -> Hint | None:
        """A hint, whatever the episode has: of the first source that says enough, or of all that do.

        Raises:
            TrainForbidden: the episode's task does not allow training; a hint is training data.
        """
        if not episode.train_allowed:
            raise TrainForbidden(f"a hint was asked for episode {episode.episode_id} of task {episode.task_id}, which "
                                 "has train_allowed=False", fix="train on a suite whose licence allows it")
        said: list[Hint] = []
        for source in self.sources.values():
            hint = await source.write(episode)
            if hint is not None and (hint.turns or len(hint.text) >= self.config.min_chars):
                said.append(hint)
                if self.config.pick == "first":
                    break
        if not said:
            return None
        turns: dict[int, list[str]] = {}
        for turn, text in (one for hint in said for one in hint.turns):
            turns.setdefault(turn, []).append(text)
        return said[0].model_copy(update={"text": JOINT.join(one.text for one in said if one.text),
                                          "turns": tuple((turn, JOINT.join(turns[turn])) for turn in sorted(turns)),
                                          "author": ", ".join(dict.fromkeys(one.author for one in said)),
                                          "answer_bearing": any(one.answer_bearing for one in said),
                                          "placement": self.config.placement})

    def metrics(self, *, reset: bool = True) -> dict[str, float]:
        """Counts since the last reset: hints made, share of episodes dropped, share of distinct texts; nothing where
        nobody is to write hints."""
        if not self.sources:
            return {}
        made, seen = self.counts["made"], sum(self.counts.values())
        values = {"hint/made": float(made), "hint/dropped_frac": 1.0 - made / seen if seen else 0.0,
                  "hint/novelty": len(self._texts) / made if made else 0.0}
        if reset:
            self.counts, self._texts = Counter(), set()
        return values
