"""Turns, medians and lines of output: what all benchmark scripts share."""

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

__all__ = ["alternate", "optional", "options", "printer"]

TURN = 0.02
"""Seconds: a turn repeats short calls until it is about this long. A single call right after a peer's turn finds cold
caches and sleeping threads; it takes us 2 to 3 times longer than the next ones."""


def alternate(
    ours: Callable, peer: Callable | None, runs: int, prepare: Callable | None = None
) -> tuple[float, float | None, Any, Any]:
    """Median seconds a call of both, in turns after a warm-up each, and what they returned last.

    With `prepare`, the peer is called on what it returns: made anew before every call, off the clock.
    """
    sides: list[tuple[Callable, Callable | None, int, list[float]]] = []
    for work, ready in ((ours, None), (peer, prepare)):
        if work is not None:
            seconds, _ = _call(work, ready)
            if seconds < 2.0:  # compilation among it, perhaps
                seconds, _ = _call(work, ready)
            sides.append((work, ready, 1 if ready else max(1, int(TURN / seconds)), []))
    out = [None, None]
    for _ in range(runs):
        for side, (work, ready, repeats, times) in enumerate(sides):
            spent = 0.0
            if repeats == 1:
                spent, out[side] = _call(work, ready)
            else:
                begun = time.perf_counter()
                for _ in range(repeats):
                    out[side] = work()
                spent = time.perf_counter() - begun
            times.append(spent / repeats)
    return median(sides[0][3]), median(sides[1][3]) if peer else None, *out


def _call(work: Callable, prepare: Callable | None) -> tuple[float, Any]:
    arguments = () if prepare is None else (prepare(),)
    begun = time.perf_counter()
    found = work(*arguments)
    return time.perf_counter() - begun, found


def optional(name: str) -> Any:
    """The module if it is installed, else None."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def options(description: str, parts: list[str]) -> argparse.Namespace:
    """`--quick`, `--json`, `--only`; says on stderr how busy the machine is."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: smaller sizes, fewer peers")
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--only", choices=parts, help="one part")
    chosen = parser.parse_args()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(f"{os.cpu_count()} cores, load {load:.1f} at the start", file=sys.stderr)
    return chosen


def printer(as_json: bool) -> Callable:
    """`emit(name, ours_s, peer, peer_s, runs, note, ratio=None)`: a line; the ratio is peer_s / ours_s if not given."""

    def emit(name, ours_s, peer, peer_s, runs, note, ratio=None):
        ratio = peer_s / ours_s if ratio is None and peer_s is not None else ratio
        if as_json:
            row = dict(name=name, ours_s=ours_s, peer=peer, peer_s=peer_s, ratio=ratio, runs=runs, note=note)
            print(json.dumps(row), flush=True)
        else:
            theirs = "-" if peer_s is None else f"{peer_s:.3g} s"
            shown = "-" if ratio is None else f"{ratio:.3g}"
            print(f"{name}: {ours_s:.3g} s | {peer or '-'} {theirs} | {shown} | {note}", flush=True)

    return emit
