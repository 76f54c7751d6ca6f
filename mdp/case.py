"""A problem that has been solved, with what the facts of the theory share about it (`mdp.theory`)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float

from mdp import conditions, families
from mdp.knots import even_and_kinks, place
from mdp.many import solve_many
from mdp.price import lump, sweep
from mdp.problem import FiniteProblem, StoppingProblem
from mdp.solve import Solution, SolveStatus, solve

__all__ = ["ROUNDING", "Ahead", "Case", "converged", "examine", "examine_many"]

ROUNDING = 1e-12
KNOTS = 1024
CELLS, NODES = 255, 63
"""How finely a continuous law is cut that is drawn afresh, and one that depends on the candidate before."""


class Ahead(NamedTuple):
    """CONTINUE - STOP in tokens at `knots` [K, N] of survival, from below (real rules) and above [K, Z, N]."""

    knots: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


@dataclass(frozen=True)
class Case:
    """A problem with its solution, and what the facts share.

    Attributes:
        problem: as given.
        finite: the arrays the facts are checked on: the problem's own, or a chain that bounds it from below.
        exact: whether `finite` is the problem itself.
        solution: of `mdp.solve`.
        bounds: on rho*: equal to rounding where the tree of rounds is small enough, else the solver's.
        met: [K, Z] whether k candidates, all of which may yet be accepted, can end in regime z.
    """

    problem: StoppingProblem | FiniteProblem
    finite: FiniteProblem
    exact: bool
    solution: Solution
    bounds: tuple[float, float]
    met: Bool[np.ndarray, "K Z"]

    @property
    def rate(self) -> float:
        """rho*, as well as it is known."""
        return float(np.clip(self.solution.throughput, *self.bounds))

    @property
    def price(self) -> float:
        """The rate at which a round of `finite` is worth nothing: rho*, or less if that is a chain from below."""
        return self.rate if self.exact else self.solution.throughput

    @property
    def threshold(self) -> Float[np.ndarray, "K Z"]:
        """S* per depth and regime, inf where nothing is worth drafting on."""
        table = self.solution.survival_threshold
        assert table is not None  # facts are checked on chains that show their regimes
        return np.broadcast_to(table, self.finite.accept_prob.shape)

    @cached_property
    def ahead(self) -> Ahead:
        """CONTINUE - STOP by one backward induction at rho* and the optimum's bias."""
        unit = 2.0 ** np.frexp(self.finite.round_time.max())[1]
        finite = self.finite._replace(
            draft_time=self.finite.draft_time / unit, verify_time=self.finite.verify_time / unit
        )
        arrays, into = lump(finite)
        depth, classes = finite.max_candidates, len(arrays.initial)
        _, first = np.unique(into, return_index=True)
        first = np.pad(first, (0, classes - len(first)), mode="edge")  # a regime of each class, padding included
        bias = self.solution.bias if self.exact else np.zeros(finite.num_regimes)
        threshold = np.full((len(arrays.accept_prob), classes), np.inf)
        threshold[:depth] = self.threshold[:, first]
        knots = even_and_kinks(arrays.accept_prob, arrays.into, threshold, KNOTS)
        with jax.enable_x64(True):
            grid = place(arrays.accept_prob, knots)
            seen = jax.device_get(_look(arrays, grid, np.float64(self.price * unit), bias[first]))
        lower, upper = (side[:depth][:, into] for side in seen.ahead)
        return Ahead(knots[:depth], lower, upper)

    @cached_property
    def lengths(self) -> families.Lengths:
        unseen = self.problem.unseen() if isinstance(self.problem, StoppingProblem) else self.finite
        return families.best_lengths(unseen)

    @property
    def name(self) -> str:
        """The kind of process, for messages."""
        return self.problem.acceptance.kind if isinstance(self.problem, StoppingProblem) else "finite problem"


_look = jax.jit(partial(sweep, track=False, ahead=True))


def examine(problem: StoppingProblem | FiniteProblem) -> Case:
    """Solve a problem and gather what its facts need.

    Raises:
        ValueError: if the exact optimum and the solver's bounds contradict each other.
    """
    if not isinstance(problem, StoppingProblem) or problem.acceptance.finite:
        finite = problem.lower() if isinstance(problem, StoppingProblem) else problem
        return _case(problem, finite, True, solve(problem))
    # A chain worth no more than the continuous process.
    finite = problem.bracket(CELLS if problem.acceptance.num_regimes == 1 else NODES)[0]
    # Thresholds and worth are the chain's, at its own rate; the bounds stay those of the process.
    return replace(_case(problem, finite, False, solve(finite)), bounds=solve(problem).bounds)


def examine_many(problems: Sequence[StoppingProblem | FiniteProblem]) -> list[Case]:
    """Finite problems of one shape, solved together; otherwise as `examine`.

    Raises:
        ValueError: as `mdp.many.solve_many` and `examine`.
    """
    finite = [problem.lower() if isinstance(problem, StoppingProblem) else problem for problem in problems]
    found = solve_many(finite)
    cases = []
    for index, (problem, arrays) in enumerate(zip(problems, finite, strict=True)):
        emitted, drafted = found.block_efficiency[index], found.mean_candidates[index]
        solution = Solution(
            throughput=float(found.throughput[index]), speedup=float(found.throughput[index] * arrays.verify_time[0]),
            bounds=(float(found.bounds[index, 0]), float(found.bounds[index, 1])),
            survival_threshold=found.survival_threshold[index], bias=found.bias[index], block_efficiency=float(emitted),
            verification_rate=float(1.0 / emitted), discard_rate=float((drafted - (emitted - 1.0)) / emitted),
            mean_candidates=float(drafted), status=found.status[index], num_sweeps=0, num_knots=0,
            seconds=found.seconds,
        )  # fmt: skip
        cases.append(_case(problem, arrays, True, solution))
    return cases


def _case(problem: StoppingProblem | FiniteProblem, finite: FiniteProblem, exact: bool, solution: Solution) -> Case:
    lower, upper = solution.bounds
    if exact:
        try:
            best = families.optimum(finite).throughput
        except ValueError:  # too many nodes, or classes that do not meet: the bounds must do
            pass
        else:
            if not lower * (1 - ROUNDING) <= best <= upper * (1 + ROUNDING):
                raise ValueError(f"the exact optimum {best!r} lies outside the solver's bounds {solution.bounds}")
            lower, upper = best * (1 - ROUNDING), best * (1 + ROUNDING)
    return Case(problem, finite, exact, solution, (lower, upper), conditions.met_regimes(finite))


def converged(case: Case) -> bool:
    """Whether the solver closed its bounds."""
    return case.solution.status is SolveStatus.successful
