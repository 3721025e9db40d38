"""Criteria that a program checks: ``check = "package.module:function"`` in a task names a function marked as one."""

from collections.abc import Callable
from importlib import import_module
from typing import TypeVar

from agentsdpo.errors import ConfigError
from agentsdpo.types import Criterion, CriterionResult, Outcome, Task

Check = Callable[[Task, Outcome], bool | float]
"""Looks at what an attempt left behind; True or 1.0 is met."""
C = TypeVar("C", bound=Check)
_MARK = "__agentsdpo_check__"


def check(function: C) -> C:
    """Mark a function as a check. Nothing else can be named by a task, whoever wrote that task.

    >>> @check
    ... def says_five(task: Task, outcome: Outcome) -> bool:
    ...     return outcome.answer == "5"
    >>> says_five(Task(task_id="t", prompt="2 + 3?"), Outcome(answer="5", initial=b"", final=b""))
    True
    """
    setattr(function, _MARK, True)
    return function


def find_check(name: str) -> Check:
    """The function of that name.

    Raises:
        ConfigError: no such module or function, or it is not marked with :func:`check`.

    >>> find_check("os:remove")
    Traceback (most recent call last):
    agentsdpo.errors.ConfigError: os:remove is no check; mark the function with @check of agentsdpo...apex.checks
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"there is no check {name!r}: {error}",
                          fix="write package.module:function, with the package where Python finds it") from error
    if not getattr(found, _MARK, False):
        raise ConfigError(f"{name} is no check",
                          fix="mark the function with @check of agentsdpo.benchmarks.apex.checks")
    return found


def run_check(criterion: Criterion, task: Task, outcome: Outcome) -> CriterionResult:
    """The result of a programmatic criterion; a check that breaks is an error of the check, never a zero."""
    assert criterion.check is not None
    function = find_check(criterion.check)
    try:
        score = float(function(task, outcome))
    except Exception as fault:  # noqa: BLE001 - anybody's code
        return CriterionResult(id=criterion.id, status="error", score=None,
                               rationale=f"check {criterion.check} broke: {type(fault).__name__}: {fault}")
    if not 0.0 <= score <= 1.0:
        return CriterionResult(id=criterion.id, status="error", score=None,
                               rationale=f"check {criterion.check} gave {score}, not 0 to 1")
    return CriterionResult(id=criterion.id, score=score, rationale=f"check {criterion.check}")
