"""The site: `make docs`. Nothing is fetched while it is built, and nothing while it is read."""

import sys
import tomllib
import warnings
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]
warnings.simplefilter("ignore")  # those of the libraries that are documented beside ours

import drawings  # noqa: E402
import math_font  # noqa: E402
from site_parts import module_pages  # noqa: E402

from specstop.settings import prepare  # noqa: E402

prepare()
meta = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
project, release, version = meta["name"], meta["version"], meta["version"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "site_parts"]
exclude_patterns = ["_build", "notebooks/*.py", "**.ipynb_checkpoints"]
html_theme = "furo"
html_title = f"specstop {release}"
html_static_path = ["_static", "drawn"]
html_show_copyright = False
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are run by their own tests; here they are shown as stored
nb_merge_streams = True
# Sliders need a kernel: shown is the picture that was stored beside them, and no script is loaded for them.
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
nb_ipywidgets_js = {}

default_role = "py:obj"  # `mdp.solve` in a docstring is a link where it names something
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
nitpicky = False  # names of arguments in single quotes are no links; links between pages are always checked
suppress_warnings = ["ref.python"]  # a name that two modules share: the page says which

drawings.draw(HERE / "drawn")
math_font.write(HERE / "drawn" / "site-math.woff")
module_pages(HERE / "reference" / "modules")
