r"""The price problem: what a round is worth at a trial rate and bias, by one backward induction.

With $h_b(z) = \sum_y \mathrm{bonus}(z, y) h(y)$, $h_r$ likewise and $a' = a_{k+1}(z')$,

$$J_k(z, S) = \max\{\, S h_b(z) - \rho V(k),\;
  -\rho t_d + \sum_{z'} P(z, z') [\, S (a' + (1 - a') h_r(z')) + J_{k+1}(z', S a') \,] \,\},$$

and $J_K$ the first term. $J_k(z, \cdot)$ is convex and piecewise linear in $S$. At each knot of the survival axis two
things are kept of CONTINUE: its value, interpolated linearly (an over-estimate), and the rule that earns the most
there as exact coefficients, a line in $S$ (an under-estimate). STOP is kept exactly. Theory, section 3.

Regimes that share their rows of $P$ and `bonus` have one $J$ between them: they are lumped into C classes, while the
Y outcomes of a draft step keep their own acceptance. Independent acceptances that the stopper sees (C = 1), and
pairs of token chains (Y = n squared, C = n), cost no more than what they really know.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdp.knots import Grid
from mdp.policy import TIE
from mdp.problem import FiniteProblem, start_graph

__all__ = ["NEVER", "Arrays", "Sweep", "lump", "sweep"]

NEVER = -1e30  # the value of CONTINUE where it is not allowed; finite, so that interpolation makes no NaN
SIZES = sorted(size for power in range(16) for size in (2**power, 3 * 2**power))


class Arrays(NamedTuple):
    """A lumped and padded problem: C classes of regimes, Y outcomes of a draft step.

    `transition` [C, Y], `accept_prob` [K, Y], `into` [Y] the class an outcome belongs to, `initial` [C],
    `verify_time` [K + 1], `rejection` [Y, C] and `bonus` [C, C] or None, `reachable` [C] 1 where a round can start.
    """

    transition: Any
    accept_prob: Any
    into: Any
    initial: Any
    draft_time: Any
    verify_time: Any
    rejection: Any
    bonus: Any
    reachable: Any


def lump(problem: FiniteProblem) -> tuple[Arrays, np.ndarray]:
    """The problem as the compiled loop sees it, and the class of each regime [Z].

    Shapes are padded to a few sizes, so that most problems find their loop compiled: with copies of classes that
    no round starts in, outcomes of probability 0, and depths that are never worth their time.
    """
    rows = problem.transition if problem.bonus is None else np.hstack([problem.transition, problem.bonus])
    if (rows == rows[0]).all():
        first, into = np.zeros(1, dtype=int), np.zeros(len(rows), dtype=int)
    else:
        _, first, into = np.unique(rows, axis=0, return_index=True, return_inverse=True)
        into = into.reshape(-1)
    if len(first) == problem.num_regimes:
        first = into = np.arange(problem.num_regimes)  # nothing to lump: keep the order
    member = np.eye(len(first))[into]
    pad_class, pad_outcome = _padded(len(first)) - len(first), _padded(len(into)) - len(into)
    pad_depth = _padded(problem.max_candidates) - problem.max_candidates
    starts = start_graph(problem)[1] if problem.persistent else problem.initial > 0

    def rows_like(law: np.ndarray, pad_rows: int, pad_columns: int) -> np.ndarray:
        return np.pad(np.pad(law, ((0, 0), (0, pad_columns))), ((0, pad_rows), (0, 0)), mode="edge")

    arrays = Arrays(
        transition=rows_like(problem.transition[first], pad_class, pad_outcome),
        accept_prob=np.pad(problem.accept_prob, ((0, pad_depth), (0, pad_outcome))),
        into=np.pad(into, (0, pad_outcome)).astype(np.int32),
        initial=np.pad(problem.initial @ member, (0, pad_class)),
        draft_time=np.float64(problem.draft_time),
        verify_time=np.pad(problem.verify_time, (0, pad_depth), constant_values=-NEVER),
        rejection=None if problem.rejection is None else rows_like(problem.rejection @ member, pad_outcome, pad_class),
        bonus=None if problem.bonus is None else rows_like(problem.bonus[first] @ member, pad_class, pad_class),
        reachable=np.pad((starts @ member > 0).astype(np.float64), (0, pad_class)),
    )
    return arrays, into


def _padded(size: int) -> int:
    return next((padded for padded in SIZES if padded >= size), size)


class Sweep(NamedTuple):
    """One backward induction, per class: both sides of T_rho_h - h, thresholds and their slack [K, C].

    If the policy was tracked, also what the rules at S = 1 earn and where they lead: `emitted`, `time`, `drafted` [C]
    and `next_start` [C, C] ([C, 0] if rounds renew). On request `ahead`: both sides of CONTINUE - STOP at the knots
    [K, C, N].
    """

    lower: Any
    upper: Any
    threshold: Any
    slack: Any
    emitted: Any = None
    time: Any = None
    drafted: Any = None
    next_start: Any = None
    ahead: Any = None


class _Kept(NamedTuple):
    """What is kept of CONTINUE at the knots of one depth [C, N]: its value from above; the best rule's line
    slope * S - rho * time; and if tracked, that rule's expected candidates and next starts [C, N, 1 + C]."""

    upper: Any
    slope: Any
    time: Any
    track: Any


def sweep(problem: Arrays, grid: Grid, rate: Any, bias: Any, track: bool, ahead: bool = False) -> Sweep:
    """Backward induction over depth at rate rho and bias h [C] (zeros if rounds renew).

    A bias of K + 1 rows is that of a start behind k + 1 emitted tokens, where the tokens still to come count
    (`mdp.horizon`); then nothing is tracked.
    """
    num_classes, num_knots = problem.transition.shape[0], grid.knots.shape[1]
    persistent = problem.bonus is not None
    bonus = problem.bonus if persistent else jnp.zeros((num_classes, 0))
    rejection = problem.rejection if persistent else jnp.zeros((problem.transition.shape[1], 0))
    depths = problem.verify_time.shape[0]
    biases = jnp.broadcast_to(bias, (depths, num_classes))
    after_bonus, after_rejection = (
        biases @ law.T if persistent else jnp.zeros((depths, len(law))) for law in (bonus, rejection)
    )
    stopped = jnp.concatenate([jnp.zeros((num_classes, 1)), bonus], axis=1)  # tracked: no candidates, the bonus's law
    into, onto = problem.into, problem.into[:, None] * num_knots

    def step(later: _Kept, layer):
        accept, knots, cell, weight, verify_now, verify_next, bonus_now, bonus_next, if_rejected = layer
        survival, at = accept[:, None] * knots, onto + cell
        upper, slope, time = (part.reshape(-1) for part in later[:3])
        stop_slope = bonus_next[into][:, None]
        stop = survival * stop_slope - rate * verify_next
        # lower: the best of STOP and the two rules kept around this survival
        left, right = (survival * slope[index] - rate * time[index] for index in (at, at + 1))
        goes_on = jnp.maximum(left, right) >= stop - TIE * (1.0 + jnp.abs(stop))
        # on a kink the rule above it, so that each knot keeps the line to its right
        best = jnp.where(right >= left - TIE * (1.0 + jnp.abs(left)), at + 1, at)
        between = (1.0 - weight) * upper[at] + weight * upper[at + 1]
        missed = ((1.0 - accept) * if_rejected)[:, None]
        outcomes = jnp.stack(
            [
                knots * (accept[:, None] + missed) + jnp.maximum(stop, between),
                accept[:, None] * (1.0 + jnp.where(goes_on, slope[best], stop_slope)) + missed,
                jnp.where(goes_on, time[best], verify_next),
            ],
            axis=1,
        )
        mean = jnp.tensordot(problem.transition, outcomes, axes=1)
        now = _Kept(mean[:, 0] - rate * problem.draft_time, mean[:, 1], mean[:, 2] + problem.draft_time, None)
        if track:
            chosen = later.track.reshape(-1, later.track.shape[2])[best]
            chosen = jnp.where(goes_on[..., None], chosen, stopped[into][:, None, :])
            missed_law = (1.0 - accept)[:, None, None] * rejection[:, None, :]
            leads = [1.0 + chosen[..., :1], missed_law + accept[:, None, None] * chosen[..., 1:]]
            now = now._replace(track=jnp.tensordot(problem.transition, jnp.concatenate(leads, axis=2), axes=1))
        return now, (_thresholds(knots, now, bonus_now, rate, verify_now), sides(knots, now, bonus_now, verify_now))

    def sides(knots, kept: _Kept, bonus_now, verify_now):
        stop = bonus_now[:, None] * knots - rate * verify_now
        return (kept.slope * knots - rate * kept.time - stop, kept.upper - stop) if ahead else None

    shape = (num_classes, num_knots)
    last = _Kept(jnp.full(shape, NEVER), jnp.zeros(shape), jnp.full(shape, -NEVER), None)
    if track:
        last = last._replace(track=jnp.zeros((*shape, stopped.shape[1])))
    times = (problem.verify_time[:-1], problem.verify_time[1:])
    layers = (problem.accept_prob, *grid, *times, after_bonus[:-1], after_bonus[1:], after_rejection[:-1])
    first, ((threshold, slack), found) = jax.lax.scan(step, last, layers, reverse=True)

    stop = after_bonus[0] - rate * problem.verify_time[0]
    going_on = first.slope[:, -1] - rate * first.time[:, -1]
    lower, upper = (1.0 + jnp.maximum(stop, value) - biases[0] for value in (going_on, first.upper[:, -1]))
    if not track:
        return Sweep(lower, upper, threshold, slack, ahead=found)
    goes_on = going_on >= stop - TIE * (1.0 + jnp.abs(stop))
    slope = jnp.where(goes_on, first.slope[:, -1], after_bonus[0])
    leads = jnp.where(goes_on[:, None], first.track[:, -1], stopped)
    next_start = leads[:, 1:]
    return Sweep(
        lower, upper, threshold, slack,
        emitted=1.0 + slope - (next_start @ bias if persistent else 0.0),
        time=jnp.where(goes_on, first.time[:, -1], problem.verify_time[0]),
        drafted=leads[:, 0],
        next_start=next_start,
        ahead=found,
    )  # fmt: skip


def _thresholds(knots, kept: _Kept, after_bonus, rate, verify_time):
    """Where the best rule's line crosses STOP [C], and how much CONTINUE could still be worth there [C]."""
    stop_slope, stop_price = after_bonus[:, None], rate * verify_time
    slope, price, upper = kept.slope - stop_slope, rate * kept.time - stop_price, kept.upper
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
