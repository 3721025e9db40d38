"""The filter language of the store: one Python expression over the columns of a branch, parsed and never run.

    env_id == 'desk' and reward >= 0.5 and status in ('sealed', 'truncated')
    0.2 < reward <= 0.8 and not like(task_id, 'demo-%') and t_stored >= '2026-01-31'
    n_trainable / n_tokens < 0.1 or label is None

Nulls behave as in SQL: a comparison with null is null, and a row is kept only where the whole expression is true.
Arithmetic is in float64 throughout.
"""

import ast
import operator
from collections.abc import Callable
from datetime import UTC, datetime
from difflib import get_close_matches
from functools import partial, reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from agentsdpo.errors import ConfigError
from agentsdpo.replay.schema import GIVEN, SCALARS, SCHEMA

COLUMNS = pa.schema([*(SCHEMA.field(name) for name in SCALARS), *GIVEN])
"""What can be asked for: a row's scalar columns, with ``reward`` as the overlays left it, and what is given to it."""

MAX_LENGTH = 4_096
"""Characters of an expression."""


def _call(name: str, *arguments: Any) -> pc.Expression:
    """A function of Arrow by name: pyarrow makes them when it is imported, where no type checker sees them."""
    return getattr(pc, name)(*arguments)


_COMPARE: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge}
_ARITHMETIC: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    node: partial(_call, name) for node, name in
    ((ast.Add, "add"), (ast.Sub, "subtract"), (ast.Mult, "multiply"), (ast.Div, "divide"))}
"""Unchecked, on float64: a division by zero is an infinity or NaN, not the end of the query."""
_GRAMMAR = ("write comparisons (== != < <= > >= in, is None) of columns, numbers and 'text', joined by and, or, not; "
            "arithmetic + - * /; like(column, 'pattern%'), length(column)")


def where(text: str) -> pc.Expression:
    """The Arrow filter a text stands for; apply it to any table that has :data:`COLUMNS`.

    Args:
        text: at most 4,096 characters of the language above. A date is ISO 8601 text, UTC unless it says otherwise.

    Raises:
        ConfigError: not in the language, an unknown column (the nearest is named), or types that cannot be compared.

    >>> where("0.5 <= reward < 1 and like(env_id, 'desk%')")
    <pyarrow.compute.Expression (((0.5 <= reward) and (reward < 1)) and match_like(env_id, ...))>
    >>> where("n_token > 0")
    Traceback (most recent call last):
    agentsdpo.errors.ConfigError: the filter names the column 'n_token', which does not exist; did you mean n_tokens?
    """
    if len(text) > MAX_LENGTH:
        raise ConfigError(f"the filter has {len(text)} characters, {MAX_LENGTH} are allowed", fix="write a shorter one")
    try:
        expression = _expression(ast.parse(text.strip(), mode="eval").body)
        COLUMNS.empty_table().filter(expression)
    except ConfigError:
        raise
    except pa.ArrowException as error:
        raise ConfigError(f"the filter {text!r} compares or computes what does not fit: {error}",
                          fix="compare numbers with numbers, text with 'text', yes-or-no columns with True or False; "
                              "a filter as a whole is a comparison") from error
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise ConfigError(f"the filter {text!r} cannot be read: {error}", fix=_GRAMMAR) from error
    return expression


def select(table: pa.Table, condition: str | pc.Expression | None) -> pa.Table:
    """Rows of a table with :data:`COLUMNS` for which the condition holds; None keeps all. Raises as :func:`where`."""
    if condition is None:
        return table
    return table.filter(where(condition) if isinstance(condition, str) else condition)


def _expression(node: ast.AST) -> pc.Expression:
    """The expression of one node of the syntax tree; what has no case here is not in the language."""
    match node:
        case ast.Constant():
            return pc.scalar(_constant(node))
        case ast.Name(id=name):
            return _column(name)
        case ast.BoolOp(op=op, values=values):
            return reduce(operator.and_ if isinstance(op, ast.And) else operator.or_, map(_expression, values))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return ~_expression(operand)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _call("negate", _number(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            return _ARITHMETIC[type(op)](_number(left), _number(right))
        case ast.Compare(left=left, ops=ops, comparators=rights):
            pairs = zip([left, *rights[:-1]], ops, rights, strict=True)
            return reduce(operator.and_, (_comparison(*pair) for pair in pairs))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            return _function(name, args)
    raise ConfigError(f"the filter holds {ast.unparse(node)!r}, which is not in its language", fix=_GRAMMAR)


def _constant(node: ast.AST) -> bool | int | float | str:
    """A literal: text, a number (negative ones too), True or False."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.Constant(value=None):
            raise ConfigError("the filter compares with None, which is never true", fix="write `column is None`")
    raise ConfigError(f"the filter holds {ast.unparse(node)!r} where a value belongs", fix="write a number or 'text'")


def _column(name: str) -> pc.Expression:
    if name not in COLUMNS.names:
        near = get_close_matches(name, COLUMNS.names, 3, 0.75) or COLUMNS.names
        raise ConfigError(f"the filter names the column {name!r}, which does not exist",
                          fix=f"did you mean {' or '.join(near) if len(near) <= 3 else 'one of ' + ', '.join(near)}?")
    return pc.field(name)


def _number(node: ast.AST) -> pc.Expression:
    """An operand as float64: Arrow would narrow a literal to 32 bits and then refuse large integers beside it."""
    kind = COLUMNS.field(node.id).type if isinstance(node, ast.Name) and node.id in COLUMNS.names else None
    if kind == pa.float64():
        return _expression(node)
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return pc.scalar(float(node.value))
    if isinstance(node, ast.Constant) or (kind is not None and not pa.types.is_integer(kind)):
        raise ConfigError(f"the filter computes with {ast.unparse(node)}, which is {kind or 'text'} and no number",
                          fix="compute and compare with numbers there")
    return _expression(node).cast(pa.float64(), safe=False)


def _is_real(node: ast.AST) -> bool:
    """Whether a side of a comparison is a fraction or computed, so that both sides must be float64."""
    return (isinstance(node, ast.Constant) and isinstance(node.value, float)) or (
        isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)) or isinstance(node, ast.BinOp)


def _comparison(left: ast.AST, op: ast.AST, right: ast.AST) -> pc.Expression:
    """One link of a chain of comparisons."""
    if isinstance(op, (ast.In, ast.NotIn)):
        return _membership(_expression(left), right, isinstance(op, ast.In))
    if isinstance(op, (ast.Is, ast.IsNot)):
        if not isinstance(right, ast.Constant) or right.value is not None:
            raise ConfigError("the filter uses `is` with something other than None", fix="write == or !=")
        null = _expression(left).is_null()
        return null if isinstance(op, ast.Is) else ~null
    if _is_time(left) != _is_time(right):
        return _COMPARE[type(op)](_moment(left), _moment(right))
    if _is_real(left) or _is_real(right):
        return _COMPARE[type(op)](_number(left), _number(right))
    return _COMPARE[type(op)](_expression(left), _expression(right))


def _membership(left: pc.Expression, right: ast.AST, wanted: bool) -> pc.Expression:
    """``left in (...)``; ``not in`` stays null where the left side is."""
    if not isinstance(right, (ast.Tuple, ast.List, ast.Set)):
        raise ConfigError(f"the filter looks for a value in {ast.unparse(right)!r}",
                          fix="write a list, e.g. status in ('sealed', 'truncated'); for parts of text like(column, "
                              "'%part%')")
    found = left.isin([_constant(item) for item in right.elts])
    return found if wanted else ~found & left.is_valid()


def _is_time(node: ast.AST) -> bool:
    return (isinstance(node, ast.Name) and node.id in COLUMNS.names
            and pa.types.is_timestamp(COLUMNS.field(node.id).type))


def _moment(node: ast.AST) -> pc.Expression:
    """A time column, or the time an ISO 8601 text names."""
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        return _expression(node)
    time = datetime.fromisoformat(node.value)
    return pc.scalar(pa.scalar(time if time.tzinfo else time.replace(tzinfo=UTC), pa.timestamp("us", tz="UTC")))


def _function(name: str, args: list[ast.expr]) -> pc.Expression:
    match name, args:
        case "like", [column, ast.Constant(value=str() as pattern)]:
            return _call("match_like", _expression(column), pattern)
        case "length", [column]:
            return _call("utf8_length", _expression(column))
    raise ConfigError(f"the filter calls {name} with {len(args)} arguments",
                      fix="like(column, 'pattern%') and length(column) are the functions there are")
