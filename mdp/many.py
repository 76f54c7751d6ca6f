r"""Thousands of problems of one shape, each with its own proof.

Per problem, inside one compiled call:

1. `mdp.lattice.rules` on few knots, then on more, each followed by the outer step of `mdp.policy_iteration`: Dinkelbach
   if rounds renew, Howard's linear system if they persist. A rule that is off by $\epsilon$ in survival loses only
   order $\epsilon^2$, so few knots find a policy that is optimal to far below `tol`. What it earns is known exactly.
2. `mdp.lattice.ceiling` once, on the most knots, at that policy's rate and bias. It keeps a single row per regime, and
   is the side that needs resolution.

Bounds follow as in `mdp.certificate`, which holds for any rate and bias. The lower one prices the policy found,
the upper one the ceiling. Problems whose bounds or thresholds did not close go through a second, finer call; what is
left is solved one at a time by `solve`, so that a status never speaks for a neighbour.

Derivatives. $\rho^*$ is the root of $\max_\pi \{E[\text{emitted}] - \rho E[\text{time}]\} = 0$; by the envelope theorem
it moves as if the policy stood still: $d\rho^*/d t_d = -\rho\, E[k] / E[T]$, and a shift of all V(k) counts each round
once, $-\rho / E[T]$. At a tie between policies these are one-sided.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mdp.batch import in_calls, member, round_times, stack, take
from mdp.certificate import certificate
from mdp.lattice import Rules, ceiling, lattice, rules, step_time
from mdp.policy_iteration import MAX_SWEEPS, THRESHOLD_TOLERANCE, improve
from mdp.price import Arrays
from mdp.problem import FiniteProblem, StoppingProblem
from mdp.solve import Solution, SolveStatus, solve

__all__ = ["ManySolutions", "derivatives", "solve_many"]


class Fineness(NamedTuple):
    """Knots for the two rounds of rules and for the ceiling, and problems per compiled call (filled up with copies)."""

    first: int
    second: int
    ceiling: int
    chunk: int


COARSE, FINE = Fineness(64, 384, 2048, chunk=32), Fineness(256, 1024, 8192, chunk=4)
"""All problems go through the first; what does not close there, a few per cent, through the second."""


class ManySolutions(NamedTuple):
    """What `solve_many` found, in the order of the problems [B].

    Attributes:
        throughput, bounds: rho* [B], and proven lower and upper bounds on it [B, 2].
        survival_threshold: [B, K, Z] as in `Solution`: right wherever CONTINUE and STOP differ by more than
            `threshold_slack` [B] tokens, at a rate within 1e-7 of the throughput found.
        bias: [B, Z] relative value of each start regime; zeros if rounds renew.
        block_efficiency, mean_candidates: of the policy found [B].
        status: [B] of `SolveStatus`.
        num_refined: how many needed the finer call, and how many were solved one at a time.
        seconds: wall time, compilation included.
    """

    throughput: Float[np.ndarray, " B"]
    bounds: Float[np.ndarray, "B 2"]
    survival_threshold: Float[np.ndarray, "B K Z"]
    threshold_slack: Float[np.ndarray, " B"]
    bias: Float[np.ndarray, "B Z"]
    block_efficiency: Float[np.ndarray, " B"]
    mean_candidates: Float[np.ndarray, " B"]
    status: list[SolveStatus]
    num_refined: tuple[int, int]
    seconds: float


class _Start(NamedTuple):
    """Where a pass begins: a rate, a bias [Z] and the lowest knot to try."""

    rate: Any
    bias: Any
    lowest: Any


class _Found(NamedTuple):
    """One problem's answer; `lower` and `upper` are the sides of T_rho_h - h, `starts` the regimes they count for."""

    rate: Any
    bias: Any
    lowest: Any
    threshold: Any
    slack: Any
    lower: Any
    upper: Any
    exact: Any
    block_efficiency: Any
    mean_candidates: Any


def solve_many(
    problems: Sequence[StoppingProblem | FiniteProblem] | FiniteProblem, *, tol: float = 1e-6
) -> ManySolutions:
    """Solve problems of one shape (same K and Z, all renewal or all persistent) to bounds of relative width `tol`.

    Args:
        problems: one by one, or a `FiniteProblem` whose every field has a leading batch axis.
        tol: relative width of the bounds that counts as solved.

    Returns:
        Each problem's throughput, bounds and status. Never raises for want of convergence.

    Raises:
        ValueError: if there are none, `tol` is not positive or the shapes differ.

    Example:
        >>> from mdp.acceptance import IID
        >>> from mdp.cost import Affine
        >>> grid = [StoppingProblem(IID(0.8), Affine(t, 1.0), max_candidates=12) for t in (0.1, 0.2)]
        >>> solve_many(grid).throughput.round(6).tolist()
        [2.46964, 1.867556]
    """
    if not tol > 0:
        raise ValueError(f"tol: must be > 0, got {tol!r}")
    begun = time.perf_counter()
    batch = stack(problems)
    count, _, size = batch.accept_prob.shape
    start = _Start(1.0 / batch.verify_time[:, 0], np.zeros((count, size)), np.zeros(count))
    found, bounds, closed = _pass(batch, start, COARSE, tol)
    open_ones = np.flatnonzero(~closed)
    num_finer = len(open_ones)
    if num_finer:
        part, again = (take(tree, open_ones) for tree in (batch, _Start(found.rate, found.bias, found.lowest)))
        finer, finer_bounds, finer_closed = _pass(part, again, FINE, tol)
        for old, new in zip(found, finer, strict=True):
            old[open_ones] = new
        bounds[open_ones], closed[open_ones] = finer_bounds, finer_closed
    status = [SolveStatus.successful if good else SolveStatus.max_steps_reached for good in closed]
    last = np.flatnonzero(~closed)
    for index in last.tolist():
        alone = solve(member(batch, index), tol=tol)
        found.rate[index], bounds[index], status[index] = alone.throughput, alone.bounds, alone.status
        found.threshold[index], found.bias[index] = alone.survival_threshold, alone.bias
        found.block_efficiency[index], found.mean_candidates[index] = alone.block_efficiency, alone.mean_candidates
        found.slack[index] = THRESHOLD_TOLERANCE if alone.status is SolveStatus.successful else np.inf
    return ManySolutions(
        throughput=np.clip(found.rate, *bounds.T),
        bounds=bounds,
        survival_threshold=found.threshold,
        threshold_slack=found.slack,
        bias=found.bias,
        block_efficiency=found.block_efficiency,
        mean_candidates=found.mean_candidates,
        status=status,
        num_refined=(num_finer, len(last)),
        seconds=time.perf_counter() - begun,
    )


def derivatives(solution: Solution | ManySolutions) -> tuple[Any, Any]:
    r"""$d\rho^*/d t_d$, and $d\rho^*$ per unit added to every V(k): `draft_time` and the constant of `verify_time`.

    By the envelope theorem; one-sided where optimal policies tie.

    Example:
        >>> from mdp.acceptance import IID
        >>> from mdp.cost import Affine
        >>> problem = StoppingProblem(IID(0.8), Affine(draft_time=0.2, verify_time=1.0), max_candidates=12)
        >>> by_draft_time, by_verify_time = derivatives(solve(problem))
        >>> round(by_draft_time / by_verify_time, 9)  # four candidates a round
        4.0
    """
    by_verify_time = -(solution.throughput**2) / solution.block_efficiency
    return solution.mean_candidates * by_verify_time, by_verify_time


def _pass(batch: Any, start: _Start, knots: Fineness, tol: float) -> tuple[_Found, np.ndarray, np.ndarray]:
    """All problems at one fineness, chunk by chunk on every core: answers, bounds [B, 2], closed [B]."""

    def run(index: Any) -> Any:
        with jax.enable_x64(True):
            return jax.device_get(_solve_chunk(take(batch, index), take(start, index), knots))

    found = _Found(*in_calls(run, len(batch.accept_prob), knots.chunk))
    bounds = _bounds(batch, found)
    lower, upper = bounds.T
    closed = (upper - lower <= tol * lower) & (found.slack <= THRESHOLD_TOLERANCE)
    return found, bounds, closed


def _bounds(batch: Any, found: _Found) -> np.ndarray:
    """`certificate` for every problem; what is not proven is left open."""
    scale = np.abs(found.bias).max(axis=1)
    sound = np.isfinite(found.rate) & np.isfinite(found.lower) & (found.rate > 0)
    with np.errstate(invalid="ignore"):
        low, high = certificate(found.rate, found.lower, found.upper, round_times(batch), scale, found.bias.shape[1])
    return np.stack([np.where(sound, low, 0.0), np.where(sound & found.exact, high, np.inf)], axis=1)


@partial(jax.jit, static_argnames="knots")
def _solve_chunk(batch: Any, start: _Start, knots: Fineness) -> _Found:
    return jax.lax.map(lambda member: _solve_one(member[0], member[1], knots), (batch, start))


def _solve_one(finite: Any, start: _Start, knots: Fineness) -> _Found:
    """The two steps of the module docstring."""
    starts = finite.initial > 0 if finite.bonus is None else _reachable(finite)
    problem = Arrays(**finite._asdict(), into=None, reachable=starts.astype(finite.initial.dtype))
    # A guess at the least threshold, from the price of a candidate; improved below.
    guess = jnp.clip(0.3 * start.rate * step_time(problem).min(), 1e-4, 0.5)
    rate, bias, lowest = start.rate, start.bias, jnp.where(start.lowest > 0, start.lowest, guess)
    for num_knots, precision in zip((knots.first, knots.second), (1e-4, 1e-7), strict=True):
        found, rate, bias = _improve_until(problem, num_knots, lowest, rate, bias, precision)
        least = found.threshold.min()
        lowest = jnp.where(least > 0, jnp.clip(0.9 * least, 1e-9, 0.9), lowest**2)
    on = lattice(problem.accept_prob, lowest, knots.ceiling)
    value, slack, exact = ceiling(problem, on, rate, bias, found.threshold)
    earned = found.emitted - rate * found.time  # by the policy found, whose rate and bias these are
    if problem.bonus is None:
        lower, upper, visits = problem.initial @ earned, problem.initial @ value, problem.initial
    else:
        lower = jnp.where(starts, earned + found.next_start @ bias - bias, jnp.inf).min()
        upper = jnp.where(starts, value - bias, -jnp.inf).max()
        visits = _visits(found.next_start, problem.reachable)
    emitted, drafted = visits @ found.emitted, visits @ found.drafted
    return _Found(rate, bias, lowest, found.threshold, slack, lower, upper, exact, emitted, drafted)


def _improve_until(
    problem: Arrays, num_knots: int, lowest: Any, rate: Any, bias: Any, precision: float
) -> tuple[Rules, Any, Any]:
    """The rules found once the outer step moves by less than `precision`, and their own rate and bias."""
    on = lattice(problem.accept_prob, lowest, num_knots)

    def body(carry):
        _, rate, bias, _, count = carry
        found = rules(problem, on, rate, bias)
        new_rate, new_bias = improve(problem, found, bias)
        moved = jnp.abs(new_bias - bias).max() / (1.0 + jnp.abs(new_bias).max())
        return found, new_rate, new_bias, jnp.maximum(jnp.abs(new_rate / rate - 1.0), moved), count + 1

    shapes = jax.eval_shape(lambda: rules(problem, on, rate, bias))
    empty = jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), shapes)
    start = (empty, rate, bias, jnp.asarray(jnp.inf, rate.dtype), 0)
    found, rate, bias, _, _ = jax.lax.while_loop(lambda c: (c[3] > precision) & (c[4] < MAX_SWEEPS), body, start)
    return found, rate, bias


def _visits(next_start: Any, reachable: Any) -> Any:
    """Stationary law of the start regime, with the little leak that keeps rows of unreachable regimes regular."""
    size = len(reachable)
    chain = jnp.where(reachable[:, None] > 0, next_start, reachable / reachable.sum())
    system = (jnp.eye(size) - chain).at[:, 0].set(1.0)
    return jnp.linalg.solve(system.T, jnp.zeros(size).at[0].set(1.0))


def _reachable(problem: Any) -> Any:
    """Start regimes that can be met from `initial` under some actions [Z], as in `mdp.problem.start_graph`."""
    size = problem.transition.shape[0]

    def step(carry, accept_prob):
        survived, edges = carry
        drafted = survived @ problem.transition > 0
        edges |= jnp.where(drafted & (accept_prob < 1), 1.0, 0.0) @ problem.rejection > 0
        survived = jnp.where(drafted & (accept_prob > 0), 1.0, 0.0)
        return (survived, edges | (survived @ problem.bonus > 0)), None

    (_, edges), _ = jax.lax.scan(step, (jnp.eye(size), problem.bonus > 0), problem.accept_prob)
    connected = jnp.eye(size) + edges
    for _ in range(max(size - 1, 1).bit_length()):
        connected = (connected @ connected > 0).astype(problem.initial.dtype)
    return problem.initial @ connected > 0
