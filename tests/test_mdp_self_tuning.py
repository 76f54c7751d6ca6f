"""Self-tuning: where it settles, that it gets there, and where it stays behind."""

import itertools

import numpy as np
import pytest

from mdp.acceptance import MarkovModulated
from mdp.calibrate import two_regimes
from mdp.cost import Affine
from mdp.evaluate import evaluate
from mdp.head_rule import told_throughput, weighted
from mdp.policy import ThresholdTable
from mdp.problem import Persistent, StoppingProblem
from mdp.self_tuning import (
    best_threshold,
    counterexample,
    heads,
    lookahead_family,
    optimal_family,
    read_by_head,
    settle,
)
from mdp.solve import solve
from simulate.self_tuning import play


def random_problem(rng, size=3, depth=4):
    laws = rng.dirichlet(np.full(size, 0.7), size=size)
    chain = MarkovModulated(laws, rng.uniform(0.05, 0.99, size), rng.dirichlet(np.ones(size)))
    return StoppingProblem(chain, Affine(float(rng.uniform(0.05, 0.5)), 1.0), depth)


@pytest.mark.parametrize("seed", range(4))
def test_the_optimal_family_has_one_limit_and_it_is_the_optimum(seed):
    problem = random_problem(np.random.default_rng(seed))
    found = settle(problem.lower(), optimal_family(problem.lower()), points=41)
    lower, upper = solve(problem).bounds
    assert len(found.stable) == 1
    assert lower * (1 - 1e-7) <= found.throughput <= upper * (1 + 1e-7)
    assert found.best <= upper * (1 + 1e-12)


def test_a_family_that_is_not_optimal_settles_elsewhere():
    problem = random_problem(np.random.default_rng(0))
    dear = optimal_family(problem.lower())
    found = settle(problem.lower(), lambda rate: dear(3.0 * rate), points=41)
    assert found.throughput < solve(problem).bounds[0] * (1 - 1e-3)


@pytest.mark.parametrize("dispersion", [0.3, 0.9])
def test_lookahead_reaches_the_optimum_in_the_monotone_case(dispersion):
    problem = StoppingProblem(two_regimes(0.8, dispersion, 0.0), Affine(0.2, 1.0), 6)
    finite = problem.lower()
    mean = finite.next_accept_prob[0]
    assert (finite.accept_prob[0] * mean <= mean.min() + 1e-12).all()  # the condition
    found = settle(finite, lookahead_family(finite))
    assert len(found.stable) == 1 and found.throughput == pytest.approx(solve(problem).throughput, rel=1e-6)


def test_the_counterexample_in_fractions():
    problem = counterexample()
    finite = problem.lower()
    found = settle(finite, lookahead_family(finite))
    assert found.stable == [pytest.approx(50 / 29, rel=1e-12)]
    assert found.best == pytest.approx(13 / 7, rel=1e-12) and solve(problem).throughput == pytest.approx(13 / 7)
    # by hand: easy start 4 tokens in 1.9; hard start 1 in 1, or one try: 5/2 tokens in 1.6
    by_hand = (4 + 1) / (1.9 + 1), (4 + 2.5) / (1.9 + 1.6)
    assert by_hand == pytest.approx((50 / 29, 13 / 7))
    # the optimal family has no such limit
    assert settle(finite, optimal_family(finite)).throughput == pytest.approx(13 / 7, rel=1e-9)


def test_it_gets_there_when_played():
    problem = counterexample()
    family, output = lookahead_family(problem.lower()), problem.lower().accept_prob[0]
    path = play(problem, family, output, rounds=(10, 100, 1000), rates=np.linspace(0.5, 2.0, 301))
    error = path.spread[-1] / 16  # 256 replicas
    assert abs(path.mean[-1] - 50 / 29) < 5 * error + 1e-3  # the early rounds still count
    assert path.spread[0] > 5 * path.spread[-1]
    assert path.mean[-1] < 13 / 7 - 0.1


def told_by_enumeration(problem, table, output):
    """Throughput of a table whose survival is made of `output`, path by path."""
    tokens = time = 0.0
    for path in itertools.product(range(problem.num_regimes), repeat=problem.max_candidates + 1):
        chance = problem.initial[path[0]] * np.prod(problem.transition[path[:-1], path[1:]])
        k, survival = 0, 1.0
        while k < problem.max_candidates and survival >= table[k, path[k]] - 1e-12:
            k += 1
            survival *= output[path[k]]
        tokens += chance * (1.0 + np.cumprod(problem.accept_prob[0, list(path[1 : k + 1])]).sum())
        time += chance * (k * problem.draft_time + problem.verify_time[k])
    return tokens / time


def test_a_rule_that_is_told_something_else():
    rng = np.random.default_rng(3)
    for _ in range(5):
        problem = random_problem(rng).lower()
        table, output = rng.uniform(0, 1, (4, 3)), rng.uniform(0.2, 1, 3)
        told = told_throughput(problem, table, output)
        assert told == pytest.approx(told_by_enumeration(problem, table, output), rel=1e-12)
        honest = told_throughput(problem, table, problem.accept_prob[0])
        assert honest == pytest.approx(evaluate(problem, ThresholdTable(table)).throughput, rel=1e-12)
        assert told != pytest.approx(honest, rel=1e-6)


def test_readings_are_calibrated_and_weights_come_off():
    chain = two_regimes(0.8, 0.7, 0.5)
    both, (biased, debiased, perfect) = heads(chain, 0.8, 6.0)
    law = both.initial
    np.testing.assert_allclose(law @ both.transition, law, atol=1e-12)
    assert law @ debiased.output == pytest.approx(law @ both.accept_prob, rel=1e-12)
    for reading in range(2):  # E[a | reading] is the output
        where = np.arange(4) % 2 == reading
        assert debiased.output[where] == pytest.approx(law[where] @ both.accept_prob[where] / law[where].sum())
    np.testing.assert_allclose(biased.output, weighted(debiased.output, 6.0), rtol=1e-12)
    # what a head says of the next candidate must not depend on the regime it cannot see
    assert biased.next_output[0] == biased.next_output[2] and debiased.next_output[1] == debiased.next_output[3]
    np.testing.assert_allclose(perfect.next_output, both.transition @ both.accept_prob)
    assert law @ debiased.next_output == pytest.approx(0.8, rel=1e-12)


def test_bias_costs_and_debiasing_repairs():
    both, three = heads(two_regimes(0.82, 0.6, 0.8), 0.8, 6.0)
    problem = StoppingProblem(both, Affine(0.21, 1.0), 8)
    finite = problem.lower()
    limits = [settle(finite, lookahead_family(finite, head.next_output), head.output).throughput for head in three]
    assert limits[0] < 0.8 * limits[1] and limits[1] < limits[2] <= solve(problem).bounds[1]
    # one tuned threshold makes up for most of the bias: order of outputs is kept
    assert best_threshold(finite, three[0].output)[1] > 1.2 * limits[0]


def test_what_is_refused():
    loop = np.full((2, 2), 0.5)
    chain = two_regimes(0.8, 0.5, 0.5)
    persistent = StoppingProblem(chain, Affine(0.2, 1.0), 3, Persistent(loop, loop))
    with pytest.raises(ValueError, match="coupling"):
        settle(persistent.lower(), lookahead_family(persistent.lower()))
    with pytest.raises(ValueError, match="coupling"):
        play(persistent, lookahead_family(persistent.lower()), chain.accept_prob, rates=np.ones(2))
    with pytest.raises(ValueError, match="long-run law"):
        read_by_head(MarkovModulated([[0.9, 0.1], [0.3, 0.7]], [0.9, 0.3], [0.5, 0.5]), 0.8)
