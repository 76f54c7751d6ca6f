r"""Continuous acceptance processes, solved between a problem worth less and one worth more.

Acceptances drawn afresh need no cells (`mdp.independent`); those with memory are put between two chains
(`AcceptanceProcess.bracket`), and the lower bound of one and the upper bound of the other are taken.
"""

from typing import Any

import numpy as np

from mdp.certificate import certificate
from mdp.continuous import BetaMixture
from mdp.independent import Knots, price
from mdp.policy_iteration import FIRST_KNOTS, THRESHOLD_TOLERANCE, Found, close, in_units, rates_per_round
from mdp.problem import StoppingProblem
from mdp.rounded import enclose

__all__ = ["drawn_afresh", "with_memory"]

COUNTS = tuple(2**power for power in range(10, 25, 2))
"""Knots where acceptances are drawn afresh."""

NODES, MAX_PRODUCTS = (127, 255, 511, 1023, 2047), 2**33
"""Nodes of a law with memory, coarse to fine, one less than a padded size; and the most nodes^2 x knots x depths."""


def drawn_afresh(
    problem: StoppingProblem, unit: float, tol: float, max_knots: int, max_sweeps: int
) -> tuple[Found, bool]:
    r"""Acceptances drawn afresh from a continuous law (`mdp.independent`), with more knots until the bounds agree.

    Thresholds S are those from below. With $D$ the worth of CONTINUE - STOP at the true rate, $\sigma$ the slack at S,
    $\Delta$ the bounds' relative width and $L = \sum_{j=1}^{K-k} m^j$ the most tokens any rule can still expect per
    unit of survival, $-\Delta S L \le D(S) \le \sigma + \Delta S L$: a rule that breaks even at S spends at most
    $S L / \rho$ on it, which is what a change of the rate is multiplied with. Where the right side is at most
    `THRESHOLD_TOLERANCE` for every k, S is right wherever $|D|$ exceeds that.
    """
    process, finite = problem.acceptance, in_units(problem.unseen(), unit)
    assert isinstance(process, BetaMixture)
    if process.sure:
        found = close(finite, tol, THRESHOLD_TOLERANCE / 2, THRESHOLD_TOLERANCE / 2, max_knots, max_sweeps)
        return found, found.closed
    depth = finite.max_candidates
    most = np.cumsum(process.mean ** np.arange(1, depth + 1))[::-1]  # L for k = 0..K-1
    rate, lowest, lower, upper, num_sweeps = 1.0 / float(finite.verify_time[0]), 1e-3, 0.0, np.inf, 0
    counts = [count for count in COUNTS if count <= max(max_knots, COUNTS[0])]
    for count in counts:
        knots = Knots(process, count, lowest)
        for _ in range(max_sweeps):
            priced = price(knots, rate, finite.draft_time, finite.verify_time)
            num_sweeps += 1
            if abs(priced.lower) <= 1e-3 * tol * rate * priced.time:
                break
            rate += priced.lower / priced.time
        low, high = certificate(rate, priced.lower, priced.upper, finite.round_time, 0.0, count)
        lower, upper = max(lower, float(low)), min(upper, float(high))
        at = np.minimum(priced.threshold, 1.0)
        unsure = (upper - lower) / max(lower, np.finfo(float).tiny) * at * most
        closed = upper - lower <= tol * lower
        if closed and (priced.slack + unsure).max() > THRESHOLD_TOLERANCE:
            priced = price(knots, rate, finite.draft_time, finite.verify_time, sharp=True)
            closed = bool((priced.slack + unsure).max() <= THRESHOLD_TOLERANCE)
        if closed:
            break
        lowest = 0.8 * float(min(at[at > 0], default=1e-3 / 0.8))
    drawn = enclose(process, priced.threshold, finite.round_time, cells=2**14)
    emitted, drafted = float(drawn.emitted.mean()), float(drawn.drafted.mean())
    found = Found(
        (lower + upper) / 2, np.zeros(1), (lower, upper), priced.threshold[:, None], priced.slack,
        rates_per_round(emitted, drafted), closed, num_sweeps, count,
    )  # fmt: skip
    return found, closed


def with_memory(
    problem: StoppingProblem, unit: float, tol: float, max_knots: int, max_sweeps: int
) -> tuple[Found, bool]:
    """A process with a continuum of regimes between two finite problems, refined until their bounds agree.

    The lower problem's table is reported, a column per node (`AcceptanceProcess.regimes`).
    """
    depth = int(problem.max_candidates)
    allowed = [size for size in NODES if size == NODES[0] or size**2 * 4 * FIRST_KNOTS * depth <= MAX_PRODUCTS]
    low: Any = None
    high: Any = None
    lower, upper, num_sweeps, size = 0.0, np.inf, 0, NODES[0]
    while True:
        # The gap falls with the square of the nodes' distance; knots have to close a part of it only.
        goal = max(tol / 4, size**-2.0)
        knots = max(FIRST_KNOTS, min(max_knots, 2 ** int(np.log2(MAX_PRODUCTS / (size**2 * depth)))))
        low, high = (
            close(in_units(finite, unit), goal, np.inf, np.inf, knots, max_sweeps, like)
            for finite, like in zip(problem.bracket(size), (low, high), strict=True)
        )
        num_sweeps += low.num_sweeps + high.num_sweeps
        lower, upper = max(lower, low.bounds[0]), min(upper, high.bounds[1])
        closed = upper - lower <= tol * lower
        finer = [more for more in allowed if more > size]
        if closed or not finer:
            break
        enough = 1.1 * size * np.sqrt((upper - lower) / (tol * lower)) if lower > 0 else np.inf
        size = next((more for more in finer if more >= enough), finer[-1])
    found = low._replace(
        rate=(lower + upper) / 2, bounds=(lower, upper), threshold=low.threshold[:, :-1], bias=np.zeros(1),
        num_sweeps=num_sweeps,
    )  # fmt: skip
    return found, closed
