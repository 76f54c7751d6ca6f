"""Chains of round starts: which start regime follows which, and how often each is met in the long run."""

import numpy as np
from jaxtyping import Bool, Float
from scipy.sparse.csgraph import connected_components

__all__ = ["reachable", "recurrent_classes", "stationary_law"]

NEGLIGIBLE = 1e-150
"""A round as rare as this never comes; its inverse squared would overflow."""


def reachable(edges: Bool[np.ndarray, "Z Z"], start: Bool[np.ndarray, " Z"]) -> Bool[np.ndarray, " Z"]:
    """Regimes that can be met from `start` in any number of steps, none included."""
    seen = np.asarray(start, dtype=bool)
    while True:
        more = seen | edges[seen].any(axis=0)
        if (more == seen).all():
            return seen
        seen = more


def recurrent_classes(chain: Float[np.ndarray, "Z Z"], initial: Float[np.ndarray, " Z"]) -> list[np.ndarray]:
    """The closed classes of regimes that the chain can end up in from `initial`."""
    edges = chain > NEGLIGIBLE
    met = np.flatnonzero(reachable(edges, initial > 0))
    count, labels = connected_components(edges[np.ix_(met, met)], connection="strong")
    classes = [met[labels == label] for label in range(count)]
    return [members for members in classes if not np.delete(edges[members], members, axis=1).any()]


def stationary_law(chain: Float[np.ndarray, "Z Z"], members: np.ndarray) -> Float[np.ndarray, " Z"]:
    """Long-run law of the chain inside one closed class.

    State reduction without subtractions (Grassmann, Taksar, Heyman 1985): each entry is right to rounding even where
    parts of the chain hardly ever meet.
    """
    rest = chain[np.ix_(members, members)].astype(np.float64)
    rest[rest <= NEGLIGIBLE] = 0.0
    for last in range(len(members) - 1, 0, -1):
        rest[:last, last] /= rest[last, :last].sum()
        rest[:last, :last] += np.outer(rest[:last, last], rest[last, :last])
    law = np.ones(len(members))
    for state in range(1, len(members)):
        law[state] = law[:state] @ rest[:state, state]
    out = np.zeros(len(chain))
    out[members] = law / law.sum()
    return out
