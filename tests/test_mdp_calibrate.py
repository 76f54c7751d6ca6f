"""Fits give back what made the figures, and refuse what nothing can have made."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdp.calibrate import (
    best_fixed,
    fit_cost_ratio,
    fit_dispersion,
    fit_mean_acceptance,
    fixed_speedup,
    rule_curve,
    two_regimes,
)
from mdp.cost import Affine
from mdp.evaluate import evaluate
from mdp.head_rule import HeadRule
from mdp.problem import StoppingProblem

LENGTHS = [2, 4, 6, 8]
RULE = HeadRule(weight=6.0, lag=1, least=2)


@given(st.floats(0.05, 0.98), st.floats(0.02, 0.8))
def test_mean_and_cost_come_back(mean, cost_ratio):
    rates = [(1 - mean) / (1 - mean ** (k + 1)) for k in LENGTHS]
    found = fit_mean_acceptance(LENGTHS, rates)
    assert found.mean == pytest.approx(mean, abs=1e-7) and found.worst_misfit < 1e-6
    speedup = best_fixed(mean, cost_ratio, LENGTHS)[1]
    assert fit_cost_ratio(mean, speedup, LENGTHS) == pytest.approx(cost_ratio, rel=1e-6)


def test_disagreeing_lengths_show():
    found = fit_mean_acceptance([2, 8], [0.45, 0.25])
    assert found.spread[0] < found.mean < found.spread[1]
    assert found.worst_misfit > 0.01


def test_fixed_speedups_are_those_of_the_problem():
    problem = StoppingProblem(two_regimes(0.8, 0.7, 0.0), Affine(0.21, 1.0), 8)  # independent, so dispersion is unseen
    exact = [evaluate(problem, f"fixed:{k}").speedup for k in LENGTHS]
    np.testing.assert_allclose(fixed_speedup(0.8, 0.21, LENGTHS), exact, rtol=1e-12)


@pytest.mark.parametrize(("form", "number"), [("beta", 0.3), ("two_point", 0.6)])
def test_dispersion_comes_back(form, number):
    grid = [0.5, 0.7, 0.9]
    speedup = float(rule_curve(form, 0.82, number, 0.21, RULE, 12, grid).throughput.max())
    assert fit_dispersion(form, 0.82, 0.21, speedup, RULE, 12, grid) == pytest.approx(number, abs=1e-5)


@given(st.floats(0.1, 0.9), st.floats(0.0, 1.0), st.floats(0.0, 0.99))
def test_two_regimes_keep_mean_and_variance(mean, dispersion, persistence):
    chain = two_regimes(mean, dispersion, persistence)
    law = chain.initial
    np.testing.assert_allclose(law @ chain.transition, law, atol=1e-12)
    assert law @ chain.accept_prob == pytest.approx(mean, abs=1e-12)
    assert law @ (chain.accept_prob - mean) ** 2 == pytest.approx(dispersion**2 * mean * (1 - mean), abs=1e-12)


def test_what_no_model_can_have_made_is_refused():
    with pytest.raises(ValueError, match="verification_rate: must lie"):
        fit_mean_acceptance([2], [0.2])
    with pytest.raises(ValueError, match="lengths: must be"):
        fit_mean_acceptance([2, 3], [0.5])
    with pytest.raises(ValueError, match="speedup: must lie"):
        fit_cost_ratio(0.5, 3.0, LENGTHS)
    with pytest.raises(ValueError, match="speedup: must lie"):
        fit_dispersion("beta", 0.82, 0.21, 9.0, RULE, 12, [0.7])
    with pytest.raises(ValueError, match="dispersion: must lie"):
        two_regimes(0.5, 1.5, 0.0)
