r"""Acceptance processes: how likely the next candidate is accepted, and what the stopper sees of it.

Here are the finite ones, which lower exactly (`mdp.process` says to what); those of `mdp.continuous` come along, so
that every process can be had from here.
"""

from dataclasses import dataclass, field

import numpy as np

from mdp.continuous import BetaMixture
from mdp.process import (
    AcceptanceProcess,
    FiniteChain,
    StartLaws,
    distribution,
    probabilities,
    square,
)

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

MAX_REGIMES = 4096
MAX_VOCABULARY = 32


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
