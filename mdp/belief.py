r"""Hidden regimes: what a stopper knows who sees symbols only.

Symbols $o_k \sim O(z_k, \cdot)$ are independent of acceptance given the regimes. Sufficient for what is still to come
is the pair $(w, \pi)$: $\pi(z)$ is the probability of regime z given $o_1..o_k$, $w(z)$ that of regime z *and* no
rejection yet; $w_0 = \pi_0 =$ `initial`. A further symbol o has probability
$c = \sum_{z, y} \pi(z) P(z, y) O(y, o)$ and leads to

$$\pi'(y) = \sum_z \pi(z) P(z, y) O(y, o) / c, \qquad w'(y) = a(y) \sum_z w(z) P(z, y) O(y, o) / c,$$

both with the same c. Survival is $\sum_z w(z)$. It may rise: a symbol that speaks for the good regimes speaks for the
candidates before it, too. It is not the product of the acceptances $\sum_y a(y) \pi_k(y)$ that a calibrated head would
report one by one: those know of earlier candidates that they were drafted, not that they were accepted.

A point is the row $x = [w, \pi]$. Histories that agree in it are one point.

Theory, F8.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt

from mdp.problem import FiniteProblem

__all__ = ["MERGE", "Branches", "branch", "cells", "merge", "next_accept_prob", "survival"]

BITS = 44
MERGE = 2.0**BITS
"""Points closer than 1 / MERGE in every coordinate may be made one."""

IMPOSSIBLE = 1e-280
"""A symbol as improbable as this never comes; dividing by it would overflow."""

_FACTORS = np.random.default_rng(0).integers(0, 2**63, size=4096, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


class Branches(NamedTuple):
    """One more candidate behind n points: probability that it and all before are accepted, and what each symbol does.

    Rows of `point` for symbols that cannot come are 0.
    """

    gain: Float[np.ndarray, " n"]
    chance: Float[np.ndarray, "n O"]
    point: Float[np.ndarray, "n O 2Z"]


def branch(
    problem: FiniteProblem, observation: Float[np.ndarray, "Z O"], k: int, points: Float[np.ndarray, "n 2Z"]
) -> Branches:
    """Draft candidate k + 1 at every point."""
    size = problem.num_regimes
    kept = points[:, :size] @ problem.transition * problem.accept_prob[k]
    moved = points[:, size:] @ problem.transition
    chance = moved @ observation
    chance[chance < IMPOSSIBLE] = 0.0
    scale = np.divide(1.0, chance, out=np.zeros_like(chance), where=chance > 0)
    both = np.stack([kept, moved], axis=1)[:, None]  # [n, 1, 2, Z]
    point = both * observation.T[None, :, None, :] * scale[:, :, None, None]
    return Branches(kept.sum(axis=1), chance, point.reshape(*chance.shape, 2 * size))


def cells(points: Float[np.ndarray, "n d"], bits: int) -> UInt[np.ndarray, " n"]:
    """A number for the cell of side 2^-bits that each point falls in; two cells hardly ever share theirs."""
    key = np.rint(points * 2.0**bits).astype(np.int64).view(np.uint64)
    return (key * _FACTORS[: points.shape[1]]).sum(axis=1)


def merge(points: Float[np.ndarray, "n d"]) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " n"]]:
    """First of every group of points that agree, and the group of each point."""
    if len(points) < 2:
        return np.arange(len(points)), np.zeros(len(points), dtype=np.int64)
    key = cells(points, BITS)
    _, first, group = np.unique(key, return_index=True, return_inverse=True)
    if np.abs(points - points[first[group]]).max() > 2.0 / MERGE:  # two keys met by chance
        return np.arange(len(points)), np.arange(len(points))
    return first, group


def survival(points: Float[np.ndarray, "n 2Z"]) -> Float[np.ndarray, " n"]:
    """Probability that no candidate was rejected, given the symbols."""
    return points[:, : points.shape[1] // 2].sum(axis=1)


def next_accept_prob(problem: FiniteProblem, k: int, points: Float[np.ndarray, "n 2Z"]) -> Float[np.ndarray, " n"]:
    """Probability that candidate k + 1 is accepted, given the symbols and that all before it were; 0 if none can be."""
    alive = survival(points)
    kept = points[:, : problem.num_regimes] @ problem.next_accept_prob[k]
    return np.divide(kept, alive, out=np.zeros_like(kept), where=alive > 0)
