"""The site as it is built: no warning, no broken link, nothing fetched, every public module and verb on it."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent


class Page(HTMLParser):
    """The anchors of a page, what it links to, and what it loads."""

    def __init__(self, text):
        super().__init__()
        self.anchors, self.links, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors.update(filter(None, (found.get("id"), found.get("name") if tag == "a" else None)))
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag in ("img", "script", "source", "iframe") and found.get("src"):
            self.loads.append(found["src"])
        if tag == "link" and found.get("rel") in ("stylesheet", "preload", "icon") and found.get("href"):
            self.loads.append(found["href"])


def faults(folder):
    """Links and loads of all pages that lead nowhere, and loads from elsewhere."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))}
    for path, page in pages.items():
        for link in [*page.links, *page.loads]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.loads and parts.scheme != "data":
                    yield f"{path.name} loads {link}"
                continue
            target = path.parent / unquote(parts.path) if parts.path else path
            target = target.resolve() if target.suffix else (target / "index.html").resolve()
            if not target.exists():
                yield f"{path.name}: no file {link}"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                yield f"{path.name}: no anchor {link}"


def test_the_check_of_links_can_fail(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="b.html">1</a><a href="#x">2</a><a href="a.html#y">3</a><p id="y"></p><script src="https://x/y.js">'
    )
    assert [fault.split(": ")[-1] for fault in faults(tmp_path)] == [
        "no file b.html", "no anchor #x", "a.html loads https://x/y.js",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site: the one that `make docs` has just made (SPECSTOP_SITE), or one of our own."""
    if built := os.environ.get("SPECSTOP_SITE"):
        return Path(built).resolve()
    pytest.importorskip("sphinx")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-d", out / "trees",
         ROOT / "docs", out / "html"], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out / "html"


@pytest.mark.slow
def test_no_link_is_broken_and_nothing_is_fetched(site):
    assert list(faults(site)) == []
    assert len(list(site.rglob("*.html"))) > 80


def raw_formulas(text):
    """Lines of a page's running text in which a formula was left as it was typed."""
    article = re.sub(r"<(pre|code|script|style|math)\b.*?</\1>", "", text, flags=re.S)
    return [line for line in article.splitlines() if re.search(r"\$[A-Za-z\\(]", line)]


def test_the_check_of_formulas_can_fail():
    assert raw_formulas("<p>reported as $m / (m</p>\n<pre>$ ls $HOME</pre><p>$\\rho</p>")


@pytest.mark.slow
def test_no_formula_is_left_as_it_was_typed(site):
    assert {path.name: lines for path in site.rglob("*.html") if (lines := raw_formulas(path.read_text()))} == {}


@pytest.mark.slow
def test_all_there_is_is_on_it(site):
    from mdp.gallery import gallery
    from mdp.policy import RULES
    from mdp.problem import schema
    from specstop.arguments import build_parser

    def text(page):
        return (site / page).read_text(encoding="utf-8")

    (choices,) = [action.choices for action in build_parser()._actions if action.dest == "verb"]
    assert all(f"specstop {verb}<" in text("reference/command-line.html") for verb in choices)
    assert all(f">{rule}<" in text("reference/rules.html") for rule in RULES)
    for kinds in schema()["keys"].values():
        for keys in kinds.values():
            assert all(f">{key}<" in text("reference/problem-file.html") for key in keys)
    assert all(f"<strong>{case.name}</strong>" in text("theory/gallery.html") for case in gallery())
    modules = {path.relative_to(ROOT).with_suffix("") for name in ("mdp", "simulate", "realmodels", "specstop")
               for path in (ROOT / name).rglob("*.py") if not path.name.startswith("_")}  # fmt: skip
    for module in modules:
        page = site / "reference" / "modules" / f"{'.'.join(module.parts)}.html"
        assert page.exists(), module
    assert 'id="mdp.solve.solve"' in text("reference/modules/mdp.solve.html")
    assert "to paste: fixed:4" in text("tutorial.html") and "<math" in text("theory/facts.html")
    assert (site / "notebooks" / "01_first_look.html").exists()
