r"""What a survival threshold earns when acceptances are drawn afresh from a continuous law: two roundings enclose it.

The rule goes on at depth k iff $S_k \ge h_k$, so with $N$ the candidates drafted and $m = E[a]$

$$E[\text{emitted}] = 1 + m \sum_{n \ge 1} E[S_{n-1};\, N \ge n], \qquad
  E[\text{time}] = T(0) + \sum_{n \ge 1} (T(n) - T(n-1))\, P(N \ge n).$$

*Claim.* Round $\log S$ down to a grid after each candidate, and the rule stops no later; round it up, and it stops no
earlier. *Proof:* the rounded survival is on its side of the true one after every candidate, and the rule is monotone
in it. $\square$ So each of these probabilities and weights lies between its values under the two roundings; each term
of the sums takes the end that its sign calls for. On the grid $\log S$ is a random walk whose steps do not depend on
where it is: a convolution. Weights $E[S; \cdot]$ are carried as a second measure, with steps weighted by a, so that
rounding moves decisions only, not what they earn. The width falls in proportion to the grid's step.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import fft

from mdp.continuous import BetaMixture
from mdp.policy import TIE

__all__ = ["Enclosure", "enclose"]

CELLS = 2**17
ROUNDING = 1e-12  # what convolutions and sums of that many probabilities can be off by
RARE = 1e-15


class Enclosure(NamedTuple):
    """Low and high value [2] of expectations per round."""

    emitted: Float[np.ndarray, " 2"]
    time: Float[np.ndarray, " 2"]
    drafted: Float[np.ndarray, " 2"]


def enclose(
    process: BetaMixture, threshold: Float[np.ndarray, " K"], round_time: Float[np.ndarray, " K+1"], cells: int = CELLS
) -> Enclosure:
    """Bounds on what the rule "go on iff S_k >= threshold[k]" drafts, emits and takes per round.

    Args:
        process: whose acceptances are independent of each other.
        threshold: inf means stop.
        round_time: T(k) = k t_d + V(k).
        cells: of the grid, evenly in log survival down to the least threshold.
    """
    positive = threshold[(threshold > TIE) & (threshold <= 1.0)]
    reach = -np.log(positive.min()) + 0.1 if positive.size else 1.0
    grid = -np.arange(cells + 1) * (reach / cells)
    (low_reach, low_weight), (high_reach, high_weight) = (
        _walk(process, threshold, grid, rounded_up) for rounded_up in (False, True)
    )
    reaches, weights = np.stack([low_reach, high_reach]), np.stack([low_weight, high_weight])
    slack = ROUNDING * len(threshold) * np.array([-1.0, 1.0])
    longer = np.diff(round_time)
    time = round_time[0] + np.array(
        [(longer * np.where(longer >= 0, reaches[end], reaches[1 - end])).sum() for end in (0, 1)]
    )
    return Enclosure(
        1.0 + process.mean * weights.sum(axis=1) + slack,
        time + slack * np.abs(longer).max(),
        reaches.sum(axis=1) + slack,
    )


def _walk(
    process: BetaMixture, threshold: np.ndarray, grid: np.ndarray, rounded_up: bool
) -> tuple[np.ndarray, np.ndarray]:
    """P(N >= n) and E[S_{n-1}; N >= n] for n = 1..K, with log survival rounded to the grid; the last cell is open."""
    cells, survival = len(grid) - 1, np.exp(grid)
    last = survival[-1] if rounded_up else 0.0  # where the open cell's survival is taken to be
    size = fft.next_fast_len(2 * cells + 1, real=True)
    spectra = []
    for beyond in process.above(survival):
        steps = np.zeros(cells + 1)
        steps[0 if rounded_up else 1 :][:cells] = np.diff(beyond)
        spectra.append(fft.rfft(steps, size))
    totals = np.array([1.0, process.mean])
    mass, beyond = np.zeros((2, cells + 1)), np.zeros(2)
    mass[:, 0] = 1.0
    found = np.zeros((2, len(threshold)))
    for k, limit in enumerate(threshold):
        going_on = np.searchsorted(-survival[:-1], TIE - limit, side="right") if np.isfinite(limit) else 0
        mass[:, going_on:] = 0.0
        beyond = beyond if last >= limit - TIE else np.zeros(2)
        kept = mass.sum(axis=1)
        found[:, k] = kept + beyond
        if found[0, k] < RARE:
            if rounded_up:  # and no more later
                found[:, k:] = found[:, k : k + 1]
            break
        for i, spectrum in enumerate(spectra):
            mass[i] = np.maximum(np.asarray(fft.irfft(fft.rfft(mass[i], size) * spectrum, size))[: cells + 1], 0.0)
        mass[:, -1] = 0.0
        beyond = np.maximum(totals * (kept + beyond) - mass.sum(axis=1), 0.0)  # what has left the grid
    return found[0], found[1]
