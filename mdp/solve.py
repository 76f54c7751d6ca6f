r"""The optimal stopping policy and its throughput, with a proof.

*Price problem.* At a trial rate $\rho$ and bias $h$ over start regimes ($h = 0$ if rounds renew), drafting on from
survival $S$ by any rule is worth $S L - C$: tokens and next starts scale with $S$, time does not. With
$h_b(z) = \sum_y \mathrm{bonus}(z, y) h(y)$ and $h_r$ likewise, backward induction over $k$ reads

$$J_k(z, S) = \max\{\, S h_b(z) - \rho V(k),\;
  -\rho t_d + \sum_{z'} P(z, z') [\, S (a' + (1 - a') h_r(z')) + J_{k+1}(z', S a') \,] \,\},$$

with $a' = a_{k+1}(z')$, and $J_K$ the first term. $J_k(z, \cdot)$ is convex and piecewise linear, its stop set an
interval $[0, S^*(k, z))$ (theory, F1), and $T_{\rho h}(z) = 1 + J_0(z, 1)$.

*Representation.* Each depth has a row of knots in $[0, 1]$. At each knot two things are kept: the value of CONTINUE,
interpolated linearly, which over-estimates a convex function; and the *rule* that earns the most there as its exact
coefficients (tokens, time, candidates, next starts), a line in $S$ that under-estimates it. Lines on both sides of a
kink meet exactly at it, so thresholds come from lines; the next pass puts its knots on the kinks those thresholds
imply ($S^*$ divided by acceptances), where interpolation is exact too. Two or three passes suffice unless kinks
outnumber knots, and then the curve is nearly smooth and the error falls with the square of the spacing.

*Outer loop.* The rule found from $S = 1$ is a real policy whose tokens $e$, times $T$ and next-start matrix $M$ are
known exactly. Renewal: $\rho \leftarrow \bar e / \bar T$ (Dinkelbach). Persistent: solve $e - \rho T + M h = h$
(Howard's policy iteration).

*Certificate.* With $\hat\delta = \max_z (\hat T_{\rho h} - h)$ from interpolation and
$\check\delta = \min_z (\check T_{\rho h} - h)$ from rules, over reachable start regimes (renewal: means under
`initial`), and $T_{min}, T_{max}$ the least and greatest round times, whatever $\rho$ and $h$:
$\rho^* \le \rho + \hat\delta / T_{min}$ ($/ T_{max}$ if negative), $\rho^* \ge \rho + \check\delta / T_{min}$
($/ T_{max}$ if positive), widened for rounding. The loop ends `successful` only if these bounds are closer than `tol`
and CONTINUE - STOP at each threshold is known to half of `THRESHOLD_TOLERANCE`.

References: Dinkelbach (1967); Howard (1960); Huang, Guo, Wang, SpecDec++ (arXiv 2405.19715).
"""

import enum
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdp.chain import recurrent_classes, stationary_law
from mdp.policy import TIE, ThresholdTable
from mdp.problem import FiniteProblem, StoppingProblem, start_graph

__all__ = ["Solution", "SolveStatus", "solve"]

THRESHOLD_TOLERANCE = 1e-6
"""Tokens: a threshold is right wherever CONTINUE and STOP differ by more than this."""

MAX_SWEEPS = 60
NEVER = -1e30  # the value of CONTINUE where it is not allowed; finite, so that interpolation makes no NaN
SIZES = sorted(size for power in range(16) for size in (2**power, 3 * 2**power))


class SolveStatus(enum.Enum):
    """How a solve ended; the value is advice for the user."""

    successful = ""
    max_steps_reached = (
        "The bounds on the throughput or the thresholds did not close. Raise `max_knots`, or loosen `tol`; "
        "many regimes with long rounds and nearly deterministic chains need the most knots."
    )


@dataclass(frozen=True)
class Solution:
    """The optimal policy of a problem and what it earns.

    Attributes:
        throughput: rho*, tokens per unit time; `speedup` = throughput * V(0).
        bounds: proven lower and upper bound on the best throughput of any policy.
        survival_threshold: [K, Z]; CONTINUE iff survival >= threshold, inf = STOP at every survival.
        bias: [Z] relative value of each start regime in tokens; zeros if rounds renew.
        block_efficiency, verification_rate, discard_rate, mean_candidates: of the policy found.
        status: `successful`, or why not, with advice.
        num_sweeps, num_knots: backward inductions done in all, and knots per depth in the last pass.
        seconds: wall time, compilation included.
    """

    throughput: float
    speedup: float
    bounds: tuple[float, float]
    survival_threshold: np.ndarray
    bias: np.ndarray
    block_efficiency: float
    verification_rate: float
    discard_rate: float
    mean_candidates: float
    status: SolveStatus
    num_sweeps: int
    num_knots: int
    seconds: float

    @property
    def policy(self) -> ThresholdTable:
        """The stopping rule, for `evaluate`, `simulate`, `replay` and live decoding."""
        return ThresholdTable(self.survival_threshold)

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `specstop solve --json`; null stands for STOP at every survival."""
        table = [[None if np.isinf(cell) else float(cell) for cell in row] for row in self.survival_threshold]
        names = ("block_efficiency", "verification_rate", "discard_rate", "mean_candidates")
        return {"status": self.status.name, "throughput": self.throughput, "speedup": self.speedup,
                "bounds": list(self.bounds), "survival_threshold": table,
                **{name: getattr(self, name) for name in names}, "seconds": self.seconds}  # fmt: skip


class _Arrays(NamedTuple):
    """A padded problem as the compiled loop sees it; Q = reachable start regimes as 0/1 weights."""

    transition: Any
    accept_prob: Any
    initial: Any
    draft_time: Any
    verify_time: Any
    rejection: Any
    bonus: Any
    reachable: Any


class _Grid(NamedTuple):
    """Knots per depth [K, N], and where `accept_prob * knot` falls among the next depth's knots [K, Z, N]."""

    knots: Any
    cell: Any
    weight: Any


class _Sweep(NamedTuple):
    """One backward induction: lower and upper T_rho_h - h, the rules at S = 1, thresholds and their slack."""

    lower: Any
    upper: Any
    emitted: Any
    time: Any
    drafted: Any
    next_start: Any
    threshold: Any
    slack: Any


class _Result(NamedTuple):
    rate: Any
    bias: Any
    sweep: _Sweep
    num_sweeps: Any


def _sweep(problem: _Arrays, grid: _Grid, rate: Any, bias: Any) -> _Sweep:
    num_regimes, num_knots = grid.cell.shape[1:]
    persistent = problem.bonus is not None
    bonus = problem.bonus if persistent else jnp.zeros((num_regimes, 0))
    rejection = problem.rejection if persistent else jnp.zeros((num_regimes, 0))
    bias_row = bias if persistent else jnp.zeros(0)
    after_bonus, after_rejection = bonus @ bias_row, rejection @ bias_row

    def pick(values, index):
        return jnp.take_along_axis(values, index, axis=1)

    def stop_rule(verify_time):
        """(tokens, time, candidates, next starts): tokens and next starts per unit of survival."""
        head = jnp.broadcast_to(jnp.stack([0.0 * verify_time, verify_time, 0.0 * verify_time]), (num_regimes, 3))
        return jnp.concatenate([head, bonus], axis=1)

    def step(carry, layer):
        rules, upper = carry
        accept, knots, cell, weight, verify_now, verify_next = layer
        survival = accept[:, None] * knots
        stop = survival * after_bonus[:, None] - rate * verify_next
        # lower: the best of STOP and the two rules kept around this survival
        slope = rules[..., 0] + rules[..., 3:] @ bias_row
        price = rate * rules[..., 1]
        left = survival * pick(slope, cell) - pick(price, cell)
        right = survival * pick(slope, cell + 1) - pick(price, cell + 1)
        nearest = jnp.where(right > left, cell + 1, cell)
        goes_on = jnp.maximum(left, right) >= stop - TIE * (1.0 + jnp.abs(stop))
        chosen = jnp.where(
            goes_on[..., None],
            jnp.take_along_axis(rules, nearest[..., None], axis=1),
            stop_rule(verify_next)[:, None, :],
        )
        earned = jnp.concatenate(
            [
                accept[:, None, None] * (1.0 + chosen[..., :1]),
                chosen[..., 1:2],
                chosen[..., 2:3],
                (1.0 - accept)[:, None, None] * rejection[:, None, :] + accept[:, None, None] * chosen[..., 3:],
            ],
            axis=2,
        )
        rules = jnp.einsum("zy,ynf->znf", problem.transition, earned)
        rules = rules.at[..., 1].add(problem.draft_time).at[..., 2].add(1.0)
        # upper: the interpolated value
        between = (1.0 - weight) * pick(upper, cell) + weight * pick(upper, cell + 1)
        gain = knots * (accept + (1.0 - accept) * after_rejection)[:, None]
        upper = problem.transition @ (gain + jnp.maximum(stop, between)) - rate * problem.draft_time
        return (rules, upper), _thresholds(knots, rules, upper, after_bonus, bias_row, rate, verify_now)

    width = 3 + bonus.shape[1]
    rules = jnp.zeros((num_regimes, num_knots, width)).at[..., 1].set(-NEVER)
    upper = jnp.full((num_regimes, num_knots), NEVER)
    layers = (problem.accept_prob, *grid, problem.verify_time[:-1], problem.verify_time[1:])
    (rules, upper), (threshold, slack) = jax.lax.scan(step, (rules, upper), layers, reverse=True)

    stop = after_bonus - rate * problem.verify_time[0]
    at_one = rules[:, -1]
    going_on = at_one[:, 0] + at_one[:, 3:] @ bias_row - rate * at_one[:, 1]
    best = jnp.where(
        (going_on >= stop - TIE * (1.0 + jnp.abs(stop)))[:, None], at_one, stop_rule(problem.verify_time[0])
    )
    return _Sweep(
        lower=1.0 + jnp.maximum(stop, going_on) - bias,
        upper=1.0 + jnp.maximum(stop, upper[:, -1]) - bias,
        emitted=1.0 + best[:, 0],
        time=best[:, 1],
        drafted=best[:, 2],
        next_start=best[:, 3:],
        threshold=threshold,
        slack=slack,
    )


def _thresholds(knots, rules, upper, after_bonus, bias_row, rate, verify_time):
    """Where the best rule's line crosses STOP [Z], and how much CONTINUE could still be worth there [Z]."""
    stop_slope, stop_price = after_bonus[:, None], rate * verify_time
    slope = rules[..., 0] + rules[..., 3:] @ bias_row - stop_slope
    price = rate * rules[..., 1] - stop_price
    # Behind is an interval that ends at the threshold; it may start just above a tie at survival 0.
    ahead, tie = slope * knots - price, TIE * (1.0 + jnp.abs(stop_price))
    behind = (ahead < -tie) | ((knots == 0.0) & (ahead <= tie) & (slope < -tie))
    last = knots.shape[0] - 1
    always = ~behind.any(axis=1, keepdims=True)
    before = jnp.where(always, 0, last - jnp.argmax(behind[:, ::-1], axis=1, keepdims=True))
    never = ~always & (before == last)
    first = jnp.minimum(before + 1, last)

    def crossing(index):
        rise = jnp.take_along_axis(slope, index, axis=1)
        return jnp.where(rise > 0, jnp.take_along_axis(price, index, axis=1) / rise, jnp.inf)

    low, high = knots[before], knots[first]
    found = jnp.clip(jnp.minimum(crossing(first), crossing(before)), low, high)
    found = jnp.where(always, 0.0, found)
    point = jnp.where(never, 1.0, found)
    start, end = jnp.where(never, last - 1, before), jnp.where(never, last, first)
    width = knots[end] - knots[start]
    share = jnp.where(width > 0, (point - knots[start]) / jnp.where(width > 0, width, 1.0), 0.0)
    value = (1.0 - share) * jnp.take_along_axis(upper, start, axis=1) + share * jnp.take_along_axis(upper, end, axis=1)
    slack = jnp.where(always, 0.0, value - (point * stop_slope - stop_price))
    return jnp.where(never, jnp.inf, found)[:, 0], slack[:, 0]


def _improve(problem: _Arrays, sweep: _Sweep, bias: Any) -> tuple[Any, Any]:
    """Rate and bias of the policy found: Dinkelbach if rounds renew, else Howard's linear system."""
    if problem.bonus is None:
        return (problem.initial @ sweep.emitted) / (problem.initial @ sweep.time), bias
    size = problem.initial.shape[0]
    reference = jnp.argmax(problem.reachable)
    anchor = problem.reachable / problem.reachable.sum()

    def system(leak):
        # regimes that no round can start in need not reach the others; the leak keeps their rows regular
        leak = jnp.where(problem.reachable > 0, leak, 1e-9)[:, None]
        chain = (1.0 - leak) * sweep.next_start + leak * anchor
        matrix = (jnp.eye(size) - chain).at[:, reference].set(sweep.time)
        answer = jnp.linalg.solve(matrix, sweep.emitted)
        return answer[reference], answer.at[reference].set(0.0)

    rate, bias = system(0.0)
    # Several recurrent classes under this policy make the system singular; a leak between them picks the better.
    leaky_rate, leaky_bias = system(1e-6)
    sound = jnp.isfinite(bias).all() & (jnp.abs(bias * problem.reachable).max() < 1e8) & (rate > 0)
    return jnp.where(sound, rate, leaky_rate), jnp.where(sound, bias, leaky_bias)


@partial(jax.jit, static_argnames="max_sweeps")
def _iterate(problem: _Arrays, grid: _Grid, rate: Any, bias: Any, max_sweeps: int) -> _Result:
    """Improve until the rate stands still; the last sweep is the one done at the rate and bias returned."""

    def go_on(carry):
        stalled, _, result = carry
        return (stalled < 2) & (result.num_sweeps < max_sweeps)

    def body(carry):
        stalled, best, result = carry
        new_rate, new_bias = _improve(problem, result.sweep, result.bias)
        sweep = _sweep(problem, grid, new_rate, new_bias)
        # A policy's own rate can only rise; when it no longer does, the knots are what limits the bounds.
        still = new_rate <= best * (1.0 + 1e-15)
        settled = jnp.abs((new_bias - result.bias) * problem.reachable).max() <= 1e-13 * (1.0 + jnp.abs(new_bias).max())
        stalled = jnp.where(still, stalled + 1 + settled, 0)
        return stalled, jnp.maximum(best, new_rate), _Result(new_rate, new_bias, sweep, result.num_sweeps + 1)

    start = _Result(rate, bias, _sweep(problem, grid, rate, bias), jnp.asarray(1))
    return jax.lax.while_loop(go_on, body, (jnp.asarray(0), rate * 0.0, start))[2]


def _padded(size: int) -> int:
    """Shapes come in a few sizes, so that most problems find their loop compiled."""
    return next((padded for padded in SIZES if padded >= size), size)


def _pad(problem: FiniteProblem) -> _Arrays:
    """Regimes that are never entered, and depths that are never worth their time."""
    size, depth = problem.num_regimes, problem.max_candidates
    more_regimes, more_depth = _padded(size) - size, _padded(depth) - depth

    def matrix(rows):
        return None if rows is None else np.pad(rows, (0, more_regimes)) + np.diag([0.0] * size + [1.0] * more_regimes)

    reachable = start_graph(problem)[1] if problem.persistent else problem.initial > 0
    return _Arrays(
        transition=matrix(problem.transition),
        accept_prob=np.pad(problem.accept_prob, ((0, more_depth), (0, more_regimes))),
        initial=np.pad(problem.initial, (0, more_regimes)),
        draft_time=np.float64(problem.draft_time),
        verify_time=np.pad(problem.verify_time, (0, more_depth), constant_values=-NEVER),
        rejection=matrix(problem.rejection),
        bonus=matrix(problem.bonus),
        reachable=np.pad(reachable.astype(np.float64), (0, more_regimes)),
    )


def _place(accept_prob: np.ndarray, knots: np.ndarray) -> _Grid:
    """Locate each product of acceptance and knot among the next depth's knots."""
    depth, size = accept_prob.shape
    cell = np.empty((depth, size, knots.shape[1]), dtype=np.int32)
    weight = np.empty(cell.shape)
    for k in range(depth):
        following = knots[min(k + 1, depth - 1)]
        survival = accept_prob[k][:, None] * knots[k]
        cell[k] = np.clip(np.searchsorted(following, survival, side="right") - 1, 0, len(following) - 2)
        low = following[cell[k]]
        width = following[cell[k] + 1] - low
        weight[k] = np.clip((survival - low) / np.where(width > 0, width, 1.0), 0.0, 1.0)
    return _Grid(knots, cell, weight)


def _thin(values: np.ndarray, low: float, most: int) -> np.ndarray:
    """At most one value in each of `most` even cells of [low, 1]."""
    cell = np.minimum((values - low) / (1.0 - low) * most, most - 1).astype(int)
    return values[np.diff(cell, prepend=-1) > 0]


def _kinks(accept_prob: np.ndarray, threshold: np.ndarray, lowest: np.ndarray, most: int) -> list[np.ndarray]:
    """Survivals at which CONTINUE has a kink at each depth: thresholds further down over the acceptances between."""
    depth, size = accept_prob.shape
    below: list[np.ndarray] = [np.empty(0)] * depth
    for k in range(depth - 2, -1, -1):
        found = [np.empty(0)]
        for z in range(size):
            limit, accept = threshold[k + 1, z], accept_prob[k, z]
            if accept > 0 and limit <= accept:
                inherited = below[k + 1]
                bends = np.append(inherited[(inherited > limit) & (inherited <= accept)], limit)
                found.append(bends[bends > 0] / accept)
        bends = np.unique(np.concatenate(found))
        bends = bends[(np.diff(bends, prepend=-1.0) > 1e-14) & (bends > lowest[k]) & (bends < 1.0)]
        below[k] = bends if len(bends) <= most else _thin(bends, lowest[k], most)
    return below


def _knots(accept_prob: np.ndarray, threshold: np.ndarray | None, num_knots: int) -> np.ndarray:
    """A row of knots per depth: 0, then evenly from below the least threshold to 1, on the kinks where they are known.

    Below the least threshold of a depth every regime stops, and STOP is kept exactly.
    """
    depth = accept_prob.shape[0]
    if threshold is None:
        return np.tile(np.linspace(0.0, 1.0, num_knots), (depth, 1))
    lowest = 0.9 * np.minimum(threshold.min(axis=1), 1.0)
    rows = np.zeros((depth, num_knots))
    for k, bends in enumerate(_kinks(accept_prob, threshold, lowest, num_knots // 2)):
        even = np.linspace(lowest[k], 1.0, num_knots - 1 - len(bends))
        rows[k, 1:] = np.sort(np.concatenate([even, bends]))
    return rows


def solve(
    problem: StoppingProblem | FiniteProblem, *, tol: float = 1e-6, max_knots: int = 2**16, max_sweeps: int = MAX_SWEEPS
) -> Solution:
    """Solve a stopping problem to proven bounds of relative width `tol`.

    Args:
        problem: a finite problem, renewal or persistent.
        tol: relative width of the bounds that counts as solved.
        max_knots: most knots per depth before giving up with status `max_steps_reached`.
        max_sweeps: most backward inductions in one pass.

    Returns:
        The policy, its throughput, the bounds and the status. Never raises for want of convergence.

    Raises:
        ValueError: if `tol` or a limit is not positive.

    Example:
        >>> from mdp.acceptance import IID
        >>> from mdp.cost import Affine
        >>> solution = solve(StoppingProblem(IID(0.8), Affine(draft_time=0.2, verify_time=1.0), max_candidates=12))
        >>> solution.status.name, round(solution.throughput, 6), round(solution.mean_candidates, 6)
        ('successful', 1.8676, 4.0)
    """
    for name, value in (("tol", tol), ("max_knots", max_knots), ("max_sweeps", max_sweeps)):
        if not value > 0:
            raise ValueError(f"{name}: must be > 0, got {value!r}")
    start = time.perf_counter()
    finite = problem.lower() if isinstance(problem, StoppingProblem) else problem
    arrays = _pad(finite)
    rate, bias = np.float64(1.0 / finite.verify_time[0]), np.zeros(len(arrays.initial))
    num_knots, knots, num_sweeps = 128, None, 0
    with jax.enable_x64(True):
        for attempt in range(64):
            knots = _knots(arrays.accept_prob, None if knots is None else result.sweep.threshold, num_knots)  # noqa: F821
            result = jax.device_get(_iterate(arrays, _place(arrays.accept_prob, knots), rate, bias, max_sweeps))
            num_sweeps += int(result.num_sweeps)
            lower, upper = _bounds(finite, arrays, result)
            slack = result.sweep.slack[: finite.max_candidates, : finite.num_regimes].max()
            closed = upper - lower <= tol * lower and slack <= THRESHOLD_TOLERANCE / 2
            if closed or (attempt >= 2 and 4 * num_knots > max_knots):
                break
            rate, bias = result.rate, result.bias
            num_knots = num_knots if attempt == 0 else 4 * num_knots
    throughput = float(np.clip(result.rate, lower, upper))
    rates = _rates(arrays, result)
    return Solution(
        throughput=throughput,
        speedup=throughput * float(finite.verify_time[0]),
        bounds=(lower, upper),
        survival_threshold=result.sweep.threshold[: finite.max_candidates, : finite.num_regimes].copy(),
        bias=result.bias[: finite.num_regimes].copy(),
        **rates,
        status=SolveStatus.successful if closed else SolveStatus.max_steps_reached,
        num_sweeps=num_sweeps,
        num_knots=num_knots,
        seconds=time.perf_counter() - start,
    )


def _bounds(finite: FiniteProblem, arrays: _Arrays, result: _Result) -> tuple[float, float]:
    """The certificate of the module docstring, widened for rounding."""
    least, greatest = finite.round_time.min(), finite.round_time.max()
    if finite.persistent:
        starts = arrays.reachable > 0
        low, high = result.sweep.lower[starts].min(), result.sweep.upper[starts].max()
        scale = np.abs(result.bias[starts]).max()
    else:
        low, high = arrays.initial @ result.sweep.lower, arrays.initial @ result.sweep.upper
        scale = 0.0
    rate, depth = float(result.rate), finite.max_candidates
    rounding = 8 * np.finfo(float).eps * (depth + finite.num_regimes) * (scale + depth + 1 + rate * greatest)
    low, high = low - rounding, high + rounding
    return (
        float(max(rate + low / (greatest if low >= 0 else least), 0.0)),
        float(rate + high / (least if high >= 0 else greatest)),
    )


def _rates(arrays: _Arrays, result: _Result) -> dict[str, float]:
    """Long-run rates of the policy found, under the stationary law of the start regime."""
    sweep, law = result.sweep, arrays.initial
    if arrays.bonus is not None:  # several classes tie if all of them are optimal: any one will do
        law = stationary_law(sweep.next_start, recurrent_classes(sweep.next_start, law)[0])
    emitted, drafted = float(law @ sweep.emitted), float(law @ sweep.drafted)
    return {
        "block_efficiency": emitted,
        "verification_rate": 1.0 / emitted,
        "discard_rate": max(0.0, (drafted - (emitted - 1.0)) / emitted),
        "mean_candidates": drafted,
    }
