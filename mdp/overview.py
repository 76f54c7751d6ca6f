r"""What a few numbers imply, at once: the policy, what it earns and the frontier, for the explorer's sliders.

Text comes in easy and hard stretches (`mdp.calibrate.two_regimes`: mean acceptance, dispersion, persistence), rounds
renew, times are affine. With two regimes a round has at most $2(k + 1)$ states at depth k, so everything is exact and
nothing is compiled: $\rho^*$ by policy iteration on the merged tree (`mdp.families.optimum`), thresholds as crossings
(`mdp.crossings`), rates of whole families in one pass (`mdp.frontier`).

With affine times every rule obeys one identity: a round drafts $1 + d - v$ candidates per token, hence

$$\text{time per token} = (t_d + s)(1 + d - v) + V(0)\, v,$$

$v$ target calls and $d$ discarded candidates per token. So rules of equal speedup lie on a straight line in the
$(d, v)$ plane, and a rule is faster the further below it.
"""

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from mdp import families
from mdp.calibrate import two_regimes
from mdp.cost import Affine
from mdp.crossings import crossings
from mdp.evaluate import Evaluation, evaluate
from mdp.frontier import Frontier, frontier
from mdp.policy import ThresholdTable
from mdp.problem import StoppingProblem

__all__ = ["RANGES", "Overview", "Settings", "overview"]

MOST_CANDIDATES = 24
RANGES: dict[str, tuple[float, float]] = {
    "mean": (0.05, 0.99),
    "dispersion": (0.0, 1.0),
    "persistence": (0.0, 0.99),
    "draft_time": (0.5, 100.0),
    "verify_time": (5.0, 200.0),
    "verify_slope": (0.0, 10.0),
    "max_candidates": (1, MOST_CANDIDATES),
}
"""What each setting may be."""

THRESHOLDS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True)
class Settings:
    """The explorer's sliders.

    Attributes:
        mean, dispersion, persistence: of acceptance (`mdp.calibrate.two_regimes`).
        draft_time: of one candidate, in ms.
        verify_time, verify_slope: V(k) = verify_time + verify_slope k, in ms.
        max_candidates: K.

    Raises:
        ValueError: naming the setting, the value and its range.
    """

    mean: float = 0.8
    dispersion: float = 0.6
    persistence: float = 0.8
    draft_time: float = 10.0
    verify_time: float = 50.0
    verify_slope: float = 0.0
    max_candidates: int = 12

    def __post_init__(self) -> None:
        for name, value in ((field.name, getattr(self, field.name)) for field in fields(self)):
            low, high = RANGES[name]
            whole = name == "max_candidates"
            number = isinstance(value, (int, np.integer) if whole else (int, float, np.number))
            if isinstance(value, bool) or not number or not low <= value <= high:
                raise ValueError(f"{name}: must be a {'whole ' * whole}number in {low:g}..{high:g}, got {value!r:.60}")

    @property
    def problem(self) -> StoppingProblem:
        """The stopping problem; times in ms."""
        chain = two_regimes(self.mean, self.dispersion, self.persistence)
        return StoppingProblem(
            chain, Affine(self.draft_time, self.verify_time, self.verify_slope), int(self.max_candidates)
        )


class Overview(NamedTuple):
    """What the settings imply; all of it exact.

    Attributes:
        accept_prob: of an easy and of a hard candidate.
        survival_threshold: [K, 2] of the optimal policy; inf = STOP at every survival.
        optimum: its throughput (tokens per ms), speedup and rates.
        fixed: every candidate length 0..K.
        rejection: constant thresholds 0, .01 .. 1 on 1 - S.
        best_threshold: speedup and h of the best constant threshold of all, on the grid or off it; h < 0: never draft.
    """

    settings: Settings
    accept_prob: Float[np.ndarray, " 2"]
    survival_threshold: Float[np.ndarray, "K 2"]
    optimum: Evaluation
    fixed: Frontier
    rejection: Frontier
    best_threshold: tuple[float, float]

    @property
    def best_fixed(self) -> tuple[float, int]:
        """Speedup and length of the best fixed length."""
        length = int(self.fixed.speedup.argmax())
        return float(self.fixed.speedup[length]), length

    def discard_rate_at(self, verification_rate: Any) -> Any:
        """The discard rate at which a rule with this verification rate is exactly as fast as the optimum."""
        step = self.settings.draft_time + self.settings.verify_slope
        time = 1.0 / self.optimum.throughput
        return (time - self.settings.verify_time * verification_rate) / step + verification_rate - 1.0

    def to_dict(self) -> dict[str, Any]:
        """The headline figures, for JSON."""
        (fixed, length), (threshold, h) = self.best_fixed, self.best_threshold
        return {
            "settings": vars(self.settings), "speedup": self.optimum.speedup, "throughput": self.optimum.throughput,
            "mean_candidates": float(self.optimum.tally.mean_candidates), "best_length": length,
            "best_fixed_speedup": fixed, "best_threshold": h, "best_threshold_speedup": threshold,
        }  # fmt: skip


def overview(settings: Settings) -> Overview:
    """Solve and compare; deterministic, some ten milliseconds.

    Example:
        >>> found = overview(Settings(mean=0.8, dispersion=0.0, draft_time=10.0, verify_time=50.0))
        >>> round(found.optimum.speedup, 6), found.best_fixed[1]  # all candidates alike: a fixed length is optimal
        (1.867556, 4)
    """
    problem = settings.problem
    finite = problem.lower()
    table = crossings(finite, families.optimum(finite).throughput)
    best, at = families.ladder(finite, "survival").best
    return Overview(
        settings=settings,
        accept_prob=finite.accept_prob[0],
        survival_threshold=table,
        optimum=evaluate(finite, ThresholdTable(table)),
        fixed=frontier(finite, "fixed", np.arange(finite.max_candidates + 1)),
        rejection=frontier(finite, "rejection", THRESHOLDS),
        best_threshold=(best * float(finite.verify_time[0]), 1.0 - at),
    )
