"""Results as text: one JSON line each, or a table for people."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["emit", "json_line", "jsonable", "key_values", "policy_table", "solution_text", "table", "write_file"]

SAME = 1e-4
"""Percent of the throughput that `solve`, at its usual tolerance, does not tell apart."""

MOST_COLUMNS = 9
"""Regimes whose thresholds are printed; a table has one column for each."""

POLICY_COLUMNS = (
    "policy", "signal", "throughput", "throughput_bounds", "throughput_se", "throughput_interval", "speedup",
    "block_efficiency", "verification_rate", "discard_rate", "mean_candidates", "gap",
)  # fmt: skip


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


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all."""
    from mdp.trace import atomic_write

    atomic_write(path, content.encode() if isinstance(content, str) else content)


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


def solution_text(path: str, result: Mapping[str, Any], advice: str, fixed: tuple[int, float] | None = None) -> str:
    """What `solve` found, for people: figures, the best fixed length, thresholds of a few regimes if there are many."""
    scalars = {
        key: value for key, value in result.items() if key not in ("survival_threshold", "belief_rule", "horizon")
    }
    scalars |= {f"horizon {key}": value for key, value in result.get("horizon", {}).items()}
    head = "\n".join(filter(None, (path, key_values(scalars), advice and f"not converged: {advice}")))
    if fixed is not None:
        length, throughput = fixed
        loss = 100 * (1 - throughput / result["throughput"])
        below = "as good as the optimum" if loss < SAME else f"{loss:.2g} % below the optimum"
        head += f"\n\nto paste: fixed:{length}, the best fixed length ({throughput:.5g}, {below})"
    if result["survival_threshold"] is None:
        return head + "\n\nregimes are hidden: the rule follows the symbols (--json gives it, optimal:FILE plays it)"
    columns = len(result["survival_threshold"][0])
    shown = [round(j * (columns - 1) / (MOST_COLUMNS - 1)) for j in range(MOST_COLUMNS)]
    shown = shown if columns > MOST_COLUMNS else list(range(columns))
    rows = [
        {"k": k} | {f"regime {z}": "stop" if row[z] is None else row[z] for z in shown}
        for k, row in enumerate(result["survival_threshold"])
    ]
    some = f" ({len(shown)} of {columns} regimes; --json gives all)" if len(shown) < columns else ""
    thresholds = f"draft candidate k + 1 iff survival >= threshold{some}:\n" + table(rows)
    return f"{head}\n\n{thresholds}" + ("\n" if len(rows) > 1 else "")


def policy_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One row a policy, with the columns that any of them has."""
    return table(rows, [column for column in POLICY_COLUMNS if any(row.get(column) is not None for row in rows)])
