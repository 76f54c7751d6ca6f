"""What a key of the problem file holds: said in the annotation of the field that it fills, and listed from there.

    draft_time: Annotated[float, Key("number", "time", 1e-100, 1e100, "a draft step")]

The class still checks its values; a test tries the stated ends of every range on it.
"""

from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any, NamedTuple, get_type_hints

__all__ = ["Key", "describe"]


class Key(NamedTuple):
    """A key's value.

    Attributes:
        shape: `number`, `whole number`, or the axes of a list as in `[Z, Z]`: K candidates, Z regimes, O symbols,
            n tokens.
        unit: `probability`, `time` (any unit, the same throughout the file), or a unit proper; empty for pure numbers.
        low, high: the least and the greatest value of the number, or of each number in the list.
        does: what it is, in a few words.
        rows: lists of probabilities whose rows (last axis) sum to 1.
    """

    shape: str
    unit: str
    low: float
    high: float
    does: str
    rows: bool = False


def describe(cls: type) -> dict[str, dict[str, Any]]:
    """For each key of a kind what `Key` says, and its default; `required` if there is none."""
    return {
        name: {**key._asdict(), "required": default is MISSING, "default": None if default is MISSING else default}
        for name, key, default in _keys(cls)
    }


def _keys(cls: type) -> Iterator[tuple[str, Key, Any]]:
    hints = get_type_hints(cls, include_extras=True)
    for field in fields(cls):
        (key,) = (note for note in hints[field.name].__metadata__ if isinstance(note, Key))
        yield field.name, key, field.default
