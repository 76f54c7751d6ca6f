r"""Continuous acceptance processes, bracketed between two finite chains."""

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from jaxtyping import Float, Int
from scipy import interpolate, optimize, special

from mdp.keys import Key
from mdp.process import AcceptanceProcess, FiniteChain, Sampled, number, probabilities

__all__ = ["BetaMixture", "LogitAR"]

CONCENTRATIONS = (1e-6, 1e9)
LOGIT_LIMITS = {"logit_mean": (-50.0, 50.0), "logit_deviation": (1e-4, 20.0), "correlation": (0.0, 0.999999)}
REACH = 6.5  # standard deviations to either side of the mean that get nodes; beyond lie 8e-11
TRAPEZOID = 0.7  # steps per innovation deviation, at which the trapezoid rule is exact to rounding
SQRT_TWO_PI = math.sqrt(2.0 * math.pi)


@dataclass(frozen=True)
class BetaMixture(AcceptanceProcess):
    r"""$a_i$ iid Beta with the given mean and concentration: shapes $(mc, (1-m)c)$, seen once drafted; rounds renew.

    Solved in `mdp.independent`, thresholds evaluated in `mdp.rounded`, both by the law's partial moments.
    """

    mean: Annotated[float, Key("number", "probability", 0, 1, "mean acceptance")]
    concentration: Annotated[float, Key("number", "", *CONCENTRATIONS, "the larger, the less acceptances differ")]
    kind = "beta_mixture"
    finite = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", float(probabilities("acceptance.mean", self.mean, 0)))
        object.__setattr__(
            self, "concentration", number("acceptance.concentration", self.concentration, *CONCENTRATIONS)
        )

    @property
    def shapes(self) -> tuple[float, float]:
        """The two parameters of the Beta law; one of them is 0 if every acceptance is 0, or 1."""
        return self.mean * self.concentration, (1.0 - self.mean) * self.concentration

    def unseen(self, max_candidates: int) -> FiniteChain:
        """Every acceptance at its mean."""
        one = np.ones((1, 1))
        return FiniteChain(one, np.full((max_candidates, 1), self.mean), one[0])

    @property
    def sure(self) -> bool:
        """Whether every acceptance is 0, or every one is 1."""
        return min(self.shapes) == 0.0

    def above(self, value: Float[np.ndarray, "..."]) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
        """$P(a > x)$ and $E[a; a > x]$, unless they are `sure`."""
        first, second = self.shapes
        return special.betaincc(first, second, value), self.mean * special.betaincc(first + 1, second, value)

    def bracket(self, max_candidates: int, cells: int) -> tuple[FiniteChain, FiniteChain]:
        """Cells of equal probability: their conditional means, and their ends, with the mean kept.

        What a round is worth is convex in each acceptance, so that moving mass together inside a cell lowers it
        (Jensen) and moving it apart raises it (Edmundson, Madansky).
        """
        if self.sure:
            return self.unseen(max_candidates), self.unseen(max_candidates)
        ends = np.unique(np.r_[0.0, special.betaincinv(*self.shapes, np.arange(1, cells) / cells), 1.0])
        mass, moment = (-np.diff(part) for part in self.above(ends))
        centre = np.clip(moment / np.where(mass > 0, mass, 1.0), ends[:-1], ends[1:])
        right = mass * (centre - ends[:-1]) / np.diff(ends)
        split = np.append(mass - right, 0.0) + np.append(0.0, right)
        chains = []
        for values, law in ((centre, mass), (ends, split)):
            values, law = values[law > 0], law[law > 0] / law[law > 0].sum()
            rows, accept = (
                np.broadcast_to(law, (len(law), len(law))),
                np.broadcast_to(values, (max_candidates, len(law))),
            )
            chains.append(FiniteChain(rows, accept, law))
        return chains[0], chains[1]

    def sample(self, coins: Float[np.ndarray, "K ..."], start_coins: Float[np.ndarray, "..."]) -> Sampled:
        """By inverse CDF: each coin is the probability of a lesser acceptance."""
        drawn = np.full(np.shape(coins), self.mean) if self.sure else special.betaincinv(*self.shapes, coins)
        return Sampled(drawn, np.zeros_like(drawn))

    def expected_next(self, state: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        return np.full(np.shape(state), self.mean)


@dataclass(frozen=True)
class LogitAR(AcceptanceProcess):
    r"""$a_i = 1/(1 + e^{-x_i})$ with a Gaussian AR(1) logit, seen once drafted; rounds renew.

    $x_0 \sim N(m, \sigma^2)$ is seen at the round's start, $x_i = m + \phi (x_{i-1} - m) + s \varepsilon_i$ with
    $s = \sigma \sqrt{1 - \phi^2}$, so that every $x_i$ has the law of $x_0$ and neighbours have correlation $\phi$.

    Let $v = e^{-x}$ be the odds of rejection, $a = 1/(1 + v)$; $J_k(v, S)$ the best value of a round from depth k on at
    any rate (`mdp.price`), and $G_k(v, S) = Sa + J_{k+1}(v, Sa)$ what a candidate of odds v is worth.

    *Claim.* $J_k$ and $G_k$ are convex and non-increasing in v for every S. *Proof.* A stopping rule reads the
    innovations. For one such rule the time does not depend on v, and the tokens are a sum of means of products of
    $a(x_j)$, where $x_j = \phi^j x + \text{noise}$, so that $a(x_j) = 1/(1 + w v^p)$ with $w > 0$ and
    $p = \phi^j \in [0, 1]$. The derivative of $-\log(1 + w v^p)$ is $-p/(v + v^{1-p}/w)$, which increases: factors are
    log-convex, hence so are products, and log-convex functions are convex. Sums, means and suprema over rules keep
    that. $\square$

    So a chain encloses the process if each row's law of $v'$ is replaced by one on nodes that is larger, or smaller, in
    the mean of every convex decreasing function; that is, whose put $\pi(t) = E[(t - v')^+]$ is larger, or smaller, at
    every t. Nodes $v_1 > \dots > v_M$ are shared by all rows and both chains; a law on nodes has a put that is linear
    between them, with slopes in [0, 1].

    *Above:* join the true $\pi(v_j)$ by chords, which splits the mass between two nodes so that its mean stays; mass
    beyond $v_1$ moves to $v_1$, mass below $v_M$ is split between $v_M$ and $v = 0$ (a = 1, for good if $\phi > 0$).
    *Below:* lower each $\pi(v_j)$ by as much as a chord beside it can lie too high (at most
    $\Delta^2 \max f / 8$ and $\Delta P / 4$ on a segment of length $\Delta$, density f and mass P), so that all chords
    lie below $\pi$; take the greatest convex minorant, with mass beyond $v_1$ at $a = 0$ and mass below $v_M$ at $v_M$.
    Both are off by the square of the nodes' distance. By induction over k, $\check J_k \le J_k \le \hat J_k$ at the
    nodes; the law of $x_0$ is treated alike. Nodes lie evenly in the integral of $f^{1/3}$, f the density of x: where
    the value's curvature is even, that makes the error least (Bennett 1948).

    Args:
        logit_mean: m, in -50..50.
        logit_deviation: $\sigma$, standard deviation of every $x_i$, in 0.0001..20.
        correlation: $\phi$, in 0..0.999999; the proof needs that it is not negative.
    """

    logit_mean: Annotated[float, Key("number", "logit", *LOGIT_LIMITS["logit_mean"], "mean logit of acceptance")]
    logit_deviation: Annotated[
        float, Key("number", "logit", *LOGIT_LIMITS["logit_deviation"], "standard deviation of every logit")
    ]
    correlation: Annotated[float, Key("number", "", *LOGIT_LIMITS["correlation"], "of a logit with the one before")]
    kind = "logit_ar"
    finite = False

    def __post_init__(self) -> None:
        for name, limits in LOGIT_LIMITS.items():
            object.__setattr__(self, name, number(f"acceptance.{name}", getattr(self, name), *limits))

    @property
    def num_regimes(self) -> None:
        return None

    @property
    def innovation(self) -> float:
        """s, the standard deviation of a logit given the one before."""
        return self.logit_deviation * math.sqrt(1.0 - self.correlation**2)

    def _follow(self, logit: np.ndarray) -> np.ndarray:
        """Mean of the next logit."""
        return self.logit_mean + self.correlation * (logit - self.logit_mean)

    def nodes(self, count: int) -> Float[np.ndarray, " M"]:
        """Logits at which the chains live, ascending: column j of a table of `count` columns is about node j."""
        at = np.linspace(-REACH, REACH, 2001)
        share = np.exp(-(at**2) / 6) + 0.02  # the floor keeps tails from being one cell
        total = np.append(0.0, np.cumsum((share[1:] + share[:-1]) / 2))
        return self.logit_mean + self.logit_deviation * np.interp(np.linspace(0.0, total[-1], count), total, at)

    def regimes(self, state: Float[np.ndarray, "..."], columns: int) -> Int[np.ndarray, "..."]:
        nodes = self.nodes(columns)
        return np.searchsorted((nodes[1:] + nodes[:-1]) / 2, state)

    def bracket(self, max_candidates: int, cells: int) -> tuple[FiniteChain, FiniteChain]:
        nodes = self.nodes(cells)
        start = _laws(nodes, np.array([self.logit_mean]), self.logit_deviation)
        steps = _laws(nodes, self._follow(np.append(nodes, self.logit_mean)), self.innovation)
        chains = []
        for first, step, last in zip(start, steps, (0.0, 1.0), strict=True):
            if self.correlation > 0:
                step[-1] = np.append(np.zeros(cells), 1.0)  # for good; from a = 0 on, nothing matters
            accept_prob = np.append(special.expit(nodes), last)
            chains.append(FiniteChain(step, np.broadcast_to(accept_prob, (max_candidates, cells + 1)), first[0]))
        return chains[0], chains[1]

    def sample(self, coins: Float[np.ndarray, "K ..."], start_coins: Float[np.ndarray, "..."]) -> Sampled:
        # Coins are multiples of 2^-53, 0 included: their cells' centres have finite quantiles.
        logits = [self.logit_mean + self.logit_deviation * special.ndtri(start_coins + 2.0**-54)]
        for noise in special.ndtri(np.asarray(coins) + 2.0**-54):
            logits.append(self._follow(logits[-1]) + self.innovation * noise)
        return Sampled(special.expit(np.stack(logits[1:])), np.stack(logits[:-1]))

    def expected_next(self, state: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        centre = self._follow(np.asarray(state))
        return self._smooth(float(centre.min()), float(centre.max()))(centre)

    def _smooth(self, low: float, high: float) -> interpolate.CubicSpline:
        r"""$E[a(c + s \varepsilon)]$ as a function of c in [low, high], to 1e-10."""
        step = min(TRAPEZOID * self.innovation, 0.5)
        noise = np.arange(-math.ceil(9 * self.innovation / step), math.ceil(9 * self.innovation / step) + 1) * step
        weight = np.exp(-0.5 * (noise / self.innovation) ** 2)
        at = np.linspace(low - 0.02, high + 0.02, max(8, math.ceil((high - low + 0.04) / 0.02)))
        return interpolate.CubicSpline(at, special.expit(at[:, None] + noise) @ (weight / weight.sum()))

    def unseen(self, max_candidates: int) -> FiniteChain:
        r"""$E[S_k]/E[S_{k-1}]$ at depth k.

        By the trapezoid rule, whose error is that of rounding: integrands are analytic and vanish at the ends, and it
        falls like $e^{-2 \pi^2 s^2 / h^2}$ and $e^{-2 \pi^2 / h}$ with the step h.
        """
        spread = self.innovation
        step = min(TRAPEZOID * spread, 0.5)
        half = math.ceil(9 * self.logit_deviation / step)
        at = np.arange(-half, half + 1) * step
        nearest = np.rint(self.correlation * at / step).astype(int)
        band = np.arange(-math.ceil(9 * spread / step), math.ceil(9 * spread / step) + 1)
        into = nearest[:, None] + band
        weight = np.exp(-0.5 * ((into * step - self.correlation * at[:, None]) / spread) ** 2)
        weight[np.abs(into) > half] = 0.0
        weight /= weight.sum(axis=1, keepdims=True)
        into = np.clip(into + half, 0, 2 * half)
        alive = np.exp(-0.5 * (at / self.logit_deviation) ** 2)
        alive /= alive.sum()
        accept, ratios = special.expit(self.logit_mean + at), []
        for _ in range(max_candidates):
            following = accept * np.bincount(into.ravel(), (weight * alive[:, None]).ravel(), len(at))
            ratios.append(following.sum() / alive.sum())
            alive = following / following.sum()
        one = np.ones((1, 1))
        return FiniteChain(one, np.array(ratios)[:, None], one[0])


def _laws(nodes: np.ndarray, means: np.ndarray, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Laws on nodes, [R, M + 1] each, that enclose N(means, spread^2): below (last column a = 0), above (a = 1)."""
    odds, size = np.exp(-nodes), len(nodes)
    length = odds[:-1] - odds[1:]
    at = (nodes - means[:, None]) / spread
    mass, beyond = _between(at), special.ndtr(-at)
    # Mean odds in a segment, in units of those at its left end, and the share of mass that goes there.
    scale = np.exp(nodes[:-1] - means[:, None] + 0.5 * spread**2)
    moment = scale * _between(at + spread)
    left = np.clip((moment - (1.0 - length / odds[:-1]) * mass) * (odds[:-1] / length), 0.0, mass)
    right = mass - left

    above = np.zeros((len(means), size + 1))
    above[:, : size - 1] += left
    above[:, 1:size] += right
    above[:, 0] += special.ndtr(at[:, 0])
    tail = np.exp(nodes[-1] - means + 0.5 * spread**2) * special.ndtr(-at[:, -1] - spread)
    tail = np.clip(tail, 0.0, beyond[:, -1])
    above[:, -2] += tail
    above[:, -1] += beyond[:, -1] - tail

    slope = beyond[:, 1:] + right  # of the put's chords
    peak = np.clip(means[:, None] + spread**2, nodes[:-1], nodes[1:])
    density = np.exp(-0.5 * ((peak - means[:, None]) / spread) ** 2 + peak - nodes[:-1]) / (spread * SQRT_TWO_PI)
    too_high = length * np.minimum(density * (length / odds[:-1]) / 8, mass / 4)
    lowered = np.zeros_like(at)
    lowered[:, :-1] = too_high
    lowered[:, 1:-1] = np.maximum(lowered[:, 1:-1], too_high[:, :-1])
    put = np.zeros_like(at)
    put[:, :-1] = np.cumsum((slope * length)[:, ::-1], axis=1)[:, ::-1]
    # A put is no less than 0. To the right of a node where it is 0, the tangent there is a chord that is not too high.
    none = put <= lowered
    lowered = np.where(none, put, lowered)
    lowered[:, :-1] = np.where(
        none[:, 1:] & ~none[:, :-1], np.maximum(lowered[:, :-1], put[:, :-1] - beyond[:, 1:] * length), lowered[:, :-1]
    )
    slope -= (lowered[:, :-1] - lowered[:, 1:]) / length
    for row in np.flatnonzero((np.diff(slope, axis=1) > 0).any(axis=1)):
        slope[row] = optimize.isotonic_regression(slope[row], weights=length, increasing=False).x
    slope = np.clip(slope, 0.0, beyond[:, :1])
    below = np.column_stack(
        [beyond[:, 0] - slope[:, 0], slope[:, :-1] - slope[:, 1:], slope[:, -1], special.ndtr(at[:, 0])]
    )
    return below, above


def _between(at: np.ndarray) -> np.ndarray:
    """Normal probability between neighbours, to full relative precision in both tails."""
    left, right = at[:, :-1], at[:, 1:]
    flip = left > 0
    return special.ndtr(np.where(flip, -left, right)) - special.ndtr(np.where(flip, -right, left))
