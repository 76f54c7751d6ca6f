"""What it takes for a solution to be right: the oracle's value inside the bounds, a policy that earns it, thresholds.

Shared by the tests of the solver and of its methods; the problems that broke the solver once stand here too.
"""

import numpy as np
import pytest

from mdp.acceptance import MarkovModulated
from mdp.chain import recurrent_classes, stationary_law
from mdp.cost import Affine, Table
from mdp.evaluate import evaluate, round_law
from mdp.problem import Persistent, StoppingProblem, start_graph
from mdp.reference import advantage, solve_by_enumeration
from mdp.solve import SolveStatus

CLOSE = 1e-9
"""Relative agreement with the oracle and with exact evaluation."""

ROUNDING = 1e-13
"""What the oracle's own floating point may be off by when bounds are held against it."""

OFFSETS = 10.0 ** -np.arange(1, 8)
"""How far from a threshold, on both sides, its verdict is checked."""

TOKENS = 1e-6
"""A threshold is right wherever CONTINUE and STOP differ by more tokens than this."""


def persistent(transition, accept_prob, initial, rejection, bonus, cost, depth):
    return StoppingProblem(MarkovModulated(transition, accept_prob, initial), cost, depth, Persistent(rejection, bonus))


# Problems that broke the solver once. Round times that stand still: STOP and CONTINUE tie at survival 0, not above it.
FLAT = persistent(
    [[0.999, 0.001], [1.0, 0.0]], [0.0, 1.0], [0.0, 1.0], [[0.0, 1.0], [0.5, 0.5]], [[1.0, 0.0], [0.4, 0.6]],
    Table(0.25, [2.0, 1.75, 1.5]), 2,
)  # fmt: skip
# Draft steps that cost nearly nothing: thresholds in the millionths, several kinks apart by a few of them.
CHEAP = StoppingProblem(MarkovModulated([[1.0, 0.0], [0.5, 0.5]], [1.0 - 1e-12, 0.5], [0.5, 0.5]), Affine(1e-6, 1.0), 6)
# One hundred thousand rounds between visits to the other regime.
RARE = persistent(
    [[0.5, 0.5], [0.5, 0.5]], [1.0, 1e-9], [1.0, 0.0], [[1.0 - 1e-9, 1e-9], [1e-9, 1.0 - 1e-9]],
    [[1.0 - 1e-9, 1e-9], [1e-9, 1.0 - 1e-9]], Affine(0.2, 1.0), 3,
)  # fmt: skip
# All candidates are accepted and the bonus turns in a circle: the three starts take turns for ever.
CIRCLE = persistent(
    np.eye(3), [1.0, 1.0, 1.0], [1.0, 0.0, 0.0], np.eye(3), np.roll(np.eye(3), 1, axis=1), Table(0.1, [1, 1, 1.5, 2]), 3
)
# A probability too small to be divided by.
NEVER = persistent(
    [[1.0, 0.0], [1.0, 0.0]], [0.0, 0.0], [1.0, 0.0], [[1.0, 0.0], [1.0, 0.0]], [[1.0, 2e-313], [1.0, 0.0]],
    Affine(0.001, 1.0), 3,
)  # fmt: skip


def oracle(problem):
    return solve_by_enumeration(*problem.lower())


def check_optimum(solution, reference):
    """The value is the oracle's, and the bounds hold it tightly."""
    lower, upper = solution.bounds
    assert solution.status is SolveStatus.successful
    assert solution.throughput == pytest.approx(reference.throughput, rel=CLOSE)
    assert lower <= solution.throughput <= upper
    assert lower <= reference.throughput * (1 + ROUNDING)
    assert upper >= reference.throughput * (1 - ROUNDING)
    assert upper - lower <= 1e-6 * lower


def check_policy_earns_it(problem, solution):
    """The table, evaluated exactly, earns what the solver says: in each class of starts it can end up in."""
    finite, policy = problem.lower(), solution.policy
    law = round_law(finite, policy)
    if not finite.persistent:
        assert evaluate(problem, policy).throughput == pytest.approx(solution.throughput, rel=CLOSE)
        return
    classes = recurrent_classes(law.next_start, finite.initial)
    for members in classes:
        weights = stationary_law(law.next_start, members)
        assert (weights @ law.emitted) / (weights @ law.time) == pytest.approx(solution.throughput, rel=CLOSE)
    if len(classes) == 1:
        assert evaluate(problem, policy).throughput == pytest.approx(solution.throughput, rel=CLOSE)


def can_be_met(finite):
    """[K, Z]: whether k candidates, all of which may yet be accepted, can end in z in a round that can happen.

    Only there does what follows have a value: a persistent round elsewhere would lead to starts that no run meets,
    and whose bias means nothing. Where rounds renew there is no bias, and every (k, z) counts.
    """
    depth, size = finite.accept_prob.shape
    if not finite.persistent:
        return np.ones((depth, size), dtype=bool)
    met = [start_graph(finite)[1]]
    for accept_prob in finite.accept_prob[:-1]:
        met.append((met[-1] @ (finite.transition > 0)) & (accept_prob > 0))
    return np.array(met)


def check_thresholds(problem, solution, reference, offsets=OFFSETS):
    """CONTINUE iff survival >= threshold, close to the threshold on both sides and far from it."""
    finite = problem.lower()
    arrays = finite._asdict()
    for k, z in np.argwhere(can_be_met(finite)):
        threshold = solution.survival_threshold[k, z]
        assert threshold >= 0 and (threshold <= 1 or threshold == np.inf)
        near = min(threshold, 1.0)
        survivals = np.concatenate([near - offsets, near + offsets, [near, 1e-9, 0.3, 1.0]])
        for survival in survivals[(survivals > 0) & (survivals <= 1)]:
            gain = advantage(arrays, reference, k, z, survival)
            if abs(gain) > TOKENS:
                assert (gain > 0) == (survival >= threshold), (k, z, survival, threshold, gain)


def random_problem(seed, size, depth, coupling):
    rng = np.random.default_rng(seed)
    rows = lambda: rng.dirichlet(np.full(size, 0.5), size)  # noqa: E731
    chain = MarkovModulated(rows(), rng.random(size), rng.dirichlet(np.ones(size)))
    cost = Table(0.05, 1.0 + 0.5 * (np.arange(depth + 1) >= 4))
    return StoppingProblem(chain, cost, depth, Persistent(rows(), rows()) if coupling == "persistent" else None)
