"""All figures of the paper into one folder: data first, pictures from the data, pages last."""

import csv
import io
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specstop.figures import heads, pair, published, summary, theory, times
from specstop.figures.pages import write_pages
from specstop.figures.recipe import Data, Recipe, Unavailable, origins
from specstop.figures.sources import SOURCES
from specstop.figures.store import Store
from specstop.output import emit, json_line, table, write_file

__all__ = ["RECIPES", "figures", "make"]

DEMO_TRACE = Path("out/trace")
"""Where `make demo` leaves its trace."""

PICTURES = (".pdf", ".svg", ".png")

_EVERY = {
    recipe.name: recipe for module in (summary, pair, published, heads, times, theory) for recipe in module.RECIPES
}
_ORDER = (
    "summary", "round", "speedups", "frontiers", "throughput_by_length", "throughput_by_threshold", "oracle",
    "head_weights", "heads", "reliability", "time_decomposition", "time_regression", "threshold_map", "theorem_bound",
    "phase", "information", "gallery", "self_tuning",
)  # fmt: skip
RECIPES: Mapping[str, Recipe] = {name: _EVERY[name] for name in _ORDER}
"""Every figure by name, in the order of the page."""

assert len(RECIPES) == len(_EVERY)


def figures(args: Namespace) -> int:
    """`specstop figures`."""
    trace = None if args.trace is None else Path(args.trace)
    result = make(Path(args.out), quick=args.quick, force=args.force, trace=trace, only=args.only)
    emit(json_line(result) if args.json else _text(result))
    return 0


def make(
    out: Path, *, quick: bool = False, force: bool = False, trace: Path | None = None, only: Sequence[str] | None = None
) -> dict[str, Any]:
    """Make or refresh every figure in `out`.

    Args:
        out: made if it does not exist; results in it that are not too old are used again.
        quick: small sizes, and a tiny random pair unless a trace is given.
        force: compute everything anew; a trace that was recorded stays.
        trace: of a real pair; None takes that of `make demo` if it is there, else records one.
        only: names of figures; the pages then show these alone. None: all of them.

    Returns:
        `out`, `figures` (name, seconds, reused, origins), `not_made` (name, why), `seconds`.

    Raises:
        ValueError: if the trace is none, a name is unknown, or the demo's packages are missing; one line.
    """
    start = time.perf_counter()
    for name in only or ():
        if name not in RECIPES:
            raise ValueError(f"--only: must be among {', '.join(RECIPES)}, got {name!r:.60}")
    if trace is None and not quick and (DEMO_TRACE / "manifest.json").is_file():
        trace = DEMO_TRACE
    if trace is not None:
        from mdp.trace import load

        load(trace)  # a trace that is none is refused before any work
    out.mkdir(parents=True, exist_ok=True)
    store = Store(out, SOURCES, quick=quick, force=force, trace=trace)
    made, missing, figures = [], [], []
    for recipe in RECIPES.values():
        if only and recipe.name not in only:
            continue
        begun = time.perf_counter()
        _say(recipe.name)
        try:
            data, reused = store.data(recipe)
        except Unavailable as why:
            missing.append({"name": recipe.name, "title": recipe.title, "why": str(why)})
            for path in _files(out, recipe.name):
                path.unlink(missing_ok=True)  # what an earlier run made with other inputs
            continue
        _draw(out, data)
        made.append(data)
        figures.append({"name": recipe.name, "reused": reused, "origins": origins(data),
                        "seconds": round(time.perf_counter() - begun, 2)})  # fmt: skip
    write_pages(out, made, missing)
    return {"out": str(out), "quick": quick, "trace": store.trace_read, "figures": figures, "not_made": missing,
            "seconds": round(time.perf_counter() - start, 1)}  # fmt: skip


def _draw(out: Path, data: Data) -> None:
    """All files of one figure but its data, from its data."""
    from simulate.figures import draw, render

    figure = draw(data)
    for suffix in PICTURES:
        write_file(out / f"{data['name']}{suffix}", render(figure, suffix))
    write_file(out / f"{data['name']}.csv", as_csv(data))


def as_csv(data: Data) -> str:
    """One line a point: the series' name, panel, origin and evidence, then every column that any series has."""
    head = ("series", "panel", "origin", "tag", "source")
    columns = list(dict.fromkeys(name for entry in data["series"] for name in entry["columns"]))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*head, *columns])
    for entry in data["series"]:
        about = [entry["name"], *(entry[key] for key in head[1:])]
        size = len(next(iter(entry["columns"].values())))
        for row in range(size):
            writer.writerow([*about, *(entry["columns"].get(name, [None] * size)[row] for name in columns)])
    return file.getvalue()


def _files(out: Path, name: str) -> list[Path]:
    return [out / f"{name}{suffix}" for suffix in (*PICTURES, ".csv", ".json")]


def _say(name: str) -> None:
    if sys.stderr.isatty():
        print(f"figure {name}", file=sys.stderr, flush=True)


def _text(result: dict[str, Any]) -> str:
    rows = [{"figure": row["name"], "origins": ", ".join(row["origins"]), "seconds": row["seconds"],
             "": "used again" if row["reused"] else ""} for row in result["figures"]]  # fmt: skip
    parts = [table(rows)]
    parts += [f"not made: {row['name']}: {row['why']}" for row in result["not_made"]]
    parts.append(f"{result['out']}/index.html, report.md  ({result['seconds']:.0f} s)")
    return "\n".join(parts)
