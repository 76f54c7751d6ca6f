"""Counterexamples in small fractions: each breaks one condition of the theory, and what that costs is known exactly.

The problem files lie beside the code, in `mdp/counterexamples/`; any command takes them. They were found by search and
shrunk (`mdp.search`), or by trying all problems with few regimes in halves and quarters.
"""

import json
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from mdp.problem import StoppingProblem, load

__all__ = ["Counterexample", "gallery"]

FOLDER = Path(__file__).parent / "counterexamples"


class Counterexample(NamedTuple):
    """A problem on which a claim is false.

    Attributes:
        name, path: of the problem file.
        fact, number: the fact that is broken, and which of its numbers says by how much.
        value: that number, exactly.
        breaks: the one condition that is not met.
        story: what happens, in words and exact fractions.
    """

    name: str
    path: Path
    fact: str
    number: str
    value: Fraction
    breaks: str
    story: str

    @property
    def problem(self) -> StoppingProblem:
        return load(self.path)


def gallery() -> list[Counterexample]:
    """All counterexamples, the one to look at first first.

    Example:
        >>> first = gallery()[0]
        >>> first.name, first.fact, str(first.value)
        ('two_regimes', 'F2', '2/301')
    """
    entries = json.loads((FOLDER / "index.json").read_text(encoding="utf-8"))
    return [
        Counterexample(**{**entry, "value": Fraction(entry["value"]), "path": FOLDER / f"{entry['name']}.json"})
        for entry in entries
    ]
