r"""The stopping problem in tabular form: regime by depth by a lattice of survivals, discounted or not.

State (k, z, j): k candidates drafted, regime z, survival $S_j = e^{-j \Delta}$. Acceptances are powers of the lattice,
$a(z) = e^{-d_z \Delta}$, so that a candidate moves j to $j' = \min(j + d_{z'}, M - 1)$ exactly. CONTINUE earns
$\sum_{z'} P(z, z') S_{j'} - \lambda c_d$, STOP $1 - \lambda c_v$ and a new round from $z' \sim \nu$; either way the
next decision is worth $\beta$. This is the form general MDP solvers take, and what they are compared on.

*Structure.* All STOPs are worth the same number q, so $V = q + U$ with $U \ge 0$ and, at the *price*
$p = \lambda c_d + (1 - \beta) q$ of going on,

$$U_k(z, j) = \max\{0,\; -p + \textstyle\sum_{z'} P(z, z') [\, S_{j'} + \beta\, U_{k+1}(z', j') \,]\}, \quad U_K = 0.$$

One backward induction over k instead of iterations over all states. What remains is one unknown, p, with
$p - \lambda c_d = 1 - \lambda c_v + \beta\, \nu U_0(\cdot, 0; p)$ if discounted; the largest long-run average of
tokens per cost $\lambda$, if $\beta = 1$, has $p = \lambda c_d$ and $\lambda c_v = 1 + \nu U_0(\cdot, 0; p)$. $U_0$ is
convex, piecewise linear and non-increasing in p: Newton's method from below never overshoots after its first step and
ends, at a fixed point, after as many steps as policy iteration (Dinkelbach 1967), 3 to 5 here.

*Stopping rule.* Near the answer a Newton step is exact, or wrong to second order of its length: a step below
`STEP` is the last, and the sweep that yields the values also says what the equation still lacks, `residual`. Each
value is then off by at most |residual| / (1 - discount), apart from rounding.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from mdp.lattice import window

__all__ = ["TabularProblem", "TabularSolution", "solve_tabular"]

MAX_NEWTON = 50
STEP = 1e-5


class TabularProblem(NamedTuple):
    """Z regimes, K candidates at most, M survivals; `steps` are the d_z >= 0."""

    transition: Float[np.ndarray, "Z Z"]
    initial: Float[np.ndarray, " Z"]
    steps: Int[np.ndarray, " Z"]
    survival: Float[np.ndarray, " M"]
    draft_cost: float
    verify_cost: float


class TabularSolution(NamedTuple):
    """`value` [K + 1, Z, M] (None if not asked for), with CONTINUE where it exceeds `stop_value`.

    `rate` is the cost's price lambda: the one given, or the largest average. `threshold` [K, Z] is the least survival
    of the lattice from which CONTINUE is right, inf if none. `residual` of the scalar equation, after `num_sweeps`.
    """

    value: Any
    stop_value: Any
    rate: Any
    threshold: Any
    residual: Any
    num_sweeps: Any


def solve_tabular(
    problem: TabularProblem, max_candidates: int, *, rate: float = 0.3, discount: float = 1.0, full: bool = True
) -> TabularSolution:
    """Solve by backward induction and Newton's method on the price of going on.

    Args:
        problem: its arrays.
        max_candidates: K.
        rate: $\\lambda$; without discount it is not read but found.
        discount: $\\beta$ per decision; 1 for the average reward, whose values are relative to STOP.
        full: whether to return all values, or thresholds alone.

    Raises:
        ValueError: if `discount` is not in (0, 1].
    """
    if not 0 < discount <= 1:
        raise ValueError(f"discount: must be in (0, 1], got {discount!r}")
    with jax.enable_x64(True):
        arrays: Any = (np.asarray(part) for part in problem)
        return jax.device_get(_solve(TabularProblem(*arrays), rate, discount, max_candidates, discount == 1, full))


@partial(jax.jit, static_argnames=("depth", "average", "full"))
def _solve(problem: TabularProblem, rate: Any, discount: Any, depth: int, average: bool, full: bool) -> TabularSolution:
    draft, verify = problem.draft_cost, problem.verify_cost
    weight, base = (verify / draft, 1.0) if average else (1.0, 1.0 - rate * (verify - draft))

    def lacking(price, worth):
        """What the scalar equation lacks at this price."""
        return base + discount * (problem.initial @ worth) - weight * price

    def improve(price, first):
        """One step of Newton's method."""
        return price - lacking(price, first[:, 0, 0]) / (discount * (problem.initial @ first[:, 1, 0]) - weight)

    def rest(width, price):
        """Newton's method and the last sweep on the first `width` survivals alone."""

        def body(carry):
            price, _, count = carry
            better = improve(price, _backward(problem, discount, price, width, depth, slopes=True)[0])
            return better, jnp.abs(better - price), count + 1

        def unsettled(carry):
            price, moved, count = carry
            return (moved > STEP * (1.0 + jnp.abs(price))) & (count < MAX_NEWTON)

        start = (price, jnp.asarray(jnp.inf, price.dtype), 1)
        price, _, count = jax.lax.while_loop(unsettled, body, start)
        last, going_on, worth = _backward(problem, discount, price, width, depth, slopes=False, values=full)
        return price, lacking(price, last[:, 0, 0]), count + 1, going_on, worth

    # Any policy's price is below the optimum's, where Newton's method is monotone: take the best fixed length.
    start = _fixed_length(problem, discount, base, weight, depth)
    num_knots = len(problem.survival)
    first = _backward(problem, discount, start, num_knots, depth, slopes=True)[0]
    price = improve(start, first)
    # U falls as the price rises and as survival does: where it is 0 now it stays so.
    support = (first[:, 0] > 0).any(axis=0).sum() + 1
    widths = sorted({-(-num_knots // part) for part in (8, 4, 2, 1)})
    choice = jnp.searchsorted(jnp.asarray(widths), support)
    branches = [partial(_padded, partial(rest, width), num_knots) for width in widths]
    price, gap, count, going_on, worth = jax.lax.switch(
        jnp.minimum(choice, len(widths) - 1), branches, jnp.maximum(price, start)
    )
    stop_value = jnp.zeros_like(price) if average else (price - rate * draft) / (1.0 - discount)
    threshold = jnp.where(going_on > 0, problem.survival[going_on - 1], jnp.inf)
    value = stop_value + worth if full else None
    return TabularSolution(value, stop_value, price / draft if average else rate, threshold, gap, count)


def _fixed_length(problem: TabularProblem, discount: Any, base: Any, weight: Any, depth: int) -> Any:
    """The price of the best round of fixed length; the lattice's last knot counts as survival 0."""
    accept = jnp.exp(problem.steps * jnp.log(problem.survival[1]))

    def step(carry, _):
        alive, now, earned, paid = carry
        alive = (alive @ problem.transition) * accept
        earned, paid = earned + now * alive.sum(), paid + now
        return (alive, now * discount, earned, paid), (base + earned) / (weight + paid)

    start = (problem.initial, jnp.asarray(discount, accept.dtype), 0.0 * accept[0], 0.0 * accept[0])
    prices = jax.lax.scan(step, start, None, length=depth)[1]
    return jnp.maximum(prices.max(), base / weight)


def _padded(solve: Any, num_knots: int, price: Any) -> Any:
    """The answer with zeros for the survivals left out."""
    *numbers, worth = solve(price)
    if worth is not None:
        worth = jnp.pad(worth, ((0, 0), (0, 0), (0, num_knots - worth.shape[2])))
    return *numbers, worth


def _backward(
    problem: TabularProblem, discount: Any, price: Any, width: int, depth: int, slopes: bool, values: bool = False
) -> tuple[Any, Any, Any]:
    """Backward induction at one price on the first `width` survivals, with U = 0 on the others.

    It ends early where a layer repeats the one after it, bit for bit: so do then all before it (K does not bind).

    Returns:
        $U_0$ [Z, 1, width], with `slopes` also its slope in the price [Z, 2, width]; how many survivals go on [K, Z];
        and with `values` all of U.
    """
    size, num_knots = problem.transition.shape[0], problem.survival.shape[0]
    parts = 2 if slopes else 1
    tail = num_knots if width == num_knots else width  # a window past the end reads the last knot, or zeros
    start = jnp.minimum(problem.steps, tail).astype(jnp.int32)
    ahead = jnp.concatenate([problem.survival, jnp.full(num_knots, problem.survival[-1])])
    at = jnp.minimum(problem.steps, num_knots).astype(jnp.int32)
    gain = problem.transition @ window(jnp.tile(ahead, (size, 1)), at, width) - price
    law = discount * problem.transition

    def body(carry):
        k, later, _, counts, kept = carry
        near = window(later, start, width)
        mean = (law @ near.reshape(size, -1)).reshape(near.shape)
        going_on = gain + mean[:, 0]
        now = jnp.maximum(going_on, 0.0)[:, None]
        if slopes:
            now = jnp.concatenate([now, jnp.where(going_on > 0, mean[:, 1] - 1.0, 0.0)[:, None]], axis=1)
        else:
            counts = counts.at[k].set((going_on > 0).sum(axis=1))
        if values:
            kept = jax.lax.dynamic_update_slice(kept, now.transpose(1, 0, 2), (k, 0, 0))
        changed = (now != later[..., :width]).any()
        later = jax.lax.dynamic_update_slice(later, now, (0, 0, 0))
        if width == num_knots:
            edge = jnp.broadcast_to(now[..., -1:], (size, parts, tail))
            later = jax.lax.dynamic_update_slice(later, edge, (0, 0, width))
        return k - 1, later, changed, counts, kept

    none = jnp.zeros((size, parts, width + tail), problem.survival.dtype)
    kept: Any = jnp.zeros((depth + 1, size, width), problem.survival.dtype) if values else None
    start_at = (jnp.asarray(depth - 1), none, jnp.asarray(True), jnp.zeros((depth, size), int), kept)
    k, later, _, counts, kept = jax.lax.while_loop(lambda carry: (carry[0] >= 0) & carry[2], body, start_at)
    first, depths = later[..., :width], jnp.arange(depth + 1)
    counts = jnp.where(depths[:-1, None] <= k, (first[:, 0] > 0).sum(axis=1), counts)
    if values:
        kept = jnp.where(depths[:, None, None] <= k, first[:, 0], kept)
    return first, counts, kept
