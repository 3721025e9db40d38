"""Task families: what is asked, what is right, and how a skilled agent does it.

A plan is a generator that yields ``(tool, arguments)`` and is sent each observation. It is skill, not knowledge:
the house rules are an argument, so the oracle passes the true ones and a guesser passes its guesses.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from agentsdpo.envs.desk import text
from agentsdpo.envs.desk.calc import present
from agentsdpo.envs.desk.world import State, excluded

Meta = dict[str, Any]
Rules = dict[str, str]
Step = tuple[str, dict[str, Any]]
Plan = Generator[Step, str, Any]

FAMILIES = ("lookup", "correct", "reconcile", "rollup", "close")
CLOSE_KINDS = ["margin", "revenue", "cost"]
_MAIL_FAMILIES = ("correct", "rollup", "close")


@dataclass(frozen=True)
class Filing:
    """One figure that must be filed: in the sheet of ``name``, row ``kind``; dollars before conversion."""

    name: str
    kind: str
    value: Decimal


def prompt(meta: Meta) -> str:
    """The request, terse as a colleague's.

    >>> prompt({"family": "lookup", "kinds": ["tax"], "clients": ["tamori"], "period": "q3-4"})
    'Report tax of @tamori for q3-4.'
    """
    kind, who, when = meta["kinds"][0], text.listing(meta["clients"]), meta["period"]
    return {
        "lookup": f"Report {kind} of {who} for {when}.",
        "correct": f"Report {kind} of {who} for {when} with corrections by mail.",
        "reconcile": f"Report ledger minus bank of {kind} of {who} for {when}.",
        "rollup": f"Roll up {kind} of {who} for {when} with corrections by mail.",
        "close": f"Close {when} of {who} with corrections by mail.",
    }[meta["family"]]


# ------------------------------------------------------------------------------------------------ what is right


def figures(meta: Meta, state: State, source: str) -> list[Filing]:
    """Every figure to file if ``source`` is the sheet to use, read off the initial state."""
    return {"lookup": _each, "correct": _each, "reconcile": _differences, "rollup": _rollup, "close": _close}[
        meta["family"]](meta, state, source)


def _value(meta: Meta, state: State, source: str, client: str, kind: str) -> Decimal:
    """Figure of the sheet, unless a correction applies; mails stand newest first, so the first match wins."""
    if meta["family"] in _MAIL_FAMILIES:
        for mail in state["mail"]:
            if mail["subject"] == f"correction {kind} @{client}":
                return Decimal(mail["body"].split()[-2])
    return Decimal(state["files"][f"{source}/{client}"][kind][meta["period"]][0])


def _each(meta: Meta, state: State, source: str) -> list[Filing]:
    kind = meta["kinds"][0]
    return [Filing(c, kind, _value(meta, state, source, c, kind)) for c in meta["clients"]]


def _differences(meta: Meta, state: State, source: str) -> list[Filing]:
    kind = meta["kinds"][0]
    return [Filing(c, kind, _value(meta, state, "ledger", c, kind) - _value(meta, state, "bank", c, kind))
            for c in meta["clients"]]


def _rollup(meta: Meta, state: State, source: str) -> list[Filing]:
    filings = [f for f in _each(meta, state, source) if f.name not in excluded(meta)]
    return [*filings, Filing("total", meta["kinds"][0], sum((f.value for f in filings), Decimal(0)))]


def _close(meta: Meta, state: State, source: str) -> list[Filing]:
    filings = []
    for client in meta["clients"]:
        revenue, cost = (_value(meta, state, source, client, k) for k in ("revenue", "cost"))
        filings += [Filing(client, "revenue", revenue), Filing(client, "cost", cost),
                    Filing(client, "margin", revenue - cost)]
    return filings


def owners(meta: Meta) -> list[str]:
    """Addressees besides the one the house rules name: reconciled clients are told."""
    return [f"@{client}" for client in meta["clients"]] if meta["family"] == "reconcile" else []


def answer(meta: Meta, shown: list[str]) -> str:
    """What ``submit`` must state, from the figures as filed, in filing order.

    >>> answer({"family": "lookup"}, ["481", "233"])
    '481 233'
    """
    if meta["family"] == "rollup":
        return shown[-1]
    return " ".join(shown) if len(shown) <= 4 else f"{len(shown)} filed"


def close_day(state: State) -> str:
    """The day on which the period is closed, as the chat says."""
    return state["chat"]["close"][0].split()[-1]


# ------------------------------------------------------------------------------------------------- how it is done


def plan(meta: Meta, rules: Rules, *, notes: bool = False) -> Plan:
    """The calls of a skilled agent that believes ``rules``, ending with ``submit``.

    Args:
        meta: of the task.
        rules: slot -> option.
        notes: whether it writes down what is done, so that it knows where it was once its history is cut (``lookup``).
    """
    work = _Work(meta, rules, notes)
    if rules.get("before") == "mail":
        yield from work.notify()
    yield from work.prepare()
    body: dict[str, Callable[[], Plan]] = {"lookup": work.report, "correct": work.report, "rollup": work.rollup,
                                           "reconcile": work.reconcile, "close": work.close}
    yield from body[meta["family"]]()
    if "before" in rules:
        yield from work.before()
    if rules.get("before") != "mail":
        yield from work.notify()
    yield "submit", {"answer": answer(meta, work.shown)}


class _Work:
    """State of one plan: what was read, what was filed."""

    def __init__(self, meta: Meta, rules: Rules, notes: bool = False) -> None:
        self.meta, self.rules, self.notes = meta, rules, notes
        self.kind, self.when = meta["kinds"][0], meta["period"]
        self.newest: dict[tuple[str, str], str] = {}
        self.shown: list[str] = []
        self.last_path, self.rate, self.left_out = "", "", ""

    def prepare(self) -> Plan:
        """Read what applies to the whole task: the rate, the mails, the exceptions."""
        if self.rules["unit"] == "eur" and "round" in self.rules:
            self.rate = (yield "file_read", {"path": "policy/rates"}).split()[-1]
        if self.meta["family"] == "rollup":
            self.left_out = yield "file_read", {"path": f"policy/{self.kind}"}
        page, pages = 1, 1
        while self.meta["family"] in _MAIL_FAMILIES and page <= pages:
            seen = yield "mail_list", {} if page == 1 else {"page": page}
            for line in seen.splitlines():
                self._note_mail(line.split())
                pages = int(line.split()[-1]) if line.startswith("page ") else pages
            page += 1

    def _note_mail(self, words: list[str]) -> None:
        if len(words) == 5 and words[2] == "correction":
            self.newest.setdefault((words[3], words[4].removeprefix("@")), words[0])

    def read(self, source: str, client: str, kind: str) -> Plan:
        """One figure in dollars: the newest correction if there is one, else the sheet."""
        if (kind, client) in self.newest:
            return (yield "mail_read", {"id": self.newest[kind, client]}).split()[-2]
        page = yield "file_read", {"path": f"{source}/{client}"}
        return next((line.split()[2] for line in page.splitlines() if line.startswith(f"{kind} {self.when} ")), "0")

    def file(self, name: str, kind: str, expr: str, *, remember: bool = False) -> Plan:
        """Convert, round and file one figure; in the mini preset the unit is a label and figures stay."""
        unit, value = self.rules["unit"], expr
        if "round" in self.rules:
            expr = f"({expr})*{self.rate}" if self.rate and not expr.isdigit() else expr
            expr = f"{expr}*{self.rate}" if self.rate and expr.isdigit() else expr
            value = (yield "calc", {"expr": expr, "unit": unit, "round": self.rules["round"]}).split()[0]
        elif not expr.lstrip("-").isdigit():
            value = (yield "calc", {"expr": expr, "unit": "usd", "round": "exact"}).split()[0]
        if remember:
            yield "note_add", {"key": name, "text": value}
        self.last_path = f"{self.rules['file']}/{name}"
        yield "cell_set", {"path": self.last_path, "row": kind, "col": self.when, "value": value, "unit": unit}
        self.shown.append(value)

    def report(self) -> Plan:
        for client in self.meta["clients"]:
            value = yield from self.read(self.rules["source"], client, self.kind)
            yield from self.file(client, self.kind, value, remember=self.notes or self.meta["family"] == "correct")

    def reconcile(self) -> Plan:
        for client in self.meta["clients"]:
            left = yield from self.read("ledger", client, self.kind)
            right = yield from self.read("bank", client, self.kind)
            yield from self.file(client, self.kind, f"{left}-{right}")
            yield "mail_send", {"to": f"@{client}", "text": f"{self.kind} differs"}

    def rollup(self) -> Plan:
        total = "0"
        for client in self.meta["clients"]:
            if f"@{client}" in self.left_out.split():
                continue
            value = yield from self.read(self.rules["source"], client, self.kind)
            total = (yield "calc", {"expr": f"{total}+{value}", "unit": "usd", "round": "exact"}).split()[0]
            yield from self.file(client, self.kind, value)
            yield "note_add", {"key": "total", "text": total}
        yield from self.file("total", self.kind, total)

    def close(self) -> Plan:
        day = (yield "chat_read", {"channel": "close"}).split()[-1]
        for client in self.meta["clients"]:
            revenue = yield from self.read(self.rules["source"], client, "revenue")
            yield from self.file(client, "revenue", revenue)
            cost = yield from self.read(self.rules["source"], client, "cost")
            yield from self.file(client, "cost", cost)
            yield from self.file(client, "margin", f"{revenue}-{cost}")
        yield "cal_add", {"day": day, "title": f"close {self.when}"}

    def notify(self) -> Plan:
        yield "mail_send", {"to": self.rules["notify"], "text": f"{self.kind} filed"}

    def before(self) -> Plan:
        """The one thing that must have happened before ``submit`` (``mail`` is done at the start)."""
        steps: dict[str, Step] = {
            "review": ("cal_add", {"day": "mon", "title": "review"}),
            "memo": ("file_read", {"path": f"policy/{self.kind}"}),
            "check": ("file_read", {"path": self.last_path}),
        }
        if self.rules["before"] in steps:
            yield steps[self.rules["before"]]


def presented(filing: Filing, unit: str, rounding: str, rate: str) -> str:
    """A figure as it must stand in the sheet of preset ``desk``."""
    value = filing.value * Decimal(rate) if unit == "eur" else filing.value
    return present(value, unit, rounding)
