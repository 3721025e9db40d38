"""Answers that say nothing of their own: no judge is asked about them, since judges have been fooled by less.

A lone colon or the opening of a thought made judges say yes in 80 to 90 % of cases (arXiv 2507.08794).
"""

import re

from agentsdpo.types import Task

_WORD = re.compile(r"[^\W_]+")
_OPENERS = frozenset((
    "thought process", "thoughts", "thinking", "think", "solution", "answer", "final answer", "the answer is",
    "lets solve this problem step by step", "let us solve this problem step by step", "lets think step by step",
    "let me think", "let me think step by step", "lets begin", "task completed", "the task is complete",
    "all criteria are met", "the criterion is met"))
_THINKS = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL)
_SHORTEST = 6
"""Words of a criterion below which an honest answer may well be the same words."""
_REST = 20
"""One word in so many may be left over beside what was repeated."""


def says_nothing(task: Task, answer: str) -> str:
    """Why the answer cannot meet anything, empty when it might.

    >>> from agentsdpo.types import Criterion
    >>> rubric = (Criterion(id="a", text="States that revenue was 5 m"), Criterion(id="b", text="Names the source"))
    >>> task = Task(task_id="t", prompt="What was revenue?", rubric=rubric)
    >>> stuffed = "States that revenue was 5 m. Names the source"
    >>> [bool(says_nothing(task, text)) for text in ("", ":", "What was revenue?", stuffed, "5 m, says the ledger")]
    [True, True, True, True, False]
    """
    words = _words(_THINKS.sub(" ", answer))
    if not words or " ".join(words) in _OPENERS:
        return "the answer is empty, punctuation or an opening without what it opens"
    criteria = [_words(criterion.text) for criterion in task.rubric]
    whole = [word for text in criteria for word in text]
    repeated = [_words(task.prompt), whole if len(criteria) > 1 else []]
    repeated += [text for text in criteria if len(text) >= _SHORTEST]
    if _left(words, repeated) <= len(words) // _REST:
        return "the answer repeats the request or the rubric and says nothing else"
    return ""


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold().replace("'", "").replace("\u2019", ""))


def _left(words: list[str], repeated: list[list[str]]) -> int:
    """Words of an answer outside whole repetitions of any of the texts."""
    covered = [False] * len(words)
    for text in repeated:
        for i in range(len(words) - len(text) + 1):
            if text and words[i] == text[0] and words[i:i + len(text)] == text:
                covered[i:i + len(text)] = [True] * len(text)
    return covered.count(False)
