"""Reading a figure's stored data: its series by name, panel and origin, and where its numbers come from."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simulate.figures.style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, heading, sign

__all__ = ["ORIGIN_LOOKS", "PAIR", "column", "finish", "label", "one", "pick", "whiskers"]

PAIR = "pair"
"""The panel of the recorded pair, which is shown under its own name."""

ORIGIN_LOOKS: Mapping[str, tuple[str, str, str]] = {
    "published": (BLACK, "*", ""),
    "derived": (GREY, "o", "\\\\\\"),
    "predicted": (BLUE, "D", ""),
    "simulated": (PURPLE, "v", "++"),
    "replayed": (ORANGE, "s", "..."),
    "measured": (GREEN, "^", "xxx"),
}
"""Colour, marker and hatch of an origin, in every figure that sets origins side by side."""

Series = Mapping[str, Any]


def pick(data: Series, name: str | None = None, panel: str | None = None, origin: str | None = None) -> list[Series]:
    """The series with these, in the order stored."""
    wanted = {"name": name, "panel": panel, "origin": origin}
    return [
        entry for entry in data["series"] if all(v is None or entry[key] == v for key, v in wanted.items())
    ]  # fmt: skip


def one(data: Series, name: str | None = None, panel: str | None = None, origin: str | None = None) -> Series:
    """The only series with these.

    Raises:
        ValueError: if there are none or several.
    """
    found = pick(data, name, panel, origin)
    if len(found) != 1:
        raise ValueError(f"data {data['name']}: {len(found)} series are {name or ''} {panel or ''} {origin or ''}")
    return found[0]


def column(entry: Series, name: str) -> np.ndarray:
    """Numbers of a column; null is nan."""
    return np.array([np.nan if value is None else value for value in entry["columns"][name]], dtype=float)


def label(data: Series, panel: str) -> str:
    """A panel's name for people."""
    return data["about"]["pair"]["label"] if panel == PAIR else panel


def whiskers(axes: Axes, entry: Series, x: Any, y: str, *, vertical: bool = True, **look: Any) -> None:
    """Points with intervals [low, high]; those of no width are left out."""
    value, low, high = (column(entry, name) for name in (y, "low", "high"))
    span = np.nan_to_num(np.stack([value - low, high - value]))
    where: dict[str, Any] = {"x": x, "y": value, "yerr": span} if vertical else {"x": value, "y": x, "xerr": span}
    axes.errorbar(**where, capsize=2.0, elinewidth=1.0, **look)


def finish(figure: Figure, data: Series, note: str = "") -> Figure:
    """Heading, and under the figure where its numbers come from."""
    parts = []
    for origin in ORIGIN_LOOKS:
        entries = pick(data, origin=origin)
        tags = sorted({str(entry["tag"]) for entry in entries if entry["tag"]} - {origin})
        if entries:
            parts.append(f"{origin} [{', '.join(tags)}]" if tags else origin)
    heading(figure, data["title"])
    quick = "  Made with --quick." if data.get("quick") else ""
    return sign(figure, f"Numbers: {', '.join(parts)}.  {note}".strip() + quick)
