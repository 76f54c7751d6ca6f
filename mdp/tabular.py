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
ends, at a fixed point, after as many steps as policy iteration (Dinkelbach 1967), 2 to 4 here.

*Price first.* Where K does not bind, U does not depend on depth either, and one pass over the survivals is a sweep
(`mdp.survival_pass`): that is tried first, and says whether K binds. If so, its price is where Newton's method over
depths starts. Values, if asked for, are one backward induction at the price found.

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
from mdp.survival_pass import Equation, Passed, fixed_length_price, newton, survival_pass

__all__ = ["TabularProblem", "TabularSolution", "backward", "solve_tabular"]

WIDTHS = (16, 8, 4, 2, 1)
"""Survivals are worked on up to a half, a quarter, .. of the lattice, whichever still holds all that go on."""


SMALL = 20_000
"""States up to which one call that goes by depth takes less than two."""


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
    of the lattice from which CONTINUE is right, inf if none; with `one_pass`, the same at all depths, it is right in
    every state that a round can reach. `residual` of the scalar equation, after `num_sweeps`.
    """

    value: Any
    stop_value: Any
    rate: Any
    threshold: Any
    residual: Any
    num_sweeps: Any
    one_pass: bool


def solve_tabular(
    problem: TabularProblem, max_candidates: int, *, rate: float = 0.3, discount: float = 1.0, full: bool = True
) -> TabularSolution:
    """Solve by Newton's method on the price of going on.

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
    transition, initial, steps, survival, draft, verify = problem
    steps, num_knots, average = np.asarray(steps, np.int32), len(survival), discount == 1
    weight, base = (verify / draft, 1.0) if average else (1.0, 1.0 - rate * (verify - draft))
    least = int(steps.min())
    block = 1 << min(max(least, 1).bit_length() - 1, 6)
    with jax.enable_x64(True):
        equation = Equation(np.float64(base), np.float64(weight), np.float64(discount), np.asarray(initial, float))
        arrays = (equation, np.asarray(transition, float), steps, np.asarray(survival, float))
        price: Any = None
        width, settled, count = num_knots, False, 0
        if (max_candidates + 1) * len(steps) * num_knots > SMALL:
            passed, support = _host(_by_survival(*arrays, max_candidates, block))
            count = int(passed.num_sweeps)
            if passed.bounded:
                longest = -(-int(passed.counts.max()) // least)
                price, residual, settled = passed.price, passed.residual, longest <= max_candidates
                counts, value = np.broadcast_to(passed.counts, (max_candidates, len(steps))), None
                widths = (-(-num_knots // part) for part in WIDTHS)
                width = next(width for width in widths if width >= support)
        if full or not settled:
            depth = _Depth(max_candidates, width, edge=price is None, settled=settled, full=full, average=average)
            price, residual, more, counts, value = _host(_by_depth(*arrays, price, rate * draft, depth))
            count += int(more)
    return TabularSolution(
        value=value,
        stop_value=_stop_value(price, rate * draft, discount, average),
        rate=price / draft if average else rate,
        threshold=np.where(counts > 0, np.asarray(survival)[counts - 1], np.inf),
        residual=residual,
        num_sweeps=count,
        one_pass=settled and not full,
    )


def _host(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)  # device_get takes ten times longer for a handful of numbers


def _stop_value(price: Any, paid: Any, discount: Any, average: bool) -> Any:
    return price * 0.0 if average else (price - paid) / (1.0 - discount)


def _gain(transition: Any, steps: Any, survival: Any) -> Any:
    """Expected tokens of one more candidate [Z, M]."""
    size, num_knots = len(steps), len(survival)
    ahead = jnp.concatenate([survival, jnp.full(num_knots, survival[-1])])
    return transition @ window(jnp.tile(ahead, (size, 1)), jnp.minimum(steps, num_knots), num_knots)


def _start(equation: Equation, transition: Any, steps: Any, survival: Any, depth: int) -> Any:
    """Any policy's price is below the optimum's, where Newton's method is monotone: that of a fixed length."""
    return fixed_length_price(equation, transition, jnp.exp(steps * jnp.log(survival[1])), depth)


@partial(jax.jit, static_argnames=("depth", "block"))
def _by_survival(
    equation: Equation, transition: Any, steps: Any, survival: Any, depth: int, block: int
) -> tuple[Passed, Any]:
    """The one pass, and how many survivals can matter: as U falls with the price and with survival, zeros stay."""
    gain = _gain(transition, steps, survival)
    start = _start(equation, transition, steps, survival, depth)
    return survival_pass(equation, transition, steps, gain, start, block), (gain.max(axis=0) > start).sum()


class _Depth(NamedTuple):
    """What `_by_depth` is compiled for; `edge` as in `backward`, `settled` if the price is right already."""

    max_candidates: int
    width: int
    edge: bool
    settled: bool
    full: bool
    average: bool


@partial(jax.jit, static_argnames="how")
def _by_depth(
    equation: Equation, transition: Any, steps: Any, survival: Any, price: Any, paid: Any, how: _Depth
) -> tuple[Any, Any, Any, Any, Any]:
    """Newton's method over depths unless the price is settled, and a last sweep: at what price, what the equation
    lacks, sweeps, survivals that go on [K, Z], and all values."""
    law, gain = equation.discount * transition, _gain(transition, steps, survival)
    sweep = partial(backward, law, gain, steps, depth=how.max_candidates, width=how.width, edge=how.edge)

    def at_one(price):
        first = sweep(price, slopes=True)[0]
        return first[:, 0, 0], first[:, 1, 0]

    if price is None:
        price = _start(equation, transition, steps, survival, how.max_candidates)
    price, count = newton(equation, at_one, price, jnp.full_like(price, 0.0 if how.settled else jnp.inf))
    first, counts, worth = sweep(price, values=how.full)
    if how.full:
        rest = ((0, 0), (0, 0), (0, len(survival) - how.width))
        worth = jnp.pad(worth, rest) + _stop_value(price, paid, equation.discount, how.average)
    return price, equation.lacking(price, first[:, 0, 0]), count + 1, counts, worth


def backward(
    law: Any, gain: Any, steps: Any, price: Any, depth: int, width: int, edge: bool,
    slopes: bool = False, values: bool = False, ends: bool = True,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Backward induction at one price on the first `width` survivals, with U = 0 on the others.

    Args:
        law: discount * P [Z, Z].
        gain: expected tokens of one more candidate [Z, M].
        steps: d_z [Z] int32.
        price: of going on.
        depth: K.
        width: survivals worked on.
        edge: whether the last of them goes on for ever at U of its own, as the lattice's last does; or U is 0 there.
        slopes: whether to find the slope of U_0 in the price as well.
        values: whether to keep all of U.
        ends: whether to end where a layer repeats the one after it, bit for bit: so do then all before it.

    Returns:
        $U_0$ [Z, 1, width], with `slopes` also its slope in the price [Z, 2, width]; how many survivals go on [K, Z]
        unless there are slopes; and with `values` U [K + 1, Z, width].
    """
    size, parts = law.shape[0], 2 if slopes else 1
    start = jnp.minimum(steps, width)
    gain = gain[:, :width] - price

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
        changed = (now != later[..., :width]).any() if ends else True
        later = jax.lax.dynamic_update_slice(later, now, (0, 0, 0))
        if edge:
            last = jnp.broadcast_to(now[..., -1:], (size, parts, width))
            later = jax.lax.dynamic_update_slice(later, last, (0, 0, width))
        return k - 1, later, changed, counts, kept

    none = jnp.zeros((size, parts, 2 * width), gain.dtype)
    kept: Any = jnp.zeros((depth + 1, size, width), gain.dtype) if values else None
    start_at = (jnp.asarray(depth - 1), none, jnp.asarray(True), jnp.zeros((depth, size), int), kept)
    k, later, _, counts, kept = jax.lax.while_loop(lambda carry: (carry[0] >= 0) & carry[2], body, start_at)
    first, depths = later[..., :width], jnp.arange(depth + 1)
    counts = jnp.where(depths[:-1, None] <= k, (first[:, 0] > 0).sum(axis=1), counts)
    if values:
        kept = jnp.where(depths[:, None, None] <= k, first[:, 0], kept)
    return first, counts, kept
