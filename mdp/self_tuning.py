r"""Self-tuning: the throughput so far in place of the one nobody knows (theory, F7).

A *family* gives a stopping table for each rate $\rho$. Played at $\rho_n$ = emitted / time of the rounds so far, its
long run follows $M(\rho)$, the throughput of the rule for $\rho$ (exact, `mdp.head_rule`): rounds renew, so
$E[\text{emitted}] - \rho E[\text{time}]$ has the sign of $M(\rho) - \rho$, and $\rho_n$ can only settle where that goes
from + to -. If the rule at $\rho$ maximises $E[\text{emitted}] - \rho E[\text{time}]$ over the family (the optimal
table; look-ahead in the monotone case) there is one such rate, the family's best. For a heuristic evaluated at $\rho$
there may be a worse one (`counterexample`).

A *head* is what the rule is told instead of acceptance: its outputs make its survival, and their mean given the last
output stands for the next acceptance.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from mdp.acceptance import MarkovModulated
from mdp.cost import Affine
from mdp.head_rule import HeadRule, head_curve, told_throughput, weighted
from mdp.knots import even_and_kinks, place
from mdp.price import lump, sweep
from mdp.problem import FiniteProblem, StoppingProblem

__all__ = [
    "Family", "Head", "Settled", "best_threshold", "counterexample", "heads", "lookahead_family", "optimal_family",
    "read_by_head", "settle",
]  # fmt: skip

KNOTS = 512
NEVER = 2.0  # a survival that is never reached: stop

Family = Callable[[float], Float[np.ndarray, "K Z"]]
"""Rate to table of survival thresholds."""


class Head(NamedTuple):
    """Outputs per regime, and their mean over the next candidate given the last output."""

    name: str
    output: Float[np.ndarray, " Z"]
    next_output: Float[np.ndarray, " Z"]


class Settled(NamedTuple):
    """Where self-tuning goes.

    Attributes:
        throughput: where it settles if it starts at plain decoding and follows its mean.
        stable: all rates it can settle at, found between neighbours of the grid and bisected.
        best: the most that any rule of the family on the grid earns.
        rates, realised: the grid and M on it.
    """

    throughput: float
    stable: list[float]
    best: float
    rates: Float[np.ndarray, " G"]
    realised: Float[np.ndarray, " G"]


def optimal_family(problem: FiniteProblem) -> Family:
    """The rule that maximises E[emitted] - rho E[time], as a function of rho.

    Its thresholds come from backward induction on knots that are put on the kinks a first pass finds; a table that is
    off by little loses to second order.
    """
    arrays, into = lump(problem)

    def at(rate: float) -> np.ndarray:
        threshold = None
        with jax.enable_x64(True):
            for _ in range(2):
                grid = place(arrays.accept_prob, even_and_kinks(arrays.accept_prob, arrays.into, threshold, KNOTS))
                threshold = np.asarray(_threshold(arrays, grid, rate, np.zeros(len(arrays.initial))))
        assert threshold is not None
        return np.minimum(threshold[: problem.max_candidates][:, into], NEVER)

    return at


@jax.jit
def _threshold(arrays, grid, rate, bias):
    return sweep(arrays, grid, rate, bias, track=False).threshold


def lookahead_family(problem: FiniteProblem, next_output: Float[np.ndarray, " Z"] | None = None) -> Family:
    r"""Continue iff $S \bar a(z) \ge \rho (t_d + V(k+1) - V(k))$; `next_output` stands for $\bar a$."""
    mean = problem.next_accept_prob if next_output is None else np.tile(next_output, (problem.max_candidates, 1))
    step = problem.step_time[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        price = np.where(mean > 0, step / mean, np.where(step > 0, np.inf, 0.0))
    return lambda rate: np.minimum(rate * price, NEVER)


def settle(
    problem: FiniteProblem, family: Family, output: Float[np.ndarray, " Z"] | None = None, *, points: int = 201
) -> Settled:
    """Exact mean behaviour of self-tuning on a problem whose rounds renew.

    Args:
        problem: finite.
        family: a table for each rate.
        output: what the rule's survival is made of, if not of acceptance.
        points: of the grid of rates, from half of plain decoding's to a little over what the family can earn.

    Raises:
        ValueError: if rounds persist.
    """
    if problem.persistent:
        raise ValueError("coupling: self-tuning is exact for rounds that renew only")
    shown = problem.accept_prob if output is None else output

    def realised(rate: float) -> float:
        return told_throughput(problem, family(rate), shown)

    plain = 1.0 / float(problem.verify_time[0])
    # every rate above the optimum is above M; the first grid finds how high M gets
    most = (problem.max_candidates + 1) * plain
    high = max(realised(rate) for rate in np.linspace(0.5 * plain, most, points))
    rates = np.linspace(0.5 * plain, 1.1 * max(high, plain), points)
    values = np.array([realised(rate) for rate in rates])
    above = values >= rates
    stable = [_cross(realised, *rates[i : i + 2]) for i in np.flatnonzero(above[:-1] & ~above[1:])]
    if not stable:
        raise ValueError("family: its throughput does not cross its own rate; no self-tuned limit was found")
    rising = realised(plain) >= plain
    ahead = [rate for rate in stable if rate >= plain] if rising else [rate for rate in stable if rate <= plain][::-1]
    return Settled(float((ahead or stable)[0]), list(map(float, stable)), float(values.max()), rates, values)


def _cross(realised: Callable[[float], float], low: float, high: float) -> float:
    """Where M goes from above the diagonal to below; M may jump there, and is then held at the jump."""
    for _ in range(45):
        middle = (low + high) / 2
        low, high = (middle, high) if realised(middle) >= middle else (low, middle)
    return (low + high) / 2


def read_by_head(chain: MarkovModulated, accuracy: float) -> tuple[MarkovModulated, np.ndarray]:
    """The chain of (regime, reading), number z Z + reading, and m(reading) = E[a | reading] for each of them.

    A reading is the regime with probability `accuracy`, else any other; m is under the chain's initial law, which is
    to be its long-run law. Candidates before the round are read as well: its start has a reading.

    Raises:
        ValueError: if the initial law is not stationary.
    """
    if np.abs(chain.initial @ chain.transition - chain.initial).max() > 1e-9:
        raise ValueError("acceptance.initial: must be the chain's long-run law for a head to be calibrated to it")
    size = chain.num_regimes
    error = (1.0 - accuracy) / max(size - 1, 1)
    law = np.full((size, size), error) + (accuracy - error) * np.eye(size)
    both = MarkovModulated(
        np.repeat((chain.transition[:, :, None] * law).reshape(size, -1), size, axis=0),
        np.repeat(chain.accept_prob, size),
        (chain.initial[:, None] * law).ravel(),
    )
    joint = chain.initial[:, None] * law
    mean = (chain.accept_prob @ joint) / joint.sum(axis=0)
    return both, np.tile(mean, size)


def heads(chain: MarkovModulated, accuracy: float, weight: float) -> tuple[MarkovModulated, list[Head]]:
    """A chain with readings, and three heads on it: `perfect` knows a(z); the others know the reading only.

    `biased` puts out what training with `weight` on rejections makes of m(reading); `de-biased` undoes that (F6).
    """
    size = chain.num_regimes
    both, mean = read_by_head(chain, accuracy)
    joint = both.initial.reshape(size, size)  # [regime, reading]
    follow = (joint.T / joint.sum(axis=0)[:, None]) @ both.transition.reshape(size, size, -1)[
        :, 0, :
    ]  # [reading, next]

    def blind(name: str, output: np.ndarray) -> Head:
        return Head(name, output, np.tile(follow @ output, size))

    biased = weighted(mean, weight)
    known = both.accept_prob
    return both, [
        blind("biased", biased),
        blind("de-biased", weighted(biased, 1.0 / weight)),
        Head("perfect", known, both.transition @ known),
    ]


def best_threshold(problem: FiniteProblem, output: Float[np.ndarray, " Z"]) -> tuple[float, float]:
    """The constant threshold on the product of outputs that earns most, tuned with the answer known, and its value."""
    curve = head_curve(problem, HeadRule(), output=output)
    return float(curve.threshold[curve.best]), float(curve.throughput[curve.best])


def counterexample() -> StoppingProblem:
    """Self-tuned look-ahead stays at 50/29 where another rate's look-ahead earns 13/7, the optimum.

    Easy stretches (always accepted) last; from a hard one (never accepted) the next candidate is easy with
    probability 1/2. Rounds start in either. Drafting one candidate from a hard start does not pay for itself at any
    rate above 5/3, but pays for what it reveals: with it a round earns 13/7, without it 50/29, and both exceed 5/3.

    Example:
        >>> finite = counterexample().lower()
        >>> found = settle(finite, lookahead_family(finite))
        >>> round(found.throughput * 29, 9), round(found.best * 7, 9)
        (50.0, 13.0)
    """
    chain = MarkovModulated(np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([1.0, 0.0]), np.array([0.5, 0.5]))
    return StoppingProblem(chain, Affine(0.3, 1.0), max_candidates=3)
