"""Where hints come from. First source: the grader's feedback on the criteria of this very attempt.

A row whose hint cannot be made is dropped and counted, never given an empty hint: with nothing to read the teacher
equals the student, the gap is zero, and the fault would hide in a healthy-looking loss.
"""

from collections import Counter

from agentsdpo.errors import TrainForbidden
from agentsdpo.hint.config import HintConfig
from agentsdpo.types import Episode, Grade, Hint

DROPS = ("forbidden", "unscored", "silent")
"""Why an episode gets no hint: its task may not be trained on; it has no grade; its grade says too little."""


def feedback_text(grade: Grade, level: int) -> str:
    """What a grade says at one level of detail, stripped; empty when it says nothing.

    Args:
        grade: the results of one attempt; only those with status ``ok`` and a score below 0.99 are failed.
        level: 1 names the failed criteria, 2 adds the feedback on each, 3 is the grader's whole feedback.

    >>> from agentsdpo.types import CriterionResult
    >>> results = [CriterionResult(id="unit", score=0.0, feedback="the unit is k_usd"),
    ...            CriterionResult(id="file", score=1.0, feedback="fine")]
    >>> grade = Grade.of(results, feedback="For tax work: unit k_usd.")
    >>> [feedback_text(grade, level) for level in (1, 2, 3)]
    ['Not met: unit.', 'Not met: unit (the unit is k_usd).', 'For tax work: unit k_usd.']
    """
    if level == 3:
        return grade.feedback.strip()
    failed = [r for r in grade.results if r.status == "ok" and r.score is not None and r.score < 0.99]
    if not failed:
        return ""
    details = [f"{r.id} ({r.feedback.strip()})" if level == 2 and r.feedback.strip() else r.id for r in failed]
    return f"Not met: {'; '.join(details)}."


def criteria_hint(episode: Episode, config: HintConfig, *, author: str) -> Hint | None:
    """The hint of one graded episode, or None when its grade has too little to say.

    Args:
        episode: must be of a task that may be trained on.
        author: the grader's name or the judge's model id, recorded in the hint.

    Raises:
        TrainForbidden: the episode's task does not allow training; a hint is training data.
    """
    if not episode.train_allowed:
        raise TrainForbidden(f"a hint was asked for episode {episode.episode_id} of task {episode.task_id}, which has "
                             "train_allowed=False", fix="train on a suite whose licence allows it")
    text = feedback_text(episode.grade, config.level) if episode.grade else ""
    if len(text) < config.min_chars:
        return None
    return Hint(text=text, source="criteria", author=author)


class CriteriaSource:
    """Hints from criteria for a stream of episodes; keeps count of what it made and what it dropped.

    An episode that already carries a hint keeps it: it was written when the attempt was graded.

    Args:
        config: level and least length.
        author: the grader's name or the judge's model id.

    >>> from agentsdpo.types import StopReason
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
