"""Docstrings read well as pages: no stray markup and no formula that a browser could not draw.

The build of the site would say so too; this takes seconds.
"""

import ast
import io
import re
from pathlib import Path

import pytest

pytest.importorskip("sphinx")

import site_parts
from docutils import nodes
from docutils.core import publish_doctree
from docutils.parsers.rst import roles
from docutils.utils.math import MathError
from sphinx.ext.napoleon import Config, GoogleDocstring

ROOT = Path(__file__).parent.parent
NAPOLEON = Config(napoleon_use_ivar=True, napoleon_use_rtype=False)
OURS = (ast.Module, ast.ClassDef, ast.FunctionDef)


def faults(text):
    """What docutils and the formulas' converter say of a docstring."""
    lines = text.split("\n")
    site_parts.docstring(None, "", "", None, None, lines)
    source = ".. default-role:: literal\n\n" + str(GoogleDocstring("\n".join(lines), NAPOLEON))
    said = io.StringIO()
    tree = publish_doctree(source, settings_overrides={"warning_stream": said, "report_level": 2})
    found = [line for line in said.getvalue().splitlines() if re.search("WARNING|ERROR", line)]
    for formula in tree.findall(lambda node: isinstance(node, (nodes.math, nodes.math_block))):
        try:
            site_parts.mathml(formula.astext(), isinstance(formula, nodes.math_block))
        except MathError as error:
            found.append(f"{formula.astext()}: {error}")
    return found


@pytest.fixture(autouse=True, scope="module")
def _links_are_words():
    roles.register_generic_role("py:obj", nodes.literal)


@pytest.mark.parametrize("package", site_parts.PACKAGES)
def test_docstrings_make_pages(package):
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, OURS) and (text := ast.get_docstring(node)):
                assert not faults(text), f"{path.relative_to(ROOT)}: {getattr(node, 'name', 'module')}"


@pytest.mark.parametrize(
    "text", ["A `name without end.", "A **strong start.", r"A formula $\nosuchcommand{x}$.", "* a list\nthat stops"]
)
def test_a_fault_is_seen(text):
    assert faults(text)


def test_markdown_habits_are_fine():
    text = (
        "At most |x - y| of `Thing`s, $x_i$:\n\n    an example | with * anything\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
    )
    assert faults(text) == []
