"""The paper's figures by name: stored data in, a `Figure` out."""

from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.figure import Figure

from simulate.figures import bars, curves, maps, rounds

__all__ = ["DRAWINGS", "draw"]

DRAWINGS: Mapping[str, Callable[[Mapping[str, Any]], Figure]] = {
    "summary": rounds.summary,
    "round": rounds.round_,
    **{name: getattr(module, name) for module in (bars, curves, maps) for name in module.__all__},
}


def draw(data: Mapping[str, Any]) -> Figure:
    """A figure from its stored data (`specstop figures`), `data["name"]` saying which.

    Raises:
        ValueError: if no figure has this name.
    """
    name = str(data.get("name"))
    if name not in DRAWINGS:
        raise ValueError(f"name: must be one of {', '.join(DRAWINGS)}, got {name!r:.60}")
    return DRAWINGS[name](data)
