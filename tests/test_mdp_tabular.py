"""The tabular form against the plainest value iteration there is, which shares no structure with it."""

import numpy as np
import pytest

import mdp.tabular
from mdp.tabular import TabularProblem, solve_tabular

DEPTH = 6


def problem(seed=0, size=3, knots=24, least_step=1, span=4.0):
    rng = np.random.default_rng(seed)
    steps = rng.integers(least_step, 9, size)
    survival = np.exp(-np.arange(knots) * span / (knots - 1))
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


def shapes_of_trouble():
    """K that binds and that does not, steps of 0, lattices that end where going on still pays."""
    for seed in range(8):
        least, span, depth = (4, 1, 0)[seed % 3], (4.0, 0.4)[seed % 4 == 3], (6, 40)[seed % 2]
        yield problem(seed, knots=96, least_step=least, span=span), depth


def goes_on(found, case, depth):
    """CONTINUE in every state [K, Z, M] that a round can reach: j is at least k times the least step."""
    reached = np.arange(len(case.survival)) >= np.arange(depth)[:, None] * case.steps.min()
    return (case.survival >= np.asarray(found.threshold)[..., None]) & reached[:, None]


def test_one_pass_over_survivals_finds_what_the_sweep_over_depths_does(monkeypatch):
    passes, discount = [], 0.9
    for case, depth in shapes_of_trouble():
        monkeypatch.setattr(mdp.tabular, "SMALL", 10**9)
        plain = solve_tabular(case, depth, rate=0.2, discount=discount)
        monkeypatch.setattr(mdp.tabular, "SMALL", 0)
        lean = solve_tabular(case, depth, rate=0.2, discount=discount, full=False)
        full = solve_tabular(case, depth, rate=0.2, discount=discount)
        assert lean.rate == pytest.approx(plain.rate, rel=1e-13)
        assert abs(lean.residual) <= 1e-12
        np.testing.assert_allclose(full.value, plain.value, atol=1e-11)
        np.testing.assert_array_equal(full.threshold, plain.threshold)
        np.testing.assert_array_equal(goes_on(lean, case, depth), goes_on(plain, case, depth))
        passes.append(lean.one_pass)
    assert {False, True} == set(passes)


def test_a_round_that_the_pass_would_make_longer_than_allowed_is_left_to_depths(monkeypatch):
    """One regime, acceptance e^-Delta, where each candidate pays: K = 3 binds, K = 30 does not."""
    monkeypatch.setattr(mdp.tabular, "SMALL", 0)
    survival = np.exp(-0.1 * np.arange(60))
    case = TabularProblem(np.ones((1, 1)), np.ones(1), np.ones(1, int), survival, 1.0, 5.0)
    found = {depth: solve_tabular(case, depth, full=False) for depth in (3, 30)}
    assert {depth: solution.one_pass for depth, solution in found.items()} == {3: False, 30: True}
    lengths = np.arange(31)
    rates = np.cumsum(survival[:31]) / (5.0 + lengths)  # 1 + S_1 + .. + S_n over the cost of n candidates
    for depth, solution in found.items():
        assert solution.rate == pytest.approx(rates[: depth + 1].max(), rel=1e-13)
