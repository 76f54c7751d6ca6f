"""Results as text: one JSON line each, or a table for people."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["emit", "json_line", "jsonable", "key_values", "table"]


def jsonable(value: Any) -> Any:
    """`value` in JSON's own types; NaN and infinities, which JSON has not, become null."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def json_line(value: Any) -> str:
    """One line, no indentation, no NaN or Infinity."""
    return json.dumps(jsonable(value), allow_nan=False)


def emit(text: str) -> None:
    """Print to stdout at once, whatever its encoding can hold."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def _cell(value: Any) -> str:
    value = jsonable(value)
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list):
        return "[" + ", ".join(f"{x:.7g}" if isinstance(x, float) else _cell(x) for x in value) + "]"
    return str(value)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Aligned columns with a header; text to the left, numbers to the right."""
    columns = list(columns or rows[0])
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    left = [any(isinstance(row.get(column), str) for row in rows) for column in columns]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = []
    for line in [columns, *cells]:
        parts = [
            text.ljust(width) if is_left else text.rjust(width)
            for text, width, is_left in zip(line, widths, left, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def key_values(values: Mapping[str, Any]) -> str:
    """One `name  value` line each."""
    width = max(map(len, values))
    return "\n".join(f"{name.ljust(width)}  {_cell(value)}" for name, value in values.items())
