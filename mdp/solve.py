r"""The optimal stopping policy and its throughput, with a proof.

*Price problem* (`mdp.price`). At a trial rate $\rho$ and bias $h$ over start regimes ($h = 0$ if rounds renew),
backward induction gives $T_{\rho h}(z) = 1 + J_0(z, 1)$, the best value of a round, from above by interpolation and
from below by real rules, and the thresholds $S^*(k, z)$.

*Knots* (`mdp.knots`). A first pass on even knots yields thresholds; the next puts its knots on the kinks they imply,
where interpolation is exact. Two or three passes suffice unless kinks outnumber knots, and then the curve is nearly
smooth and the error falls with the square of the spacing.

*Outer loop.* The rule found from $S = 1$ is a real policy whose tokens $e$, times $T$ and next-start matrix $M$ are
known exactly. Renewal: $\rho \leftarrow \bar e / \bar T$ (Dinkelbach). Persistent: solve $e - \rho T + M h = h$
(Howard's policy iteration).

*Other ways.* Where the form of the policy is known, thresholds alone will do (`mdp.direct`); `value_iteration` replaces
the outer loop (`mdp.value_iteration`).

*Certificate* (`mdp.certificate`), whatever $\rho$ and $h$ the loop ends with. It ends `successful` only if these bounds
are closer than `tol` and CONTINUE - STOP at each threshold is known to `THRESHOLD_TOLERANCE` (half for the knots, half
for $\rho$; the bias is taken as it is). In float32, for hidden regimes and for `logit_ar` it speaks of the bounds
alone.

*Hidden regimes* have a method of their own, `mdp.observed`.

*Continuous processes* are enclosed from both sides: those drawn afresh without any cells (`mdp.independent`), those
with memory between two finite problems (`_enclosed`), whose lower and upper bound are taken.

References: Dinkelbach (1967); Howard (1960); Huang, Guo, Wang, SpecDec++ (arXiv 2405.19715).
"""

import itertools
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdp.acceptance import Observed
from mdp.certificate import certificate
from mdp.chain import recurrent_classes, stationary_law
from mdp.continuous import BetaMixture
from mdp.direct import solve_directly
from mdp.independent import Knots, price
from mdp.knots import Grid, even_and_kinks, place
from mdp.lattice import Rules
from mdp.observed import solve_hidden
from mdp.price import Arrays, Sweep, lump, sweep
from mdp.problem import FiniteProblem, StoppingProblem
from mdp.rounded import enclose
from mdp.solution import Solution, SolveStatus
from mdp.value_iteration import MAX_STEPS, iterate_values

__all__ = ["METHODS", "Solution", "SolveStatus", "certificate", "improve", "solve"]

THRESHOLD_TOLERANCE = 1e-6
"""Tokens: a threshold is right wherever CONTINUE and STOP differ by more than this."""

METHODS = ("auto", "policy_iteration", "value_iteration")

PRECISIONS = ("float64", "float32")

MAX_SWEEPS = 60
MAX_KNOTS_SINGLE = 1024  # more knots show nothing that float32 could
FIRST_KNOTS = 128

COUNTS = tuple(2**power for power in range(10, 25, 2))
"""Knots where acceptances are drawn afresh."""

NODES, MAX_PRODUCTS = (127, 255, 511, 1023, 2047), 2**33
"""Nodes of a law with memory, coarse to fine, one less than a padded size; and the most nodes^2 x knots x depths."""


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
        return _hidden(_in_units(finite, unit), hidden, unit, tol, max_knots, start)
    if continuous:
        between = _afresh if isinstance(continuous.acceptance, BetaMixture) else _enclosed
        found, closed = between(continuous, unit, tol, max_knots, max_sweeps)
    else:
        half = np.inf if single else THRESHOLD_TOLERANCE / 2
        found = _close(
            _in_units(finite, unit), tol, half, half, max_knots, max_sweeps, by_values=by_values, single=single
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
        **_counts(emitted, drafted),
        status=SolveStatus.successful if found.closed else SolveStatus.max_steps_reached,
        num_sweeps=found.num_steps,
        num_knots=found.opened,
        seconds=time.perf_counter() - start,
        method="point_based",
        belief_rule=found.rule,
    )


class _Found(NamedTuple):
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


def _in_units(finite: FiniteProblem, unit: float) -> FiniteProblem:
    return finite._replace(draft_time=finite.draft_time / unit, verify_time=finite.verify_time / unit)


def _close(
    finite: FiniteProblem,
    tol: float,
    slack_tol: float,
    shift_tol: float,
    max_knots: int,
    max_sweeps: int,
    like: _Found | None = None,
    by_values: bool = False,
    single: bool = False,
) -> _Found:
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
    return _Found(rate, bias[into], (lower, upper), threshold[:depth][:, into], slack, _rates(arrays, result), closed,
                  num_sweeps, num_knots)  # fmt: skip


def _afresh(problem: StoppingProblem, unit: float, tol: float, max_knots: int, max_sweeps: int) -> tuple[_Found, bool]:
    r"""Acceptances drawn afresh from a continuous law (`mdp.independent`), with more knots until the bounds agree.

    Thresholds S are those from below. With $D$ the worth of CONTINUE - STOP at the true rate, $\sigma$ the slack at S,
    $\Delta$ the bounds' relative width and $L = \sum_{j=1}^{K-k} m^j$ the most tokens any rule can still expect per
    unit of survival, $-\Delta S L \le D(S) \le \sigma + \Delta S L$: a rule that breaks even at S spends at most
    $S L / \rho$ on it, which is what a change of the rate is multiplied with. Where the right side is at most
    `THRESHOLD_TOLERANCE` for every k, S is right wherever $|D|$ exceeds that.
    """
    process, finite = problem.acceptance, _in_units(problem.unseen(), unit)
    assert isinstance(process, BetaMixture)
    if process.sure:
        found = _close(finite, tol, THRESHOLD_TOLERANCE / 2, THRESHOLD_TOLERANCE / 2, max_knots, max_sweeps)
        return found, found.closed
    depth = finite.max_candidates
    most = np.cumsum(process.mean ** np.arange(1, depth + 1))[::-1]  # L for k = 0..K-1
    rate, lowest, lower, upper, num_sweeps = 1.0 / float(finite.verify_time[0]), 1e-3, 0.0, np.inf, 0
    counts = [count for count in COUNTS if count <= max(max_knots, COUNTS[0])]
    for count in counts:
        knots = Knots(process, count, lowest)
        for _ in range(max_sweeps):
            priced = price(knots, rate, finite.draft_time, finite.verify_time)
            num_sweeps += 1
            if abs(priced.lower) <= 1e-3 * tol * rate * priced.time:
                break
            rate += priced.lower / priced.time
        low, high = certificate(rate, priced.lower, priced.upper, finite.round_time, 0.0, count)
        lower, upper = max(lower, float(low)), min(upper, float(high))
        at = np.minimum(priced.threshold, 1.0)
        unsure = (upper - lower) / max(lower, np.finfo(float).tiny) * at * most
        closed = upper - lower <= tol * lower
        if closed and (priced.slack + unsure).max() > THRESHOLD_TOLERANCE:
            priced = price(knots, rate, finite.draft_time, finite.verify_time, sharp=True)
            closed = bool((priced.slack + unsure).max() <= THRESHOLD_TOLERANCE)
        if closed:
            break
        lowest = 0.8 * float(min(at[at > 0], default=1e-3 / 0.8))
    drawn = enclose(process, priced.threshold, finite.round_time, cells=2**14)
    emitted, drafted = float(drawn.emitted.mean()), float(drawn.drafted.mean())
    found = _Found(
        (lower + upper) / 2, np.zeros(1), (lower, upper), priced.threshold[:, None], priced.slack,
        _counts(emitted, drafted), closed, num_sweeps, count,
    )  # fmt: skip
    return found, closed


def _enclosed(
    problem: StoppingProblem, unit: float, tol: float, max_knots: int, max_sweeps: int
) -> tuple[_Found, bool]:
    """A process with a continuum of regimes between two finite problems, refined until their bounds agree.

    The lower problem's table is reported, a column per node (`AcceptanceProcess.regimes`).
    """
    depth = int(problem.max_candidates)
    allowed = [size for size in NODES if size == NODES[0] or size**2 * 4 * FIRST_KNOTS * depth <= MAX_PRODUCTS]
    low: Any = None
    high: Any = None
    lower, upper, num_sweeps, size = 0.0, np.inf, 0, NODES[0]
    while True:
        # The gap falls with the square of the nodes' distance; knots have to close a part of it only.
        goal = max(tol / 4, size**-2.0)
        knots = max(FIRST_KNOTS, min(max_knots, 2 ** int(np.log2(MAX_PRODUCTS / (size**2 * depth)))))
        low, high = (
            _close(_in_units(finite, unit), goal, np.inf, np.inf, knots, max_sweeps, like)
            for finite, like in zip(problem.bracket(size), (low, high), strict=True)
        )
        num_sweeps += low.num_sweeps + high.num_sweeps
        lower, upper = max(lower, low.bounds[0]), min(upper, high.bounds[1])
        closed = upper - lower <= tol * lower
        finer = [more for more in allowed if more > size]
        if closed or not finer:
            break
        enough = 1.1 * size * np.sqrt((upper - lower) / (tol * lower)) if lower > 0 else np.inf
        size = next((more for more in finer if more >= enough), finer[-1])
    found = low._replace(
        rate=(lower + upper) / 2, bounds=(lower, upper), threshold=low.threshold[:, :-1], bias=np.zeros(1),
        num_sweeps=num_sweeps,
    )  # fmt: skip
    return found, closed


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
    return _counts(float(law @ found.emitted), float(law @ found.drafted))


def _counts(emitted: float, drafted: float) -> dict[str, Any]:
    """The rates of a solution from tokens and candidates per round."""
    return {
        "block_efficiency": emitted,
        "verification_rate": 1.0 / emitted,
        "discard_rate": max(0.0, (drafted - (emitted - 1.0)) / emitted),
        "mean_candidates": drafted,
    }
