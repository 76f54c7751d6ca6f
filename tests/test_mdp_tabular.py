"""The tabular form against the plainest value iteration there is, which shares no structure with it."""

import numpy as np
import pytest

from mdp.tabular import TabularProblem, solve_tabular

DEPTH = 6


def problem(seed=0, size=3, knots=24, least_step=1):
    rng = np.random.default_rng(seed)
    steps = rng.integers(least_step, 9, size)
    survival = np.exp(-np.arange(knots) * 4.0 / (knots - 1))
    return TabularProblem(
        rng.dirichlet(np.ones(size), size=size), rng.dirichlet(np.ones(size)), steps, survival, 1.0, 5.0
    )


def actions(problem, value, rate, discount):
    """STOP [1] and CONTINUE [K, Z, M] worked out state by state."""
    onward = np.minimum(np.arange(len(problem.survival)) + problem.steps[:, None], len(problem.survival) - 1)
    stop = 1 - rate * problem.verify_cost + discount * problem.initial @ value[0, :, 0]
    arrived = problem.survival[onward] + discount * value[1:][:, np.arange(len(onward))[:, None], onward]
    return stop, np.einsum("zy,kyj->kzj", problem.transition, arrived) - rate * problem.draft_cost


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("discount", [0.5, 0.9])
def test_discounted_values_are_those_of_value_iteration(seed, discount):
    case = problem(seed, least_step=seed % 2)  # a step of 0 is an acceptance of 1
    value = np.zeros((DEPTH + 1, 3, 24))
    for _ in range(int(np.log(1e-13) / np.log(discount))):
        stop, going_on = actions(case, value, 0.2, discount)
        value = np.concatenate([np.maximum(stop, going_on), np.full((1, 3, 24), stop)])
    found = solve_tabular(case, DEPTH, rate=0.2, discount=discount)
    np.testing.assert_allclose(np.asarray(found.value), value, atol=1e-10)
    assert abs(found.residual) <= 1e-12
    lean = solve_tabular(case, DEPTH, rate=0.2, discount=discount, full=False)
    np.testing.assert_array_equal(lean.threshold, found.threshold)
    assert lean.value is None
    stop, going_on = actions(case, value, 0.2, discount)
    clear = np.abs(going_on - stop) > 1e-9
    chosen = case.survival >= np.asarray(found.threshold)[..., None]
    np.testing.assert_array_equal(chosen[clear], (going_on > stop)[clear])


@pytest.mark.parametrize("seed", range(6))
def test_the_average_solves_its_optimality_equation(seed):
    """At the right rate, relative values stand still and a whole round is worth nothing more than its cost."""
    case = problem(seed)
    found = solve_tabular(case, DEPTH)
    value = np.asarray(found.value)
    stop, going_on = actions(case, value, float(found.rate), 1.0)
    assert stop == pytest.approx(0.0, abs=1e-12)
    np.testing.assert_allclose(value[:-1], np.maximum(going_on, 0.0), atol=1e-12)


def test_a_discount_out_of_range_is_refused():
    with pytest.raises(ValueError, match="discount"):
        solve_tabular(problem(), DEPTH, discount=1.5)
