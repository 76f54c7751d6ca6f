"""Each notebook and its script are one text; `make notebooks` runs them."""

from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext")

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_and_script_are_paired(path):
    """To pair them again: `jupytext --sync`, then `pytest --nbmake --overwrite` on the notebook for its outputs."""
    cells, script = (jupytext.read(name).cells for name in (path, path.with_suffix(".py")))
    assert [(cell.cell_type, cell.source) for cell in cells] == [(cell.cell_type, cell.source) for cell in script]
    assert path.stat().st_size < 300_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_says_what_it_shows_and_what_to_conclude(path):
    first, *rest = jupytext.read(path).cells
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert "**What this shows.**" in first.source and "**What to conclude.**" in first.source
    assert rest[-1].cell_type == "markdown" and "**Next.**" in rest[-1].source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_was_run_from_top_to_bottom(path):
    """Its outputs are of one run in a fresh kernel, without an error; figures come from `simulate.figures`."""
    code = [cell for cell in jupytext.read(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert not any("pyplot" in cell.source for cell in code)


def test_there_are_notebooks():
    numbers = [path.stem[:2] for path in NOTEBOOKS]
    assert numbers == [f"{n:02}" for n in range(1, len(NOTEBOOKS) + 1)] and len(NOTEBOOKS) >= 6
