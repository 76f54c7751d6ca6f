r"""Times: what a draft step and a verification cost.

A round that drafts $k$ candidates takes $T(k) = k\,t_d + V(k)$: $k$ draft steps and one target call that scores $k + 1$
positions. $V(0)$ is plain decoding and the usual unit. Any unit will do as long as it is one; throughput is in tokens
per that unit and speedup $= \rho V(0)$ has none.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from jaxtyping import Float

__all__ = ["Affine", "Cost", "Table"]


class Cost:
    """Base of all times; `kind` is the name in the problem file. `draft_time` is $t_d$."""

    kind: ClassVar[str]
    draft_time: float

    def verify_times(self, max_candidates: int) -> Float[np.ndarray, " K+1"]:
        """$V(0..K)$.

        Raises:
            ValueError: if the cost model has no value for that many candidates.
        """
        raise NotImplementedError

    def round_times(self, max_candidates: int) -> Float[np.ndarray, " K+1"]:
        """$T(k) = k t_d + V(k)$ for k = 0..K."""
        return np.arange(max_candidates + 1) * self.draft_time + self.verify_times(max_candidates)


SHORTEST, LONGEST = 1e-100, 1e100
"""No clock needs more; sums and products of such times stay finite in float64."""


def _time(name: str, value: object, zero: bool = False) -> float:
    good = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    least = 0.0 if zero else SHORTEST
    if not good or not least <= value <= LONGEST:  # type: ignore[operator]
        sign = ">=" if zero else ">"
        raise ValueError(f"{name}: must be a finite number {sign} 0 (in {least:g}..{LONGEST:g}), got {value!r:.60}")
    return float(value)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Affine(Cost):
    r"""$V(k) = $ `verify_time` + `verify_slope` $\cdot\, k$; slope 0 is the constant verification time of the paper."""

    draft_time: float
    verify_time: float
    verify_slope: float = 0.0
    kind = "affine"

    def __post_init__(self) -> None:
        object.__setattr__(self, "draft_time", _time("cost.draft_time", self.draft_time))
        object.__setattr__(self, "verify_time", _time("cost.verify_time", self.verify_time))
        object.__setattr__(self, "verify_slope", _time("cost.verify_slope", self.verify_slope, zero=True))

    def verify_times(self, max_candidates: int) -> np.ndarray:
        return self.verify_time + self.verify_slope * np.arange(max_candidates + 1)


@dataclass(frozen=True)
class Table(Cost):
    """$V(0), .., V(K)$ as measured; steps and dips are kept."""

    draft_time: float
    verify_time: np.ndarray = field(hash=False)
    kind = "table"

    def __post_init__(self) -> None:
        object.__setattr__(self, "draft_time", _time("cost.draft_time", self.draft_time))
        values = self.verify_time
        if not isinstance(values, (list, tuple, np.ndarray)) or len(values) == 0:
            raise ValueError(f"cost.verify_time: must be a list of times V(0)..V(K), got {values!r}")
        object.__setattr__(self, "verify_time", np.array([_time("cost.verify_time", value) for value in values]))

    def verify_times(self, max_candidates: int) -> np.ndarray:
        if len(self.verify_time) != max_candidates + 1:
            raise ValueError(
                f"cost.verify_time: must have max_candidates + 1 = {max_candidates + 1} entries, "
                f"got {len(self.verify_time)}"
            )
        return self.verify_time
