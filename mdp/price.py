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
    """One backward induction, per class: both sides of T_rho_h - h, the rules at S = 1, thresholds and their slack."""

    lower: Any
    upper: Any
    emitted: Any
    time: Any
    drafted: Any
    next_start: Any
    threshold: Any
    slack: Any


def sweep(problem: Arrays, grid: Grid, rate: Any, bias: Any) -> Sweep:
    """Backward induction over depth at rate rho and bias h [C] (zeros if rounds renew)."""
    num_classes, num_knots = problem.transition.shape[0], grid.knots.shape[1]
    persistent = problem.bonus is not None
    bonus = problem.bonus if persistent else jnp.zeros((num_classes, 0))
    rejection = problem.rejection if persistent else jnp.zeros((problem.transition.shape[1], 0))
    bias_row = bias if persistent else jnp.zeros(0)
    after_bonus, after_rejection = bonus @ bias_row, rejection @ bias_row
    onto = problem.into[:, None] * num_knots

    def pick(values, index):
        """Of each outcome's class, the entry at this knot: one flat gather."""
        return values.reshape(-1, *values.shape[2:])[index]

    def stop_rule(verify_time):
        """(tokens, time, candidates, next starts): tokens and next starts per unit of survival."""
        head = jnp.broadcast_to(jnp.stack([0.0 * verify_time, verify_time, 0.0 * verify_time]), (num_classes, 3))
        return jnp.concatenate([head, bonus], axis=1)

    def step(carry, layer):
        rules, upper = carry
        accept, knots, cell, weight, verify_now, verify_next = layer
        survival, left_at = accept[:, None] * knots, onto + cell
        stop = survival * after_bonus[problem.into][:, None] - rate * verify_next
        # lower: the best of STOP and the two rules kept around this survival
        slope, price = rules[..., 0] + rules[..., 3:] @ bias_row, rate * rules[..., 1]
        left = survival * pick(slope, left_at) - pick(price, left_at)
        right = survival * pick(slope, left_at + 1) - pick(price, left_at + 1)
        goes_on = jnp.maximum(left, right) >= stop - TIE * (1.0 + jnp.abs(stop))
        # on a kink the rule above it, so that each knot holds the line to its right
        above = right >= left - TIE * (1.0 + jnp.abs(left))
        nearest = pick(rules, jnp.where(above, left_at + 1, left_at))
        chosen = jnp.where(goes_on[..., None], nearest, stop_rule(verify_next)[problem.into][:, None, :])
        took, missed = accept[:, None, None], (1.0 - accept)[:, None, None]
        earned = [
            took * (1.0 + chosen[..., :1]),
            chosen[..., 1:3],
            missed * rejection[:, None, :] + took * chosen[..., 3:],
        ]
        rules = jnp.einsum("cy,ynf->cnf", problem.transition, jnp.concatenate(earned, axis=2))
        rules = rules.at[..., 1].add(problem.draft_time).at[..., 2].add(1.0)
        # upper: the interpolated value
        between = (1.0 - weight) * pick(upper, left_at) + weight * pick(upper, left_at + 1)
        gain = knots * (accept + (1.0 - accept) * after_rejection)[:, None]
        upper = problem.transition @ (gain + jnp.maximum(stop, between)) - rate * problem.draft_time
        return (rules, upper), _thresholds(knots, rules, upper, after_bonus, bias_row, rate, verify_now)

    rules = jnp.zeros((num_classes, num_knots, 3 + bonus.shape[1])).at[..., 1].set(-NEVER)
    upper = jnp.full((num_classes, num_knots), NEVER)
    layers = (problem.accept_prob, *grid, problem.verify_time[:-1], problem.verify_time[1:])
    (rules, upper), (threshold, slack) = jax.lax.scan(step, (rules, upper), layers, reverse=True)

    stop = after_bonus - rate * problem.verify_time[0]
    at_one = rules[:, -1]
    going_on = at_one[:, 0] + at_one[:, 3:] @ bias_row - rate * at_one[:, 1]
    best = jnp.where(
        (going_on >= stop - TIE * (1.0 + jnp.abs(stop)))[:, None], at_one, stop_rule(problem.verify_time[0])
    )
    return Sweep(
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
    """Where the best rule's line crosses STOP [C], and how much CONTINUE could still be worth there [C]."""
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
