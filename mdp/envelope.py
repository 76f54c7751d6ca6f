r"""Bounds on what a hidden-regime round is still worth, at any point of belief.

At rate $\rho$ let $G_k(x)$ be what the best rule earns above stopping with k candidates drafted, at the point
$x = [w, \pi]$ of `mdp.belief`. A rule $\tau$ for what is left emits $e_\tau \cdot w$ tokens and takes
$t_\tau \cdot \pi$ more time than stopping, both linear, so

$$G_k(x) = \max_\tau \{ e_\tau \cdot w - \rho\, t_\tau \cdot \pi \}^+$$

is convex and positively homogeneous, hence sublinear: $G(x + x') \le G(x) + G(x')$. Points need not be normalised.

*From below*: the pair $(e_\tau, t_\tau)$ of any rule holds at every point. `blind` has those that look at nothing.

*From above*: `relaxed` shows the regime from the next candidate on. Then survival given the regime is
$w'(y) / \pi'(y)$, whatever the symbol was, and what is left is the problem with visible regimes, whose value at even
knots of survival is interpolated (which over-estimates, as it is convex). `hull` uses points where more is known:
if $x = \sum_i \lambda_i x_i + r$ with $\lambda \ge 0$ and $r$ in the cone $0 \le w \le \pi$, then
$G(x) \le \sum_i \lambda_i G(x_i) + G(r)$. A few simplex pivots look for good weights; any weights are valid.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from mdp.problem import FiniteProblem

__all__ = ["Blind", "Seen", "blind", "hull", "relaxed", "seen"]

MOST_KNOTS, LEAST_KNOTS, MAX_VALUES = 1025, 65, 2**24
"""Knots of survival, and how many values of the visible problem are kept."""

MOST_BLIND = 128
PIVOTS = 6
SMALLEST_PIVOT = 1e-9
SHRINK = 1.0 - 1e-12
"""Weights are made smaller by this, so that rounding leaves the rest in the cone."""


class Blind(NamedTuple):
    """Rules that draft 1, 2, .. more whatever they see: tokens [m, Z] by regime of the survivors, time above STOP."""

    emitted: Float[np.ndarray, "m Z"]
    time: Float[np.ndarray, " m"]


class Seen(NamedTuple):
    """The visible problem at a rate: value above STOP at even knots of survival, [K + 1, Z, knots]."""

    rate: float
    value: Float[np.ndarray, "K+1 Z M"]


def blind(problem: FiniteProblem, k: int) -> Blind:
    """Rules from depth k on that do not look, up to `MOST_BLIND` more candidates; none at k = K."""
    flow, total, rows = np.eye(problem.num_regimes), np.zeros(problem.num_regimes), []
    for accept in problem.accept_prob[k : k + MOST_BLIND]:
        flow = flow @ (problem.transition * accept)
        total = total + flow.sum(axis=1)
        rows.append(total)
    return Blind(np.reshape(rows, (-1, problem.num_regimes)), np.cumsum(problem.step_time[k : k + MOST_BLIND]))


def seen(problem: FiniteProblem, rate: float) -> Seen:
    """The visible problem from above, by backward induction."""
    depth, size = problem.accept_prob.shape
    count = min(MOST_KNOTS, max(LEAST_KNOTS, MAX_VALUES // ((depth + 1) * size)))
    knots = np.linspace(0.0, 1.0, count)
    value = np.zeros((depth + 1, size, count))
    for k in range(depth - 1, -1, -1):
        after = knots * problem.accept_prob[k][:, None]
        after = after + np.stack([np.interp(at, knots, row) for at, row in zip(after, value[k + 1], strict=True)])
        value[k] = np.maximum(problem.transition @ after - rate * problem.step_time[k], 0.0)
    return Seen(rate, value)


def relaxed(problem: FiniteProblem, seen: Seen, k: int, points: Float[np.ndarray, "n 2Z"]) -> Float[np.ndarray, " n"]:
    """Over-estimate of CONTINUE above STOP at depth k."""
    size = problem.num_regimes
    kept = points[:, :size] @ problem.transition * problem.accept_prob[k]
    moved = points[:, size:] @ problem.transition
    worth = kept.sum(axis=1) - seen.rate * problem.step_time[k] * moved.sum(axis=1)
    share = np.divide(kept, moved, out=np.zeros_like(kept), where=moved > 0)
    last = seen.value.shape[2] - 1
    place = np.minimum(share, 1.0) * last
    cell = np.minimum(place.astype(np.int64), last - 1)
    part = place - cell
    for y, row in enumerate(seen.value[k + 1]):
        left, right = row[cell[:, y]], row[cell[:, y] + 1]
        worth += moved[:, y] * (left + part[:, y] * (right - left))
    return worth


def hull(
    problem: FiniteProblem,
    seen: Seen,
    k: int,
    points: Float[np.ndarray, "n 2Z"],
    known: Float[np.ndarray, "n m 2Z"],
    ceiling: Float[np.ndarray, "n m"],
) -> Float[np.ndarray, " n"]:
    """Over-estimate of G_k at each point, from m points near it where `ceiling` over-estimates G_k."""
    size, count = problem.num_regimes, known.shape[1]
    target, columns = _cone(points), _cone(known)
    corners = np.concatenate([np.eye(size)] * 2, axis=1)  # all alive, in one regime; the dead are worth nothing
    corner = np.append(np.maximum(relaxed(problem, seen, k, corners), 0.0), np.zeros(size))
    # The tableau [n, m + 1, 2Z]: each column, and last the point itself, in terms of the basis, at first the corners.
    table = np.concatenate([columns, target[:, None]], axis=1)
    cost, inside = np.tile(corner, (len(points), 1)), np.full(target.shape, -1)
    for _ in range(PIVOTS):
        reduced = ceiling - (table[:, :count] * cost[:, None]).sum(axis=2)
        enters = reduced.argmin(axis=1)
        column = np.take_along_axis(table, enters[:, None, None], axis=1)[:, 0]
        usable = column > SMALLEST_PIVOT
        ratio = np.where(usable, table[:, count] / np.where(usable, column, 1.0), np.inf)
        leaves = ratio.argmin(axis=1)
        at = np.flatnonzero((reduced.min(axis=1) < -1e-12) & usable.any(axis=1))
        if len(at) == 0:
            break
        column, leaves, enters = column[at], leaves[at], enters[at]
        rows = np.arange(len(at))
        pivot = table[at, :, leaves] / column[rows, leaves][:, None]
        table[at] -= column[:, None, :] * pivot[:, :, None]
        table[at, :, leaves] = pivot
        inside[at, leaves], cost[at, leaves] = enters, ceiling[at, enters]
    weight = np.zeros((len(points), count))
    for row in range(2 * size):
        at = np.flatnonzero(inside[:, row] >= 0)
        weight[at, inside[at, row]] = np.maximum(table[at, count, row], 0.0) * SHRINK
    # The nearest point alone, and whatever the pivots found.
    alone = np.zeros_like(weight)
    first = columns[:, 0]
    alone[:, 0] = np.where(first > 0, target / np.where(first > 0, first, 1.0), np.inf).min(axis=1) * SHRINK
    return np.minimum(*(_combined(problem, seen, k, target, columns, ceiling, part) for part in (weight, alone)))


def _cone(points: np.ndarray) -> np.ndarray:
    """[w, pi - w]: alive and dead by regime; the cone is where both are >= 0."""
    size = points.shape[-1] // 2
    alive = points[..., :size]
    return np.concatenate([alive, np.maximum(points[..., size:] - alive, 0.0)], axis=-1)


def _combined(problem, seen, k, target, columns, ceiling, weight) -> np.ndarray:
    """The bound that these weights give; none where they leave the cone."""
    size = problem.num_regimes
    rest = target - np.einsum("nm,nmd->nd", weight, columns)
    valid = rest.min(axis=1) >= 0
    rest = np.maximum(rest, 0.0)
    points = np.concatenate([rest[:, :size], rest[:, :size] + rest[:, size:]], axis=1)
    worth = (weight * ceiling).sum(axis=1) + np.maximum(relaxed(problem, seen, k, points), 0.0)
    return np.where(valid, worth, np.inf)
