r"""Continuous acceptance processes, bracketed between two finite chains."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import special

from mdp.process import AcceptanceProcess, FiniteChain, Sampled, number, probabilities

__all__ = ["BetaMixture"]

CONCENTRATIONS = (1e-6, 1e9)


@dataclass(frozen=True)
class BetaMixture(AcceptanceProcess):
    r"""$a_i$ iid Beta with the given mean and concentration: shapes $(mc, (1-m)c)$, seen once drafted; rounds renew.

    The law is continuous, so it is bracketed. Let $J_k(S)$ be the best value of a renewal round from depth k on at
    survival S and any rate (`mdp.price`): $J_k = \max\{-\rho V(k),\, -\rho t_d + E[G_k(S, a)]\}$ with
    $G_k(S, a) = Sa + J_{k+1}(Sa)$, and $J_K = -\rho V(K)$.

    *Claim.* Cut [0, 1] into cells. Moving each cell's mass to its conditional mean gives $\check J_k \le J_k$;
    splitting it over the cell's two ends so that the mean stays gives $\hat J_k \ge J_k$; all three are convex in S.
    *Proof* by induction from $k = K$, where they agree. If $J_{k+1}$ is convex, then so is $S \mapsto G_k(S, a)$ for
    every a, hence its mean under any law, hence the maximum with a constant: all three stay convex. As
    $a \mapsto G_k(S, a)$ is convex too, within a cell its value at the conditional mean is at most its conditional
    mean (Jensen), and its chord is at least that (Edmundson, Madansky); and $G_k$ only grows with $J_{k+1}$. $\square$

    So $\check T_\rho \le T_\rho \le \hat T_\rho$ at every rate, and their roots, the best throughputs, are in the same
    order. The gap falls with the square of the cells' width; where the value's curvature is even, widths
    $\propto f^{-1/3}$ make it least, f the density (Bennett 1948). That is what equal cells under the Beta law
    $((mc + 2)/3, ((1-m)c + 2)/3)$, whose density is $\propto f^{1/3}$, give.
    """

    mean: float
    concentration: float
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
        return _draws(np.array([self.mean]), np.ones(1), max_candidates)

    def sample(self, coins: Float[np.ndarray, "K ..."], start_coins: Float[np.ndarray, "..."]) -> Sampled:
        """By inverse CDF: each coin is the probability of a lesser acceptance."""
        sure = min(self.shapes) == 0.0
        drawn = np.full(np.shape(coins), self.mean) if sure else special.betaincinv(*self.shapes, coins)
        return Sampled(drawn, np.zeros_like(drawn))

    def expected_next(self, state: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        return np.full(np.shape(state), self.mean)

    def bracket(self, max_candidates: int, cells: int) -> tuple[FiniteChain, FiniteChain]:
        first, second = self.shapes
        if min(first, second) == 0.0:
            chain = self.unseen(max_candidates)
            return chain, chain
        shares = np.linspace(0.0, 1.0, cells + 1)
        ends = np.unique(np.r_[0.0, special.betaincinv((first + 2) / 3, (second + 2) / 3, shares), 1.0])
        mass = np.diff(special.betainc(first, second, ends))
        moment = self.mean * np.diff(special.betainc(first + 1, second, ends))
        left, right = ends[:-1], ends[1:]
        centre = np.clip(moment / np.where(mass > 0, mass, 1.0), left, right)
        to_right = mass * (centre - left) / (right - left)
        split = np.append(mass - to_right, 0.0) + np.append(0.0, to_right)
        return _draws(centre, mass, max_candidates), _draws(ends, split, max_candidates)


def _draws(values: np.ndarray, mass: np.ndarray, max_candidates: int) -> FiniteChain:
    """The chain whose every step draws one of `values` afresh; its rows are one row, not copies."""
    kept = mass > 0
    values, law = values[kept], mass[kept] / mass[kept].sum()
    size = len(law)
    return FiniteChain(np.broadcast_to(law, (size, size)), np.broadcast_to(values, (max_candidates, size)), law)
