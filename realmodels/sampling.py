"""How a pair is sampled: the settings that recording and live decoding share, checked in one place."""

import math
from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from realmodels.verify import Law, feature_law, warp

__all__ = ["Sampling"]


@dataclass(frozen=True)
class Sampling:
    """Settings of a recording or a live run.

    Attributes:
        max_candidates: most candidates of a round, 1..1024.
        max_new_tokens: maximum length of a continuation. Candidates are clamped to the positions left minus one.
        temperature: 0 is greedy decoding.
        top_k: tokens kept after the temperature; 0 keeps all.
        top_p: mass kept after that; 1 keeps all.
        seed: of all draws.
    """

    max_candidates: int = 12
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 50
    _: KW_ONLY
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_candidates", 1, 1024),
            ("max_new_tokens", 1, 2**20),
            ("top_k", 0, 2**31 - 1),
            ("seed", 0, 2**63 - 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise ValueError(f"{name} must be a whole number in {low}..{high}, got {value!r}")
        value = self.temperature
        if not _finite(value) or not (value == 0 or 1e-3 <= value <= 1e3):
            raise ValueError(f"temperature must be 0 or a number in [0.001, 1000], got {value!r}")
        if not _finite(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be a number in (0, 1], got {self.top_p!r}")

    def law(self, logits: Tensor) -> Law:
        """The law that is sampled from."""
        return warp(logits, self.temperature, self.top_k, self.top_p)

    def feature_law(self, logits: Tensor) -> Law:
        """The law that a stopping rule's features are taken from."""
        return feature_law(logits, self.temperature, self.top_k, self.top_p)


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
