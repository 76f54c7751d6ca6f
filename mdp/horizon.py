r"""The paper's own objective: the least expected time until n tokens are out.

Let $H_n(z)$ be that time for a round that starts in z with n tokens to go, $H_m = 0$ for $m \le 0$: tokens beyond the
n-th are cut. A round of k candidates, the i-th the first one rejected, emits i tokens; accepted whole it emits k + 1.
With $H^b_m(z) = \sum_y \mathrm{bonus}(z, y) H_m(y)$, $H^r_m$ likewise (both $\sum_y \mathrm{initial}(y) H_m(y)$ if
rounds renew), $S$ the probability that nothing is rejected so far and $a' = a_{k+1}(z')$, the time still to come is

$$W_k(z, S) = \min\{\, V(k) + S H^b_{n-k-1}(z),\;
  t_d + \sum_{z'} P(z, z') [\, S (1 - a') H^r_{n-k-1}(z') + W_{k+1}(z', S a') \,] \,\}.$$

A rejection that nobody has seen yet ends nothing: the round goes on and its time is paid in full, while the tokens to
come after it are already settled. $H_n(z) = W_0(z, 1)$.

*As a price problem.* At any rate $\rho$ put $h_m = m - \rho H_m$, so $h_m = m$ for $m \le 0$. Then $h_n = T_\rho$ with
the bias $h_{n-k-1}$ behind k + 1 emitted tokens: `mdp.price.sweep`, once for each n. At $\rho^*$ $h_n$ stays bounded,
which is $H_n = n / \rho^* + O(1)$; nothing grows with n but the rounding.

*Bounds.* Two recursions side by side: real rules give $\check h_n \le h_n$, hence a time that some policy takes;
interpolation gives $\hat h_n \ge h_n$, hence a time that none beats. Both sides only add up nonnegative multiples of
earlier ones, so either stays on its side, and rounding adds up at most. Knots lie on the kinks of the long run's
policy, which is the policy far from the end, and evenly between. At each (n, k, z) the optimal rule is a threshold in
survival (theory, sections 2 and 3).
"""

import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mdp.knots import Grid, even_and_kinks, place
from mdp.price import Arrays, lump, sweep
from mdp.problem import FiniteProblem, StoppingProblem
from mdp.solution import Solution, SolveStatus
from mdp.solve import solve

__all__ = ["HorizonSolution", "solve_horizon"]

MAX_TOKENS = 1_000_000
MAX_THRESHOLDS = 2**27  # in all; each n has its own
FIRST_KNOTS = 256
CHUNK = 128  # tokens per compiled call, so that any n finds its program compiled
REACH = 0.5  # close to the end, thresholds may lie below those of the long run


@dataclass(frozen=True)
class HorizonSolution:
    """The least expected time until n tokens are out, for n = 0..N; index n is that many tokens to go.

    Attributes:
        expected_time: [N + 1] from a start under `initial`: what the policy found takes.
        bounds: [N + 1, 2] proven, for the least time of any policy.
        expected_time_from: [N + 1, Z] the same per start regime.
        survival_threshold: [N + 1, K, Z]; with n to go CONTINUE iff survival >= threshold, inf = never.
        long_run: the solution for throughput; n / expected_time tends to its throughput.
        status: `successful` if the bounds are relatively closer than `tol` at every n.
        num_knots: per depth, in the last pass.
        seconds: wall time, compilation included.
    """

    expected_time: Float[np.ndarray, " N+1"]
    bounds: Float[np.ndarray, "N+1 2"]
    expected_time_from: Float[np.ndarray, "N+1 Z"]
    survival_threshold: Float[np.ndarray, "N+1 K Z"]
    long_run: Solution
    status: SolveStatus
    num_knots: int
    seconds: float

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.expected_time) - 1

    @property
    def throughput(self) -> Float[np.ndarray, " N"]:
        """n / expected_time for n = 1..N: tends to that of the long run, with an error of order 1 / n."""
        return np.arange(1, self.num_tokens + 1) / self.expected_time[1:]

    def to_dict(self) -> dict[str, Any]:
        """What `specstop solve --num-tokens` adds to its JSON."""
        return {"status": self.status.name, "num_tokens": self.num_tokens,
                "expected_time": float(self.expected_time[-1]), "bounds": self.bounds[-1].tolist(),
                "throughput": float(self.throughput[-1]), "seconds": self.seconds}  # fmt: skip


def solve_horizon(
    problem: StoppingProblem | FiniteProblem, num_tokens: int, *, tol: float = 1e-6, max_knots: int = 2**14
) -> HorizonSolution:
    """Least expected time until `num_tokens` tokens are out, and until any fewer are.

    Args:
        problem: a finite problem, renewal or persistent.
        num_tokens: N.
        tol: relative width of the bounds, at each n, that counts as solved.
        max_knots: most knots per depth before giving up with status `max_steps_reached`.

    Raises:
        ValueError: if `num_tokens` is not a whole number in 1..1000000 or its thresholds would not fit, a limit is not
            positive, or acceptance is continuous.

    Example:
        >>> from mdp.acceptance import IID
        >>> from mdp.cost import Affine
        >>> solution = solve_horizon(StoppingProblem(IID(0.5), Affine(0.25, 1.0), max_candidates=2), 2)
        >>> solution.expected_time.round(9).tolist()  # one plain step for the last token, a candidate for the last two
        [0.0, 1.0, 1.75]
    """
    whole = isinstance(num_tokens, (int, np.integer)) and not isinstance(num_tokens, bool)
    if not whole or not 1 <= num_tokens <= MAX_TOKENS:
        raise ValueError(f"num_tokens: must be a whole number in 1..{MAX_TOKENS}, got {num_tokens!r:.60}")
    if not max_knots > 0:
        raise ValueError(f"max_knots: must be > 0, got {max_knots!r}")
    begun = time.perf_counter()
    finite = problem.lower() if isinstance(problem, StoppingProblem) else problem
    if num_tokens * finite.accept_prob.size > MAX_THRESHOLDS:
        most = MAX_THRESHOLDS // finite.accept_prob.size
        raise ValueError(f"num_tokens: at most {most} for a problem of this size, got {num_tokens}")
    long_run = solve(finite, tol=tol)
    unit = 2.0 ** np.frexp(finite.round_time.max())[1]
    scaled = finite._replace(draft_time=finite.draft_time / unit, verify_time=finite.verify_time / unit)
    arrays, into = lump(scaled)
    if not finite.persistent:  # the next start is drawn afresh, whatever came before
        anew = [np.tile(arrays.initial, (len(rows), 1)) for rows in (arrays.into, arrays.transition)]
        arrays = arrays._replace(rejection=anew[0], bonus=anew[1])
    first = np.unique(into, return_index=True)[1]
    padding = [(0, len(arrays.accept_prob) - finite.max_candidates), (0, 0)]
    classes = np.pad(first, (0, len(arrays.initial) - len(first)), mode="edge")
    table = long_run.survival_threshold
    assert table is not None  # a finite problem shows its regimes
    threshold = np.pad(table[:, classes], padding, constant_values=np.inf)
    rate, finest, closed = long_run.throughput * unit, 0, True
    before: Any = np.broadcast_to(-np.arange(len(threshold) + 1.0)[:, None], (2, len(threshold) + 1, len(classes)))
    parts = [(np.zeros((1, 2, len(classes))), np.full((1, *threshold.shape), np.inf))]
    with jax.enable_x64(True):
        for done in range(0, num_tokens, CHUNK):
            num_knots, counts = FIRST_KNOTS, done + 1 + np.arange(CHUNK)
            while True:  # far from the end the first knots do; close to it thresholds move with n
                knots = even_and_kinks(arrays.accept_prob, arrays.into, threshold, num_knots, REACH)
                last, found = jax.device_get(_advance(arrays, place(arrays.accept_prob, knots), rate, before))
                lower, upper = _bounds(scaled, rate, counts, found[0] @ arrays.initial, np.abs(last).max())
                narrow = bool((upper - lower <= tol * lower)[counts <= num_tokens].all())
                if narrow or 4 * num_knots > max_knots:
                    break
                num_knots *= 4
            before, finest, closed = last, max(finest, num_knots), closed and narrow
            parts.append(found)
    h, thresholds = (np.concatenate(part)[: num_tokens + 1] for part in zip(*parts, strict=True))
    counts = np.arange(num_tokens + 1)
    first_start = h @ arrays.initial
    return HorizonSolution(
        expected_time=(counts - first_start[:, 0]) / rate * unit,
        bounds=np.stack(_bounds(scaled, rate, counts, first_start, np.abs(h).max()), axis=1) * unit,
        expected_time_from=((counts[:, None] - h[:, 0]) / rate * unit)[:, into],
        survival_threshold=thresholds[:, : finite.max_candidates, into],
        long_run=long_run,
        status=SolveStatus.successful if closed else SolveStatus.max_steps_reached,
        num_knots=finest,
        seconds=time.perf_counter() - begun,
    )


def _bounds(problem: FiniteProblem, rate: float, counts: np.ndarray, h: np.ndarray, scale: float) -> tuple[Any, Any]:
    """Least and greatest H_n for n in `counts`, from both sides of h [n, 2], widened for rounding.

    Each token to go may add as much to h as rounding adds to a value in `certificate`, for biases up to `scale`.
    """
    steps, terms = problem.max_candidates + 1, problem.num_regimes + 16
    rounding = np.finfo(float).eps * steps * terms * (steps + scale + rate * problem.verify_time[0]) * counts
    slow, fast = counts - h.T
    return np.maximum(fast - rounding, 0.0) / rate, (slow + rounding) / rate


@jax.jit
def _advance(arrays: Arrays, grid: Grid, rate: Any, before: Any) -> tuple[Any, Any]:
    """The next `CHUNK` tokens; `before` [2, K + 1, C] holds h for the last K + 1, newest first."""

    def step(before, _):
        both = jax.vmap(lambda bias: sweep(arrays, grid, rate, bias, track=False))(before)
        h = jnp.stack([both.lower[0], both.upper[1]]) + before[:, 0]
        return jnp.concatenate([h[:, None], before[:, :-1]], axis=1), (h, both.threshold[0])

    return jax.lax.scan(step, before, length=CHUNK)
