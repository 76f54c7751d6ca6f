"""The problem file's schema as a table for people."""

from collections.abc import Mapping
from typing import Any

from specstop.output import table

__all__ = ["schema_rows", "schema_text"]

LARGE = 2.0**40
"""A limit from here on means that there is none in practice."""


def schema_rows(known: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each key of `mdp.problem.schema`; for a kind without keys one that says so."""
    rows = []
    for part, kinds in known["keys"].items():
        for kind, keys in kinds.items():
            about = {"part": part, "kind": kind}
            rows += [about | {"key": key, **_key_cells(holds)} for key, holds in keys.items()] or [about]
    return rows


def _key_cells(holds: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "holds": holds["shape"] + (", rows sum to 1" if holds["rows"] else ""),
        "unit": holds["unit"] or "-",
        "range": _range(holds["low"], holds["high"]),
        "default": "none" if holds["required"] else f"{holds['default']:g}",
        "what": holds["does"],
    }


def _range(low: float, high: float) -> str:
    # limits that are there for the arithmetic's sake are no news to a reader
    if high >= LARGE:
        return ">= 0" if low == 0 else f">= {low:g}" if low >= 1 else "> 0"
    return f"{low:g}..{high:g}"


def schema_text(known: Mapping[str, Any]) -> str:
    """What a problem file may hold, for people."""
    low, high = known["max_candidates"]
    most = ", ".join(f"{axis} at most {size}" for axis, size in known["most"].items())
    return (
        f"{table(schema_rows(known), ['part', 'kind', 'key', 'holds', 'unit', 'range', 'default', 'what'])}\n\n"
        f"K: max_candidates; Z regimes, O symbols, n tokens: as many as the lists say; {most}\n"
        "time: any unit, the same throughout the file; throughput is in tokens per that unit\n"
        f"max_candidates: a whole number in {low}..{high}; coupling: renewal if left out"
    )
