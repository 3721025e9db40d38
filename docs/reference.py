"""Write the two reference pages from the code that defines them: ``.venv/bin/python docs/reference.py``."""

import json
from pathlib import Path
from typing import Any

from agentsdpo.config import describe
from agentsdpo.learn.presets import PRESETS, TOY
from agentsdpo.metrics import ROW_FIELDS, TABLE

MADE = "<!-- Made by docs/reference.py; do not edit. -->"


def configuration() -> str:
    """Every setting by table, then what the presets set."""
    parts = ["# Configuration", MADE, (
        "A run reads one TOML file: `agentsdpo train CONFIG.toml`. What it does not say is the preset's, then the "
        "default. `--set learn.lr=1e-4` overrides one setting; `\"none\"` stands for no value, since TOML has none. "
        "Unknown keys are refused. Defaults of `[learn]` are those of the preset `robust` with the shipped model.")]
    for table in dict.fromkeys(setting.key.rpartition(".")[0] for setting in describe()):
        rows = [(f"`{s.key.rpartition('.')[2]}`", s.expected, _value(s.default), s.description)
                for s in describe() if s.key.rpartition(".")[0] == table]
        parts += [f"## `[{table}]`" if table else "## The run", _table(("key", "value", "default", "meaning"), rows)]
    keys = list(dict.fromkeys(key for preset in (*PRESETS.values(), *TOY.values()) for key in preset))
    chosen = [(f"`learn.{key}`", *(_preset(name, key) for name in PRESETS)) for key in keys]
    parts += ["## What the presets set", (
        "`preset = \"...\"` is the starting point of `[learn]`; a dash leaves the default of the class. In brackets: "
        "with the shipped model, which is small and learns at larger rates."),
        _table(("key", *(f"`{name}`" for name in PRESETS)), chosen)]
    return "\n\n".join(parts) + "\n"


def metrics() -> str:
    """Every metric key, then the plain fields."""
    rows = [(f"`{one.pattern}`", one.unit, one.meaning, one.alarm) for one in TABLE]
    plain = [(f"`{key}`", kind, meaning) for kind, fields in ROW_FIELDS.items() for key, meaning in fields.items()]
    return "\n\n".join([
        "# Metrics", MADE, (
            "`metrics.jsonl` of a run holds one JSON object per line: `kind` is `step` (one optimiser step) or `eval` "
            "(one evaluation of one split), `step` the optimiser steps done, `wall_s` seconds since the run began. All "
            "other keys are below; `{a,b}` stands for each of the words, `*` for one word not known beforehand. "
            "`null` is what was not finite."),
        "## Keys `<room>/<quantity>[/<stat>]`", _table(("key", "unit", "meaning", "look closer when"), rows),
        "## Plain fields", _table(("field", "lines", "meaning"), plain)]) + "\n"


def _preset(name: str, key: str) -> str:
    usual, toy = (_value(table[key]) if key in table else "–" for table in (PRESETS[name], TOY[name]))
    return usual if toy == "–" else f"{usual} ({toy})"


def _value(value: Any) -> str:
    """As it is written in TOML."""
    return f"`{json.dumps('none' if value is None else value)}`"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


PAGES = {"configuration.md": configuration, "metrics.md": metrics}

if __name__ == "__main__":
    for page, text in PAGES.items():
        (Path(__file__).parent / page).write_text(text(), encoding="utf-8")
