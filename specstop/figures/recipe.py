"""What a figure is made of: series with an origin, and a recipe that computes them and says what they show."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from specstop.output import jsonable

if TYPE_CHECKING:
    from specstop.figures.store import Store

__all__ = ["ORIGINS", "Data", "Recipe", "Unavailable", "origins", "pluck", "published", "series"]

ORIGINS = {
    "published": "read in the paper, its repository or a note that quotes it",
    "derived": "worked out from published figures: digitised from a plot, or implied by other numbers",
    "predicted": "computed from a model, exactly or between proven bounds",
    "simulated": "sampled from a model",
    "replayed": "a rule on the recorded trace of a real pair",
    "measured": "a real pair run live, or its times",
}

Data = dict[str, Any]
"""`series`: a list of what `series` makes; `about`: settings, and what captions quote."""


class Unavailable(Exception):
    """A source that cannot be had here; the message says what it would take, in one line."""


def series(
    name: str, origin: str, /, *, panel: str = "", tag: str | None = None, source: str | None = None,
    **columns: Any,
) -> Data:  # fmt: skip
    """One series: columns of equal length, and where its numbers come from.

    Args:
        name: what it is called in the legend.
        origin: one of `ORIGINS`.
        panel: the part of the figure it belongs to.
        tag: evidence of what was published or derived (`specstop.paper`).
        source: where that was read, or how the numbers came about.
        columns: lists or arrays.

    Raises:
        ValueError: if the origin is unknown, a published or derived series has no tag, or lengths differ.

    Example:
        >>> series("fixed K", "predicted", K=[1, 2], speedup=[1.5, 1.7])["columns"]["speedup"]
        [1.5, 1.7]
    """
    if origin not in ORIGINS:
        raise ValueError(f"series {name!r}: origin must be one of {', '.join(ORIGINS)}, got {origin!r}")
    if origin in ("published", "derived") and not (tag and source):
        raise ValueError(f"series {name!r}: what is {origin} needs its evidence tag and its source")
    values = {key: jsonable(list(value)) for key, value in columns.items()}
    if len({len(value) for value in values.values()}) != 1:
        raise ValueError(f"series {name!r}: columns must have one length")
    return {"name": name, "panel": panel, "origin": origin, "tag": tag, "source": source, "columns": values}


def pluck(rows: Iterable[Mapping[str, Any]], *names: str) -> Data:
    """Rows as columns; what a row lacks is null."""
    rows = list(rows)
    return {name: [row.get(name) for row in rows] for name in names}


def published(tag: str) -> str:
    """The origin of a number of `specstop.paper` with this tag: only what somebody read somewhere is published.

    Raises:
        ValueError: for numbers recalled from memory, which belong in no figure.
    """
    if tag == "memory":
        raise ValueError("tag: what is recalled from memory belongs in no figure")
    return "derived" if tag == "derived" else "published"


def origins(data: Mapping[str, Any]) -> list[str]:
    """Those that occur in a figure's data, from what was read to what was measured."""
    found = {entry["origin"] for entry in data["series"]}
    return [origin for origin in ORIGINS if origin in found]


class Recipe(NamedTuple):
    """A figure: its file name and title, the sources it needs, how its data is computed and what its caption says."""

    name: str
    title: str
    uses: tuple[str, ...]
    compute: Callable[["Store"], Data]
    caption: Callable[[Data], str]
