r"""The tabular problem without its depth: one pass over the survivals.

Where K does not bind, what going on is worth does not depend on depth,

$$U(z, j) = \max\{0,\; g(z, j) - p + \beta \textstyle\sum_{z'} P(z, z')\, U(z', j + d_{z'})\}, \qquad
  g(z, j) = \sum_{z'} P(z, z') S_{j'},$$

and each candidate takes survival at least $b = \min d_z$ places down. So b places at a time follow from those below
them, from the lowest survival up, and every state is worked out once a pass.

*Where it starts.* g falls with j. From the first J where no regime gains anything from one more candidate nobody ever
will, and $U = 0$ from there on; this must happen on the lattice, `bounded`.

*Whether K binds.* CONTINUE is right for the survivals before `counts` [Z], and candidate k + 1 starts from
$j \ge k b$: a round holds at most $\lceil \max_z \mathrm{counts}(z) / b \rceil$ candidates. If that is at most K, then
from every state that a round can reach the pass is the problem itself. If not, its price is still at least the right
one, since a rule that may draft for longer loses nothing.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mdp.lattice import window

__all__ = ["Equation", "Passed", "fixed_length_price", "newton", "survival_pass"]

MAX_NEWTON = 50
STEP = 1e-5
"""A step of Newton's method that is shorter, relative to the price, is the last: what it leaves is of second order."""


class Equation(NamedTuple):
    """The scalar equation base + discount * initial @ U_0(price) = weight * price."""

    base: Any
    weight: Any
    discount: Any
    initial: Any

    def lacking(self, price: Any, worth: Any) -> Any:
        """What it lacks where rounds are worth `worth` [Z]."""
        return self.base + self.discount * (self.initial @ worth) - self.weight * price

    def better(self, price: Any, worth: Any, slope: Any) -> Any:
        """One step of Newton's method; never above the root, since U_0 is convex in the price."""
        return price - self.lacking(price, worth) / (self.discount * (self.initial @ slope) - self.weight)


class Passed(NamedTuple):
    """`price` with what the equation lacks there, survivals that go on [Z], whether U ends on the lattice, passes."""

    price: Any
    residual: Any
    counts: Any
    bounded: Any
    num_sweeps: Any


def newton(equation: Equation, sweep: Any, price: Any, moved: Any) -> tuple[Any, Any]:
    """Newton's method from `price`, while it has `moved` by more than `STEP`: its end, and sweeps done.

    `sweep` takes a price to values and slopes of U_0 at survival 1.
    """

    def body(carry):
        price, _, count = carry
        better = equation.better(price, *sweep(price))
        return better, jnp.abs(better - price), count + 1

    def unsettled(carry):
        price, moved, count = carry
        return (moved > STEP * (1.0 + jnp.abs(price))) & (count < MAX_NEWTON)

    price, _, count = jax.lax.while_loop(unsettled, body, (price, moved, 0))
    return price, count


def fixed_length_price(equation: Equation, transition: Any, accept_prob: Any, depth: int) -> Any:
    """The price at which the best round of fixed length breaks even: at most the answer.

    Lengths are tried until one is worse than the one before; any would do.
    """

    def step(carry):
        k, _, best, alive, now, earned, paid = carry
        alive = (alive @ transition) * accept_prob
        earned, paid = earned + now * alive.sum(), paid + now
        return (
            k + 1,
            best,
            (equation.base + earned) / (equation.weight + paid),
            alive,
            now * equation.discount,
            earned,
            paid,
        )

    none = jnp.zeros_like(equation.base)
    start = (0, none - jnp.inf, equation.base / equation.weight, equation.initial, none + equation.discount, none, none)
    _, before, last, *_ = jax.lax.while_loop(lambda carry: (carry[0] < depth) & (carry[2] > carry[1]), step, start)
    return jnp.maximum(before, last)


def survival_pass(equation: Equation, transition: Any, steps: Any, gain: Any, start: Any, block: int) -> Passed:
    """Newton's method with one pass a step.

    Args:
        equation: what the price must solve.
        transition: P [Z, Z].
        steps: d_z [Z] int32, from `block` up; if one is less, the answer is flagged as not `bounded`.
        gain: g [Z, M].
        start: price to begin with, at most the answer.
        block: places worked out at once.
    """
    size, num_knots = gain.shape
    law = equation.discount * transition
    gain = jnp.pad(gain, ((0, 0), (0, block)), constant_values=-jnp.inf)
    reach, zero = jnp.minimum(steps, num_knots), jnp.int32(0)

    def one(price):
        """U and its slope in the price [Z, 2, M and more zeros]."""

        def body(carry):
            at, later = carry
            near = window(later, at + reach, block)
            mean = (law @ near.reshape(size, -1)).reshape(near.shape)
            going_on = jax.lax.dynamic_slice(gain, (zero, at), (size, block)) - price + mean[:, 0]
            slope = jnp.where(going_on > 0, mean[:, 1] - 1.0, 0.0)
            now = jnp.stack([jnp.maximum(going_on, 0.0), slope], axis=1)
            return at - block, jax.lax.dynamic_update_slice(later, now, (zero, zero, at))

        end = (gain.max(axis=0) > price).sum().astype(jnp.int32)  # J
        none = jnp.zeros((size, 2, 2 * num_knots + block), gain.dtype)
        top = (end + block - 1) // block * block - block
        return jax.lax.while_loop(lambda carry: carry[0] >= 0, body, (top, none))[1]

    def at_one(price):
        worth = one(price)
        return worth[:, 0, 0], worth[:, 1, 0]

    price, count = newton(equation, at_one, start, jnp.full_like(start, jnp.inf))
    worth = one(price)[:, 0]
    bounded = (gain[:, num_knots - 1] <= start).all() & (steps >= block).all()
    return Passed(price, equation.lacking(price, worth[:, 0]), (worth > 0).sum(axis=1), bounded, count + 1)
