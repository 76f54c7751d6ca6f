r"""Acceptance processes: how likely the next candidate is accepted, and what the stopper sees of it.

Candidate $i$ of a round is accepted with probability $a_i$ given that all earlier ones were. A process lowers to a
`FiniteChain`: regimes $z_0, z_1, \dots$ with $z_i \sim P(z_{i-1}, \cdot)$ and $a_i = a_i(z_i)$. The regime follows the
draft's own law whether or not an earlier candidate was rejected unseen, and acceptances are independent given
the regimes; $a(z_0)$ is never read.

A process is a plain frozen dataclass, checked when made. Its field names are those of the problem file.
"""

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special

__all__ = [
    "IID",
    "AcceptanceProcess",
    "BetaMixture",
    "FiniteChain",
    "MarkovModulated",
    "Position",
    "StartLaws",
    "TokenPair",
    "distribution",
    "probabilities",
    "square",
]

ROW_SUM_TOLERANCE = 1e-8
MAX_REGIMES = 4096
MAX_VOCABULARY = 32
CONCENTRATIONS = (1e-6, 1e9)


class FiniteChain(NamedTuple):
    """A process lowered to arrays: `transition` [Z, Z], `accept_prob` [K, Z] per depth, `initial` [Z]."""

    transition: Float[np.ndarray, "Z Z"]
    accept_prob: Float[np.ndarray, "K Z"]
    initial: Float[np.ndarray, " Z"]


class StartLaws(NamedTuple):
    """Where the next round starts: row-stochastic laws after a first rejection in regime z, and after none."""

    rejection: Float[np.ndarray, "Z Z"]
    bonus: Float[np.ndarray, "Z Z"]


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


class AcceptanceProcess:
    """Base of all processes; `kind` is the name in the problem file."""

    kind: ClassVar[str]
    finite: ClassVar[bool] = True
    """Whether it lowers exactly; otherwise it is bracketed between two chains."""

    @property
    def num_regimes(self) -> int:
        """Z, the number of regimes the stopper can tell apart."""
        return 1

    def lower(self, max_candidates: int) -> FiniteChain:
        """The process as arrays for rounds of at most `max_candidates` candidates.

        Raises:
            ValueError: if the process does not fit that many.
        """
        raise NotImplementedError

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


@dataclass(frozen=True)
class IID(AcceptanceProcess):
    r"""$a_i = \alpha$: the model of Leviathan et al. (2023), with $E[\text{emitted}] = (1-\alpha^{K+1})/(1-\alpha)$."""

    accept_prob: float
    kind = "iid"

    def __post_init__(self) -> None:
        object.__setattr__(self, "accept_prob", float(probabilities("acceptance.accept_prob", self.accept_prob, 0)))

    def lower(self, max_candidates: int) -> FiniteChain:
        one = np.ones((1, 1))
        return FiniteChain(one, np.full((max_candidates, 1), self.accept_prob), one[0])


@dataclass(frozen=True)
class Position(AcceptanceProcess):
    r"""$a_i$ depends on the candidate's place in the round only: one number per place, exactly K of them."""

    accept_prob: np.ndarray = field(hash=False)
    kind = "position"

    def __post_init__(self) -> None:
        object.__setattr__(self, "accept_prob", probabilities("acceptance.accept_prob", self.accept_prob, 1))

    def lower(self, max_candidates: int) -> FiniteChain:
        if len(self.accept_prob) != max_candidates:
            raise ValueError(
                f"acceptance.accept_prob: must have max_candidates = {max_candidates} entries, "
                f"got {len(self.accept_prob)}"
            )
        one = np.ones((1, 1))
        return FiniteChain(one, self.accept_prob[:, None], one[0])


@dataclass(frozen=True)
class MarkovModulated(AcceptanceProcess):
    r"""Visible regimes $z_i \sim P(z_{i-1}, \cdot)$ with $a_i = a(z_i)$; $z_0 \sim$ `initial` is the round's start.

    Candidate 1's regime is drawn from `transition[z0]`, so $a(z_0)$ is never read.
    """

    transition: np.ndarray = field(hash=False)
    accept_prob: np.ndarray = field(hash=False)
    initial: np.ndarray = field(hash=False)
    kind = "markov_modulated"

    def __post_init__(self) -> None:
        accept_prob = probabilities("acceptance.accept_prob", self.accept_prob, 1)
        size = len(accept_prob)
        if size > MAX_REGIMES:
            raise ValueError(f"acceptance.accept_prob: at most {MAX_REGIMES} regimes, got {size}")
        transition = square("acceptance.transition", self.transition, size)
        initial = distribution("acceptance.initial", self.initial, 1)
        if len(initial) != size:
            raise ValueError(f"acceptance.initial: must have {size} entries, got {len(initial)}")
        for name, value in (("accept_prob", accept_prob), ("transition", transition), ("initial", initial)):
            object.__setattr__(self, name, value)

    @property
    def num_regimes(self) -> int:
        return len(self.accept_prob)

    def lower(self, max_candidates: int) -> FiniteChain:
        return FiniteChain(self.transition, np.tile(self.accept_prob, (max_candidates, 1)), self.initial)


def square(name: str, value: object, size: int) -> np.ndarray:
    """Return a row-stochastic [size, size] matrix.

    Raises:
        ValueError: as `distribution`, or if the shape is another.
    """
    array = distribution(name, value, 2)
    if array.shape != (size, size):
        raise ValueError(f"{name}: must be {size} x {size}, got {array.shape[0]} x {array.shape[1]}")
    return array


@dataclass(frozen=True)
class TokenPair(AcceptanceProcess):
    r"""A draft and a target over n tokens, each an order-1 chain: row u is the law of the token behind u. Exact.

    Regime $(u, v)$, number $u n + v$: token v was drafted behind u. From there the draft moves to $(v, w)$ with
    $q(w|v)$; $a(u, v) = \min\{1, p(v|u)/q(v|u)\}$. A rejection puts the correction c, of law
    $\propto (p(c|u) - q(c|u))^+$ at the context u, on the start regime $(\bullet, c)$; a round accepted whole puts the
    bonus c, of law $p(c|v)$, there; rounds are persistent by nature. The dummy $\bullet$ is token 0: what was drafted
    before a round started is never read. The emitted text is a path of the target's chain. The optimal threshold
    depends on v only.

    Args:
        draft, target: row-stochastic [n, n], at most 32 tokens.
        prompt_token: the last token of the prompt, where the first round starts.
    """

    draft: np.ndarray = field(hash=False)
    target: np.ndarray = field(hash=False)
    prompt_token: int = 0
    kind = "token_pair"

    def __post_init__(self) -> None:
        size = len(self.draft) if isinstance(self.draft, (list, tuple, np.ndarray)) else 0
        if size > MAX_VOCABULARY:
            raise ValueError(f"acceptance.draft: at most {MAX_VOCABULARY} tokens, got {size}")
        object.__setattr__(self, "draft", square("acceptance.draft", self.draft, size))
        object.__setattr__(self, "target", square("acceptance.target", self.target, size))
        token = self.prompt_token
        if isinstance(token, bool) or not isinstance(token, (int, np.integer)) or not 0 <= token < size:
            raise ValueError(
                f"acceptance.prompt_token: must be a whole number in 0..{size - 1} (a token), got {token!r:.60}"
            )
        object.__setattr__(self, "prompt_token", int(token))

    @property
    def num_tokens(self) -> int:
        """n, the size of the vocabulary."""
        return len(self.draft)

    @property
    def num_regimes(self) -> int:
        return self.num_tokens**2

    def lower(self, max_candidates: int) -> FiniteChain:
        size = self.num_tokens
        transition = np.zeros((size, size, size, size))  # [u, v, v, w]
        both = np.arange(size)
        transition[:, both, both, :] = self.draft
        accept_prob = np.ones((size, size))
        np.divide(self.target, self.draft, out=accept_prob, where=self.target < self.draft)
        initial = np.zeros(self.num_regimes)
        initial[self.prompt_token] = 1.0
        flat = (self.num_regimes, self.num_regimes)
        return FiniteChain(transition.reshape(flat), np.tile(accept_prob.ravel(), (max_candidates, 1)), initial)

    def start_laws(self) -> StartLaws:
        size = self.num_tokens
        residual = np.maximum(self.target - self.draft, 0.0)
        mass = residual.sum(axis=1, keepdims=True)
        # Where draft and target agree nothing is rejected, and any law will do.
        residual = np.where(mass > 0, residual / np.where(mass > 0, mass, 1.0), self.target)
        rejection, bonus = np.zeros((2, self.num_regimes, self.num_regimes))
        rejection[:, :size] = np.repeat(residual, size, axis=0)  # by u
        bonus[:, :size] = np.tile(self.target, (size, 1))  # by v
        return StartLaws(rejection, bonus)

    def features(self) -> dict[str, np.ndarray]:
        """As in a trace (`mdp.trace.FEATURES`): q(v|u), the greatest q(.|u) and the entropy of q(.|u) in nats."""
        draft, size = self.draft, self.num_tokens
        entropy = -(draft * np.log(np.where(draft > 0, draft, 1.0))).sum(axis=1)
        return {
            "draft_prob": draft.ravel(),
            "top_prob": np.repeat(draft.max(axis=1), size),
            "entropy": np.repeat(entropy, size),
        }


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
        value, (low, high) = self.concentration, CONCENTRATIONS
        good = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
        if not good or not low <= value <= high:  # type: ignore[operator]
            raise ValueError(f"acceptance.concentration: must be a number in {low:g}..{high:g}, got {value!r:.60}")
        object.__setattr__(self, "concentration", float(value))  # type: ignore[arg-type]

    @property
    def shapes(self) -> tuple[float, float]:
        """The two parameters of the Beta law; one of them is 0 if every acceptance is 0, or 1."""
        return self.mean * self.concentration, (1.0 - self.mean) * self.concentration

    def lower(self, max_candidates: int) -> FiniteChain:
        raise ValueError("acceptance: beta_mixture is continuous, no finite chain equals it; bracket it")

    def unseen(self, max_candidates: int) -> FiniteChain:
        """The chain for rules that do not look: every acceptance at its mean."""
        return IID(self.mean).lower(max_candidates)

    def quantile(self, coins: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """Acceptances with these probabilities of being less: uniform coins in, draws out."""
        if min(self.shapes) == 0.0:
            return np.full(np.shape(coins), self.mean)
        return special.betaincinv(*self.shapes, coins)

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
