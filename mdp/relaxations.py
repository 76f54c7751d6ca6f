r"""What a stopper would earn that sees less, or more: a bracket of the optimum, for thousands of problems at once.

*Nothing seen.* Where rounds renew and the regime is not seen, a fixed length is optimal (theory, F5). With
$\mu_0$ = `initial` and $\mu_{k+1} = \mu_k P\, \mathrm{diag}(a_{k+1})$, candidate k is accepted with probability
$s_k = \mu_k 1$, and the best length is $\arg\max_n (1 + s_1 + \dots + s_n) / T(n)$, T(n) = n t_d + V(n).

*Rejection seen at once.* If the drafter were told at once, a round would end with its first rejection and survival
would not matter: with $\tilde T(k) = \min_{n \ge k} T(n)$ and $c_k = \tilde T(k + 1) - \tilde T(k) \ge 0$,

$$W_k(z) = \max\{0,\; -\rho c_k + \textstyle\sum_{z'} P(z, z')\, a_{k+1}(z')\, (1 + W_{k+1}(z'))\}, \quad W_K = 0,$$

and $\rho$ is the root of $f(\rho) = 1 + \nu W_0 - \rho \tilde T(0)$. In the problem itself a candidate is paid for
whether or not the ones before it live, so that what CONTINUE earns there above STOP is at most $S\, W_k(z)$: the root
is an upper bound on every policy that sees the regime. It is found by Newton's method (Dinkelbach); f is convex and
falls by at least $\tilde T(0)$, hence the root is at most $\rho + f(\rho) / \tilde T(0)$ for every $\rho$ below it.

Both work on regimes by problems, the problems along the last axis, a few dozen at a time.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from mdp.batch import in_calls, round_times, stack, take

__all__ = ["FixedLengths", "RejectionSeen", "best_fixed_length", "rejection_seen"]

WIDTH, MOST_GROUPS, MAX_SWEEPS = 32, 32, 100
"""Problems worked on side by side, and groups of them in one compiled call."""


class FixedLengths(NamedTuple):
    """The best fixed number of candidates of each problem [B], the least if several tie, and its throughput [B]."""

    length: Int[np.ndarray, " B"]
    throughput: Float[np.ndarray, " B"]


class RejectionSeen(NamedTuple):
    """Throughput of the best rule that sees the regime and rejections at once [B], and an upper bound on it [B]."""

    throughput: Float[np.ndarray, " B"]
    bound: Float[np.ndarray, " B"]


def best_fixed_length(problems: Any) -> FixedLengths:
    """The best round of fixed length, in each of a batch of renewal problems of one shape.

    Args:
        problems: a sequence, or a `FiniteProblem` whose every field has a leading batch axis.

    Raises:
        ValueError: if there are none, the shapes differ or rounds do not renew.

    Example:
        >>> from mdp.acceptance import IID
        >>> from mdp.cost import Affine
        >>> from mdp.problem import StoppingProblem
        >>> found = best_fixed_length([StoppingProblem(IID(0.8), Affine(t, 1.0), 12) for t in (0.1, 0.2)])
        >>> found.length.tolist(), found.throughput.round(6).tolist()
        ([6, 4], [2.46964, 1.867556])
    """
    batch = _renewal(problems)
    return FixedLengths(*_in_groups(_best_fixed_length, batch, round_times(batch)))


def rejection_seen(problems: Any, *, tol: float = 1e-10) -> RejectionSeen:
    """An upper bound on each of a batch of renewal problems of one shape: what seeing rejections at once would earn.

    Args:
        problems: a sequence, or a `FiniteProblem` whose every field has a leading batch axis.
        tol: relative step of Newton's method that ends it.

    Raises:
        ValueError: as `best_fixed_length`, or if `tol` is not positive.
    """
    if not tol > 0:
        raise ValueError(f"tol: must be > 0, got {tol!r}")
    batch = _renewal(problems)
    least_time = np.minimum.accumulate(round_times(batch)[:, ::-1], axis=1)[:, ::-1]
    return RejectionSeen(*_in_groups(_rejection_seen, batch, least_time, tol))


def _renewal(problems: Any) -> Any:
    batch = stack(problems)
    if batch.bonus is not None:
        raise ValueError("problems: must renew, got persistent ones")
    return batch


def _in_groups(work: Any, batch: Any, times: np.ndarray, *more: float) -> tuple[np.ndarray, ...]:
    """`work` on groups of `WIDTH` problems, several groups a compiled call; the fewer problems, the fewer groups."""
    count = len(times)
    groups = min(MOST_GROUPS, 1 << (-(-count // WIDTH) - 1).bit_length())
    arrays = _Arrays(batch.transition, batch.accept_prob, batch.initial, times)

    def run(index: Any) -> Any:
        part = take(arrays, index)
        if (part.accept_prob == part.accept_prob[:, :1]).all():  # most processes: one layer instead of K to carry
            part = part._replace(accept_prob=part.accept_prob[:, :1])
        with jax.enable_x64(True):
            return jax.tree.map(np.asarray, _grouped(work, part, *more))

    return in_calls(run, count, groups * WIDTH)


class _Arrays(NamedTuple):
    """Transition [Z, Z], acceptance [K, Z], initial [Z], round times [K + 1], with one more axis for the problems.

    Acceptance is [1, Z] where it is the same at all depths.
    """

    transition: Any
    accept_prob: Any
    initial: Any
    times: Any


@partial(jax.jit, static_argnames="work")
def _grouped(work: Any, arrays: _Arrays, *more: Any) -> Any:
    batch_last = partial(jnp.moveaxis, source=0, destination=-1)
    groups = jax.tree.map(lambda part: part.reshape(-1, WIDTH, *part.shape[1:]), arrays)
    found = jax.lax.map(lambda group: work(jax.tree.map(batch_last, group), *more), groups)
    return jax.tree.map(jnp.ravel, found)


def _layers(problem: _Arrays) -> Any:
    """Acceptances by depth, None if they are all the same."""
    return None if len(problem.accept_prob) == 1 else problem.accept_prob


def _best_fixed_length(problem: _Arrays) -> tuple[Any, Any]:
    def step(carry, accept_prob):
        alive, emitted = carry
        alive = (problem.transition * alive[:, None]).sum(axis=0)
        alive = alive * (problem.accept_prob[0] if accept_prob is None else accept_prob)
        emitted = emitted + alive.sum(axis=0)
        return (alive, emitted), emitted

    one = jnp.ones_like(problem.times[0])
    _, emitted = jax.lax.scan(step, (problem.initial, one), _layers(problem), length=len(problem.times) - 1)
    rates = jnp.concatenate([one[None], emitted]) / problem.times
    return jnp.argmax(rates, axis=0), rates.max(axis=0)


def _rejection_seen(problem: _Arrays, tol: Any) -> tuple[Any, Any]:
    least_time, price = problem.times[0], jnp.diff(problem.times, axis=0)

    def sweep(rate):
        """f at this rate, and the mean time of a round."""

        def step(later, layer):
            accept_prob, price = layer
            accept_prob = problem.accept_prob[0] if accept_prob is None else accept_prob
            tokens, time = accept_prob * (1.0 + later[0]), accept_prob * later[1]
            # A product and a sum: a product of small matrices for each problem is several times slower.
            worth = (problem.transition * tokens).sum(axis=1) - rate * price
            time = (problem.transition * time).sum(axis=1) + price
            return (jnp.maximum(worth, 0.0), jnp.where(worth > 0, time, 0.0)), None

        none = jnp.zeros_like(problem.initial)
        (worth, time), _ = jax.lax.scan(step, (none, none), (_layers(problem), price), reverse=True)
        lacking = 1.0 + (problem.initial * worth).sum(axis=0) - rate * least_time
        return lacking, least_time + (problem.initial * time).sum(axis=0)

    def body(carry):
        rate, _, _, count = carry
        lacking, time = sweep(rate)
        better = rate + lacking / time
        return better, rate + jnp.maximum(lacking, 0.0) / least_time, jnp.abs(better - rate), count + 1

    def unsettled(carry):
        rate, _, moved, count = carry
        return (moved > tol * rate).any() & (count < MAX_SWEEPS)

    rate, bound, _, _ = jax.lax.while_loop(unsettled, body, (1.0 / least_time, least_time, 1.0 / least_time, 0))
    return rate, jnp.maximum(rate, bound)
