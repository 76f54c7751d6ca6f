r"""The price problem on a geometric lattice of survivals: drafting shifts it, so nothing is looked up.

Put the knots at $S_j = e^{-j \Delta}$, $j < M$. A candidate with acceptance $a$ moves survival by $-\ln a / \Delta$
places, the same from every knot: each outcome reads one contiguous window of the next depth's row, which costs a
fraction of the gathers that knots on kinks need (`mdp.price`), and the knots are the same at all depths.

All values are kept relative to STOP. With $h_b(z) = \sum_y \mathrm{bonus}(z, y) h(y)$, $h_r$ likewise (0 if rounds
renew), $c_k = t_d + V(k+1) - V(k)$ and $a' = a_{k+1}(z')$, what CONTINUE earns above STOP is

$$W_k(z, S) = -\rho c_k + \sum_{z'} P(z, z') [\, S (a' + (1 - a') h_r(z') + a' h_b(z')) + W_{k+1}(z', S a')^+ \,]
  - S h_b(z),$$

convex in $S$. *From below*, `rules` keeps at each knot the coefficients of a rule, a line $S L - \rho C$, and takes the
better of the two knots around a survival, or STOP: real rules all along. *From above*, `ceiling` interpolates
$W^+$ between knots. Below the lowest knot $S_{M-1}$ both stop. That is no approximation where $W_k(z, \cdot) \le 0$
at the lowest knot and at 0, hence between them: `ceiling` says if it is so.

Theory, section 3.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Lattice", "Rules", "ceiling", "lattice", "rules", "step_time", "window"]

NEVER = 1e30  # the time of a rule where there is none


class Lattice(NamedTuple):
    """`knots` [M], log spacing, and for each depth and outcome [K, Z]: first place of its window, weight of the next.

    Acceptance times knot j is at (1 - weight) knot[start + j] + weight knot[start + j + 1].
    """

    knots: Any
    spacing: Any
    start: Any
    weight: Any


def lattice(accept_prob: Any, lowest: Any, num_knots: int) -> Lattice:
    """Knots from 1 down to `lowest`, evenly in the logarithm."""
    spacing = -jnp.log(lowest) / (num_knots - 1)
    shift = jnp.minimum(-jnp.log(accept_prob) / spacing, num_knots)
    start = jnp.floor(shift)
    weight = jnp.expm1(-spacing * (shift - start)) / jnp.expm1(-spacing)
    return Lattice(jnp.exp(-spacing * jnp.arange(num_knots)), spacing, start.astype(jnp.int32), weight)


def window(rows: Any, start: Any, size: int) -> Any:
    """For each outcome the `size` entries of its row [Z, ..., 2 M + 2] from its own start on."""
    lead = (jnp.int32(0),) * (rows.ndim - 2)
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice(row, (*lead, at), (*row.shape[:-1], size)))(rows, start)


class Rules(NamedTuple):
    """The rules at survival 1, per start regime [Z], and where CONTINUE's line crosses STOP [K, Z].

    Of the better of STOP and CONTINUE: tokens and time of the round, expected candidates, and law of the next start
    [Z, Z] ([Z, 0] if rounds renew).
    """

    emitted: Any
    time: Any
    drafted: Any
    next_start: Any
    threshold: Any


def rules(problem: Any, on: Lattice, rate: Any, bias: Any) -> Rules:
    """Backward induction over depth with real rules only, at rate rho and bias h [Z]."""
    size, num_knots = problem.transition.shape[0], on.knots.shape[0]
    bonus = jnp.zeros((size, 0)) if problem.bonus is None else problem.bonus
    rejection = jnp.zeros((size, 0)) if problem.bonus is None else problem.rejection
    after_bonus, after_rejection = after(problem, bias)
    stopped = jnp.concatenate([jnp.zeros((size, 3)), bonus], axis=1)  # slope, time, candidates, next starts

    own = jnp.zeros(stopped.shape).at[:, 0].set(-after_bonus)

    def step(later, layer):
        accept, start, price = layer
        near = window(later, start, num_knots + 1)
        survival = accept[:, None] * on.knots
        left, right = (part[:, 0] * survival - rate * part[:, 1] for part in (near[..., :-1], near[..., 1:]))
        stops, moves = jnp.maximum(left, right) < 0, right > left
        chosen = [
            jnp.where(stops, none[:, None], jnp.where(moves, part[:, 1:], part[:, :-1]))
            for part, none in zip(jnp.unstack(near, axis=1), jnp.unstack(stopped, axis=1), strict=True)
        ]
        accept, missed = accept[:, None], 1.0 - accept[:, None]
        outcome = [
            accept * (1.0 + after_bonus[:, None] + chosen[0]) + missed * after_rejection[:, None],
            price + chosen[1],
            1.0 + chosen[2],
            *(missed * rejection[:, to, None] + accept * chosen[3 + to] for to in range(bonus.shape[1])),
        ]
        mean = problem.transition @ jnp.concatenate(outcome, axis=1)  # one product for all: they share P
        now = mean.reshape(size, -1, num_knots) + own[..., None]
        # Past the lowest knot no rule is kept: there STOP is as good.
        return jax.lax.dynamic_update_slice(later, now, (0, 0, 0)), _crossing(now, on.knots, rate)

    nothing = jnp.zeros((*stopped.shape, 2 * num_knots + 2)).at[:, 1].set(NEVER)
    layers = (problem.accept_prob, on.start, step_time(problem))
    first, threshold = jax.lax.scan(step, nothing, layers, reverse=True)
    at_one = first[..., 0]
    goes_on = at_one[:, 0] >= rate * at_one[:, 1]
    best = jnp.where(goes_on[:, None], at_one, stopped)
    next_start = best[:, 3:]
    onward = next_start @ bias if problem.bonus is not None else 0.0
    return Rules(
        emitted=1.0 + after_bonus + best[:, 0] - onward,
        time=problem.verify_time[0] + best[:, 1],
        drafted=best[:, 2],
        next_start=next_start,
        threshold=threshold,
    )


def _crossing(now: Any, knots: Any, rate: Any) -> Any:
    """Least survival from which CONTINUE is worth it [Z], inf if none; 0 if it still is at the lowest knot."""
    slope, price = now[:, 0], rate * now[:, 1]
    worth = slope * knots >= price
    above = jnp.where(worth.all(axis=1), knots.shape[0], jnp.argmin(worth, axis=1))[:, None]  # knots that continue
    last, first = (jnp.clip(above - 1 + move, 0, knots.shape[0] - 1) for move in (0, 1))

    def root(index):
        rise = jnp.take_along_axis(slope, index, axis=1)
        return jnp.where(rise > 0, jnp.take_along_axis(price, index, axis=1) / rise, jnp.inf)

    found = jnp.clip(jnp.minimum(root(last), root(first)), knots[first], knots[last])
    return jnp.where(above == 0, jnp.inf, jnp.where(above == knots.shape[0], 0.0, found))[:, 0]


def ceiling(problem: Any, on: Lattice, rate: Any, bias: Any, threshold: Any) -> tuple[Any, Any, Any]:
    """Backward induction from above at rate rho and bias h.

    Returns:
        $T_{\\rho h}$ [Z] over-estimated; the most that CONTINUE could be worth at any `threshold` [K, Z]; and whether
        stopping below the lowest knot was exact, without which neither is proven.
    """
    size, num_knots = problem.transition.shape[0], on.knots.shape[0]
    after_bonus, after_rejection = after(problem, bias)

    def step(later, layer):
        accept, start, weight, price, at = layer
        near = window(later, start, num_knots + 1)
        weight, accept = weight[:, None], accept[:, None]
        gain = accept * (1.0 + after_bonus[:, None]) + (1.0 - accept) * after_rejection[:, None]
        outcome = on.knots * gain + (1.0 - weight) * near[:, :-1] + weight * near[:, 1:]
        now = problem.transition @ outcome - on.knots * after_bonus[:, None] - rate * price
        # At a threshold: the chord of its cell. At "never", 1 is asked: CONTINUE must be worth nothing there.
        place = jnp.clip(-jnp.log(jnp.minimum(at, 1.0)) / on.spacing, 0.0, num_knots - 1.0)
        cell = jnp.minimum(place.astype(jnp.int32), num_knots - 2)[:, None]
        share = (jnp.exp(-on.spacing * place)[:, None] - on.knots[cell]) / (on.knots[cell + 1] - on.knots[cell])
        left, right = (jnp.take_along_axis(now, index, axis=1) for index in (cell, cell + 1))
        worth = ((1.0 - share) * left + share * right)[:, 0]
        exact = (now[:, -1] <= 0).all() & (price >= 0)
        return jax.lax.dynamic_update_slice(later, jnp.maximum(now, 0.0), (0, 0)), (worth.max(), exact)

    layers = (problem.accept_prob, on.start, on.weight, step_time(problem), threshold)
    first, (worth, exact) = jax.lax.scan(step, jnp.zeros((size, 2 * num_knots + 2)), layers, reverse=True)
    stop = 1.0 + after_bonus - rate * problem.verify_time[0]
    return stop + first[:, 0], worth.max(), exact.all()


def step_time(problem: Any) -> Any:
    """$c_k$ [K]: time that one more candidate adds to the round."""
    return problem.draft_time + jnp.diff(problem.verify_time)


def after(problem: Any, bias: Any) -> tuple[Any, Any]:
    """$h_b$ and $h_r$ [Z]: what the next round is worth after a whole round, and after a rejection."""
    if problem.bonus is None:
        return jnp.zeros_like(bias), jnp.zeros_like(bias)
    return problem.bonus @ bias, problem.rejection @ bias
