r"""Few numbers fitted to few published ones: mean acceptance, cost ratio, and how much a head can see.

*Mean acceptance* from the verification rates of fixed lengths: $1/v = (1 - \alpha^{K+1})/(1 - \alpha)$ if acceptances
are independent, seen or not. That the points of all K agree on one $\alpha$ (`spread`) is the evidence for
independence within a round: regimes that persist would make $\alpha$ rise with K.

*Cost ratio* $c = t_d/V(0)$ from one best fixed-length speedup.

*Dispersion* from one speedup of the rule of SpecDec++. A calibrated head's output m is all that its user can act on,
and acceptance given m has probability m: so what the head sees of the truth *is* the law of m. Two forms, same mean:
`beta`, m iid Beta (`BetaMixture`, concentration); `two_point`, m easy or hard by independent draws,
$m \in \{\alpha + \delta(1 - \alpha), \alpha(1 - \delta)\}$ (`two_regimes` without persistence). A noisy head is a less
dispersed m, so with one number to fit it to, noise is no second parameter.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import optimize

from mdp.acceptance import AcceptanceProcess, BetaMixture, MarkovModulated
from mdp.cost import Affine
from mdp.head_rule import HeadCurve, HeadRule, head_curve
from mdp.problem import StoppingProblem

__all__ = [
    "FORMS", "MeanAcceptance", "best_fixed", "dispersed", "fit_cost_ratio", "fit_dispersion", "fit_mean_acceptance",
    "fixed_speedup", "least", "root", "rule_curve", "two_regimes",
]  # fmt: skip

RATIOS = (1e-6, 1.0)
FORMS = {"beta": (-6.0, 9.0), "two_point": (1e-6, 1.0 - 1e-6)}
"""Forms of dispersion and the range of the number fitted: ln of the concentration (more is less dispersed); delta."""

CELLS = 1024  # of the head's curve while fitting: right to about 1e-5 of the speedup


class MeanAcceptance(NamedTuple):
    """The fit to all lengths, the least and greatest value that a single length gives, and the worst misfit of v."""

    mean: float
    spread: tuple[float, float]
    worst_misfit: float


def root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function that changes sign between low and high is 0."""
    found: Any = optimize.brentq(function, low, high, xtol=1e-12)
    return float(found)


def least(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function with one minimum between low and high has it."""
    found: Any = optimize.minimize_scalar(function, bounds=(low, high), method="bounded", options={"xatol": 1e-12})
    return float(found.x)


def _rate(mean: float, lengths: Any) -> Any:
    """Target calls per token of fixed lengths K: 1 over the sum of mean^0 .. mean^K."""
    return 1.0 / np.vectorize(lambda k: (mean ** np.arange(k + 1)).sum(), otypes=[float])(lengths)


def fit_mean_acceptance(lengths: Sequence[int], verification_rate: Sequence[float]) -> MeanAcceptance:
    """Least squares in the logarithm of the verification rate.

    Raises:
        ValueError: if a rate is outside what its length allows, (1/(K + 1), 1).

    Example:
        >>> fit_mean_acceptance([1, 2], [1 / 1.5, 1 / 1.75]).mean.__round__(6)
        0.5
    """
    k, v = np.asarray(lengths, dtype=np.int64), np.asarray(verification_rate, dtype=np.float64)
    if k.ndim != 1 or k.shape != v.shape or len(k) == 0 or (k < 1).any():
        raise ValueError("lengths: must be whole numbers >= 1, one for each verification rate")
    bad = v[~((v > 1 / (k + 1)) & (v < 1))]
    if bad.size:
        raise ValueError(f"verification_rate: must lie in (1/(K + 1), 1), got {bad[0]:g}")
    single = [root(lambda a, k=k_, v=v_: _rate(a, k) - v, 0.0, 1.0) for k_, v_ in zip(k, v, strict=True)]
    spread = (min(single), max(single))
    if spread[1] - spread[0] < 1e-9:
        mean = sum(spread) / 2
    else:
        mean = least(lambda a: float((np.log(_rate(a, k) / v) ** 2).sum()), *spread)
    return MeanAcceptance(mean, spread, float(np.abs(_rate(mean, k) / v - 1.0).max()))


def fixed_speedup(mean: float, cost_ratio: float, lengths: Sequence[int]) -> Float[np.ndarray, " N"]:
    """Speedup of fixed lengths: E[emitted] / (1 + K c)."""
    k = np.asarray(lengths)
    return 1.0 / (_rate(mean, k) * (1.0 + k * cost_ratio))


def best_fixed(mean: float, cost_ratio: float, lengths: Sequence[int]) -> tuple[int, float]:
    """The best of these lengths and its speedup."""
    speedups = fixed_speedup(mean, cost_ratio, lengths)
    return int(lengths[int(np.argmax(speedups))]), float(speedups.max())


def fit_cost_ratio(mean: float, speedup: float, lengths: Sequence[int]) -> float:
    """The c at which the best of these lengths has this speedup, which falls with c.

    Raises:
        ValueError: if no cost ratio below 1 gives it.
    """
    high, low = (best_fixed(mean, c, lengths)[1] for c in RATIOS)
    if not low < speedup < high:
        raise ValueError(f"speedup: must lie in ({low:.4g}, {high:.4g}) at this mean acceptance, got {speedup:g}")
    return root(lambda c: best_fixed(mean, c, lengths)[1] - speedup, *RATIOS)


def two_regimes(mean: float, dispersion: float, persistence: float) -> MarkovModulated:
    r"""Easy and hard stretches with this mean acceptance whatever the rest.

    Easy with probability $\alpha$ (the mean): $a = \alpha + \delta(1 - \alpha)$, else $a = \alpha(1 - \delta)$, so
    $\mathrm{Var}(a) = \delta^2 \alpha(1 - \alpha)$: at $\delta = 0$ all are alike, at 1 the regime is the answer.
    A regime stays with probability $\lambda$ (`persistence`), else is drawn anew; rounds start in the long-run law.

    Example:
        >>> two_regimes(0.8, 0.5, 0.0).accept_prob.round(6).tolist()
        [0.9, 0.4]
    """
    for name, value in (("mean", mean), ("dispersion", dispersion), ("persistence", persistence)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: must lie in [0, 1], got {value!r}")
    law = np.array([mean, 1.0 - mean])
    accept_prob = np.array([mean + dispersion * (1.0 - mean), mean * (1.0 - dispersion)])
    return MarkovModulated(persistence * np.eye(2) + (1.0 - persistence) * law, accept_prob, law)


def dispersed(form: str, mean: float, number: float) -> AcceptanceProcess:
    """What a head sees, in one of the `FORMS`; `number` is ln of the concentration, or delta."""
    return BetaMixture(mean, float(np.exp(number))) if form == "beta" else two_regimes(mean, number, 0.0)


def rule_curve(
    form: str, mean: float, number: float, cost_ratio: float, rule: HeadRule, most: int,
    thresholds: Sequence[float], cells: int = CELLS,
) -> HeadCurve:  # fmt: skip
    """The rule's curve in units of a target call, so that throughput is speedup."""
    problem = StoppingProblem(dispersed(form, mean, number), Affine(cost_ratio, 1.0), most)
    return head_curve(problem, rule, np.asarray(thresholds), cells=cells)


def fit_dispersion(
    form: str, mean: float, cost_ratio: float, speedup: float, rule: HeadRule, most: int, thresholds: Sequence[float]
) -> float:
    """The number at which the rule at the best of these thresholds has this speedup.

    Raises:
        ValueError: if no dispersion of this form gives it.
    """
    low, high = FORMS[form]

    def excess(number: float) -> float:
        return float(rule_curve(form, mean, number, cost_ratio, rule, most, thresholds).throughput.max()) - speedup

    ends = excess(low), excess(high)
    if ends[0] * ends[1] > 0:
        span = sorted(end + speedup for end in ends)
        raise ValueError(f"speedup: must lie in {span[0]:.4g}..{span[1]:.4g} for {form} dispersion, got {speedup:g}")
    return root(excess, low, high)
