"""The table of metrics is honest: what it lists is written somewhere, and what is written is listed."""

import ast
from pathlib import Path

import pytest

from agentsdpo import metrics

ROOT = Path(metrics.__file__).resolve().parent
WRITERS = sorted([*(ROOT / "collect").glob("*.py"), *(ROOT / "hint").glob("*.py"), *(ROOT / "learn").glob("*.py"),
                  *(ROOT / "replay").rglob("*.py"), ROOT / "loop.py", ROOT / "learning.py"])
WRITERS.remove(ROOT / "learn" / "trackers.py")  # gives rows that are written already the names trackers show


def written() -> tuple[set[str], set[str]]:
    """Whole keys, and the beginnings of keys that end in a value, in the code that writes step rows."""
    whole, open_ended = set(), set()
    for path in WRITERS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                whole.add(node.value)
            if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
                open_ended.add(str(node.values[0].value))
    return whole, open_ended


@pytest.mark.parametrize("key", [key for metric in metrics.TABLE for key in metric.spelt_out()])
def test_every_key_of_the_table_is_written_by_some_code(key: str) -> None:
    whole, open_ended = written()
    assert key in whole or ("*" in key and key.removesuffix("*") in open_ended)


def test_every_key_that_is_written_stands_in_the_table() -> None:
    rooms = tuple(f"{room}/" for room in ("learn", "replay", "hint", "collect", "eval", "teacher", "publish"))
    whole, open_ended = written()
    keys = [text for text in whole if text.startswith(rooms) and " " not in text and text[-1] not in "/.y"]
    assert len(keys) > 40
    metrics.check_keys(keys, "step")
    metrics.check_keys([f"{stem}x" for stem in open_ended if stem.startswith(rooms) and stem[-1] == "/"], "step")
