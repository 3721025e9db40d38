"""The committed notebooks: short, answered first, answered by the data, with outputs that the code still gives.

That they run is tested by nbmake, which collects ``notebooks/*.ipynb`` itself.
"""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from agentsdpo import plots
from agentsdpo.benchmarks.staleness.__main__ import AGES
from agentsdpo.plots import words

HOME = Path(__file__).resolve().parents[2] / "notebooks"
NAMES = sorted(path.stem for path in HOME.glob("*.ipynb"))


def read(name: str) -> Any:
    return nbformat.read(HOME / f"{name}.ipynb", as_version=4)


def outputs(notebook: Any) -> list[Any]:
    return [one for cell in notebook.cells if cell.cell_type == "code" for one in cell.outputs]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_a_question_with_the_answer_first(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    question, answer = notebook.cells[:2]
    assert len(notebook.cells) <= 12
    assert re.match(r"# .*\?\n", question.source)
    assert "words." in answer.source.splitlines()[-1]
    assert "text/markdown" in answer.outputs[-1].data


@pytest.mark.parametrize("name", NAMES)
def test_no_result_is_typed(name: str) -> None:
    for cell in read(name).cells:
        if cell.cell_type == "markdown":
            assert not re.findall(r"\d+(?:\.\d+)? ?%", re.sub(r"95 %", "", cell.source)), cell.source


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_shows_something_and_nothing_else(name: str) -> None:
    notebook = read(name)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert [one.output_type for one in cell.outputs] == ["execute_result"], cell.source
    kinds = [kind for one in outputs(notebook) for kind in one.data]
    assert kinds.count("image/svg+xml") >= 2
    for one in outputs(notebook):
        text = "".join(one.data.values())
        assert not re.search(r"/home/|/work/|/root/|site-packages", text)
        assert "<script" not in text


@pytest.mark.parametrize("name", NAMES)
def test_figures_read_on_light_and_dark(name: str) -> None:
    """Nothing is drawn on an opaque ground, and text is of the mid-tone that reads on both, or lies on a tint."""
    for one in outputs(read(name)):
        svg = one.data.get("image/svg+xml", "")
        for style in re.findall(r'<text[^>]*style="([^"]*)"', svg):
            colour = re.search(r"fill: (#[0-9a-f]{6})", style)
            assert (colour.group(1) if colour else "none") in {*plots.ROLES.values(), "#1b1d20", "#ffffff"}, style
        assert "patch_1" not in svg or 'fill: none' in svg


def test_data_are_small() -> None:
    assert sum(path.stat().st_size for path in (HOME / "data").rglob("*") if path.is_file()) < 1_000_000


def fresh(name: str) -> str:
    """The answer as the code computes it today."""
    if name == "01_reward_curves":
        return str(words.learning_answer(plots.read_seeds(sorted((HOME / "data").glob("demo*")))[1]))
    if name == "02_staleness":
        return str(words.age_answer(plots.read_study(HOME.parent / "docs" / "results" / "staleness.parquet", AGES)))
    folders = [HOME / "data" / "bench" / name for name in ("before", "after")]
    return str(words.card_answer({folder.name: plots.read_bench(folder) for folder in folders}))


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("03")])
def test_the_committed_answer_is_that_of_the_data(name: str) -> None:
    assert read(name).cells[1].outputs[-1].data["text/markdown"] == fresh(name), "run: make notebooks"
