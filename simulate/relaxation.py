r"""How little time any policy can take on a trace: information relaxation with a penalty.

On a trace every policy emits the same text (`simulate.starts`), so the best throughput belongs to the least expected
time per request, $\min_\pi E[T^\pi]$. Give a policy all draws of the request beforehand and it takes the shortest path
over cursors: a lower bound on time, but a loose one, for most of it is foresight. So charge for foresight. Let $M^\pi$
be a *penalty* with $E[M^\pi] = 0$ for every policy that does not foresee. Then
$E[T^\pi] = E[T^\pi + M^\pi] \ge E[\min_{\text{path}} (T + M)]$: weak duality, whatever the penalty (Brown, Smith and
Sun 2010; Rogers 2002). One that resembles the optimal policy's own surprises makes it tight.

*Which penalties are exactly fair here.* Fitted chains give conditional means that are about right; a bound needs them
exact. Two are, by how a coupled trace is drawn (theory, section 4), given **all** that could be known while drafting:
the text so far, the candidates and both models. With candidates $y_1, .., y_k$ of a round, $a_i = \min(1, p/q)(y_i)$
recorded as `token_accept_prob`, $\beta_i = \sum \min(p, q)$ before $y_i$ is drawn, recorded as `step_accept_prob`,
$S_i = a_1 \cdots a_i$, and $F_i$ = "the first i are accepted":

* $E[F_i \mid y_1, .., y_k] = S_i$: coins are tossed at verification, apart for each candidate;
* $E[a_i \mid y_1, .., y_{i-1}] = \beta_i$: the next candidate is a fresh draw from q.

So for any weights that are known in time, a round of k candidates may be charged

$$M = \sum_{i \le k} w_i (F_i - S_i) + \sum_{i \le k} v_i S_{i-1} (a_i - \beta_i),$$

with $w_i$ known when drafting stops and $v_i$ before candidate i is drawn. With $w = 1/\rho$ the luck of the coins
is taken away: a round is credited what it could expect. $v$ does the same, to first order, for the luck of the
candidates; what that leaves (the curvature, and where the text goes on) is the bound's slack. Weights are
combinations of a few functions, chosen on training requests (the mean of the least time is concave in them: pathwise
optimisation, Desai, Farias and Moallemi 2012) and scored on others, so nothing is fitted to what it bounds.
Weights 0 give the *clairvoyant*.

The bound holds for every rule that does not foresee, whatever it looks at, since all it can look at is among what is
conditioned on. It is an estimate from n requests: E[min] is replaced by a mean, and its limit is one-sided. It needs
scored rollouts and the recorded probabilities to be those the coins were tossed with; where a trace lacks them only the
clairvoyant is left. With greedy decoding both models' knowledge is everything, and the two coincide.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mdp.trace import Trace
from simulate.starts import Starts

__all__ = ["COINS", "Penalty", "charge", "fit_penalty", "has_coins", "least_times"]

COINS = ("token_accept_prob", "step_accept_prob")
MAX_CALLS = 120


@dataclass(frozen=True)
class Penalty:
    """Weights of the fair charges, in units of time."""

    weights: tuple[float, ...]


def has_coins(trace: Trace) -> bool:
    """Whether the trace holds what the charges are made of."""
    along = trace.rollout_offsets is not None and all(name in trace.rollout_features for name in COINS)
    return along and all(name in trace.features for name in COINS)


def least_times(
    starts: Starts, round_times: Float[np.ndarray, " K+1"], penalty: Penalty | None = None
) -> Float[np.ndarray, " R"]:
    """Least time (charges included) of each request, all its draws known: backward over cursors."""
    cost = round_times if penalty is None else round_times + charge(starts, penalty)
    return _shortest(starts, cost)[0]


def charge(starts: Starts, penalty: Penalty) -> Float[np.ndarray, "N K+1"]:
    """What a round of k candidates from each position is charged; mean 0 under every policy that does not foresee."""
    return sum(w * part for w, part in zip(penalty.weights, _charges(starts), strict=True))  # type: ignore[return-value]


def fit_penalty(starts: Starts, round_times: Float[np.ndarray, " K+1"], rate: float) -> Penalty:
    """Weights that make the bound on these requests tightest, from those of a solved value at this rate on.

    Any weights give a bound on other requests; how well these are found decides how tight it is there.
    """
    from scipy.optimize import minimize

    charges = _charges(starts)
    guess = np.zeros(len(charges))
    guess[:2] = 1.0 / rate

    def loss(scaled: np.ndarray) -> tuple[float, np.ndarray]:
        cost = round_times + sum(w * part for w, part in zip(scaled / rate, charges, strict=True))
        least, chosen = _shortest(starts, cost)
        slope = np.array([charge[chosen].sum() for charge in charges])
        return -float(least.sum()) / len(least), -slope / (rate * len(least))

    found = minimize(loss, guess * rate, jac=True, method="L-BFGS-B", options={"maxfun": MAX_CALLS})
    best = min((loss(x)[0], tuple((x / rate).tolist())) for x in (found.x, guess * rate))
    return Penalty(best[1])


def _charges(starts: Starts) -> list[Float[np.ndarray, "N K+1"]]:
    """Fair charges of a round of k candidates from each position: each column has mean 0 under any policy."""
    accept, mean = (starts.features[name] for name in COINS)
    most, count = starts.max_candidates, len(starts.depth)
    candidate = np.arange(1, most + 1)
    drafted = candidate <= starts.depth[:, None]
    accept, mean = np.where(drafted, accept, 0.0), np.where(drafted, mean, 0.0)
    survival = np.cumprod(accept, axis=1)
    before = np.concatenate([np.ones((count, 1)), survival[:, :-1]], axis=1)
    coins = np.where(drafted, (candidate <= starts.accepted[:, None]) - survival, 0.0)
    draws = np.where(drafted, before * (accept - mean), 0.0)
    left = 1.0 - (candidate - 1) / most
    parts = [coins, draws, draws * left, draws * mean, draws * before, coins * survival]
    return [np.concatenate([np.zeros((count, 1)), np.cumsum(part, axis=1)], axis=1) for part in parts]


def _shortest(starts: Starts, cost: Float[np.ndarray, "... K+1"]) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Cheapest path of each request, and the rounds on it as (positions, candidates)."""
    most = starts.max_candidates
    cost = np.where(np.arange(most + 1) <= starts.depth[:, None], cost, np.inf)
    every = np.arange(len(starts.depth))
    onward = np.stack([starts.emitted(np.full(len(every), k), every) for k in range(most + 1)], axis=1)
    lengths = starts.lengths
    # value[r, t]: least time of request r with t tokens left; columns beyond the text stay 0
    value = np.zeros((len(lengths), lengths.max() + 1))
    choice = np.zeros(len(every), dtype=np.int64)
    row = np.arange(len(lengths))
    for left in range(1, lengths.max() + 1):
        on = row[lengths >= left]
        at = starts.offsets[on + 1] - left
        total = cost[at] + value[on[:, None], np.maximum(left - onward[at], 0)]
        choice[at] = total.argmin(axis=1)
        value[on, left] = total[np.arange(len(on)), choice[at]]
    path, cursor, on = [], starts.offsets[:-1].copy(), row
    while len(on):
        at = cursor[on]
        path.append(at)
        cursor[on] = at + onward[at, choice[at]]
        on = on[cursor[on] < starts.offsets[on + 1]]
    visited = np.concatenate(path)
    return value[row, lengths], (visited, choice[visited])
