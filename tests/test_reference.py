"""The reference pages say what the code says."""

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.mark.parametrize("page", ["configuration.md", "metrics.md"])
def test_reference_pages_are_up_to_date(page: str) -> None:
    text = runpy.run_path(str(DOCS / "reference.py"))["PAGES"][page]()
    assert (DOCS / page).read_text(encoding="utf-8") == text, "run .venv/bin/python docs/reference.py"
