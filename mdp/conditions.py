"""The conditions under which rules of a simple form are optimal: None where one holds, else what breaks it, in a line.

Each looks at what can happen only: regimes that rounds can meet with a chance left that nothing is rejected yet.
Theory, section 2.
"""

import numpy as np
from jaxtyping import Bool

from mdp.families import start_regimes
from mdp.problem import FiniteProblem

__all__ = [
    "bent", "concave", "falling", "many_survivals", "met_regimes", "persists", "revealing", "seen_to_vary",
    "varying_next_accept",
]  # fmt: skip

ROUNDING = 1e-12


def met_regimes(problem: FiniteProblem) -> Bool[np.ndarray, "K Z"]:
    """Whether k candidates, all of which may yet be accepted, can end in regime z, for k = 0..K-1."""
    met = [start_regimes(problem)]
    for accept in problem.accept_prob[:-1]:
        met.append((met[-1] @ (problem.transition > 0)) & (accept > 0))
    return np.array(met)


def varying_next_accept(problem: FiniteProblem) -> str | None:
    """Whether a-bar is one number at all (k, z) that can be met with survival above 0."""
    met = met_regimes(problem)
    values = np.where(met, problem.next_accept_prob, np.nan)
    low, high = np.nanmin(values), np.nanmax(values)
    if high - low <= ROUNDING:
        return None
    (k, z), (j, y) = (np.argwhere(values == end)[0] for end in (low, high))
    return f"the next acceptance varies: {low:.6g} at k {k}, regime {z}, and {high:.6g} at k {j}, regime {y}"


def persists(problem: FiniteProblem) -> str | None:
    """Whether rounds renew."""
    return "rounds persist" if problem.persistent else None


def bent(problem: FiniteProblem) -> str | None:
    """Whether V is affine."""
    steps = np.diff(problem.verify_time)
    if np.ptp(steps) <= ROUNDING * problem.round_time.max():
        return None
    return f"V is not affine: its steps range from {steps.min():.6g} to {steps.max():.6g}"


def concave(problem: FiniteProblem) -> str | None:
    """Whether V is convex."""
    bends = np.diff(problem.verify_time, n=2)
    if not bends.size or bends.min() >= -ROUNDING * problem.round_time.max():
        return None
    k = int(bends.argmin())
    return f"V is not convex: its step falls by {-bends.min():.6g} from candidate {k + 1} to {k + 2}"


def falling(problem: FiniteProblem) -> str | None:
    """Whether V never falls."""
    steps = np.diff(problem.verify_time)
    if steps.min() >= -ROUNDING * problem.round_time.max():
        return None
    return f"V falls by {-steps.min():.6g} from candidate {int(steps.argmin())} to {int(steps.argmin()) + 1}"


def revealing(problem: FiniteProblem) -> str | None:
    """Whether the case is monotone: a(z') a-bar(z') <= a-bar(z) on every transition that can happen."""
    met = met_regimes(problem)
    for k in range(problem.max_candidates - 1):
        later = problem.accept_prob[k] * problem.next_accept_prob[k + 1]
        rise = np.where(met[k][:, None] & (problem.transition > 0), later - problem.next_accept_prob[k][:, None], -1)
        if rise.max() > ROUNDING:
            z, y = np.unravel_index(rise.argmax(), rise.shape)
            return (
                f"not monotone: from regime {z} to {y} the chance of one more token rises from "
                f"{problem.next_accept_prob[k, z]:.6g} to {later[y]:.6g}"
            )
    return None


def seen_to_vary(problem: FiniteProblem) -> str | None:
    """Whether acceptances are known once the start regime is."""
    for start in np.flatnonzero(start_regimes(problem)):
        met = np.eye(problem.num_regimes, dtype=bool)[start]
        for k, accept in enumerate(problem.accept_prob):
            met = met @ (problem.transition > 0)
            if not met.any():
                break  # something is rejected for certain: nothing behind it counts
            values = accept[met]
            if np.ptp(values) > ROUNDING:
                return (
                    f"acceptance is seen to vary: candidate {k + 1} behind start regime {start} has "
                    f"{values.min():.6g} to {values.max():.6g}"
                )
            met &= accept > 0
    return None


def many_survivals(problem: FiniteProblem) -> str | None:
    """Whether survival is a function of k alone that falls with every candidate."""
    met = start_regimes(problem)
    for k, accept in enumerate(problem.accept_prob):
        met = met @ (problem.transition > 0)
        if not met.any():
            return f"survival stands still: candidate {k + 1} is behind one that is never accepted"
        values = accept[met]
        if np.ptp(values) > ROUNDING:
            return f"survival varies: candidate {k + 1} has acceptance {values.min():.6g} to {values.max():.6g}"
        if values.max() == 1.0:
            return f"survival stands still: candidate {k + 1} is certain to be accepted"
        met &= accept > 0
    return None
