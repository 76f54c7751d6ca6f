"""The exact law of a round's counts, and samples from it."""

import numpy as np
import pytest
from test_sim_walk import RULES, PeekAndStop, random_problem, rule_named

from mdp.acceptance import IID, MarkovModulated
from mdp.cost import Affine
from mdp.evaluate import evaluate
from mdp.problem import StoppingProblem
from simulate.law import counts_law, sample_law
from simulate.rounds import simulate


@pytest.mark.parametrize("size", [1, 2, 4])
def test_law_has_the_exact_means(size):
    rng = np.random.default_rng(size)
    problem = random_problem(rng, size, 6, False, True)
    finite, could = problem.lower(), np.arange(7)
    for name in RULES:
        rule = rule_named(name, rng, finite)
        law, exact = counts_law(finite, rule), evaluate(problem, rule).tally
        assert (law >= 0).all()
        found = law.sum(), law.sum(axis=1) @ could, law.sum(axis=0) @ could, law.sum(axis=1) @ finite.round_time
        np.testing.assert_allclose(found, (1, exact.num_drafted, exact.num_emitted - 1, exact.time), rtol=1e-12)


def test_law_by_hand():
    law = counts_law(StoppingProblem(IID(0.5), Affine(0.2, 1.0), 3).lower(), rule_named("fixed:2", None, None))
    np.testing.assert_allclose(law[2], [0.5, 0.25, 0.25, 0.0])
    assert law.sum() == 1


def test_samples_agree_with_played_rounds():
    problem = random_problem(np.random.default_rng(7), 3, 5, False, False)
    rules = ["fixed:3", "rejection:0.5", "oracle"]
    drawn = sample_law(problem, rules, rounds=200_000, key=3).policies
    played = simulate(problem, rules, rounds=200_000, key=4).policies
    for one, other in zip(drawn, played, strict=True):
        se = np.hypot(one.throughput.se, other.throughput.se)
        assert abs(one.throughput.value - other.throughput.value) < 5 * se
    again = sample_law(problem, rules, rounds=200_000, key=3).policies
    assert [p.throughput for p in again] == [p.throughput for p in drawn]


def test_clairvoyant_rule_of_ones_own():
    chain = MarkovModulated([[0.5, 0.5], [0.5, 0.5]], [0.25, 0.5], [0.0, 1.0])
    law = counts_law(StoppingProblem(chain, Affine(0.2, 1.0), 3).lower(), PeekAndStop())
    first_in_1, first = 0.5 * 0.5, 0.5 * 0.75 + 0.5 * 0.5
    np.testing.assert_allclose(law.sum(axis=1) @ np.arange(4), first + first_in_1 + first_in_1 * 0.5)
    assert law[:, 1:].sum() == 0


def test_refusals():
    problem = random_problem(np.random.default_rng(1), 2, 4, True, False)
    with pytest.raises(ValueError, match="persistent"):
        sample_law(problem, ["fixed:1"], rounds=10, key=0)
