"""What the site makes of the code: outputs of commands, tables from registries, MathML, links in docstrings.

Directives, usable in any page:

    ```{run}            the lines are run as commands in the page's own folder and shown with what they print
    ```{table} NAME     rows made from the code: `schema`, `rules`, `defaults`, `trace`, `published`, `gallery`, `tests`
    ```{verbs}          the command line, from its parser

Formulas become MathML, which browsers draw themselves: nothing is fetched when a page is read.
"""

import argparse
import contextlib
import io
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from blocks import blocks, commands
from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from pygments.lexers.data import JsonLexer
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parent.parent
PACKAGES = ("mdp", "simulate", "realmodels", "specstop")
log = logging.getLogger(__name__)

# --- Commands


class Run(SphinxDirective):
    """Run the lines as commands, in a folder that holds the files which the page has shown so far."""

    has_content = True
    _folders: dict[str, tempfile.TemporaryDirectory] = {}  # noqa: RUF012 - one for each page, for the whole build

    def run(self) -> list[nodes.Node]:
        folder = self._folders.setdefault(self.env.docname, tempfile.TemporaryDirectory())
        for block in blocks(Path(self.env.doc2path(self.env.docname)).read_text()):
            if block.file:
                Path(folder.name, block.file).write_text(block.text)
        shown = []
        for command in commands("\n".join(self.content)):
            code, out, err = in_folder(folder.name, command.argv)
            if code or err:
                log.warning("%s: exit code %s: %s", command.line, code, err, location=self.get_location())
            if command.target:
                Path(folder.name, command.target).write_text(out)
                out = ""
            shown.append(f"$ {command.line}\n{out}".rstrip())
        return [nodes.literal_block("", "\n\n".join(shown), language="text", classes=["terminal"])]


def in_folder(folder: str, argv: list[str]) -> tuple[int, str, str]:
    """One command's exit code, stdout and stderr, run in this process from that folder."""
    from specstop.cli import main

    here, out, err = Path.cwd(), io.StringIO(), io.StringIO()
    try:
        os.chdir(folder)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(argv)
    finally:
        os.chdir(here)
    return code, out.getvalue(), err.getvalue()


# --- Tables


def cell(value: object) -> str:
    """A value in a Markdown table."""
    return str(value).replace("|", "\\|").replace("\n", " ") if value not in (None, "") else "–"


def markdown_table(rows: list[dict[str, Any]]) -> str:
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([cell(row.get(key)) for key in head] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def schema_table() -> str:
    from mdp.problem import schema
    from specstop.schema import schema_rows

    known, parts = schema(), []
    for part in known["keys"]:
        parts.append(f"**`{part}`**\n")
        rows = [row for row in schema_rows(known) if row["part"] == part]
        parts.append(markdown_table([
            {"kind": f"`{row['kind']}`", "key": f"`{row['key']}`" if "key" in row else "", "holds": row.get("holds"),
             "unit": row.get("unit"), "range": row.get("range"), "default": row.get("default"),
             "what it is": row.get("what", "nothing to say")}
            for row in rows
        ]))  # fmt: skip
    axes = ", ".join(f"{axis} ≤ {size}" for axis, size in known["most"].items())
    low, high = known["max_candidates"]
    parts.append(f"**`max_candidates`**: a whole number in {low}..{high}. Longest axes: {axes}.")
    return "\n\n".join(parts)


def rules_table() -> str:
    from specstop.inputs import describe_rules

    return markdown_table([
        {"rule": f"`{row['name']}`", "does": row["does"], "looks at": ", ".join(row["needs"]) or "nothing",
         "source": row["source"] or "this project", "read in": row["evidence"] and f"[{row['evidence']}]"}
        for row in describe_rules()
    ])  # fmt: skip


def defaults_table() -> str:
    from mdp.policy import write
    from specstop.inputs import describe_rules

    return markdown_table([
        {"rule": f"`{row['name']}`", "parameter": f"`{key['name']}`", "default": f"`{write(key['default'])}`",
         "range": f"{key['low']:g} to {key['high']:g}",
         "default from": "**ours**" if key["origin"] == "ours" else f"[{key['origin']}]"}
        for row in describe_rules() for key in row["parameters"]
    ])  # fmt: skip


def trace_table() -> str:
    from mdp import trace

    def limits(name: str) -> str:
        low, high = trace.FEATURES[name]
        return f"[{low:g}, {high:g}]" if high < float("inf") else f">= {low:g}"

    rows = [
        {"array": f"`{name}`", "axes": axes, "values": values}
        for name, axes, values in (
            ("offsets", "R + 1", "first position of each request"), ("limit", "R", "most tokens of the request"),
            ("ends", "R", "flag"), ("accepted", "N", "flag"), ("drafts_end", "N", "flag"),
        )
    ]  # fmt: skip
    rows += [{"array": f"`{name}`", "axes": "N", "values": limits(name)} for name in trace.FEATURES]
    rows += [{"array": f"`{name}`", "axes": "N, ...", "values": "optional"} for name in trace._OPTIONAL]
    rows += [{"array": "`rollout_offsets`", "axes": "N + 1", "values": "first rollout step of each position"},
             {"array": "`rollout_drafts_end`", "axes": "M", "values": "flag"}]  # fmt: skip
    rows += [{"array": f"`rollout_{name}`", "axes": "M", "values": limits(name)} for name in trace.FEATURES]
    rows += [{"array": f"`rollout_{name}`", "axes": "M, ...", "values": "optional"} for name in trace._ROLLOUT_OPTIONAL]
    return markdown_table(rows) + f"\n\nSchema version {trace.SCHEMA_VERSION}."


def published_table() -> str:
    from specstop.paper import DATASETS, ORACLE

    def row(name: str, what: str, figure: Any) -> dict[str, Any]:
        return {"data": name, "figure": what, "value": f"{figure.value:g} ± {figure.rounding:g}",
                "tag": f"[{figure.tag}]", "source": figure.source}  # fmt: skip

    rows = []
    for data in DATASETS.values():
        rows.append(row(data.name, "speedup, best fixed K", data.best_fixed))
        rows.append(row(data.name, "speedup, SpecDec++", data.specdec))
        rows.append(row(data.name, "gain over fixed K", data.gain))
    rows += [row("Alpaca", "oracle: verification rate", ORACLE.verification_rate),
             row("Alpaca", "oracle: speedup", ORACLE.speedup)]  # fmt: skip
    return markdown_table(rows)


def gallery_table() -> str:
    from mdp.gallery import gallery

    parts = []
    for case in gallery():
        parts.append(
            f"({case.name})=\n**{case.name}** breaks {case.fact}: *{case.breaks}*. "
            f"Its `{case.number}` is exactly **{case.value}**.\n\n{case.story}\n"
        )
    return "\n\n".join(parts)


def changelog() -> str:
    text = (ROOT / "CHANGELOG.md").read_text()
    return text.partition("\n")[2].replace("](https", "](https")


TABLES: dict[str, Callable[[], str]] = {
    "schema": schema_table, "rules": rules_table, "defaults": defaults_table, "trace": trace_table,
    "published": published_table, "gallery": gallery_table, "changelog": changelog,
}  # fmt: skip


class Table(SphinxDirective):
    """A table or text that the code knows."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(TABLES[self.arguments[0]](), allow_section_headings=True)


class HeldBy(SphinxDirective):
    """The tests that hold a statement, one name a line; a test of the repository looks each of them up."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        names = [line.strip() for line in self.content if line.strip()]
        return self.parse_text_to_nodes("Held by " + ", ".join(f"`{name}`" for name in names) + ".")


# --- The command line


class Verbs(SphinxDirective):
    """Usage, arguments and defaults of every verb, from the parser itself."""

    def run(self) -> list[nodes.Node]:
        from specstop.arguments import build_parser

        (verbs,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
        text = "\n\n".join(self._verb(name, parser) for name, parser in verbs.choices.items())
        return self.parse_text_to_nodes(text, allow_section_headings=True)

    def _verb(self, name: str, parser: argparse.ArgumentParser) -> str:
        rows = [
            {"argument": f"`{', '.join(action.option_strings) or action.metavar or action.dest}`"
             + (f" `{_value(action)}`" if action.option_strings and _value(action) else ""),
             "": ("required; " if action.required and action.option_strings else "") + (action.help or "")}
            for action in parser._actions if action.dest != "help"
        ]  # fmt: skip
        return f"(verb-{name})=\n## specstop {name}\n\n{parser.description}\n\n{markdown_table(rows)}"


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if action.choices:
        return "{" + ",".join(map(str, action.choices)) + "}"
    name = action.metavar or action.dest.upper().replace("_", "-")
    return f"{name} ..." if action.nargs in ("+", "*") else str(name)


# --- Modules


def module_pages(folder: Path) -> None:
    """One page for each module that says what is public, and their table of contents."""
    folder.mkdir(exist_ok=True)
    entries = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            if path.name.startswith("_") and path.name != "__init__.py":
                continue
            page = f"{name}\n{'=' * len(name)}\n\n.. automodule:: {name}\n"
            target = folder / f"{name}.rst"
            if not target.exists() or target.read_text() != page:
                target.write_text(page)
            entries.append(name)
    for stale in set(folder.glob("*.rst")) - {folder / f"{name}.rst" for name in entries}:
        stale.unlink()


class Modules(SphinxDirective):
    """The first line of each module, with a link to its page."""

    def run(self) -> list[nodes.Node]:
        import ast

        parts = []
        for package in PACKAGES:
            pages = sorted(Path(self.env.srcdir, "reference", "modules").glob(f"{package}*.rst"))
            rows = []
            for page in pages:
                name = page.stem
                path = ROOT.joinpath(*name.split("."))
                source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
                about = (ast.get_docstring(ast.parse(source.read_text())) or "").split("\n\n")[0]
                rows.append({"module": f"[`{name}`](modules/{name}.rst)", "": " ".join(about.split())})
            parts.append(f"## {package}\n\n{markdown_table(rows)}")
        tree = "```{toctree}\n:hidden:\n:glob:\n\nmodules/*\n```"
        return self.parse_text_to_nodes("\n\n".join([*parts, tree]), allow_section_headings=True)


# --- Formulas


def mathml(text: str, block: bool) -> str:
    """LaTeX as MathML; sizes of brackets are left to the browser."""
    text = (
        re.sub(r"\\([bB]igg?[lr]?|textstyle)(?![a-zA-Z])", "", text)
        .replace(r"\dots", r"\ldots")
        .replace(r"\tfrac", r"\frac")
    )
    tree = latex2mathml.tex2mathml(text, as_block=block)
    return tree if isinstance(tree, str) else tree.toxml()


def _inline(translator: Any, node: nodes.math) -> None:
    _write(translator, node, block=False)


def _block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(translator.starttag(node, "div", CLASS="math"))
    _write(translator, node, block=True)
    translator.body.append("</div>")
    raise nodes.SkipNode


def _write(translator: Any, node: Any, block: bool) -> None:
    try:
        translator.body.append(mathml(node.astext(), block))
    except MathError as error:
        log.warning("formula %r: %s", node.astext(), error, location=node)
    if not block:
        raise nodes.SkipNode


# --- Docstrings: Markdown habits in reStructuredText


def docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """`$...$` is a formula, and so is a `$$` block."""
    lines[:] = list(_formulas("\n".join(lines).replace("\\$", "$")))


def _formulas(text: str) -> Iterator[str]:
    def block(found: re.Match[str]) -> str:
        indent = found[1]
        body = "\n".join(f"{indent}    {line.strip()}" for line in found[2].strip().splitlines())
        return f"{indent}.. math::\n\n{body}\n"

    text = re.sub(r"^([ ]*)\$\$(.+?)\$\$\.?$", block, text, flags=re.M | re.S)
    text = re.sub(r"(?<!\\)\$([^$]+?)\$", lambda m: rf":math:`{' '.join(m[1].split())}`\ ", text)
    text = re.sub(r"(?:^[ ]*\|.*\|\n)+", _list_table, text, flags=re.M)
    text = re.sub(r"(?<![\w|`])\|([^|`\n]+)\|(?![\w|`])", r"\\|\1\\|", text)  # the absolute value
    text = re.sub(r"`([^`\n]+)`(?=[a-zA-Z])", r"`\1`\\ ", text)  # `Thing`s
    text = re.sub(r"^( *)(\S.*?):{0,2}\n\n(?=\1    \S)", _indented, text, flags=re.M)
    yield from text.split("\n")


def _indented(found: re.Match[str]) -> str:
    """What is indented behind a paragraph is an example, as it stands."""
    if found[0].rstrip().endswith(":"):
        return f"{found[1]}{found[2]}::\n\n"
    return f"{found[1]}{found[2]}\n\n{found[1]}::\n\n"


def _list_table(found: re.Match[str]) -> str:
    """A Markdown table as reStructuredText has it."""
    lines = [line.strip().strip("|").split("|") for line in found[0].splitlines()]
    rows = [line for line in lines if set("".join(line)) - set("-: ")]
    cells = ["\n     - ".join(part.strip() for part in row) for row in rows]
    return "\n.. list-table::\n   :header-rows: 1\n\n" + "\n".join(f"   * - {row}" for row in cells) + "\n\n"


def skip(app: Sphinx, what: str, name: str, obj: object, skipped: bool, options: object) -> bool | None:
    """What a module only passes on is documented where it is made."""
    module, made = app.env.current_document.autodoc_module, getattr(obj, "__module__", None)
    return True if what == "module" and module and made and made != module else None


def setup(app: Sphinx) -> dict[str, bool]:
    for name, directive in (
        ("run", Run),
        ("made", Table),
        ("verbs", Verbs),
        ("held-by", HeldBy),
        ("python-modules", Modules),
    ):
        app.add_directive(name, directive)
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.add_lexer("jsonl", JsonLexer)
    app.connect("autodoc-process-docstring", docstring, priority=400)
    app.connect("autodoc-skip-member", skip)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
