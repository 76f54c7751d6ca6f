"""The stages of a long run: how far it is, what each took, and what need not be done again."""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specstop.output import jsonable, write_file

__all__ = ["Progress", "Stages"]


@dataclass
class Progress:
    """A line on the terminal: what is being done and how long it will take, by what was done so far.

    Work is counted in tokens: a recorded one counts `RECORDED`, a live one 1.
    """

    start: float = field(default_factory=time.perf_counter)
    done_units: float = 0.0
    total_units: float = 0.0

    RECORDED = 1.5

    def expect(self, units: float) -> None:
        """So much more is to be done than was known."""
        self.total_units += units

    def tell(self, what: str, units: float = 0.0) -> None:
        self.done_units += units
        if not sys.stderr.isatty():
            return
        spent, share = time.perf_counter() - self.start, self.done_units / max(self.total_units, 1.0)
        left = f", about {math.ceil(spent * (1 / share - 1) / 60)} min left" if 0.02 < share < 1 else ""
        print(f"\r\033[K{what}{left}", end="", file=sys.stderr, flush=True)

    def done(self) -> None:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Stages:
    """What was worked out already, one JSON file each, with a hash of the settings that led to it."""

    folder: Path

    def get(self, name: str, key: str, make: Callable[[], Any]) -> Any:
        """What the stage gave, made now if it is not there or was made from other settings."""
        path = self.folder / f"{name}.json"
        try:
            saved = json.loads(path.read_text())
            if saved["key"] == key:
                return saved["value"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        value = jsonable(make())
        self.folder.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps({"key": key, "value": value}))
        return value
