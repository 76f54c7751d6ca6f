r"""Exact thresholds at a rate, for few regimes: the value of drafting on as the piecewise linear function it is.

At a rate $\rho$ let $G_k(z, S)$ be what drafting candidate $k + 1$ and going on as is best earns above stopping:

$$G_k(z, S) = \sum_{z'} P(z, z') \{S a_{k+1}(z') + G^+_{k+1}(z', S a_{k+1}(z'))\} - \rho c_k, \qquad G_K = -\infty,$$

with $c_k$ the time of one more candidate. In renewal rounds it is convex, non-decreasing and piecewise linear in $S$
(theory, F1); it bends only where a later decision turns, so its values at those points are all of it, nothing lies on
a grid, and $S^*(k, z)$, its zero, is exact to rounding. The points of a depth are those of the next one, divided by
the acceptances, that lie between the threshold and 1: their number grows with the depth to the power of Z at most.
With two regimes all thresholds take a few milliseconds and nothing is compiled; with many, use `mdp.solve`.
"""

import numpy as np
from jaxtyping import Float

from mdp.problem import FiniteProblem

__all__ = ["crossings"]

MAX_KNOTS = 100_000
SAME = 1e-13
"""Knots closer than this are one: products of the same acceptances in another order."""


def crossings(problem: FiniteProblem, rate: float) -> Float[np.ndarray, "K Z"]:
    r"""Survival thresholds $S^*(k, z)$ of the best rule when time is priced at `rate`; inf = STOP at every survival.

    At `rate` = $\rho^*$ (`mdp.families.optimum`) this is the optimal policy.

    Raises:
        ValueError: if rounds persist, or there are too many knots.

    Example:
        >>> from mdp.acceptance import IID
        >>> from mdp.cost import Affine
        >>> from mdp.problem import StoppingProblem
        >>> problem = StoppingProblem(IID(0.8), Affine(draft_time=0.2, verify_time=1.0), max_candidates=3)
        >>> crossings(problem.lower(), rate=2.0).round(6).ravel().tolist()  # rho c / a, at every depth
        [0.5, 0.5, 0.5]
    """
    if problem.persistent:
        raise ValueError("crossings: rounds persist, which puts a bias on where the next one starts; use mdp.solve")
    size, depth = problem.num_regimes, problem.max_candidates
    threshold = np.full((depth, size), np.inf)
    later = [_Line.zero()] * size
    for k in range(depth - 1, -1, -1):
        accept, price = problem.accept_prob[k], rate * problem.step_time[k]
        knots = _merged(later, accept)
        # by next regime: what candidate k + 1 and all behind it earn
        earned = np.stack([at + line(at) for line, at in zip(later, knots * accept[:, None], strict=True)])
        worth = problem.transition @ earned - price
        later = []
        for z, value in enumerate(worth):
            threshold[k, z], line = _Line.above_zero(knots, value)
            later.append(line)
    return threshold


class _Line:
    """A continuous piecewise linear function on [0, 1]: its values at its knots."""

    def __init__(self, knots: np.ndarray, value: np.ndarray) -> None:
        self.knots, self.value = knots, value

    def __call__(self, at: np.ndarray) -> np.ndarray:
        return np.interp(at, self.knots, self.value)

    @classmethod
    def zero(cls) -> "_Line":
        return cls(np.array([0.0, 1.0]), np.zeros(2))

    @classmethod
    def above_zero(cls, knots: np.ndarray, value: np.ndarray) -> tuple[float, "_Line"]:
        """Where a non-decreasing function reaches 0 (inf if it does not), and its positive part."""
        if value[-1] < 0:
            return np.inf, cls.zero()
        first = int(np.argmax(value >= 0))
        if first == 0:
            return 0.0, cls(knots, value)
        low, high = value[first - 1], value[first]
        at = knots[first] + (knots[first - 1] - knots[first]) * (high / (high - low))
        return float(at), cls(np.r_[0.0, at, knots[first:]], np.r_[0.0, 0.0, np.maximum(value[first:], 0.0)])


def _merged(lines: list[_Line], accept: np.ndarray) -> np.ndarray:
    """Where a function of S times its acceptance bends, for any of the regimes; 0 and 1 among them."""
    parts = [line.knots / a for line, a in zip(lines, accept, strict=True) if a > 0]
    knots = np.unique(np.concatenate([np.array([0.0, 1.0]), *parts]))
    knots = knots[knots <= 1.0]
    knots = knots[np.r_[True, np.diff(knots) > SAME]]
    knots[-1] = 1.0
    if len(knots) > MAX_KNOTS:
        raise ValueError(f"crossings: more than {MAX_KNOTS} knots at one depth; use mdp.solve")
    return knots
