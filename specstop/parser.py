"""A parser whose errors are one line, and the types of what is typed."""

import argparse
import re
from collections.abc import Callable
from typing import Any, NoReturn

__all__ = [
    "Parser", "UsageError", "fraction", "not_negative", "number", "part", "probability", "seed", "share",
    "whole_number",
]  # fmt: skip


class UsageError(ValueError):
    """The command line itself is wrong."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage block, and that guesses no abbreviation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """An argument type: a whole number in low..high, written in digits only."""

    def read(text: str) -> int:
        # int() would also take 1_000, other scripts' digits and surrounding blanks
        if not re.fullmatch(r"-?[0-9]{1,30}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number in {low}..{high}, got {text!r:.40}")
        return int(text)

    return read


def number(low: float, high: float, what: str) -> Callable[[str], float]:
    """An argument type: a finite number strictly between low and high; `what` says so in words."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = low
        if not low < value < high:
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r:.40}")
        return value

    return read


def part(text: str) -> tuple[int, int]:
    """An argument type: I/N with 1 <= I <= N."""
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text, re.ASCII)
    index, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= index <= count:
        raise argparse.ArgumentTypeError(f"must be I/N with 1 <= I <= N, got {text!r:.40}")
    return index, count


not_negative = number(-5e-324, float("inf"), "a finite number >= 0")
probability = number(-5e-324, 1.0 + 2.0**-52, "a number in [0, 1]")
fraction = number(0.0, 1.0, "a number between 0 and 1")
share = number(0.0, 1.0 + 2.0**-52, "a number in (0, 1]")
seed = whole_number(0, 2**63 - 1)
