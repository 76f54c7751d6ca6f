"""House style of all figures: sizes, colours with a marker, line and hatch each, and files whose bytes repeat.

Colours are Okabe and Ito's, which colour-blind readers can tell apart, and each comes with a marker, a line style and
a hatch of its own, so a grey print can be read too. Text is set by matplotlib itself: no LaTeX.
"""

import io
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

__all__ = [
    "BLACK", "BLUE", "GREEN", "GREY", "HATCHES", "LOOKS", "ORANGE", "PURPLE", "RED", "SKY", "STYLE", "WIDTH", "heading",
    "render", "save", "sign", "styled",
]  # fmt: skip

BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
GREY = "#6B6B6B"

STYLE: Mapping[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E2E2E2",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 5.0,
    "figure.facecolor": "white",
    "pdf.fonttype": 42,
    "svg.hashsalt": "specstop",
}
"""The house style, in one place."""

LOOKS = ((BLUE, "o", "-"), (ORANGE, "s", "--"), (GREEN, "^", "-."), (PURPLE, "D", ":"), (RED, "v", "-"),
         (SKY, "P", "--"), (BLACK, "X", "-."), (GREY, "*", ":"))  # fmt: skip
"""Colour, marker and line style, to be handed out in this order."""

HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++")

WIDTH = 7.6
"""Inches of a figure across a page's text."""

DPI = 150
METADATA = {".png": {"Software": None}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}


def styled(make: Callable[..., Figure]) -> Callable[..., Figure]:
    """Build the figure under the house style, ticks and layout included, and leave matplotlib's settings alone."""

    @wraps(make)
    def under_style(*args: Any, **kwargs: Any) -> Figure:
        with matplotlib.rc_context(dict(STYLE)):
            figure = make(*args, **kwargs)
            figure.draw_without_rendering()
        return figure

    return under_style


def heading(figure: Figure, text: str) -> None:
    """Write what the figure is about over it."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=10.5)


def sign(figure: Figure, text: str) -> Figure:
    """Write where the numbers come from under the figure."""
    figure.supxlabel(text.strip(), x=0.01, ha="left", fontsize=7.5, color=GREY)
    return figure


def render(figure: Figure, suffix: str, dpi: int = DPI) -> bytes:
    """The figure as the bytes of a `.png`, `.pdf` or `.svg`; the same figure gives the same bytes."""
    file = io.BytesIO()
    with matplotlib.rc_context(dict(STYLE)):
        figure.savefig(file, format=suffix.removeprefix("."), dpi=dpi, metadata=METADATA.get(suffix))
    return file.getvalue()


def save(figure: Figure, path: str | Path, dpi: int = DPI) -> Path:
    """Write a figure; the same figure gives the same bytes."""
    path = Path(path)
    path.write_bytes(render(figure, path.suffix, dpi))
    return path
