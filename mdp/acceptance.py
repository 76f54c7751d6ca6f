r"""Acceptance processes: how likely the next candidate is accepted, and what the stopper sees of it.

Here are the finite ones, which lower exactly (`mdp.process` says to what); those of `mdp.continuous` come along, so
that every process can be had from here.
"""

from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from jaxtyping import Float

from mdp.continuous import BetaMixture, LogitAR
from mdp.keys import Key
from mdp.process import (
    AcceptanceProcess,
    FiniteChain,
    Sampled,
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
    "LogitAR",
    "MarkovModulated",
    "Observed",
    "Position",
    "StartLaws",
    "TokenPair",
    "distribution",
    "probabilities",
    "square",
]

MAX_REGIMES = 4096
MAX_VOCABULARY = 32
MAX_HIDDEN, MAX_SYMBOLS = 32, 256

Moves = Annotated[np.ndarray, Key("[Z, Z]", "probability", 0, 1, "row z: law of the next regime behind z", rows=True)]
ByRegime = Annotated[np.ndarray, Key("[Z]", "probability", 0, 1, "acceptance of a candidate drafted in regime z")]
Start = Annotated[np.ndarray, Key("[Z]", "probability", 0, 1, "law of the regime at a round's start", rows=True)]


@dataclass(frozen=True)
class IID(AcceptanceProcess):
    r"""$a_i = \alpha$: the model of Leviathan et al. (2023), with $E[\text{emitted}] = (1-\alpha^{K+1})/(1-\alpha)$."""

    accept_prob: Annotated[float, Key("number", "probability", 0, 1, "acceptance of every candidate")]
    kind = "iid"

    def __post_init__(self) -> None:
        object.__setattr__(self, "accept_prob", float(probabilities("acceptance.accept_prob", self.accept_prob, 0)))

    def lower(self, max_candidates: int) -> FiniteChain:
        one = np.ones((1, 1))
        return FiniteChain(one, np.full((max_candidates, 1), self.accept_prob), one[0])


@dataclass(frozen=True)
class Position(AcceptanceProcess):
    r"""$a_i$ depends on the candidate's place in the round only: one number per place, exactly K of them."""

    accept_prob: Annotated[np.ndarray, Key("[K]", "probability", 0, 1, "acceptance of candidates 1..K")] = field(
        hash=False
    )
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

    transition: Moves = field(hash=False)
    accept_prob: ByRegime = field(hash=False)
    initial: Start = field(hash=False)
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
class Observed(AcceptanceProcess):
    r"""Hidden regimes: as `MarkovModulated`, but seen is a symbol $o_k \sim O(z_k, \cdot)$ instead of $z_k$.

    The symbol of candidate k is seen once it is drafted, and is independent of its acceptance given the regime. Rounds
    renew. What the stopper can know is in `mdp.belief`; only a `fixed` length and the `oracle` do without it, and to
    those the chain of regimes is all there is (`unseen`).

    Args:
        observation: row-stochastic [Z, O], the law of the symbol in each regime.
    """

    transition: Moves = field(hash=False)
    accept_prob: ByRegime = field(hash=False)
    initial: Start = field(hash=False)
    observation: Annotated[
        np.ndarray, Key("[Z, O]", "probability", 0, 1, "row z: law of the symbol seen in regime z", rows=True)
    ] = field(hash=False)
    kind = "observed"
    finite = False
    hides = frozenset({"regime", "token_accept_prob"})

    def __post_init__(self) -> None:
        chain = MarkovModulated(self.transition, self.accept_prob, self.initial)
        size = chain.num_regimes
        if size > MAX_HIDDEN:
            raise ValueError(f"acceptance.accept_prob: at most {MAX_HIDDEN} hidden regimes, got {size}")
        observation = distribution("acceptance.observation", self.observation, 2)
        if len(observation) != size:
            raise ValueError(f"acceptance.observation: must have {size} rows (regimes), got {len(observation)}")
        if observation.shape[1] > MAX_SYMBOLS:
            raise ValueError(f"acceptance.observation: at most {MAX_SYMBOLS} symbols, got {observation.shape[1]}")
        for name in ("transition", "accept_prob", "initial"):
            object.__setattr__(self, name, getattr(chain, name))
        object.__setattr__(self, "observation", observation)

    @property
    def num_symbols(self) -> int:
        """How many symbols the stopper can tell apart."""
        return self.observation.shape[1]

    @property
    def visible(self) -> MarkovModulated:
        """The same regimes, seen: worth at least as much to a stopper."""
        return MarkovModulated(self.transition, self.accept_prob, self.initial)

    def lower(self, max_candidates: int) -> FiniteChain:
        raise ValueError("acceptance: observed hides its regimes, no chain that shows them equals it")

    def unseen(self, max_candidates: int) -> FiniteChain:
        """The chain for rules that do not look."""
        return self.visible.lower(max_candidates)

    def sample(self, coins: Float[np.ndarray, "K ..."], start_coins: Float[np.ndarray, "..."]) -> Sampled:
        """Rounds with what the symbols tell: survival given all of them, and the mean of the next acceptance.

        What a coin leaves open once it has chosen the regime chooses the symbol.
        """
        regime, _ = _pick(self.initial[None], np.zeros(np.shape(start_coins), dtype=np.int64), start_coins)
        symbol = np.full(regime.shape, -1)
        alive = known = np.broadcast_to(self.initial, (*regime.shape, self.visible.num_regimes))
        drawn = []
        for coin in coins:
            kept, known = alive @ self.transition * self.accept_prob, known @ self.transition
            survival = alive.sum(axis=-1)
            likely = np.divide(kept.sum(axis=-1), survival, out=np.zeros_like(survival), where=survival > 0)
            regime, rest = _pick(self.transition, regime, coin)
            drawn.append((self.accept_prob[regime], likely, survival, symbol))
            symbol, _ = _pick(self.observation, regime, rest)
            seen = self.observation.T[symbol]
            known = known * seen
            total = known.sum(axis=-1, keepdims=True)
            alive, known = kept * seen / total, known / total
        return Sampled(*(np.stack(part) for part in zip(*drawn, strict=True)))

    def expected_next(self, state: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        return state


BELOW_ONE = 1.0 - 2.0**-44


def _pick(law: np.ndarray, row: np.ndarray, coin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draws by inverse CDF from the rows of a law, and the coins that are left, uniform again."""
    size = law.shape[1]
    ends = np.cumsum(law, axis=1)
    ends = ends / ends[:, -1:]
    coin = np.minimum(coin, BELOW_ONE)  # so that a row's number may be added to it
    found = np.searchsorted((ends + np.arange(len(law))[:, None]).ravel(), coin + row, side="right") - row * size
    found = np.clip(found, 0, size - 1)
    high = ends[row, found]
    low = np.where(found > 0, ends[row, found - 1], 0.0)
    return found, np.clip((coin - low) / (high - low), 0.0, BELOW_ONE)


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

    draft: Annotated[
        np.ndarray, Key("[n, n]", "probability", 0, 1, "row u: the draft's law of the token behind u", rows=True)
    ] = field(hash=False)
    target: Annotated[
        np.ndarray, Key("[n, n]", "probability", 0, 1, "row u: the target's law of the token behind u", rows=True)
    ] = field(hash=False)
    prompt_token: Annotated[int, Key("whole number", "", 0, MAX_VOCABULARY - 1, "last token of the prompt")] = 0
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

    def features(self) -> dict[str, np.ndarray]:
        """As in a trace (`mdp.trace.FEATURES`): q(v|u), the greatest q(.|u) and the entropy of q(.|u) in nats."""
        draft, size = self.draft, self.num_tokens
        entropy = -(draft * np.log(np.where(draft > 0, draft, 1.0))).sum(axis=1)
        return {
            "draft_prob": draft.ravel(),
            "top_prob": np.repeat(draft.max(axis=1), size),
            "entropy": np.repeat(entropy, size),
        }

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
