r"""Phase diagram: where adapting pays, and where one threshold is enough.

Over a grid of dispersion, persistence and cost ratio of `mdp.calibrate.two_regimes`, rounds renewing: the optimum
(`mdp.many`, with proven bounds), the best fixed length and the best constant threshold on survival (both exact, all of
their kind compared). "Never draft" belongs to both families: it is length 0, and a threshold above 1.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from mdp.calibrate import two_regimes
from mdp.cost import Affine
from mdp.head_rule import HeadRule, fixed_curve, head_curve
from mdp.many import solve_many
from mdp.problem import StoppingProblem
from mdp.solve import SolveStatus

__all__ = ["PhaseDiagram", "phase_diagram"]


class PhaseDiagram(NamedTuple):
    """Arrays over [dispersion D, persistence P, cost ratio C]; times in units of a target call, so rates are speedups.

    Attributes:
        optimum, bounds: rho* and its proven lower and upper bound [D, P, C, 2].
        best_fixed, best_length: the best fixed length and what it earns.
        best_threshold, threshold: the best constant h (stop iff 1 - S_k > h; -1: never draft) and what it earns.
        num_open: problems whose bounds did not close to the tolerance.
    """

    mean: float
    max_candidates: int
    dispersion: Float[np.ndarray, " D"]
    persistence: Float[np.ndarray, " P"]
    cost_ratio: Float[np.ndarray, " C"]
    optimum: Float[np.ndarray, "D P C"]
    bounds: Float[np.ndarray, "D P C 2"]
    best_fixed: Float[np.ndarray, "D P C"]
    best_length: Int[np.ndarray, "D P C"]
    best_threshold: Float[np.ndarray, "D P C"]
    threshold: Float[np.ndarray, "D P C"]
    num_open: int

    @property
    def gain_of_optimum(self) -> Float[np.ndarray, "D P C"]:
        """Of the optimum over the best fixed length, relative."""
        return self.optimum / self.best_fixed - 1.0

    @property
    def gain_of_threshold(self) -> Float[np.ndarray, "D P C"]:
        """Of the best constant threshold over the best fixed length, relative; may be negative."""
        return self.best_threshold / self.best_fixed - 1.0

    @property
    def width(self) -> Float[np.ndarray, "D P C"]:
        """Relative width of the bounds: what `gain_of_optimum` is uncertain by."""
        return self.bounds[..., 1] / self.bounds[..., 0] - 1.0

    def to_dict(self) -> dict[str, Any]:
        """All fields and derived arrays, for JSON."""
        names = ("gain_of_optimum", "gain_of_threshold", "width")
        return {**self._asdict(), **{name: getattr(self, name) for name in names}}


def phase_diagram(
    mean: float,
    dispersion: Sequence[float],
    persistence: Sequence[float],
    cost_ratio: Sequence[float],
    *,
    max_candidates: int = 12,
    tol: float = 1e-6,
) -> PhaseDiagram:
    """Solve the whole grid in one batch.

    Raises:
        ValueError: if a value is outside its range or an axis is empty.

    Example:
        >>> diagram = phase_diagram(0.8, [0.0, 0.8], [0.0, 0.9], [0.2], max_candidates=8)
        >>> diagram.gain_of_optimum[..., 0].round(3).tolist()
        [[0.0, 0.0], [0.178, 0.154]]
    """
    axes = [np.asarray(axis, dtype=np.float64) for axis in (dispersion, persistence, cost_ratio)]
    for name, axis in zip(("dispersion", "persistence", "cost_ratio"), axes, strict=True):
        if axis.ndim != 1 or axis.size == 0:
            raise ValueError(f"{name}: must be a list of at least one number")
    shape = tuple(len(axis) for axis in axes)
    problems = [
        StoppingProblem(two_regimes(mean, spread, staying), Affine(ratio, 1.0), max_candidates)
        for spread, staying, ratio in itertools.product(*(axis.tolist() for axis in axes))
    ]
    solved = solve_many(problems, tol=tol)
    fixed = np.array([fixed_curve(problem) for problem in problems])
    curves = [head_curve(problem, HeadRule()) for problem in problems]
    earned = np.array([curve.throughput[curve.best] for curve in curves])
    at = np.array([curve.threshold[curve.best] for curve in curves])
    plain = fixed[:, 0]
    return PhaseDiagram(
        mean, max_candidates, *axes,
        optimum=solved.throughput.reshape(shape),
        bounds=solved.bounds.reshape(*shape, 2),
        best_fixed=fixed.max(axis=1).reshape(shape),
        best_length=fixed.argmax(axis=1).reshape(shape),
        best_threshold=np.maximum(earned, plain).reshape(shape),
        threshold=np.where(earned >= plain, at, -1.0).reshape(shape),
        num_open=sum(status is not SolveStatus.successful for status in solved.status),
    )  # fmt: skip
