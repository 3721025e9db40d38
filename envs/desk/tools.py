"""The fourteen tools: one list of specs for the model, the validation and every agent, and their handlers.

A handler takes the state and its arguments and returns the observation. Errors are observations. Nothing here
imports a rule; nothing touches the host.
"""

from collections.abc import Callable
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_UP, Decimal, DivisionByZero, InvalidOperation
from typing import Any

from agentsdpo.envs.desk import text
from agentsdpo.envs.desk.world import FILE_PAGE, MAIL_PAGE, ROW_PAGE, State
from agentsdpo.types import ToolSpec

ROOTS = (*text.SOURCES, *text.FOLDERS, "policy")
_PAGE = {"type": "integer", "minimum": 1, "default": 1}
_TEXT = {"type": "string", "maxLength": 400}


def _spec(name: str, description: str, *, mutates: bool = False, **properties: Any) -> ToolSpec:
    required = [key for key, schema in properties.items() if schema is not _PAGE]
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return ToolSpec(name=name, description=description, parameters=schema, mutates=mutates)


def _enum(*options: str) -> dict[str, Any]:
    return {"type": "string", "enum": list(options)}


TOOLS: tuple[ToolSpec, ...] = (
    _spec("file_list", "Names in a folder.", folder=_enum(*ROOTS), page=_PAGE),
    _spec("file_read", "Rows of a sheet, or text of a note.", path=_TEXT, page=_PAGE),
    _spec("file_find", "Paths that contain a text.", text=_TEXT),
    _spec("cell_set", "Write one cell of a sheet.", mutates=True, path=_TEXT, row=_TEXT, col=_TEXT, value=_TEXT,
          unit=_enum(*text.UNITS)),
    _spec("mail_list", "Mails, newest first.", page=_PAGE),
    _spec("mail_read", "Text of a mail.", id=_TEXT),
    _spec("mail_send", "Send a mail.", mutates=True, to=_TEXT, text=_TEXT),
    _spec("chat_read", "Messages of a channel.", channel=_TEXT, page=_PAGE),
    _spec("cal_list", "Entries of a day.", day=_enum(*text.DAYS)),
    _spec("cal_add", "Add an entry to a day.", mutates=True, day=_enum(*text.DAYS), title=_TEXT),
    _spec("calc", "Compute, convert and round.", expr=_TEXT, unit=_enum(*text.UNITS), round=_enum(*text.ROUNDS)),
    _spec("note_add", "Keep a note.", mutates=True, key=_TEXT, text=_TEXT),
    _spec("note_get", "Read a note; an empty key lists all.", key=_TEXT),
    _spec("submit", "Hand in the answer and finish.", mutates=True, answer=_TEXT),
)
SPECS = {spec.name: spec for spec in TOOLS}


class ToolFault(Exception):
    """A fault the agent is told about; the text becomes the observation."""


def _page(items: list[str], page: int, size: int) -> str:
    pages = max(1, -(-len(items) // size))
    if page > pages:
        raise ToolFault(f"no page {page} of {pages}")
    more = f"\npage {page} of {pages}" if pages > 1 else ""
    return "\n".join(items[(page - 1) * size:page * size] or ["empty"]) + more


def file_list(state: State, folder: str, page: int = 1) -> str:
    paths = sorted(p for p in (*state["files"], *state["docs"]) if p.startswith(folder + "/"))
    return _page([p.split("/", 1)[1] for p in paths], page, FILE_PAGE)


def file_read(state: State, path: str, page: int = 1) -> str:
    if path in state["docs"]:
        return state["docs"][path]
    if path not in state["files"]:
        raise ToolFault("no such file")
    rows = state["files"][path]
    return _page([f"{row} {col} {value} {unit}" for row, cols in rows.items() for col, (value, unit) in cols.items()],
                 page, ROW_PAGE)


def file_find(state: State, text: str) -> str:
    return "\n".join(sorted(p for p in (*state["files"], *state["docs"]) if text in p)[:FILE_PAGE]) or "nothing found"


def cell_set(state: State, path: str, row: str, col: str, value: str, unit: str) -> str:
    folder, _, name = path.partition("/")
    if folder not in ROOTS or not name or len(path) > 64 or path in state["docs"]:
        raise ToolFault("no such folder")
    state["files"].setdefault(path, {}).setdefault(row, {})[col] = [value, unit]
    return "ok"


def mail_list(state: State, page: int = 1) -> str:
    return _page([f"{m['id']} {m['sender']} {m['subject']}" for m in state["mail"]], page, MAIL_PAGE)


def mail_read(state: State, id: str) -> str:
    for mail in state["mail"]:
        if mail["id"] == id:
            return mail["body"]
    raise ToolFault("no such mail")


def mail_send(state: State, to: str, text: str) -> str:
    state["sent"].append({"to": to, "text": text})
    return "ok"


def chat_read(state: State, channel: str, page: int = 1) -> str:
    if channel not in state["chat"]:
        raise ToolFault("no such channel")
    return _page(state["chat"][channel], page, MAIL_PAGE)


def cal_list(state: State, day: str) -> str:
    return "\n".join(state["calendar"][day]) or "empty"


def cal_add(state: State, day: str, title: str) -> str:
    state["calendar"][day].append(title)
    return "ok"


def note_add(state: State, key: str, text: str) -> str:
    state["notes"][key] = text
    return "ok"


def note_get(state: State, key: str) -> str:
    if not key:
        return "\n".join(f"{k} {v}" for k, v in sorted(state["notes"].items())) or "empty"
    if key not in state["notes"]:
        raise ToolFault("no such note")
    return state["notes"][key]


def submit(state: State, answer: str) -> str:
    state["submitted"] = answer
    return "ok"


def calc(state: State, expr: str, unit: str, round: str) -> str:
    return f"{present(evaluate(expr), unit, round)} {unit}"


_SCALE = {"usd": Decimal(1), "k_usd": Decimal(1000), "m_usd": Decimal(1_000_000), "eur": Decimal(1)}
_MODES = {"nearest": ROUND_HALF_UP, "up": ROUND_CEILING, "down": ROUND_FLOOR}


def present(value: Decimal, unit: str, rounding: str) -> str:
    """A figure in dollars (or already in euro) in ``unit``, rounded to whole hundreds unless ``exact``.

    >>> present(Decimal(4821), "k_usd", "up"), present(Decimal(4821), "usd", "down"), present(Decimal(4821), "m_usd", "exact")
    ('4.9', '4800', '0.004821')
    """
    if rounding != "exact":
        value = (value / 100).to_integral_value(rounding=_MODES[rounding]) * 100
    return f"{(value / _SCALE[unit]).normalize():f}"


def evaluate(expr: str) -> Decimal:
    """Value of ``+ - * / ( )`` over decimal figures; a small recursive parser, never ``eval``.

    >>> evaluate("(4821+79)*0.9")
    Decimal('4410.0')
    """
    tokens = _tokenise(expr)
    try:
        value, rest = _sum(tokens)
    except (IndexError, InvalidOperation, DivisionByZero) as error:
        raise ToolFault(f"cannot compute {expr}") from error
    if rest:
        raise ToolFault(f"cannot compute {expr}")
    return value


def _tokenise(expr: str) -> list[str]:
    tokens: list[str] = []
    for char in expr[:200].replace(" ", ""):
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


HANDLERS: dict[str, Callable[..., str]] = {
    f.__name__: f for f in (file_list, file_read, file_find, cell_set, mail_list, mail_read, mail_send, chat_read,
                            cal_list, cal_add, calc, note_add, note_get, submit)}
