"""Criteria and feedback: a pure function of task and outcome. With the oracle the only importer of the rules."""

import json
from dataclasses import dataclass
from typing import Any

from agentsdpo.envs.desk import families, text
from agentsdpo.envs.desk.families import Filing
from agentsdpo.envs.desk.firm import Firm, hint, slots_of
from agentsdpo.types import Criterion, CriterionResult, Grade, Outcome, Task

TEXTS = {
    "figure": "every figure asked for is filed for the right client and period",
    "unit": "the unit is the one the house uses", "round": "the figure is rounded as the house does",
    "file": "the deliverable is in the right folder", "notify": "the right person was told",
    "before": "what must happen before submit has happened", "answer": "the answer states what was filed",
    "booked": "the close is booked on its day",
    "sources": "no source sheet was changed", "mail": "no mail went to anyone else",
    "once": "each figure was filed once and each mail sent once",
}
NEGATIVE = ("sources", "mail", "once")
_SLOT_OF = {"figure": "source", "unit": "unit", "file": "file", "notify": "notify", "round": "round",
            "before": "before"}


def rubric(meta: dict[str, Any]) -> tuple[Criterion, ...]:
    """The binary criteria of a task; none of the texts names a rule."""
    ids = [i for i in TEXTS if i not in ("round", "before", "booked")]
    ids += ["round", "before"] if meta["preset"] == "desk" else []
    ids += ["booked"] if meta["family"] == "close" else []
    return tuple(Criterion(id=i, text=TEXTS[i], negative=i in NEGATIVE, primary=i == "figure",
                           check="agentsdpo.envs.desk.grade:DeskGrader") for i in ids)


@dataclass
class _Facts:
    """What happened, read off an outcome once."""

    meta: dict[str, Any]
    rules: dict[str, str]
    initial: dict[str, Any]
    final: dict[str, Any]
    calls: list[tuple[str, dict[str, Any]]]
    answer: str

    @property
    def cells(self) -> dict[tuple[str, str, str], list[str]]:
        """Cells written outside the source sheets: (path, row, col) -> [value, unit]."""
        return {(path, row, col): cell for path, rows in self.final["files"].items()
                if path.split("/")[0] not in text.SOURCES for row, cols in rows.items() for col, cell in cols.items()}

    @property
    def filings(self) -> list[Filing]:
        """The right figures, in dollars."""
        return families.figures(self.meta, self.initial, self.rules["source"])

    @property
    def addressees(self) -> list[str]:
        return [self.rules["notify"], *families.owners(self.meta)]

    def shown(self, filing: Filing, unit: str, rounding: str) -> str:
        """The filing as it must stand in the sheet."""
        if self.meta["preset"] == "desk-mini":
            return str(filing.value)
        rate = self.initial["docs"]["policy/rates"].split()[-1]
        return families.presented(filing, unit, rounding, rate)

    def filed(self, filing: Filing) -> list[str] | None:
        """[value, unit] filed for one figure in whatever folder, None if it is missing."""
        for (path, row, col), cell in self.cells.items():
            if (path.split("/", 1)[1], row, col) == (filing.name, filing.kind, self.meta["period"]):
                return cell
        return None


class DeskGrader:
    """Grades outcomes of one firm.

    Args:
        firm: whose rules count; a task marked ``stranger`` is graded by the firm that was never taught.
        level: feedback, 0 nothing, 1 which criterion, 2 also what it is about, 3 the house rule in words.
        scope: at level 3, state ``all`` rules of the kind, after a pass too (a review says what was right as well),
            or only the ``failed`` ones.
    """

    def __init__(self, firm: Firm, *, level: int = 3, scope: str = "all") -> None:
        self.firm, self.level, self.scope = firm, level, scope

    async def grade(self, task: Task, outcome: Outcome) -> Grade:
        """All criteria of one outcome, and the feedback."""
        return self.judge(task, outcome)

    def judge(self, task: Task, outcome: Outcome) -> Grade:
        """:meth:`grade` without a loop."""
        meta = task.metadata
        firm = self.firm.stranger(meta["preset"]) if meta.get("stranger") else self.firm
        rules = firm.rules(meta["kinds"][0], meta["preset"])
        calls = [(c.name, c.arguments) for c, r in outcome.calls if not r.is_error and isinstance(c.arguments, dict)]
        facts = _Facts(meta, rules, json.loads(outcome.initial), json.loads(outcome.final), calls, outcome.answer or "")
        results = [CriterionResult(id=c.id, score=float(CHECKS[c.id](facts))) for c in rubric(meta)]
        failed = [r.id for r in results if r.score == 0.0]
        return Grade.of(results, feedback=self._feedback(meta, rules, failed))

    def _feedback(self, meta: dict[str, Any], rules: dict[str, str], failed: list[str]) -> str:
        if self.level == 0:
            return ""
        if self.level < 3:
            return "\n".join(f"{i}: not met" if self.level == 1 else f"{i}: not met: {TEXTS[i]}" for i in failed)
        wrong = {_SLOT_OF[i] for i in failed if i in _SLOT_OF}
        slots = slots_of(meta["preset"]) if self.scope == "all" else [s for s in rules if s in wrong]
        return hint(meta["kinds"][0], rules, slots)


def _figure(f: _Facts) -> bool:
    """Right source, client and period, in whatever unit and rounding it was filed."""
    for filing in f.filings:
        cell = f.filed(filing)
        if cell is None or cell[0] not in {f.shown(filing, cell[1], r) for r in text.ROUNDS}:
            return False
    return True


def _unit(f: _Facts) -> bool:
    return bool(f.cells) and all(unit == f.rules["unit"] for _, unit in f.cells.values())


def _round(f: _Facts) -> bool:
    """Rounded by the rule, whichever sheet the figure came from."""
    options = [families.figures(f.meta, f.initial, source) for source in text.SOURCES]
    for variants in zip(*options, strict=True):
        cell = f.filed(variants[0])
        if cell is None or cell[0] not in {f.shown(v, cell[1], f.rules["round"]) for v in variants}:
            return False
    return True


def _file(f: _Facts) -> bool:
    return bool(f.cells) and all(path.split("/")[0] == f.rules["file"] for path, _, _ in f.cells)


def _notify(f: _Facts) -> bool:
    return f.rules["notify"] in [m["to"] for m in f.final["sent"]]


def _before(f: _Facts) -> bool:
    names = [name for name, _ in f.calls]
    filed = [i for i, name in enumerate(names) if name == "cell_set"]
    rule, last = f.rules["before"], filed[-1] if filed else len(names)
    if rule == "mail":
        told = [i for i, (name, a) in enumerate(f.calls) if name == "mail_send" and a["to"] == f.rules["notify"]]
        return bool(told and filed) and told[0] < filed[0]
    if rule == "review":
        return any(name == "cal_add" and "review" in a["title"] for name, a in f.calls)
    if rule == "memo":
        return ("file_read", f"policy/{f.meta['kinds'][0]}") in [(n, a.get("path")) for n, a in f.calls]
    paths = {path for path, _, _ in f.cells}
    return any(name == "file_read" and a["path"] in paths for name, a in f.calls[last:])


def _answer(f: _Facts) -> bool:
    cells = [f.filed(filing) for filing in f.filings]
    return all(cells) and f.answer == families.answer(f.meta, [c[0] for c in cells if c])


def _booked(f: _Facts) -> bool:
    entry = f"close {f.meta['period']}"
    return [day for day, titles in f.final["calendar"].items() for t in titles if t == entry] == [
        families.close_day(f.initial)]


def _sources(f: _Facts) -> bool:
    before, after = ({p: rows for p, rows in s["files"].items() if p.split("/")[0] in text.SOURCES}
                     for s in (f.initial, f.final))
    return before == after


def _mail(f: _Facts) -> bool:
    """Nobody is told who is not to be told; one wrong guess at the addressee counts under ``notify`` alone."""
    strangers = [m["to"] for m in f.final["sent"] if m["to"] not in (*text.PEOPLE, *families.owners(f.meta))]
    return not strangers


def _once(f: _Facts) -> bool:
    """Anti-scattergun: one cell per figure, one mail per addressee, nothing filed or booked twice."""
    writes = [a for name, a in f.calls if name == "cell_set"]
    return (len(f.cells) == len(writes) == len(f.filings) and len(f.final["sent"]) == len(f.addressees)
            and len({m["to"] for m in f.final["sent"]}) == len(f.addressees))


CHECKS = {"figure": _figure, "unit": _unit, "round": _round, "file": _file, "notify": _notify, "before": _before,
          "answer": _answer, "booked": _booked, "sources": _sources, "mail": _mail, "once": _once}
