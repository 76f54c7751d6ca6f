r"""Problems whose optimal policy is known in form: thresholds alone, no survival grid, bounds a few roundings apart.

At a rate $\rho$ let $c_k = t_d + V(k+1) - V(k)$ be the time that one more candidate adds, and $\bar a_k(z)$ its mean
acceptance.

*One-step look-ahead* (theory, F3). In renewal rounds CONTINUE iff $S \bar a_k(z) \ge \rho c_k$ is optimal if the states
that this stops in are never left: for every transition $z \to z'$ and every $k$ with $c_k > 0$,

$$c_{k+1} > 0, \qquad a_{k+1}(z')\, \bar a_{k+1}(z')\, c_k \le \bar a_k(z)\, c_{k+1}.$$

Then $S \bar a_k(z) < \rho c_k$ implies $S a_{k+1}(z') \bar a_{k+1}(z') < \rho c_{k+1}$: behind a loss lie only
losses, and a candidate that costs more than it brings cannot pay for itself later. Where $V$ is convex, $c_k$ is
non-decreasing and $a(z') \bar a(z') \le \bar a(z)$ suffices; what depends on the place enters as it is.

*Fixed length* (theory, F5). If acceptance does not depend on the regime, survival is known beforehand. With
$G_{kj} = \sum_{i=k+1}^{j} \prod_{l=k+1}^{i} a_l$, going on from k to j earns $S G_{kj} - \rho (T(j) - T(k))$, so
CONTINUE iff $S \ge \min_{j > k} \rho (T(j) - T(k)) / G_{kj}$: any times, and any coupling, since starts differ in
nothing.

Either rule maximises $E[\text{emitted}] - \rho E[\text{time}]$, known exactly from the merged tree (`mdp.evaluate`),
so Dinkelbach's $\rho \leftarrow E[\text{emitted}] / E[\text{time}]$ finds $\rho^*$ and the certificate's two sides
agree but for rounding. NumPy only: where this works nothing is compiled.
"""

import math
import time
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from mdp.certificate import certificate
from mdp.evaluate import round_law
from mdp.policy import MERGE, TIE, ThresholdTable
from mdp.problem import FiniteProblem
from mdp.solution import Solution, SolveStatus

__all__ = ["is_monotone", "solve_directly"]

MAX_STATES = 50_000
"""Of the merged tree; beyond, compiling a grid solver costs less."""

MAX_STEPS = 60

SAME = 1e-13
"""Differences of times that should be equal differ by so much, relatively."""


def is_monotone(problem: FiniteProblem) -> bool:
    """Whether one-step look-ahead is optimal by the condition above; sufficient, not necessary."""
    if problem.persistent:
        return False
    added, ahead = np.diff(problem.round_time), problem.next_accept_prob
    possible = problem.transition > 0
    for k in np.flatnonzero(added[:-1] > 0):
        behind = problem.accept_prob[k] * ahead[k + 1] * added[k] * (1.0 - SAME)
        if added[k + 1] <= 0 or (possible & (behind > (ahead[k] * added[k + 1])[:, None])).any():
            return False
    return True


def solve_directly(problem: FiniteProblem, *, tol: float = 1e-6) -> Solution | None:
    """The solution, or None if the problem is not of these kinds, its tree is too large, or `tol` is below rounding."""
    begun = time.perf_counter()
    size, depth = problem.num_regimes, problem.max_candidates
    if (problem.accept_prob == problem.accept_prob[:, :1]).all():
        method, seen, rule = "fixed_length", _one_regime(problem), _fixed_length
    elif size * math.comb(depth + size, size) <= MAX_STATES and is_monotone(problem):
        method, seen, rule = "one_step_lookahead", problem, _one_step_lookahead
    else:
        return None
    found = _dinkelbach(seen, rule)
    if found is None:
        return None
    rate, (emitted, spent, drafted), threshold, num_steps = found
    value = emitted - rate * spent
    # What treating two survivals as one, as tied with the threshold, or two prices as one may cost at K decisions.
    ties = depth * (TIE + depth / MERGE + depth * SAME)
    lower, upper = (float(bound) for bound in certificate(rate, value, value + ties, problem.round_time, 0.0, size))
    if upper - lower > tol * lower:
        return None
    return Solution(
        throughput=rate,
        speedup=rate * float(problem.verify_time[0]),
        bounds=(lower, upper),
        survival_threshold=np.ascontiguousarray(np.broadcast_to(threshold, (depth, size))),
        bias=np.zeros(size),
        block_efficiency=emitted,
        verification_rate=1.0 / emitted,
        discard_rate=max(0.0, (drafted - (emitted - 1.0)) / emitted),
        mean_candidates=drafted,
        status=SolveStatus.successful,
        num_sweeps=num_steps,
        num_knots=0,
        seconds=time.perf_counter() - begun,
        method=method,
    )


def _dinkelbach(
    problem: FiniteProblem, rule: Callable[[FiniteProblem, float], Float[np.ndarray, "K _"]]
) -> tuple[float, tuple[float, float, float], Float[np.ndarray, "K _"], int] | None:
    """Rate, tokens, time and candidates of a round, thresholds and steps; None if the rate does not settle."""
    rate = 0.0
    for step in range(MAX_STEPS):
        threshold = rule(problem, max(rate, 1.0 / float(problem.verify_time[0])))
        law = round_law(problem, ThresholdTable(threshold))
        earned = float(law.emitted[0]), float(law.time[0]), float(law.drafted[0])
        better = earned[0] / earned[1]
        if better <= rate * (1.0 + 1e-15):  # a policy's own rate can only rise
            return rate, earned, threshold, step + 1
        rate = better
    return None


def _one_step_lookahead(problem: FiniteProblem, rate: float) -> Float[np.ndarray, "K Z"]:
    """S* [K, Z] at this rate."""
    return _crossing(rate * np.diff(problem.round_time)[:, None], problem.next_accept_prob)


def _fixed_length(problem: FiniteProblem, rate: float) -> Float[np.ndarray, "K 1"]:
    """S* [K, 1] at this rate, where survival is known beforehand."""
    accept, round_time = problem.accept_prob[:, 0], problem.round_time
    rows = [
        _crossing(rate * (round_time[k + 1 :] - round_time[k]), np.cumsum(np.cumprod(accept[k:]))).min()
        for k in range(len(accept))
    ]
    return np.array(rows)[:, None]


def _crossing(price: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """Least survival S <= 1 with S * slope >= price, inf if there is none; slope >= 0."""
    price, slope = np.broadcast_arrays(np.maximum(price, 0.0), slope)
    return np.divide(price, slope, out=np.where(price > 0, np.inf, 0.0), where=(slope >= price) & (slope > 0))


def _one_regime(problem: FiniteProblem) -> FiniteProblem:
    """The same problem without the regimes that make no difference."""
    one = np.ones((1, 1))
    return FiniteProblem(one, problem.accept_prob[:, :1], one[0], problem.draft_time, problem.verify_time)
