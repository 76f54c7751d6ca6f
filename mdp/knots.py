r"""Where the price problem keeps its values: knots on the survival axis, one row per depth.

CONTINUE at depth k is piecewise linear in survival. Its kinks are the thresholds of later depths divided by the
acceptances in between, so a first pass on even knots, good enough for thresholds, tells a second pass where they
are. Where they outnumber the knots, one knot a cell is put on a kink and the rest of the curve is nearly smooth.
"""

from typing import Any, NamedTuple

import numpy as np

__all__ = ["Grid", "even_and_kinks", "place"]

MAX_CLASSES = 96
"""With more classes of regimes kinks are so dense that even knots do as well."""


class Grid(NamedTuple):
    """Knots per depth [K, N], and where `accept_prob * knot` falls among the next depth's knots [K, Y, N].

    `weight` is the share of the way from knot `cell` to the next one.
    """

    knots: Any
    cell: Any
    weight: Any


def place(accept_prob: np.ndarray, knots: np.ndarray) -> Grid:
    """Locate each product of acceptance and knot among the next depth's knots."""
    depth, size = accept_prob.shape
    cell = np.empty((depth, size, knots.shape[1]), dtype=np.int32)
    weight = np.empty(cell.shape)
    for k in range(depth):
        following = knots[min(k + 1, depth - 1)]
        survival = accept_prob[k][:, None] * knots[k]
        cell[k] = np.clip(np.searchsorted(following, survival, side="right") - 1, 0, len(following) - 2)
        low = following[cell[k]]
        width = following[cell[k] + 1] - low
        weight[k] = np.clip((survival - low) / np.where(width > 0, width, 1.0), 0.0, 1.0)
    return Grid(knots, cell, weight)


def _thin(values: np.ndarray, low: float, most: int) -> np.ndarray:
    """At most one value in each of `most` even cells of [low, 1]."""
    cell = np.minimum((values - low) / (1.0 - low) * most, most - 1).astype(int)
    return values[np.diff(cell, prepend=-1) > 0]


def _kinks(
    accept_prob: np.ndarray, into: np.ndarray, threshold: np.ndarray, lowest: np.ndarray, most: int
) -> list[np.ndarray]:
    """Survivals at which CONTINUE has a kink at each depth: thresholds further down over the acceptances between."""
    depth, size = accept_prob.shape
    below: list[np.ndarray] = [np.empty(0)] * depth
    for k in range(depth - 2, -1, -1):
        found = [np.empty(0)]
        for z in range(size):
            limit, accept = threshold[k + 1, into[z]], accept_prob[k, z]
            if accept > 0 and limit <= accept:
                inherited = below[k + 1]
                bends = np.append(inherited[(inherited > limit) & (inherited <= accept)], limit)
                found.append(bends[bends > 0] / accept)
        bends = np.unique(np.concatenate(found))
        bends = bends[(np.diff(bends, prepend=-1.0) > 1e-14) & (bends > lowest[k]) & (bends < 1.0)]
        below[k] = bends if len(bends) <= most else _thin(bends, lowest[k], most)
    return below


def even_and_kinks(
    accept_prob: np.ndarray, into: np.ndarray, threshold: np.ndarray | None, num_knots: int, reach: float = 0.9
) -> np.ndarray:
    """A row of knots per depth: 0, then evenly from below the least threshold to 1, on the kinks where they are known.

    Below the least threshold of a depth every regime stops, and STOP is kept exactly.

    Args:
        accept_prob: [K, Y] acceptance of each outcome of a draft step.
        into: [Y] the class of regimes each outcome belongs to.
        threshold: [K, C] thresholds of an earlier pass, None on the first.
        num_knots: knots per depth.
        reach: where the even knots begin, as a share of the least threshold.
    """
    depth = accept_prob.shape[0]
    if threshold is None:
        return np.tile(np.linspace(0.0, 1.0, num_knots), (depth, 1))
    lowest = reach * np.minimum(threshold.min(axis=1), 1.0)
    rows = np.zeros((depth, num_knots))
    if threshold.shape[1] > MAX_CLASSES:
        for k in range(depth):
            rows[k, 1:] = np.linspace(lowest[k], 1.0, num_knots - 1)
        return rows
    for k, bends in enumerate(_kinks(accept_prob, into, threshold, lowest, num_knots // 2)):
        even = np.linspace(lowest[k], 1.0, num_knots - 1 - len(bends))
        rows[k, 1:] = np.sort(np.concatenate([even, bends]))
    return rows
