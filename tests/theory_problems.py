"""Random problems for the theory's laws: a seed makes a problem, and small seeds make simple ones.

A property draws seeds; hypothesis makes a failing one smaller, and with it the numbers: seed 5 has denominators up to
4, seeds from 2^12 on are not rounded. The problems of one kind have one shape, so `solve_many` takes them together.
"""

from collections import Counter

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from mdp import conditions
from mdp.acceptance import MarkovModulated, Position, TokenPair
from mdp.cost import Affine, Table
from mdp.problem import Persistent, StoppingProblem

__all__ = ["BATCH", "KINDS", "SHARE", "batches", "budget", "made"]

REGIMES, DEPTH, BATCH = 3, 6, 20

SHARE = {
    "renewal": 220, "persistent": 200, "constant": 140, "position": 80, "monotone": 140, "known": 60,
    "known_persistent": 60, "tokens": 100,
}  # fmt: skip
"""Problems of each kind in the default run: 1,000 together."""


class Numbers:
    """Random numbers in small fractions for small seeds."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.parts = 1 + seed.bit_length() if seed < 2**12 else None

    def chance(self) -> float:
        value = self.rng.choice([0.0, 1.0, *self.rng.uniform(size=4)])
        return float(value if self.parts is None else np.round(value * self.parts) / self.parts)

    def between(self, low: float, high: float) -> float:
        value = self.rng.uniform(low, high)
        return float(value if self.parts is None else max(np.round(value * self.parts), 1.0) / self.parts)

    def law(self, size: int) -> np.ndarray:
        if self.rng.random() < 0.2:
            return np.eye(size)[self.rng.integers(size)]
        law = self.rng.dirichlet(np.full(size, self.rng.choice([0.3, 1.0])))
        if self.parts is not None:
            law = np.floor(law * self.parts) + (law == law.max())
        return law / law.sum()

    def laws(self, size: int) -> np.ndarray:
        return np.array([self.law(size) for _ in range(size)])

    def accepts(self, size: int) -> np.ndarray:
        return np.array([self.chance() for _ in range(size)])

    def convex(self) -> Table:
        """Convex V that never falls."""
        steps = np.sort([self.rng.choice([0.0, self.between(0.0, 0.3)]) for _ in range(DEPTH)])
        return Table(self.between(0.02, 0.6), 1.0 + np.r_[0.0, np.cumsum(steps)])

    def affine(self) -> Affine:
        return Affine(self.between(0.02, 0.8), 1.0, float(self.rng.choice([0.0, self.between(0.0, 0.3)])))

    def any_times(self) -> Affine | Table:
        """Affine, steps, or dips that renewal rounds may have."""
        if self.rng.random() < 0.5:
            return self.affine()
        steps = self.rng.choice([0.0, 0.0, 0.25, 1.0, -0.2], size=DEPTH)
        return Table(self.between(0.05, 0.6), np.maximum(1.0 + np.r_[0.0, np.cumsum(steps)], 0.2))


def renewal(draw: Numbers) -> StoppingProblem:
    chain = MarkovModulated(draw.laws(REGIMES), draw.accepts(REGIMES), draw.law(REGIMES))
    return StoppingProblem(chain, draw.any_times(), DEPTH)


def persistent(draw: Numbers) -> StoppingProblem:
    chain = MarkovModulated(draw.laws(REGIMES), draw.accepts(REGIMES), draw.law(REGIMES))
    bonus = 0.5 * draw.laws(REGIMES) + 0.5 / REGIMES  # any start may follow a whole round: communicating
    return StoppingProblem(chain, draw.affine(), DEPTH, Persistent(draw.laws(REGIMES), bonus))


def constant(draw: Numbers) -> StoppingProblem:
    """One next acceptance for all regimes, different laws behind it; V affine: the condition of F2."""
    accept = np.sort(np.append(draw.rng.uniform(size=REGIMES - 1), draw.rng.uniform(0.5, 1.0)))
    mean = draw.rng.uniform(accept[0] + 0.2 * np.ptp(accept), accept[-1])
    rows = []
    for row in draw.laws(REGIMES):
        end = REGIMES - 1 if row @ accept < mean else 0
        share = (mean - row @ accept) / (accept[end] - row @ accept) if accept[end] != row @ accept else 0.0
        rows.append((1.0 - share) * row + share * np.eye(REGIMES)[end])
    return StoppingProblem(MarkovModulated(rows, accept, draw.law(REGIMES)), draw.affine(), DEPTH)


def position(draw: Numbers) -> StoppingProblem:
    """Survival is known in advance and falls; any times."""
    accept = np.clip([draw.chance() for _ in range(DEPTH)], 0.05, 0.95)
    return StoppingProblem(Position(accept), draw.any_times(), DEPTH)


def monotone(draw: Numbers) -> StoppingProblem:
    """V convex, and no candidate reveals a better chance than there was: the condition of F3."""
    while True:
        chain = MarkovModulated(draw.laws(REGIMES), draw.accepts(REGIMES), draw.law(REGIMES))
        problem = StoppingProblem(chain, draw.convex(), DEPTH)
        if not conditions.revealing(problem.lower()):
            return problem


def known(draw: Numbers) -> StoppingProblem:
    """Each regime has one successor: the condition of F5."""
    step = np.eye(REGIMES)[draw.rng.integers(REGIMES, size=REGIMES)]
    return StoppingProblem(MarkovModulated(step, draw.accepts(REGIMES), draw.law(REGIMES)), draw.any_times(), DEPTH)


def known_persistent(draw: Numbers) -> StoppingProblem:
    problem = persistent(draw)
    step = np.eye(REGIMES)[draw.rng.integers(REGIMES, size=REGIMES)]
    chain = MarkovModulated(step, problem.acceptance.accept_prob, problem.acceptance.initial)
    return StoppingProblem(chain, problem.cost, DEPTH, problem.coupling)


def tokens(draw: Numbers) -> StoppingProblem:
    """A draft and a target over two tokens, every token possible."""
    draft, target = (0.9 * draw.laws(2) + 0.05 for _ in range(2))
    return StoppingProblem(TokenPair(draft, target, int(draw.rng.integers(2))), draw.affine(), DEPTH)


KINDS = {f.__name__: f for f in (renewal, persistent, constant, position, monotone, known, known_persistent, tokens)}

MADE: Counter[str] = Counter()
"""How many problems of each kind the laws have been held against in this process."""


def made(kind: str, seeds: list[int]) -> list[StoppingProblem]:
    """The problems of a kind that these seeds stand for."""
    MADE[kind] += len(seeds)
    return [KINDS[kind](Numbers(seed)) for seed in seeds]


def batches(kind: str, size: int = BATCH):
    """Batches of problems of one kind."""
    seeds = st.lists(st.integers(0, 2**20), min_size=size, max_size=size)
    return seeds.map(lambda drawn: made(kind, drawn))


def budget(kind: str) -> settings:
    """As many batches as make this kind's share; more of them in profiles with more examples than `dev`."""
    factor = max(1, settings.default.max_examples // 20) if settings.default else 1
    return settings(max_examples=factor * SHARE[kind] // BATCH)
