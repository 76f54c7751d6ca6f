r"""The optimal stopping policy and its throughput, with a proof: one entry to every way there is.

- The form of the policy is known: thresholds alone will do (`mdp.direct`).
- Finite problems: policy iteration on the price problem (`mdp.policy_iteration`), or value iteration in its place
  (`mdp.value_iteration`).
- Continuous processes: enclosed from both sides (`mdp.enclosed`).
- Hidden regimes: points of belief (`mdp.observed`).

Whatever the way, the bounds are those of `mdp.certificate`.

Reference: Huang, Guo, Wang, SpecDec++ (arXiv 2405.19715).
"""

import time

import numpy as np

from mdp.acceptance import Observed
from mdp.continuous import BetaMixture
from mdp.direct import solve_directly
from mdp.enclosed import drawn_afresh, with_memory
from mdp.observed import solve_hidden
from mdp.policy_iteration import MAX_SWEEPS, THRESHOLD_TOLERANCE, close, in_units, rates_per_round
from mdp.problem import FiniteProblem, StoppingProblem
from mdp.solution import Solution, SolveStatus
from mdp.value_iteration import MAX_STEPS

__all__ = ["METHODS", "Solution", "SolveStatus", "solve"]

METHODS = ("auto", "policy_iteration", "value_iteration")

PRECISIONS = ("float64", "float32")


def solve(
    problem: StoppingProblem | FiniteProblem,
    *,
    tol: float = 1e-6,
    max_knots: int = 2**16,
    max_sweeps: int | None = None,
    method: str = "auto",
    precision: str = "float64",
) -> Solution:
    """Solve a stopping problem to proven bounds of relative width `tol`.

    Args:
        problem: any problem, renewal or persistent.
        tol: relative width of the bounds that counts as solved.
        max_knots: most knots per depth before giving up with status `max_steps_reached`; with hidden regimes, most
            points of belief that are opened.
        max_sweeps: most backward inductions in one pass; by default 60, or 5000 for value iteration.
        method: `policy_iteration`; `value_iteration`, which is slower (`mdp.value_iteration`); or `auto`: by the form
            of the policy where that is known (`mdp.direct`), else policy iteration. The solution says which it was.
        precision: `float32` is a preview: its bounds allow for its rounding and hold, but are seldom closer than
            1e-4, and nothing is claimed of its thresholds.

    Returns:
        The policy, its throughput, the bounds and the status. Never raises for want of convergence.

    Raises:
        ValueError: if `tol` or a limit is not positive, or the method is not known.

    Example:
        >>> from mdp.acceptance import IID
        >>> from mdp.cost import Affine
        >>> solution = solve(StoppingProblem(IID(0.8), Affine(draft_time=0.2, verify_time=1.0), max_candidates=12))
        >>> solution.status.name, round(solution.throughput, 6), round(solution.mean_candidates, 6)
        ('successful', 1.867556, 4.0)
    """
    for name, value in (("tol", tol), ("max_knots", max_knots), ("max_sweeps", max_sweeps)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}: must be > 0, got {value!r}")
    for name, value, known in (("method", method, METHODS), ("precision", precision, PRECISIONS)):
        if value not in known:
            raise ValueError(f"{name}: must be one of {', '.join(known)}, got {value!r:.60}")
    start = time.perf_counter()
    finite = problem.unseen() if isinstance(problem, StoppingProblem) else problem
    continuous = problem if isinstance(problem, StoppingProblem) and not problem.acceptance.finite else None
    hidden = (
        problem.acceptance
        if isinstance(problem, StoppingProblem) and isinstance(problem.acceptance, Observed)
        else None
    )
    by_values, single = method == "value_iteration", precision == "float32"
    if (continuous or hidden) and (by_values or single):
        option, why = "method" if by_values else "precision", "is continuous" if continuous else "hides its regimes"
        kind = problem.acceptance.kind  # type: ignore[union-attr]
        raise ValueError(f"{option}: {kind} {why}, there is one way to solve it, in float64")
    if (
        method == "auto"
        and not (continuous or hidden or single)
        and (direct := solve_directly(finite, tol=tol)) is not None
    ):
        return direct
    if max_sweeps is None:
        max_sweeps = MAX_STEPS if by_values else MAX_SWEEPS
    # Times in units of about the longest round, so that "never worth it" is a number; a power of two rounds nothing.
    unit = 2.0 ** np.frexp(finite.round_time.max())[1]
    if hidden:
        return _hidden(in_units(finite, unit), hidden, unit, tol, max_knots, start)
    if continuous:
        between = drawn_afresh if isinstance(continuous.acceptance, BetaMixture) else with_memory
        found, closed = between(continuous, unit, tol, max_knots, max_sweeps)
    else:
        half = np.inf if single else THRESHOLD_TOLERANCE / 2
        found = close(
            in_units(finite, unit), tol, half, half, max_knots, max_sweeps, by_values=by_values, single=single
        )
        closed = found.closed
    lower, upper = found.bounds
    throughput = float(np.clip(found.rate, lower, upper) / unit)
    return Solution(
        throughput=throughput,
        speedup=throughput * float(finite.verify_time[0]),
        bounds=(float(lower / unit), float(upper / unit)),
        survival_threshold=found.threshold,
        bias=found.bias,
        **found.rates,  # type: ignore[arg-type]
        status=SolveStatus.successful if closed else SolveStatus.max_steps_reached,
        num_sweeps=found.num_sweeps,
        num_knots=found.num_knots,
        seconds=time.perf_counter() - start,
        method="policy_iteration" if method == "auto" else method,
    )


def _hidden(finite: FiniteProblem, process: Observed, unit: float, tol: float, limit: int, start: float) -> Solution:
    """Hidden regimes have a solver of their own (`mdp.observed`)."""
    found = solve_hidden(finite, process.observation, tol=tol, limit=limit)
    emitted, _, drafted = found.tally
    throughput = float(np.clip(found.rate, *found.bounds) / unit)
    return Solution(
        throughput=throughput,
        speedup=throughput * float(unit * finite.verify_time[0]),
        bounds=(float(found.bounds[0] / unit), float(found.bounds[1] / unit)),
        survival_threshold=None,
        bias=np.zeros(finite.num_regimes),
        **rates_per_round(emitted, drafted),
        status=SolveStatus.successful if found.closed else SolveStatus.max_steps_reached,
        num_sweeps=found.num_steps,
        num_knots=found.opened,
        seconds=time.perf_counter() - start,
        method="point_based",
        belief_rule=found.rule,
    )
