"""Hints from criteria: what is said at each level, what is dropped, what is forbidden."""

import pytest

from agentsdpo.errors import TrainForbidden
from agentsdpo.hint.config import HintConfig
from agentsdpo.hint.sources import CriteriaSource, criteria_hint
from agentsdpo.types import CriterionResult, Episode, Grade, Hint, StopReason

RULE = "For tax work use the audit sheet; unit k_usd."
RESULTS = [CriterionResult(id="unit", score=0.0, feedback="the unit is wrong", rationale="AUDIT ONLY"),
           CriterionResult(id="file", score=1.0, feedback="right folder"),
           CriterionResult(id="round", score=0.0)]


def graded(feedback: str = RULE, *, train_allowed: bool = True, results: list[CriterionResult] | None = None,
           hint: Hint | None = None) -> Episode:
    return Episode(episode_id="e7", task_id="desk/1", env_id="desk", branches=(), stop_reason=StopReason.COMPLETED,
                   grade=Grade.of(RESULTS if results is None else results, feedback), train_allowed=train_allowed,
                   hint=hint)


def test_hint_is_what_the_grader_said_and_no_more() -> None:
    hint = criteria_hint(graded(f"  {RULE}\n"), HintConfig(), author="desk")
    assert hint is not None
    assert hint == Hint(text=RULE, source="criteria", author="desk")
    assert (hint.placement, hint.scope) == ("system_prefix", "episode")
    assert "AUDIT" not in hint.text, "a rationale is for the audit, never for a hint"


@pytest.mark.parametrize(("text", "made"), [("123456789", False), ("1234567890", True), ("   12345678    ", False)])
def test_short_text_is_nothing_to_say(text: str, made: bool) -> None:
    assert (criteria_hint(graded(text), HintConfig(min_chars=10), author="desk") is not None) is made


def test_drops_are_counted_by_reason() -> None:
    source = CriteriaSource(HintConfig(), author="desk")
    ungraded = graded().model_copy(update={"grade": None})
    episodes = [graded(), graded("For cash work: unit eur."), graded(), graded(""), ungraded,
                graded(train_allowed=False)]
    hints = [source.hint(episode) for episode in episodes]
    assert [hint is not None for hint in hints] == [True, True, True, False, False, False]
    assert dict(source.counts) == {"made": 3, "silent": 1, "unscored": 1, "forbidden": 1}
    assert source.metrics() == {"hint/made": 3.0, "hint/dropped_frac": 0.5, "hint/novelty": pytest.approx(2 / 3)}
    assert source.metrics() == {"hint/made": 0.0, "hint/dropped_frac": 0.0, "hint/novelty": 0.0}


def test_hint_written_at_grading_is_kept_unless_training_is_forbidden() -> None:
    gold = Hint(text="Send it to the cfo.", source="gold", author="expert")
    source = CriteriaSource(HintConfig(), author="desk")
    assert source.hint(graded(hint=gold)) is gold
    assert source.hint(graded(hint=gold, train_allowed=False)) is None


def test_forcing_a_hint_on_forbidden_data_raises() -> None:
    with pytest.raises(TrainForbidden, match=r"episode e7 of task desk/1, which has train_allowed=False"):
        criteria_hint(graded(train_allowed=False), HintConfig(), author="desk")
