"""The fourteen tools: one list of specs for the model, the validation and every agent, and their handlers.

A handler takes the state and its arguments and returns the observation; its docstring is what the model reads. Errors
are observations. Nothing here imports a rule; nothing touches the host.
"""

from collections.abc import Callable
from typing import Any

from agentsdpo.envs.desk import text
from agentsdpo.envs.desk.calc import BadExpression, evaluate, present
from agentsdpo.envs.desk.world import FILE_PAGE, MAIL_PAGE, ROW_PAGE, State
from agentsdpo.types import ToolSpec

ROOTS = (*text.SOURCES, *text.FOLDERS, "policy")


class ToolFault(Exception):
    """A fault the agent is told about; the text becomes the observation."""


def _page(items: list[str], page: int, size: int) -> str:
    pages = max(1, -(-len(items) // size))
    if page > pages:
        raise ToolFault(f"no page {page} of {pages}")
    more = f"\npage {page} of {pages}" if pages > 1 else ""
    return "\n".join(items[(page - 1) * size:page * size] or ["empty"]) + more


def file_list(state: State, folder: str, page: int = 1) -> str:
    """Names in a folder."""
    paths = sorted(p for p in (*state["files"], *state["docs"]) if p.startswith(folder + "/"))
    return _page([p.split("/", 1)[1] for p in paths], page, FILE_PAGE)


def file_read(state: State, path: str, page: int = 1) -> str:
    """Rows of a sheet, or text of a note."""
    if path in state["docs"]:
        return state["docs"][path]
    if path not in state["files"]:
        raise ToolFault("no such file")
    rows = state["files"][path]
    return _page([f"{row} {col} {value} {unit}" for row, cols in rows.items() for col, (value, unit) in cols.items()],
                 page, ROW_PAGE)


def file_find(state: State, text: str) -> str:
    """Paths that contain a text."""
    return "\n".join(sorted(p for p in (*state["files"], *state["docs"]) if text in p)[:FILE_PAGE]) or "nothing found"


def cell_set(state: State, path: str, row: str, col: str, value: str, unit: str) -> str:
    """Write one cell of a sheet."""
    folder, _, name = path.partition("/")
    if folder not in ROOTS or not name or len(path) > 64 or path in state["docs"]:
        raise ToolFault("no such folder")
    state["files"].setdefault(path, {}).setdefault(row, {})[col] = [value, unit]
    return "ok"


def mail_list(state: State, page: int = 1) -> str:
    """Mails, newest first."""
    return _page([f"{m['id']} {m['sender']} {m['subject']}" for m in state["mail"]], page, MAIL_PAGE)


def mail_read(state: State, id: str) -> str:
    """Text of a mail."""
    for mail in state["mail"]:
        if mail["id"] == id:
            return mail["body"]
    raise ToolFault("no such mail")


def mail_send(state: State, to: str, text: str) -> str:
    """Send a mail."""
    state["sent"].append({"to": to, "text": text})
    return "ok"


def chat_read(state: State, channel: str, page: int = 1) -> str:
    """Messages of a channel."""
    if channel not in state["chat"]:
        raise ToolFault("no such channel")
    return _page(state["chat"][channel], page, MAIL_PAGE)


def cal_list(state: State, day: str) -> str:
    """Entries of a day."""
    return "\n".join(state["calendar"][day]) or "empty"


def cal_add(state: State, day: str, title: str) -> str:
    """Add an entry to a day."""
    state["calendar"][day].append(title)
    return "ok"


def note_add(state: State, key: str, text: str) -> str:
    """Keep a note."""
    state["notes"][key] = text
    return "ok"


def note_get(state: State, key: str) -> str:
    """Read a note; an empty key lists all, in the order in which they were first written."""
    if not key:
        return "\n".join(f"{k} {v}" for k, v in state["notes"].items()) or "empty"
    if key not in state["notes"]:
        raise ToolFault("no such note")
    return state["notes"][key]


def submit(state: State, answer: str) -> str:
    """Hand in the answer and finish."""
    state["submitted"] = answer
    return "ok"


def calc(state: State, expr: str, unit: str, round: str) -> str:
    """Compute, convert and round."""
    try:
        return f"{present(evaluate(expr), unit, round)} {unit}"
    except BadExpression as error:
        raise ToolFault(str(error)) from error


_PAGE = {"type": "integer", "minimum": 1, "default": 1}
_TEXT = {"type": "string", "maxLength": 400}


def _spec(handler: Callable[..., str], *, mutates: bool = False, **properties: Any) -> ToolSpec:
    required = [key for key, schema in properties.items() if schema is not _PAGE]
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return ToolSpec(name=handler.__name__, description=handler.__doc__ or "", parameters=schema, mutates=mutates)


def _enum(*options: str) -> dict[str, Any]:
    return {"type": "string", "enum": list(options)}


TOOLS: tuple[ToolSpec, ...] = (
    _spec(file_list, folder=_enum(*ROOTS), page=_PAGE),
    _spec(file_read, path=_TEXT, page=_PAGE),
    _spec(file_find, text=_TEXT),
    _spec(cell_set, mutates=True, path=_TEXT, row=_TEXT, col=_TEXT, value=_TEXT,
          unit=_enum(*text.UNITS)),
    _spec(mail_list, page=_PAGE),
    _spec(mail_read, id=_TEXT),
    _spec(mail_send, mutates=True, to=_TEXT, text=_TEXT),
    _spec(chat_read, channel=_TEXT, page=_PAGE),
    _spec(cal_list, day=_enum(*text.DAYS)),
    _spec(cal_add, mutates=True, day=_enum(*text.DAYS), title=_TEXT),
    _spec(calc, expr=_TEXT, unit=_enum(*text.UNITS), round=_enum(*text.ROUNDS)),
    _spec(note_add, mutates=True, key=_TEXT, text=_TEXT),
    _spec(note_get, key=_TEXT),
    _spec(submit, mutates=True, answer=_TEXT),
)
SPECS = {spec.name: spec for spec in TOOLS}
"""Tool name -> spec."""
HANDLERS: dict[str, Callable[..., str]] = {name: globals()[name] for name in SPECS}
"""Tool name -> handler."""
