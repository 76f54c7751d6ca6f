"""A whole family of rules in one pass: the frontier of verification rate against discard rate, exactly.

Thresholds of a family are ordered by patience: where one goes on, so do all larger ones. So the merged tree of
`mdp.evaluate` is walked once, as far as the most patient rule goes, each state marked with the least threshold that
gets there; what a state adds is added to that threshold and, by one cumulative sum at the end, to all larger ones. Of
renewal rounds a thousand thresholds cost little more than one; persistent ones also need a stationary law each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from mdp.evaluate import RoundLaw, TreeTooLarge, long_run, round_laws
from mdp.metrics import Tally
from mdp.policy import TIE, FixedLength, LookaheadThreshold, Observation, RejectionThreshold
from mdp.problem import FiniteProblem, StoppingProblem

__all__ = ["FAMILIES", "Frontier", "frontier"]

FAMILIES: dict[str, tuple[type[Any], Callable[[Observation], Any], tuple[str, ...]]] = {
    "fixed": (FixedLength, lambda seen: seen.num_candidates + 1, ()),
    "lookahead": (LookaheadThreshold, lambda seen: 1.0 - seen.survival * seen.next_accept_prob, ("survival",)),
    "rejection": (RejectionThreshold, lambda seen: 1.0 - seen.survival, ("survival",)),
}
"""For each family its rule, the least parameter that goes on, and what it reads of the past."""


@dataclass(frozen=True)
class Frontier:
    """Exact long-run figures of a family of rules, one entry per threshold (candidate length for `fixed`) [H].

    `tally` holds expectations per round; the properties are its figures, as in `Evaluation`.
    """

    family: str
    threshold: Float[np.ndarray, " H"]
    tally: Tally
    speedup: Float[np.ndarray, " H"]

    @property
    def throughput(self) -> Float[np.ndarray, " H"]:
        return np.asarray(self.tally.throughput)

    @property
    def block_efficiency(self) -> Float[np.ndarray, " H"]:
        return np.asarray(self.tally.block_efficiency)

    @property
    def verification_rate(self) -> Float[np.ndarray, " H"]:
        return np.asarray(self.tally.verification_rate)

    @property
    def discard_rate(self) -> Float[np.ndarray, " H"]:
        return np.asarray(self.tally.discard_rate)

    @property
    def mean_candidates(self) -> Float[np.ndarray, " H"]:
        return np.asarray(self.tally.mean_candidates)


def frontier(
    problem: StoppingProblem | FiniteProblem, family: str, thresholds: Sequence[float] | Float[np.ndarray, " H"]
) -> Frontier:
    """Exact throughput and rates of every rule `family:threshold`.

    Args:
        problem: a finite problem; of a continuous one only `fixed` has exact values.
        family: `rejection`, `lookahead` or `fixed`.
        thresholds: in [0, 1]; whole numbers in 0..max_candidates for `fixed`.

    Raises:
        ValueError: if the family or a threshold is none of these, a rule has several long runs, or the tree is too
            large for even one rule (simulate it instead).

    Example:
        >>> from mdp.acceptance import IID
        >>> from mdp.cost import Affine
        >>> problem = StoppingProblem(IID(0.5), Affine(draft_time=0.5, verify_time=1.0), max_candidates=4)
        >>> found = frontier(problem, "fixed", [0, 1, 2])
        >>> found.verification_rate.round(3).tolist(), found.discard_rate.round(3).tolist()
        ([1.0, 0.667, 0.571], [0.0, 0.333, 0.714])
    """
    if family not in FAMILIES:
        raise ValueError(f"family: must be one of {', '.join(FAMILIES)}, got {family!r:.60}")
    values = _checked(family, thresholds, int(problem.max_candidates))
    finite = problem.unseen() if isinstance(problem, StoppingProblem) else problem
    if isinstance(problem, StoppingProblem) and not problem.acceptance.finite and family != "fixed":
        kind = problem.acceptance.kind  # what such rules see is no regime of a finite chain
        raise ValueError(f"family: {family} on {kind} has no frontier in one pass; evaluate its thresholds one by one")
    patience, back = np.unique(values, return_inverse=True)
    laws = _laws(finite, family, patience)
    weights = np.ones((len(patience), 1))
    if finite.persistent:
        weights = np.array([
            long_run(RoundLaw(*(part[h] for part in laws)), finite.initial, f"{family}:{value:g}")
            for h, value in enumerate(patience)
        ])  # fmt: skip
    counts = ((weights * part).sum(axis=1)[back] for part in (laws.emitted, laws.drafted, laws.time))
    emitted, drafted, time = counts
    tally = Tally(num_target_calls=np.ones(len(values)), num_drafted=drafted, num_emitted=emitted,
                  num_discarded=np.maximum(drafted - (emitted - 1.0), 0.0), num_cut=np.zeros(len(values)),
                  time=time)  # fmt: skip
    return Frontier(family, values, tally, np.asarray(tally.throughput) * float(finite.verify_time[0]))


def _checked(family: str, thresholds: Any, depth: int) -> np.ndarray:
    values = np.asarray(thresholds)
    number = values.dtype.kind in ("iu" if family == "fixed" else "fiu")
    if not number or values.ndim != 1 or values.size == 0:
        what = "whole numbers" if family == "fixed" else "numbers"
        raise ValueError(f"thresholds: must be a list of {what}, got {thresholds!r:.60}")
    most = depth if family == "fixed" else 1
    bad = values[~((values >= 0) & (values <= most))]
    if bad.size:
        raise ValueError(f"thresholds: must lie in 0..{most} for {family}, got {bad[0]:g}")
    return values


def _laws(problem: FiniteProblem, family: str, patience: np.ndarray) -> RoundLaw:
    """Laws of a round with a leading axis for the rules, in order of patience; in halves where not all fit."""
    _, least, reads = FAMILIES[family]
    margin = TIE if reads else 0.0

    def first_going_on(seen: Observation) -> Any:
        return np.searchsorted(patience + margin, least(seen), side="left")

    try:
        return round_laws(problem, first_going_on, len(patience), "survival" in reads)
    except TreeTooLarge:
        if len(patience) == 1:
            raise
    halves = [_laws(problem, family, part) for part in np.array_split(patience, 2)]
    return RoundLaw(*(np.concatenate(parts) for parts in zip(*halves, strict=True)))
