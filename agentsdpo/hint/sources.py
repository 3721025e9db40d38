"""Where hints come from. First source: the grader's feedback on the criteria of this very attempt.

A row whose hint cannot be made is dropped and counted, never given an empty hint: with nothing to read the teacher
equals the student, the gap is zero, and the fault would hide in a healthy-looking loss.
"""

from collections import Counter

from agentsdpo.errors import TrainForbidden
from agentsdpo.hint.config import HintConfig
from agentsdpo.types import Episode, Hint

DROPS = ("forbidden", "unscored", "silent")
"""Why an episode gets no hint: its task may not be trained on; it has no grade; its grade says too little."""


def criteria_hint(episode: Episode, config: HintConfig, *, author: str) -> Hint | None:
    """The hint of one graded episode: the grader's own words, or None when they say too little.

    Rationales are for the audit and never become part of a hint.

    Args:
        episode: must be of a task that may be trained on.
        config: the least length; level and scope were the grader's when it wrote the feedback.
        author: the grader's name or the judge's model id, recorded in the hint.

    Raises:
        TrainForbidden: the episode's task does not allow training; a hint is training data.
    """
    if not episode.train_allowed:
        raise TrainForbidden(f"a hint was asked for episode {episode.episode_id} of task {episode.task_id}, which has "
                             "train_allowed=False", fix="train on a suite whose licence allows it")
    text = episode.grade.feedback.strip() if episode.grade else ""
    if len(text) < config.min_chars:
        return None
    return Hint(text=text, source="criteria", author=author)


class CriteriaSource:
    """Hints from criteria for a stream of episodes; keeps count of what it made and what it dropped.

    An episode that already carries a hint keeps it: it was written when the attempt was graded.

    Args:
        config: the least length of a hint.
        author: the grader's name or the judge's model id.

    >>> from agentsdpo.types import Grade, StopReason
    >>> episode = Episode(episode_id="e", task_id="t", env_id="desk", branches=(), stop_reason=StopReason.COMPLETED,
    ...                   train_allowed=True, grade=Grade.of([], feedback="For tax work: unit k_usd."))
    >>> source = CriteriaSource(HintConfig(), author="desk-grader")
    >>> source.hint(episode).text
    'For tax work: unit k_usd.'
    >>> source.hint(episode.model_copy(update={"train_allowed": False})) is None
    True
    >>> source.metrics()
    {'hint/made': 1.0, 'hint/dropped_frac': 0.5, 'hint/novelty': 1.0}
    """

    def __init__(self, config: HintConfig, *, author: str) -> None:
        self.config, self.author = config, author
        self.counts: Counter[str] = Counter()
        self._texts: set[str] = set()

    def hint(self, episode: Episode) -> Hint | None:
        """The hint of one episode; None when it is dropped, with the reason counted (see :data:`DROPS`)."""
        drop = "forbidden" if not episode.train_allowed else ""
        hint = None if drop else episode.hint or criteria_hint(episode, self.config, author=self.author)
        if hint is None:
            self.counts[drop or ("silent" if episode.grade else "unscored")] += 1
            return None
        self.counts["made"] += 1
        self._texts.add(hint.text)
        return hint

    def metrics(self, *, reset: bool = True) -> dict[str, float]:
        """Counts since the last reset: hints made, share of episodes dropped, share of distinct texts."""
        made, seen = self.counts["made"], sum(self.counts.values())
        values = {"hint/made": float(made), "hint/dropped_frac": 1.0 - made / seen if seen else 0.0,
                  "hint/novelty": len(self._texts) / made if made else 0.0}
        if reset:
            self.counts, self._texts = Counter(), set()
        return values
