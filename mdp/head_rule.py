r"""The rule of SpecDec++ on a biased head, at all thresholds at once and without sampling.

*Bias* (theory, F6). A head trained with weight $w$ on rejections puts out $\hat a = m / (m + w(1 - m))$ where the
probability of acceptance given its input is $m$; so $m = w \hat a / (1 - \hat a + w \hat a)$.

*Rule.* With $\hat S_k$ the product of the first k outputs, stop at k candidates iff $1 - \hat S_{k - \text{lag}} > h$,
never before `least` candidates, always at `max_candidates`. The released code scores a candidate while drafting the
next one: `lag` = 1.

*Value.* $\hat S$ only falls, so a round reaches candidate $j >$ `least` iff $\hat S_n \ge 1 - h$ with
$n = j - 1 - $ lag. With $P_j = P(\hat S_n \ge 1 - h)$ and $F_j = E[S_j; \hat S_n \ge 1 - h]$ (1 and $E[S_j]$ for
$j \le$ `least`), E[emitted] $= 1 + \sum_j F_j$ and E[time] $= V(0) + \sum_j P_j (t_d + V(j) - V(j-1))$: one pass over
the laws of $\hat S_n$ serves every threshold.

*Finite chains*: paths that agree in regime and $\hat S_n$ are merged; exact. *Seen iid acceptances* (`BetaMixture`):
$-\ln \hat S_n$ is a sum of n independent terms, a convolution on a grid; rounding each term down or up bounds $P_j$ and
$F_j$ from both sides, hence the throughput.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special

from mdp.acceptance import BetaMixture
from mdp.policy import MERGE, TIE
from mdp.problem import FiniteProblem, StoppingProblem

__all__ = [
    "HeadCurve",
    "HeadRule",
    "best_seen_threshold",
    "fixed_curve",
    "head_curve",
    "told_throughput",
    "unweighted",
    "weighted",
]

MAX_STATES = 2_000_000
MAX_STEPS, MAX_THRESHOLD = 30, 0.999  # Dinkelbach takes about five
SUBCELLS, FIRST_CELL = 4, np.geomspace(1e-9, 1.0, 96)


def weighted(accept_prob: Any, weight: float) -> Float[np.ndarray, "..."]:
    """What a head that was trained with `weight` on rejections puts out where acceptance has this probability.

    Example:
        >>> float(weighted(np.array(0.72), 6.0).round(3))  # SpecDec++'s h = .7 for one token is a rejection of .28
        0.3
    """
    accept_prob = np.asarray(accept_prob, dtype=np.float64)
    return accept_prob / (accept_prob + weight * (1.0 - accept_prob))


def unweighted(output: Any, weight: float) -> Float[np.ndarray, "..."]:
    """The acceptance probability behind a weighted head's output; undoes `weighted`."""
    return weighted(output, 1.0 / weight)


@dataclass(frozen=True)
class HeadRule:
    """All of the rule but its threshold: the head's `weight`, the `lag` of its score, and the `least` candidates."""

    weight: float = 1.0
    lag: int = 0
    least: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.weight < np.inf:
            raise ValueError(f"weight: must be a finite number > 0, got {self.weight!r}")
        for name in ("lag", "least"):
            if not isinstance(getattr(self, name), (int, np.integer)) or getattr(self, name) < 0:
                raise ValueError(f"{name}: must be a whole number >= 0, got {getattr(self, name)!r}")


class HeadCurve(NamedTuple):
    """Expected counts and time of one round at each threshold h [N], and bounds on the throughput (equal if exact)."""

    threshold: Float[np.ndarray, " N"]
    emitted: Float[np.ndarray, " N"]
    drafted: Float[np.ndarray, " N"]
    time: Float[np.ndarray, " N"]
    lower: Float[np.ndarray, " N"]
    upper: Float[np.ndarray, " N"]

    @property
    def throughput(self) -> Float[np.ndarray, " N"]:
        return self.emitted / self.time

    @property
    def verification_rate(self) -> Float[np.ndarray, " N"]:
        return 1.0 / self.emitted

    @property
    def discard_rate(self) -> Float[np.ndarray, " N"]:
        return (self.drafted - (self.emitted - 1.0)) / self.emitted

    @property
    def best(self) -> int:
        """Index of the threshold that earns most."""
        return int(np.argmax(self.throughput))


def head_curve(
    problem: StoppingProblem | FiniteProblem,
    rule: HeadRule,
    thresholds: Float[np.ndarray, " N"] | None = None,
    *,
    output: Float[np.ndarray, " Z"] | None = None,
    cells: int = 4096,
) -> HeadCurve:
    """What the rule earns at each threshold.

    Args:
        problem: rounds must renew; a finite process, or a `BetaMixture`.
        rule: weight, lag and least candidates.
        thresholds: h in [0, 1), or for a finite process None: every threshold that makes a difference.
        output: for a finite process, the head's output per regime instead of its weighted acceptance.
        cells: of the grid for continuous acceptances.

    Raises:
        ValueError: if rounds persist, a threshold is missing or outside [0, 1), or the tree is too large.

    Example:
        >>> from mdp.cost import Affine
        >>> problem = StoppingProblem(BetaMixture(0.8, 2.0), Affine(0.2, 1.0), max_candidates=20)
        >>> curve = head_curve(problem, HeadRule(weight=6.0, lag=1, least=2), np.array([0.5, 0.7, 0.9]))
        >>> curve.throughput.round(2).tolist()
        [1.9, 1.95, 1.96]
    """
    if thresholds is not None:
        thresholds = np.atleast_1d(np.asarray(thresholds, dtype=np.float64))
        bad = thresholds[~((thresholds >= 0) & (thresholds < 1))]
        if bad.size:
            raise ValueError(f"thresholds: must lie in [0, 1), got {bad[0]:g}")
    if isinstance(problem, StoppingProblem) and isinstance(problem.acceptance, BetaMixture):
        if thresholds is None or output is not None:
            raise ValueError("thresholds: continuous acceptances need some, and give the head's output themselves")
        return _continuous(problem, problem.acceptance, rule, thresholds, cells)
    finite = problem.lower() if isinstance(problem, StoppingProblem) else problem
    if finite.persistent:
        raise ValueError("coupling: the head's curve needs rounds that renew")
    return _finite(finite, rule, thresholds, output)


def _assemble(problem: FiniteProblem, threshold, reach, kept, reach_bounds=None, kept_bounds=None) -> HeadCurve:
    """The curve from P_j and F_j [K, N]; bounds are (below, above) pairs of the same."""
    step = problem.step_time[:, None]
    start = problem.verify_time[0]
    emitted, drafted, time = 1.0 + kept.sum(axis=0), reach.sum(axis=0), start + (step * reach).sum(axis=0)
    lower = upper = emitted / time
    if reach_bounds is not None and kept_bounds is not None:
        below, above = reach_bounds
        least = start + (np.where(step >= 0, below, above) * step).sum(axis=0)
        most = start + (np.where(step >= 0, above, below) * step).sum(axis=0)
        lower, upper = (1.0 + kept_bounds[0].sum(axis=0)) / most, (1.0 + kept_bounds[1].sum(axis=0)) / least
    return HeadCurve(threshold, emitted, drafted, time, lower, upper)


def told_throughput(
    problem: FiniteProblem, survival_threshold: Float[np.ndarray, "K Z"], output: Float[np.ndarray, "... Z"]
) -> float:
    """What a table earns whose survival is the product of these outputs [Z] or [K, Z]; rounds renew."""
    shown = np.broadcast_to(output, problem.accept_prob.shape)
    states = _start(problem)
    emitted, time = 1.0, 0.0
    for k in range(problem.max_candidates + 1):
        goes_on = np.zeros(len(states.regime), dtype=bool)
        if k < problem.max_candidates:
            goes_on = states.product >= survival_threshold[k, states.regime] - TIE
        time += problem.verify_time[k] * states.mass[~goes_on].sum()
        states = _States(*(part[goes_on] for part in states))
        if len(states.regime) == 0:
            break
        time += problem.draft_time * states.mass.sum()
        states = _branch(problem, k, shown, states)
        emitted += states.alive.sum()
    return float(emitted / time)


class _States(NamedTuple):
    """Rounds that agree in regime and product of outputs: their mass, and their mass with nothing rejected."""

    regime: np.ndarray
    product: np.ndarray
    mass: np.ndarray
    alive: np.ndarray


def _start(problem: FiniteProblem) -> _States:
    size = problem.num_regimes
    return _States(np.arange(size), np.ones(size), problem.initial, problem.initial)


def _branch(problem: FiniteProblem, k: int, shown: np.ndarray, states: _States) -> _States:
    """Candidate k + 1 is drafted everywhere; what agrees is merged."""
    size = problem.num_regimes
    weight = problem.transition[states.regime]
    product = np.outer(states.product, shown[k])
    mass, alive = states.mass[:, None] * weight, states.alive[:, None] * weight * problem.accept_prob[k]
    possible = mass > 0
    regime = np.broadcast_to(np.arange(size), weight.shape)[possible]
    key = np.rint(product[possible] * MERGE).astype(np.int64) * size + regime
    if len(key) > MAX_STATES:
        raise ValueError(f"the problem is too large for exact evaluation ({len(key)} states at one depth)")
    _, first, group = np.unique(key, return_index=True, return_inverse=True)
    mass, alive = (np.bincount(group, part[possible], len(first)) for part in (mass, alive))
    return _States(regime[first], product[possible][first], mass, alive)


def _finite(problem: FiniteProblem, rule: HeadRule, thresholds, output) -> HeadCurve:
    """All thresholds: at each depth the states in order of their products, summed up to each threshold."""
    depth = problem.max_candidates
    shown = (
        weighted(problem.accept_prob, rule.weight)
        if output is None
        else np.broadcast_to(output, (depth, problem.num_regimes))
    )
    layers = [_start(problem)]
    for k in range(depth - 1):
        layers.append(_branch(problem, k, shown, layers[-1]))
    if thresholds is None:
        values = np.unique(np.rint(np.concatenate([layer.product for layer in layers]) * MERGE) / MERGE)
        thresholds = 1.0 - values[values > 0][::-1]
    level = 1.0 - thresholds - TIE
    reach, kept = np.ones((2, depth, len(thresholds)))
    for j in range(1, depth + 1):
        seen = j - 1 - rule.lag if j > rule.least else -1
        regime, product, mass, alive = layers[max(seen, 0)]
        ahead = _ahead(problem, max(seen, 0), j)[regime]
        order = np.argsort(-product, kind="stable")
        count = np.searchsorted(-product[order], -level, side="right") if seen > 0 else np.full(len(level), len(order))
        reach[j - 1] = np.append(0.0, np.cumsum(mass[order]))[count]
        kept[j - 1] = np.append(0.0, np.cumsum((alive * ahead)[order]))[count]
    return _assemble(problem, thresholds, reach, kept)


def _ahead(problem: FiniteProblem, begin: int, end: int) -> np.ndarray:
    """Probability [Z] that candidates begin + 1 .. end are all accepted."""
    value = np.ones(problem.num_regimes)
    for k in reversed(range(begin, end)):
        value = problem.transition @ (problem.accept_prob[k] * value)
    return value


def fixed_curve(problem: StoppingProblem | FiniteProblem) -> Float[np.ndarray, " K+1"]:
    """Throughput of every fixed length 0..K, for rounds that renew."""
    finite = problem.unseen() if isinstance(problem, StoppingProblem) else problem
    if finite.persistent:
        raise ValueError("coupling: the curve of fixed lengths needs rounds that renew")
    alive, emitted = finite.initial, [1.0]
    for accept_prob in finite.accept_prob:
        alive = (alive @ finite.transition) * accept_prob
        emitted.append(emitted[-1] + float(alive.sum()))
    return np.array(emitted) / finite.round_time


def _continuous(problem: StoppingProblem, law: BetaMixture, rule: HeadRule, thresholds, cells: int) -> HeadCurve:
    """Sums of n independent -ln(output) on a grid: in the middle, and rounded both ways."""
    finite, depth, mean = problem.unseen(), int(problem.max_candidates), law.mean
    if min(law.shapes) == 0.0:
        return _finite(finite, rule, thresholds, None)
    level = -np.log1p(-thresholds)
    width = max(float(level.max()), 1e-3) / cells
    edges = width * np.r_[0.0, FIRST_CELL, np.arange(SUBCELLS + 1, SUBCELLS * cells + 1) / SUBCELLS]
    accept = unweighted(np.exp(-edges), rule.weight)
    first, second = law.shapes
    masses = (
        -np.diff(special.betainc(first, second, accept)),
        -mean * np.diff(special.betainc(first + 1, second, accept)),
    )
    at = (edges[:-1] + edges[1:]) / (2 * width)
    cell = np.minimum(np.floor(at).astype(int), cells - 1)
    names = [(share, kind) for share in ("middle", "above", "below") for kind in ("reach", "kept")]
    shares = {"middle": at - cell, "above": np.zeros(len(at)), "below": np.ones(len(at))}  # rounded down: longer rounds
    steps = [_steps(cell, masses[kind == "kept"], shares[share], cells + 1) for share, kind in names]
    sums = _sums(np.array(steps), depth - 1, level, width, np.array([share == "middle" for share, _ in names]))
    rows = {key: np.ones((depth, len(level))) for key in names}
    for j in range(1, depth + 1):
        seen = j - 1 - rule.lag
        for row, (key, found) in enumerate(rows.items()):
            kept = key[1] == "kept"
            if j > rule.least and seen > 0:
                found[j - 1] = sums[seen, row] * (mean ** (1 + rule.lag) if kept else 1.0)
            elif kept:
                found[j - 1] = mean**j
    reach_bounds, kept_bounds = ((rows["below", kind], rows["above", kind]) for kind in ("reach", "kept"))
    return _assemble(finite, thresholds, rows["middle", "reach"], rows["middle", "kept"], reach_bounds, kept_bounds)


def _steps(cell: np.ndarray, mass: np.ndarray, share: np.ndarray, size: int) -> np.ndarray:
    """Mass at the grid's nodes if this share of each cell's goes to its upper end."""
    return np.bincount(cell, mass * (1.0 - share), size) + np.bincount(cell + 1, mass * share, size)


def _sums(steps: np.ndarray, count: int, level: np.ndarray, width: float, smooth: np.ndarray) -> np.ndarray:
    """Mass [count + 1, R, N] of sums of 0..count terms at or below each level, for R laws of a term.

    Terms off the grid are above all levels. Where `smooth` a node stands for half a cell on either side.
    """
    size, nodes = 2 * steps.shape[1], width * np.r_[0.0, np.arange(steps.shape[1]) + 0.5]
    place = np.floor(level / width + TIE * steps.shape[1]).astype(int)
    turned = np.fft.rfft(steps, size)
    law, rows = np.eye(1, steps.shape[1]).repeat(len(steps), axis=0), [np.ones((len(steps), len(level)))]
    for _ in range(count):
        law = np.maximum(np.fft.irfft(np.fft.rfft(law, size) * turned, size)[:, : steps.shape[1]], 0.0)
        below = np.cumsum(law, axis=1)
        exact = below[:, place]
        for row in np.flatnonzero(smooth):
            exact[row] = np.interp(level, nodes, np.r_[0.0, below[row]])
        rows.append(exact)
    return np.array(rows)


def best_seen_threshold(problem: StoppingProblem, *, cells: int = 16384) -> HeadCurve:
    r"""The optimum where acceptances are independent and seen, as a curve of one point.

    One threshold on the true survival is optimal there if rounds renew and V is affine with slope s (theory, F2):
    $1 - h = \rho^* (t_d + s) / \alpha$. Iterated from plain decoding, as Dinkelbach does.

    Raises:
        ValueError: if the process is no `BetaMixture`, or V is not affine.
    """
    steps = np.diff(problem.cost.verify_times(int(problem.max_candidates)))
    if not isinstance(problem.acceptance, BetaMixture) or np.ptp(steps) > TIE * (1.0 + abs(steps[0])):
        raise ValueError("problem: one threshold is known to be optimal for beta_mixture with affine times only")
    price = (problem.cost.draft_time + steps[0]) / problem.acceptance.mean
    curve, rate = None, 0.0
    for _ in range(MAX_STEPS):
        threshold = np.clip(1.0 - rate * price, 0.0, MAX_THRESHOLD)
        curve = head_curve(problem, HeadRule(), np.array([threshold]), cells=cells)
        if abs(curve.throughput[0] - rate) <= 1e-9 * rate:
            break
        rate = float(curve.throughput[0])
    assert curve is not None
    return curve
