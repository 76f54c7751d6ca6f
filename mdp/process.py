r"""What an acceptance process is: the base of all of them, what it lowers to, and the checks of its numbers.

Candidate $i$ of a round is accepted with probability $a_i$ given that all earlier ones were. A process lowers to a
`FiniteChain`: regimes $z_0, z_1, \dots$ with $z_i \sim P(z_{i-1}, \cdot)$ and $a_i = a_i(z_i)$. The regime follows the
draft's own law whether or not an earlier candidate was rejected unseen, and acceptances are independent given
the regimes; $a(z_0)$ is never read.

A process is a plain frozen dataclass, checked when made. Its field names are those of the problem file.
"""

from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float, Int

__all__ = [
    "AcceptanceProcess",
    "FiniteChain",
    "Sampled",
    "StartLaws",
    "distribution",
    "number",
    "probabilities",
    "square",
]

ROW_SUM_TOLERANCE = 1e-8


class FiniteChain(NamedTuple):
    """A process lowered to arrays: `transition` [Z, Z], `accept_prob` [K, Z] per depth, `initial` [Z]."""

    transition: Float[np.ndarray, "Z Z"]
    accept_prob: Float[np.ndarray, "K Z"]
    initial: Float[np.ndarray, " Z"]


class StartLaws(NamedTuple):
    """Where the next round starts: row-stochastic laws after a first rejection in regime z, and after none."""

    rejection: Float[np.ndarray, "Z Z"]
    bonus: Float[np.ndarray, "Z Z"]


class Sampled(NamedTuple):
    """Drawn rounds, each axis but the first free (rounds x replicas): what decides acceptance, and what is seen.

    `accept_prob` [K, ...] of candidates 1..K; `state` [K, ...] is what the stopper sees of the process when k = 0..K-1
    candidates are drafted, in the process's own terms (`regimes`, `expected_next`). Where the stopper does not see the
    acceptances themselves, `survival` and `symbol` [K, ...] at those k are what it knows and sees instead.
    """

    accept_prob: Float[np.ndarray, "K ..."]
    state: Float[np.ndarray, "K ..."]
    survival: Float[np.ndarray, "K ..."] | None = None
    symbol: Int[np.ndarray, "K ..."] | None = None


def probabilities(name: str, value: object, ndim: int) -> np.ndarray:
    """Return `value` as a float64 array of probabilities with `ndim` axes.

    Raises:
        ValueError: naming the field, the first bad value and what is allowed.
    """
    shape = ("a number", "a list of numbers", "a list of equally long lists of numbers")[ndim]
    try:
        array = np.asarray(value)
        if _holds_bool(value) or array.dtype.kind not in "fiu" or array.ndim != ndim or array.size == 0:
            raise ValueError
        array = array.astype(np.float64)
    except ValueError:
        raise ValueError(f"{name}: must be {shape}, got {_short(value)}") from None
    bad = array[~((array >= 0) & (array <= 1))]
    if bad.size:
        raise ValueError(f"{name}: must lie in [0, 1], got {bad.flat[0]:g}")
    return array


def distribution(name: str, value: object, ndim: int) -> np.ndarray:
    """Return probabilities whose last axis sums to 1 within 1e-8, normalised.

    Raises:
        ValueError: as `probabilities`, or if a row sums to something else.
    """
    array = probabilities(name, value, ndim)
    sums = array.sum(axis=-1, keepdims=True)
    off = np.abs(sums - 1) > ROW_SUM_TOLERANCE
    if off.any():
        row = f" row {int(np.argmax(off))}" if ndim == 2 else ""
        raise ValueError(f"{name}:{row} must sum to 1 within {ROW_SUM_TOLERANCE:g}, sums to {sums[off][0]:.10g}")
    return array / sums


def _holds_bool(value: object) -> bool:
    """Whether a (nested) list holds a boolean, which NumPy would quietly turn into 0 or 1."""
    return isinstance(value, bool) or (isinstance(value, (list, tuple)) and any(map(_holds_bool, value)))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def square(name: str, value: object, size: int) -> np.ndarray:
    """Return a row-stochastic [size, size] matrix.

    Raises:
        ValueError: as `distribution`, or if the shape is another.
    """
    array = distribution(name, value, 2)
    if array.shape != (size, size):
        raise ValueError(f"{name}: must be {size} x {size}, got {array.shape[0]} x {array.shape[1]}")
    return array


def number(name: str, value: object, low: float, high: float) -> float:
    """Return a number within limits as a float.

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """
    good = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not good or not low <= value <= high:  # type: ignore[operator]
        raise ValueError(f"{name}: must be a number in {low:g}..{high:g}, got {value!r:.60}")
    return float(value)  # type: ignore[arg-type]


class AcceptanceProcess:
    """Base of all processes; `kind` is the name in the problem file."""

    kind: ClassVar[str]
    finite: ClassVar[bool] = True
    """Whether it lowers exactly; otherwise it is enclosed from both sides, and draws its own samples."""

    hides: ClassVar[frozenset[str]] = frozenset({"symbol"})
    """Fields of an observation that a stopper does not see here."""

    @property
    def num_regimes(self) -> int | None:
        """Z, the number of regimes the stopper can tell apart; None: a table may have any number of columns."""
        return 1

    def lower(self, max_candidates: int) -> FiniteChain:
        """The process as arrays for rounds of at most `max_candidates` candidates.

        Raises:
            ValueError: if the process does not fit that many, or is continuous.
        """
        raise ValueError(f"acceptance: {self.kind} is continuous, no finite chain equals it")

    def unseen(self, max_candidates: int) -> FiniteChain:
        """The chain that rules meet which look at nothing but the depth."""
        return self.lower(max_candidates)

    def bracket(self, max_candidates: int, cells: int) -> tuple[FiniteChain, FiniteChain]:
        """Two chains whose best throughputs enclose that of the process, whatever the (renewal) problem.

        `cells` says how finely a continuous law is cut; a finite process is its own bracket.
        """
        chain = self.lower(max_candidates)
        return chain, chain

    def start_laws(self) -> StartLaws | None:
        """The coupling of rounds, for processes that leave no choice; None: the problem says."""
        return None

    def features(self) -> dict[str, Float[np.ndarray, " Z"]]:
        """What a candidate shows besides its acceptance, by the regime it falls in: fields of an observation."""
        return {}

    def sample(self, coins: Float[np.ndarray, "K ..."], start_coins: Float[np.ndarray, "..."]) -> Sampled | None:
        """Whole rounds from uniform coins, one per candidate and one for the start.

        None: the simulator walks the finite chain itself.
        """
        return None

    def regimes(self, state: Float[np.ndarray, "..."], columns: int) -> Int[np.ndarray, "..."]:
        """The column of a policy table with so many columns that a sampled state falls in."""
        return np.zeros(np.shape(state), dtype=np.int64)

    def expected_next(self, state: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """Mean acceptance of the next candidate, given a sampled state."""
        raise NotImplementedError
