r"""Value iteration: the plain method, for comparison and for readers of the MDP as the paper states it.

States are (k, z, S) with S on the knots of `mdp.knots`. One step is one backward sweep over all of them at the
present rate $\rho$ and values of the round starts $h$, interpolated linearly in S. With $D = \hat T_{\rho h} - h$ over
the start regimes that count (renewal: its mean under `initial`, and h stays 0),

$$h \leftarrow h + \tfrac12 (D - D(z_{ref})), \qquad \rho \leftarrow \rho + d / T_{max},$$

d being $\min D$ if that is positive, $\max D$ if that is negative, else 0.

The half keeps starts that take turns from going round for ever. $\rho$ moves to a bound on $\rho^*$
(`mdp.certificate`), so it never overshoots. No linear system and no policy is evaluated; in return the error falls by
a constant factor a step, close to 1 where long rounds are possible but rare or regimes hardly ever change, while
policy iteration squares it. The bounds are the same certificate's, converged or not.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mdp.knots import Grid
from mdp.price import NEVER, Arrays, Sweep, sweep

__all__ = ["MAX_STEPS", "Iterate", "iterate_values"]

MAX_STEPS = 5000

PRECISION = 1e-9
"""Steps end when they know the rate to this, relatively."""


class Iterate(NamedTuple):
    """The last sweep, done at this rate and bias, and how many there were."""

    rate: Any
    bias: Any
    sweep: Sweep
    num_sweeps: Any


@jax.jit
def iterate_values(problem: Arrays, grid: Grid, rate: Any, bias: Any, max_sweeps: Any) -> Iterate:
    """Value iteration from a rate and bias until the rate is known to `PRECISION`, or `max_sweeps`."""
    depths = jnp.arange(problem.verify_time.shape[0])
    round_time = depths * problem.draft_time + problem.verify_time
    allowed = problem.verify_time < -NEVER / 2  # the others pad
    longest = jnp.where(allowed, round_time, 0.0).max()
    shortest = jnp.where(allowed, round_time, jnp.inf).min()
    counts = problem.reachable > 0
    reference = jnp.argmax(counts)

    def sides(swept):
        if problem.bonus is None:
            mean = problem.initial @ swept.upper
            return mean, mean
        return jnp.where(counts, swept.upper, jnp.inf).min(), jnp.where(counts, swept.upper, -jnp.inf).max()

    def go_on(done):
        low, high = sides(done.sweep)
        known = jnp.maximum(high, -low) <= PRECISION * done.rate * shortest
        return ~known & (done.num_sweeps < max_sweeps)

    def body(done):
        (low, high), gain = sides(done.sweep), done.sweep.upper
        rate = done.rate + jnp.where(low > 0, low, jnp.where(high < 0, high, 0.0)) / longest
        bias = done.bias if problem.bonus is None else done.bias + 0.5 * (gain - gain[reference])
        return Iterate(rate, bias, sweep(problem, grid, rate, bias, track=True), done.num_sweeps + 1)

    start = Iterate(rate, bias, sweep(problem, grid, rate, bias, track=True), jnp.asarray(1))
    return jax.lax.while_loop(go_on, body, start)
