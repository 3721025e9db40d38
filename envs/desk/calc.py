"""Figures: a small parser of arithmetic, never ``eval``, and how a figure is presented. Decimals, no floats."""

from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_UP, Decimal, DivisionByZero, InvalidOperation


class BadExpression(ValueError):
    """The text is not an expression over figures, is too long, or divides by zero."""


LONGEST = 200
"""Characters of an expression; more brackets than that would not fit onto Python's stack."""
_SCALE = {"usd": Decimal(1), "k_usd": Decimal(1000), "m_usd": Decimal(1_000_000), "eur": Decimal(1)}
_MODES = {"nearest": ROUND_HALF_UP, "up": ROUND_CEILING, "down": ROUND_FLOOR}


def present(value: Decimal, unit: str, rounding: str) -> str:
    """A figure in dollars (or already in euro) in ``unit``, rounded to whole hundreds unless ``exact``.

    >>> present(Decimal(4821), "k_usd", "up"), present(Decimal(4821), "usd", "down")
    ('4.9', '4800')
    >>> present(Decimal(4821), "m_usd", "exact")
    '0.004821'
    """
    if rounding != "exact":
        value = (value / 100).to_integral_value(rounding=_MODES[rounding]) * 100
    return f"{(value / _SCALE[unit]).normalize():f}"


def evaluate(expr: str) -> Decimal:
    """Value of ``+ - * / ( )`` over decimal figures; a small recursive parser, never ``eval``.

    >>> evaluate("(4821+79)*0.9")
    Decimal('4410.0')
    """
    if len(expr) > LONGEST:
        raise BadExpression(f"cannot compute {len(expr)} characters, only {LONGEST}")
    tokens = _tokenise(expr)
    try:
        value, rest = _sum(tokens)
    except (IndexError, InvalidOperation, DivisionByZero) as error:
        raise BadExpression(f"cannot compute {expr}") from error
    if rest:
        raise BadExpression(f"cannot compute {expr}")
    return value


def _tokenise(expr: str) -> list[str]:
    tokens: list[str] = []
    for char in expr.replace(" ", ""):
        if tokens and (char.isdigit() or char == ".") and (tokens[-1][-1].isdigit() or tokens[-1][-1] == "."):
            tokens[-1] += char
        else:
            tokens.append(char)
    return tokens


def _sum(tokens: list[str]) -> tuple[Decimal, list[str]]:
    value, tokens = _product(tokens)
    while tokens and tokens[0] in "+-":
        sign, (term, tokens) = tokens[0], _product(tokens[1:])
        value = value + term if sign == "+" else value - term
    return value, tokens


def _product(tokens: list[str]) -> tuple[Decimal, list[str]]:
    value, tokens = _atom(tokens)
    while tokens and tokens[0] in "*/":
        sign, (factor, tokens) = tokens[0], _atom(tokens[1:])
        value = value * factor if sign == "*" else value / factor
    return value, tokens


def _atom(tokens: list[str]) -> tuple[Decimal, list[str]]:
    if tokens[0] == "-":
        value, rest = _atom(tokens[1:])
        return -value, rest
    if tokens[0] == "(":
        value, rest = _sum(tokens[1:])
        if rest[0] != ")":
            raise IndexError
        return value, rest[1:]
    return Decimal(tokens[0]), tokens[1:]
