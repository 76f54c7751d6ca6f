"""Requests: where texts end in a simulated world."""

from dataclasses import dataclass

import numpy as np

__all__ = ["Requests"]


@dataclass(frozen=True)
class Requests:
    """Texts of at most `max_new_tokens` tokens, each of which is the last one with probability `end_prob`.

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """

    max_new_tokens: int
    end_prob: float = 0.0

    def __post_init__(self) -> None:
        most, end = self.max_new_tokens, self.end_prob
        if isinstance(most, bool) or not isinstance(most, (int, np.integer)) or not 1 <= most <= 2**31:
            raise ValueError(f"max_new_tokens: must be a whole number in 1..{2**31}, got {most!r:.60}")
        if isinstance(end, bool) or not isinstance(end, (int, float, np.number)) or not 0 <= end <= 1:
            raise ValueError(f"end_prob: must be a number in [0, 1], got {end!r:.60}")
