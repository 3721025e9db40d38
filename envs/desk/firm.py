"""House rules of a firm: what stands in no document and only the grader knows.

Imported by the grader and by the oracle, by nothing else: no tool handler can reach a rule.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from agentsdpo.envs.desk import text

SLOTS: dict[str, tuple[str, ...]] = {
    "source": text.SOURCES, "unit": text.UNITS, "file": text.FOLDERS, "notify": text.PEOPLE,
    "round": text.ROUNDS, "before": text.BEFORE,
}
"""Slot -> options, in the fixed order of the hint; the preset ``desk-mini`` uses the first four."""

MINI_SLOTS = tuple(SLOTS)[:4]
_PHRASES = {
    "source": "use the {} sheet", "unit": "unit {}", "file": "file in {}", "notify": "notify {}",
    "round": "round {}", "before": "{} before submit",
}


def slots_of(preset: str) -> tuple[str, ...]:
    """Slots of a preset: four for ``desk-mini`` (256 combinations), six for ``desk`` (4 096)."""
    return MINI_SLOTS if preset == "desk-mini" else tuple(SLOTS)


@dataclass(frozen=True)
class Firm:
    """The rules of one firm, drawn per kind, uniformly and independently, from ``seed``.

    >>> Firm(7).rules("tax", "desk-mini") == Firm(7).rules("tax", "desk-mini")
    True
    >>> sorted(Firm(7).rules("tax", "desk"))
    ['before', 'file', 'notify', 'round', 'source', 'unit']
    """

    seed: int = 7

    def rules(self, kind: str, preset: str) -> dict[str, str]:
        """Slot -> option for one kind of work."""
        return {slot: text.pick(SLOTS[slot], "rule", self.seed, kind, slot) for slot in slots_of(preset)}

    def stranger(self, preset: str) -> "Firm":
        """Another firm that shares no kind's full rule set: the control whose rules are never taught."""
        for seed in range(self.seed + 1, self.seed + 1000):
            other = Firm(seed)
            if all(other.rules(k, preset) != self.rules(k, preset) for k in text.KINDS):
                return other
        raise AssertionError("no stranger among 1 000 firms; the chance is below 1e-100")


def hint(kind: str, rules: dict[str, str], slots: Iterable[str] | None = None) -> str:
    """The rules in one sentence, fixed slot order, no figure and no name.

    Args:
        kind: what the rules are for.
        rules: slot -> option.
        slots: the slots to state; all of ``rules`` by default.

    >>> hint("tax", {"source": "audit", "unit": "k_usd", "file": "board", "notify": "cfo"})
    'For tax work use the audit sheet; unit k_usd; file in board; notify cfo.'
    """
    stated = set(rules if slots is None else slots)
    phrases = [_PHRASES[slot].format(rules[slot]) for slot in SLOTS if slot in stated and slot in rules]
    return f"For {kind} work {'; '.join(phrases)}." if phrases else ""
