r"""Policy iteration on the price problem, on knots that follow the kinks: how finite problems are solved.

*Price problem* (`mdp.price`). At a trial rate $\rho$ and bias $h$ over start regimes ($h = 0$ if rounds renew),
backward induction gives $T_{\rho h}(z) = 1 + J_0(z, 1)$, the best value of a round, from above by interpolation and
from below by real rules, and the thresholds $S^*(k, z)$.

*Knots* (`mdp.knots`). A first pass on even knots yields thresholds; the next puts its knots on the kinks they imply,
where interpolation is exact. Two or three passes suffice unless kinks outnumber knots, and then the curve is nearly
smooth and the error falls with the square of the spacing.

*Outer loop.* The rule found from $S = 1$ is a real policy whose tokens $e$, times $T$ and next-start matrix $M$ are
known exactly. Renewal: $\rho \leftarrow \bar e / \bar T$ (Dinkelbach). Persistent: solve $e - \rho T + M h = h$
(Howard's policy iteration).

*Certificate* (`mdp.certificate`), whatever $\rho$ and $h$ the loop ends with. It ends `successful` only if these bounds
are closer than `tol` and CONTINUE - STOP at each threshold is known to `THRESHOLD_TOLERANCE` (half for the knots, half
for $\rho$; the bias is taken as it is). In float32, for hidden regimes and for `logit_ar` it speaks of the bounds
alone.

References: Dinkelbach (1967); Howard (1960).
"""

import itertools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdp.certificate import certificate
from mdp.chain import recurrent_classes, stationary_law
from mdp.knots import Grid, even_and_kinks, place
from mdp.lattice import Rules
from mdp.price import Arrays, Sweep, lump, sweep
from mdp.problem import FiniteProblem
from mdp.value_iteration import iterate_values

__all__ = ["FIRST_KNOTS", "MAX_SWEEPS", "THRESHOLD_TOLERANCE", "Found", "close", "improve", "in_units",
           "rates_per_round"]  # fmt: skip

THRESHOLD_TOLERANCE = 1e-6
"""Tokens: a threshold is right wherever CONTINUE and STOP differ by more than this."""

MAX_SWEEPS = 60
MAX_KNOTS_SINGLE = 1024  # more knots show nothing that float32 could
FIRST_KNOTS = 128


class _Result(NamedTuple):
    rate: Any
    bias: Any
    sweep: Sweep
    num_sweeps: Any


def improve(problem: Arrays, sweep: Sweep | Rules, bias: Any) -> tuple[Any, Any]:
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
def _iterate(problem: Arrays, grid: Grid, rate: Any, bias: Any, max_sweeps: int) -> _Result:
    """Improve until the rate stands still; the last sweep is the one done at the rate and bias returned."""

    def go_on(carry):
        stalled, _, result = carry
        return (stalled < 2) & (result.num_sweeps < max_sweeps)

    def body(carry):
        stalled, best, result = carry
        new_rate, new_bias = improve(problem, result.sweep, result.bias)
        swept = sweep(problem, grid, new_rate, new_bias, track=True)
        # A policy's own rate can only rise; when it no longer does, the knots are what limits the bounds.
        still = new_rate <= best * (1.0 + 1e-15)
        settled = jnp.abs((new_bias - result.bias) * problem.reachable).max() <= 1e-13 * (1.0 + jnp.abs(new_bias).max())
        stalled = jnp.where(still, stalled + 1 + settled, 0)
        return stalled, jnp.maximum(best, new_rate), _Result(new_rate, new_bias, swept, result.num_sweeps + 1)

    start = _Result(rate, bias, sweep(problem, grid, rate, bias, track=True), jnp.asarray(1))
    return jax.lax.while_loop(go_on, body, (jnp.asarray(0), rate * 0.0, start))[2]


@jax.jit
def _inspect(problem: Arrays, grid: Grid, rate: Any, bias: Any) -> Sweep:
    """Bounds and thresholds at a rate and bias that are good enough; a finer look costs one light sweep."""
    return sweep(problem, grid, rate, bias, track=False)


class Found(NamedTuple):
    """What is known of a finite problem: `threshold` [K, Z]; `slack` [K] is what CONTINUE may still be worth there."""

    rate: float
    bias: np.ndarray
    bounds: tuple[float, float]
    threshold: np.ndarray
    slack: np.ndarray
    rates: dict[str, Any]
    closed: bool
    num_sweeps: int
    num_knots: int


def in_units(finite: FiniteProblem, unit: float) -> FiniteProblem:
    return finite._replace(draft_time=finite.draft_time / unit, verify_time=finite.verify_time / unit)


def close(
    finite: FiniteProblem,
    tol: float,
    slack_tol: float,
    shift_tol: float,
    max_knots: int,
    max_sweeps: int,
    like: Found | None = None,
    by_values: bool = False,
    single: bool = False,
) -> Found:
    """Refine knots until the bounds and the thresholds have closed.

    `slack_tol` and `shift_tol` are tokens: what knots, and the rate's own uncertainty, may do to a threshold. `like`
    is the end of a similar problem, to start from. `by_values`: improve by value iteration. `single`: in float32.
    """
    arrays, into = lump(finite)
    depth = finite.max_candidates
    rate, bias = np.float64(1.0 / finite.verify_time[0]), np.zeros(len(arrays.initial))
    lower, upper, num_sweeps, num_knots, improving = 0.0, np.inf, 0, FIRST_KNOTS, True
    threshold: Any = None
    if like is not None:
        padding = np.full((len(arrays.accept_prob) - depth, len(bias)), np.inf)
        lowest = like.threshold.min(axis=1, keepdims=True)
        threshold = np.concatenate([np.repeat(lowest, len(bias), axis=1), padding])
        rate, num_knots = like.rate, min(like.num_knots, max_knots)
    iterate = iterate_values if by_values else _iterate
    max_knots = min(max_knots, MAX_KNOTS_SINGLE) if single else max_knots
    eps = float(np.finfo(np.float32 if single else np.float64).eps)
    with jax.enable_x64(not single):
        for attempt in itertools.count():
            first = threshold is None
            knots = even_and_kinks(arrays.accept_prob, arrays.into, threshold, num_knots)
            grid = place(arrays.accept_prob, knots)
            if improving:
                result = jax.device_get(iterate(arrays, grid, rate, bias, max_sweeps))
                rate, bias, seen = result.rate, result.bias, result.sweep
                num_sweeps += int(result.num_sweeps)
            else:
                seen = jax.device_get(_inspect(arrays, grid, rate, bias))
                num_sweeps += 1
            threshold, slack = seen.threshold, seen.slack[:depth][:, into].max(axis=1)
            low, high = _bounds(finite, arrays, rate, bias, seen, eps)
            lower, upper = max(lower, low), min(upper, high)
            # What the rate's own uncertainty can shift a threshold by: it prices the time between STOP and CONTINUE.
            shift = (upper - lower) * np.ptp(finite.round_time)
            improving = upper - lower > tol * lower or shift > shift_tol
            closed = not improving and slack.max() <= slack_tol
            # Without a similar problem the first passes are blind.
            if closed or (4 * num_knots > max_knots and (like is not None or attempt >= 2)):
                break
            num_knots = num_knots if first else 4 * num_knots
    return Found(rate, bias[into], (lower, upper), threshold[:depth][:, into], slack, _rates(arrays, result), closed,
                  num_sweeps, num_knots)  # fmt: skip


def _bounds(
    finite: FiniteProblem, arrays: Arrays, rate: float, bias: np.ndarray, seen: Sweep, eps: float
) -> tuple[float, float]:
    """The certificate, for the start regimes that count; what holds of any policy if the numbers ran over."""
    if not (np.isfinite(rate) and np.isfinite(seen.lower).all() and np.isfinite(seen.upper).all()):
        return 0.0, (finite.max_candidates + 1) / float(finite.round_time.min())
    if finite.persistent:
        starts = arrays.reachable > 0
        low, high, scale = seen.lower[starts].min(), seen.upper[starts].max(), np.abs(bias[starts]).max()
    else:
        low, high, scale = arrays.initial @ seen.lower, arrays.initial @ seen.upper, 0.0
    rate = float(rate)
    lower, upper = certificate(rate, low, high, finite.round_time, scale, finite.num_regimes, eps)
    return float(lower), float(upper)


def _rates(arrays: Arrays, result: _Result) -> dict[str, Any]:
    """Long-run rates of the policy found, under the stationary law of the start regime."""
    found, law = result.sweep, arrays.initial
    if arrays.bonus is not None:  # several classes tie if all of them are optimal: any one will do
        law = stationary_law(found.next_start, recurrent_classes(found.next_start, law)[0])
    return rates_per_round(float(law @ found.emitted), float(law @ found.drafted))


def rates_per_round(emitted: float, drafted: float) -> dict[str, Any]:
    """The rates of a solution from tokens and candidates per round."""
    return {
        "block_efficiency": emitted,
        "verification_rate": 1.0 / emitted,
        "discard_rate": max(0.0, (drafted - (emitted - 1.0)) / emitted),
        "mean_candidates": drafted,
    }
