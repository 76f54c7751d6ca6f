"""The rule on a biased head: against evaluation, enumeration of all paths, sampling and the optimum."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize
from strategies import affine_costs, problems, tame_probabilities

from mdp.acceptance import BetaMixture, MarkovModulated
from mdp.cost import Affine, Table
from mdp.evaluate import evaluate
from mdp.head_rule import HeadRule, best_seen_threshold, fixed_curve, head_curve, unweighted, weighted
from mdp.policy import RejectionThreshold
from mdp.problem import Persistent, StoppingProblem
from mdp.solve import solve

CHAIN = MarkovModulated([[0.9, 0.1], [0.3, 0.7]], [0.95, 0.4], [0.8, 0.2])


@given(st.floats(0.01, 0.99), st.floats(0.1, 20.0))
def test_the_weighted_output_minimises_the_weighted_loss(accept_prob, weight):
    def loss(output):
        return -weight * (1 - accept_prob) * np.log1p(-output) - accept_prob * np.log(output)

    best = optimize.minimize_scalar(loss, bounds=(1e-9, 1 - 1e-9), method="bounded", options={"xatol": 1e-12}).x
    assert weighted(accept_prob, weight) == pytest.approx(best, abs=1e-6)
    assert unweighted(weighted(accept_prob, weight), weight) == pytest.approx(accept_prob, rel=1e-12)


def test_the_papers_threshold_for_one_token():
    # a reported rejection of .7 is a true one of .28
    assert 1 - unweighted(0.3, 6.0) == pytest.approx(0.28, abs=0.001)


@given(problems(coupling="renewal"))
def test_every_threshold_earns_what_evaluation_says(problem):
    curve = head_curve(problem, HeadRule())
    for index in np.unique(np.linspace(0, len(curve.threshold) - 1, 5).astype(int)):
        exact = evaluate(problem, RejectionThreshold(float(curve.threshold[index])))
        assert curve.throughput[index] == pytest.approx(exact.throughput, rel=1e-9)
        assert curve.drafted[index] == pytest.approx(exact.tally.num_drafted, rel=1e-9, abs=1e-12)


def by_enumeration(problem, rule, threshold):
    """Tokens and time of one round, path by path, the rule asked as the released code asks it."""
    finite = problem.lower()
    output = finite.accept_prob[0] / (finite.accept_prob[0] + rule.weight * (1 - finite.accept_prob[0]))
    tokens = time = 0.0
    for path in itertools.product(range(finite.num_regimes), repeat=finite.max_candidates + 1):
        chance = finite.initial[path[0]] * np.prod(finite.transition[path[:-1], path[1:]])
        k = 0
        while k < finite.max_candidates:
            scored = path[1 : max(k - rule.lag, 0) + 1]
            if k >= rule.least and 1.0 - np.prod(output[list(scored)]) > threshold + 1e-12:
                break
            k += 1
        tokens += chance * (1.0 + np.cumprod(finite.accept_prob[0, list(path[1 : k + 1])]).sum())
        time += chance * (k * finite.draft_time + finite.verify_time[k])
    return tokens, time


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("least", [0, 1, 2, 4])
def test_lag_least_and_weight_against_all_paths(lag, least):
    problem = StoppingProblem(CHAIN, Table(0.2, [1.0, 1.3, 1.2, 1.2, 2.0, 2.1]), max_candidates=5)
    rule = HeadRule(weight=6.0, lag=lag, least=least)
    curve = head_curve(problem, rule, np.array([0.1, 0.3, 0.5, 0.7, 0.9, 0.99]))
    for h, emitted, time in zip(curve.threshold, curve.emitted, curve.time, strict=True):
        assert (emitted, time) == pytest.approx(by_enumeration(problem, rule, h), rel=1e-12)


def test_the_comparison_notices_another_lag_or_weight():
    problem = StoppingProblem(CHAIN, Affine(0.2, 1.0), max_candidates=5)
    emitted, time = by_enumeration(problem, HeadRule(6.0, 1, 2), 0.5)
    for other in (HeadRule(6.0, 0, 2), HeadRule(6.0, 2, 2), HeadRule(1.0, 1, 2), HeadRule(6.0, 1, 4)):
        curve = head_curve(problem, other, np.array([0.5]))
        assert (curve.emitted[0], curve.time[0]) != pytest.approx((emitted, time), rel=1e-6)


def test_a_seen_continuous_law_against_sampling():
    mean, concentration, depth = 0.82, 1.3, 20
    problem = StoppingProblem(BetaMixture(mean, concentration), Affine(0.21, 1.0), depth)
    thresholds = np.array([0.1, 0.5, 0.7, 0.9])
    curve = head_curve(problem, HeadRule(weight=6.0, lag=1, least=2), thresholds)
    assert (curve.lower <= curve.throughput).all() and (curve.throughput <= curve.upper).all()
    assert (curve.upper / curve.lower - 1).max() < 2e-3
    rng = np.random.default_rng(5)
    accept = rng.beta(mean * concentration, (1 - mean) * concentration, (200_000, depth))
    product = np.cumprod(accept / (accept + 6.0 * (1 - accept)), axis=1)
    for h, rate in zip(thresholds, curve.throughput, strict=True):
        reached = np.ones(accept.shape, dtype=bool)
        reached[:, 2:] = 1 - product[:, :-2] <= h
        tokens = 1.0 + (np.cumprod(accept, axis=1) * reached).sum(axis=1)
        time = 1.0 + 0.21 * reached.sum(axis=1)
        error = (tokens - rate * time).std() / time.mean() / np.sqrt(len(time))
        assert abs(tokens.mean() / time.mean() - rate) < 5 * error


def test_bounds_of_a_coarse_grid_hold_the_fine_value():
    problem = StoppingProblem(BetaMixture(0.8, 0.5), Affine(0.2, 1.0), max_candidates=12)
    thresholds = np.linspace(0.05, 0.95, 10)
    for rule in (HeadRule(), HeadRule(6.0, 1, 2)):
        coarse, fine = (head_curve(problem, rule, thresholds, cells=cells) for cells in (64, 8192))
        assert (coarse.lower <= fine.lower).all() and (fine.upper <= coarse.upper).all()
        np.testing.assert_allclose(coarse.throughput, fine.throughput, rtol=1e-2)


def test_no_dispersion_is_iid():
    problem = StoppingProblem(BetaMixture(0.8, 1e8), Affine(0.2, 1.0), max_candidates=10)
    curve = head_curve(problem, HeadRule(), np.array([1 - 0.8**3.5]))  # goes on after three, stops after four
    assert curve.drafted[0] == pytest.approx(4.0, abs=1e-3)
    assert curve.throughput[0] == pytest.approx(fixed_curve(problem)[4], rel=1e-4)


def test_one_threshold_is_the_optimum_where_acceptances_are_seen():
    problem = StoppingProblem(BetaMixture(0.8, 1.5), Affine(0.2, 1.0, 0.02), max_candidates=5)
    curve, solution = best_seen_threshold(problem), solve(problem, tol=1e-4)
    assert curve.lower[0] <= solution.bounds[1] and solution.bounds[0] <= curve.upper[0]
    assert curve.threshold[0] == pytest.approx(1 - solution.survival_threshold[0, 0], abs=1e-3)


@given(tame_probabilities(), affine_costs())
def test_fixed_lengths(accept_prob, cost):
    problem = StoppingProblem(MarkovModulated([[1.0]], [accept_prob], [1.0]), cost, max_candidates=4)
    exact = [evaluate(problem, f"fixed:{k}").throughput for k in range(5)]
    np.testing.assert_allclose(fixed_curve(problem), exact, rtol=1e-12)


def test_what_is_refused():
    beta = StoppingProblem(BetaMixture(0.8, 1.0), Affine(0.2, 1.0), max_candidates=4)
    loop = np.full((2, 2), 0.5)
    persistent = StoppingProblem(CHAIN, Affine(0.2, 1.0), 4, Persistent(loop, loop))
    with pytest.raises(ValueError, match="thresholds: must lie in"):
        head_curve(beta, HeadRule(), np.array([1.0]))
    with pytest.raises(ValueError, match="thresholds: continuous"):
        head_curve(beta, HeadRule())
    with pytest.raises(ValueError, match="coupling"):
        head_curve(persistent, HeadRule())
    with pytest.raises(ValueError, match="weight: must be"):
        HeadRule(weight=0.0)
    with pytest.raises(ValueError, match="lag: must be"):
        HeadRule(lag=-1)
    with pytest.raises(ValueError, match="one threshold"):
        best_seen_threshold(StoppingProblem(CHAIN, Affine(0.2, 1.0), 4))
