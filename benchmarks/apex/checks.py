"""Criteria that a program checks: ``check = "package.module:function"`` in a task names a function marked as one."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from importlib import import_module
from math import nan
from threading import Thread
from typing import TypeVar

from agentsdpo.errors import ConfigError
from agentsdpo.types import Criterion, CriterionResult, Outcome, Task

Check = Callable[[Task, Outcome], bool | float]
"""Looks at what an attempt left behind; True or 1.0 is met."""
C = TypeVar("C", bound=Check)
_MARK = "__agentsdpo_check__"
PATIENCE_S = 300.0
"""Seconds after which a check that has not answered is an error."""


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
                          fix="write package.module:function; PYTHONPATH=FOLDER says where the module is") from error
    if not getattr(found, _MARK, False):
        raise ConfigError(f"{name} is no check",
                          fix="mark the function with @check of agentsdpo.benchmarks.apex.checks")
    return found


async def run_check(criterion: Criterion, task: Task, outcome: Outcome, *,
                    patience: float = PATIENCE_S) -> CriterionResult:
    """The result of a programmatic criterion; a check that breaks or hangs is an error of the check, never a zero.

    It runs in a thread of its own, beside those of other attempts.

    Args:
        patience: seconds it may take.
    """
    assert criterion.check is not None
    answer = _started(find_check(criterion.check), task, outcome)
    try:
        score, problem = await asyncio.wait_for(asyncio.wrap_future(answer), patience)
    except TimeoutError:
        score, problem = nan, f"gave no answer within {patience:g} s"
    if not problem and not 0.0 <= score <= 1.0:
        problem = f"gave {score}, not 0 to 1"
    if problem:
        return CriterionResult(id=criterion.id, status="error", score=None,
                               rationale=f"check {criterion.check} {problem}")
    return CriterionResult(id=criterion.id, score=score, rationale=f"check {criterion.check}")


def _started(function: Check, task: Task, outcome: Outcome) -> "Future[tuple[float, str]]":
    """Score and problem to come. No pool: the end of the program would wait for a thread of it that hangs."""
    answer: Future[tuple[float, str]] = Future()
    answer.set_running_or_notify_cancel()  # so that nobody's loss of patience cancels it under the thread's hands

    def work() -> None:
        try:
            answer.set_result((float(function(task, outcome)), ""))
        except BaseException as fault:  # noqa: BLE001 - anybody's code, which may call sys.exit
            answer.set_result((nan, f"broke: {type(fault).__name__}: {fault}"))

    Thread(target=work, name="check", daemon=True).start()
    return answer
