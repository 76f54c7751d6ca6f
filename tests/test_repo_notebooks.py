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


def test_there_are_notebooks():
    assert NOTEBOOKS
