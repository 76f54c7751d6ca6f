"""The paper's objective: least time until n tokens are out, against a walk over all paths, and its way to n / rho*."""

import dataclasses
import inspect
import sys
from functools import lru_cache
from types import ModuleType

import numpy as np
import pytest
from hypothesis import example, given
from optimum import CIRCLE, FLAT, RARE, random_problem
from strategies import problems, scales

import mdp.horizon
from mdp.acceptance import IID, BetaMixture
from mdp.cost import Affine, Table
from mdp.horizon import solve_horizon
from mdp.problem import StoppingProblem
from mdp.solve import SolveStatus, solve

ROUNDING = 1e-12
TOKENS = 5


def walk(finite, num_tokens, table=None):
    """Least expected time per start regime for 0..N tokens to go; with a `table` [N + 1, K, Z] that of its rule.

    Path by path in terms of what has happened, not of what is known: `alive` is a probability, a rejection found out
    later has its next start noted at once, and every draft step and call is paid for by all paths.
    """
    size, depth = finite.num_regimes, finite.max_candidates
    bonus = finite.bonus if finite.persistent else np.tile(finite.initial, (size, 1))
    rejection = finite.rejection if finite.persistent else np.tile(finite.initial, (size, 1))

    @lru_cache(None)
    def least(left, z):
        return 0.0 if left <= 0 else behind(left, 0, z, 1.0)

    def after(left, law):
        return 0.0 if left <= 0 else sum(p * least(left, y) for y, p in enumerate(law) if p > 0)

    def behind(left, k, z, alive):
        stop = finite.verify_time[k] + alive * after(left - (k + 1), bonus[z])
        if k == depth or (table is not None and alive < table[left, k, z] - 1e-12):
            return stop
        go_on = finite.draft_time
        for y in np.flatnonzero(finite.transition[z]):
            accept = finite.accept_prob[k, y]
            rejected = alive * (1.0 - accept) * after(left - (k + 1), rejection[y])
            go_on += finite.transition[z, y] * (rejected + behind(left, k + 1, y, alive * accept))
        return go_on if table is not None else min(stop, go_on)

    return np.array([[least(left, z) for z in range(size)] for left in range(num_tokens + 1)])


def check_enclosed(problem, solution, expected):
    time = expected @ problem.lower().initial
    lower, upper = solution.bounds.T
    assert (lower <= time * (1 + ROUNDING)).all() and (time * (1 - ROUNDING) <= upper).all()
    assert (lower <= solution.expected_time).all() and (solution.expected_time <= upper).all()


def check(problem, solution, expected):
    check_enclosed(problem, solution, expected)
    lower, upper = solution.bounds.T
    assert solution.status is SolveStatus.successful
    assert (upper - lower <= 1e-6 * lower).all()
    np.testing.assert_allclose(solution.expected_time, expected @ problem.lower().initial, rtol=1e-6)


@given(problems(shapes=((2, 3), (3, 6))))
@example(FLAT)
@example(RARE)
@example(CIRCLE)
def test_the_time_is_that_of_the_best_way_through_all_paths(problem):
    check(problem, solve_horizon(problem, TOKENS), walk(problem.lower(), TOKENS))


@given(problems(shapes=((3, 6),)))
def test_the_thresholds_take_the_time_that_is_claimed(problem):
    solution = solve_horizon(problem, TOKENS)
    taken = walk(problem.lower(), TOKENS, solution.survival_threshold)
    starts = problem.lower().initial > 0
    np.testing.assert_allclose(taken[:, starts], solution.expected_time_from[:, starts], rtol=2e-6)


@pytest.mark.parametrize("coupling", ["renewal", "persistent"])
@pytest.mark.parametrize("seed", range(3))
def test_total_time_is_n_over_the_best_throughput_and_a_bounded_rest(coupling, seed):
    problem = random_problem(seed, 3, 6, coupling)
    solution, rate = solve_horizon(problem, 800), solve(problem).throughput
    counts = np.arange(801)
    rest = solution.expected_time - counts / rate
    assert np.abs(rest[101:]).max() <= np.abs(rest[:101]).max() * (1 + 1e-6)  # it does not grow
    assert np.ptp(rest[400:]) <= 1e-6  # it even settles: rounds emit now one number of tokens, now another
    assert (np.abs(solution.throughput / rate - 1) * counts[1:] <= np.abs(rest).max() * rate * 1.1 + 1e-6).all()
    assert solution.throughput[-1] == pytest.approx(rate, rel=5e-3)
    # far from the end the rule is that of the long run
    near, far = solution.survival_threshold[400], solution.survival_threshold[800]
    np.testing.assert_allclose(np.minimum(near, 1), np.minimum(far, 1), atol=1e-6)
    np.testing.assert_allclose(np.minimum(far, 1), np.minimum(solution.long_run.survival_threshold, 1), atol=1e-5)


def test_sure_acceptance_counts_rounds():
    # Three tokens a round while that many are wanted; the last tokens in a shorter round.
    solution = solve_horizon(StoppingProblem(IID(1.0), Affine(0.25, 1.0), max_candidates=2), 7)
    assert solution.expected_time.tolist() == [0, 1, 1.25, 1.5, 2.5, 2.75, 3.0, 4.0]


def test_worthless_drafts_are_plain_decoding():
    solution = solve_horizon(StoppingProblem(IID(0.0), Affine(0.25, 2.0), max_candidates=4), 9)
    np.testing.assert_allclose(solution.expected_time, 2.0 * np.arange(10), rtol=1e-14)
    assert np.isinf(solution.survival_threshold).all()


@given(problems(shapes=((3, 6),)), scales())
def test_more_tokens_take_longer_and_units_of_time_do_not_matter(problem, unit):
    solution = solve_horizon(problem, TOKENS)
    if not problem.lower().persistent:  # else a start may be better than the one before it
        assert (np.diff(solution.expected_time) >= -1e-6 * solution.expected_time[1:]).all()
    times = problem.cost.draft_time * unit, [float(time * unit) for time in problem.cost.verify_time]
    scaled = StoppingProblem(problem.acceptance, Table(*times), problem.max_candidates, problem.coupling)
    np.testing.assert_allclose(solve_horizon(scaled, TOKENS).expected_time, solution.expected_time * unit, rtol=2e-6)


def test_bounds_hold_where_the_knots_are_too_few():
    problem = random_problem(1, 3, 6, "renewal")
    coarse, fine = solve_horizon(problem, 40, tol=1e-14, max_knots=1), solve_horizon(problem, 40)
    assert coarse.status is SolveStatus.max_steps_reached and "max_knots" in coarse.status.value
    assert (coarse.bounds[:, 0] <= fine.bounds[:, 1]).all() and (coarse.bounds[:, 1] >= fine.bounds[:, 0]).all()
    assert (np.diff(coarse.bounds, axis=1)[1:] > 1e-14 * coarse.bounds[1:, :1]).any()


def test_what_the_command_prints():
    content = solve_horizon(StoppingProblem(IID(0.5), Affine(0.25, 1.0), max_candidates=2), 2).to_dict()
    assert content["num_tokens"] == 2 and content["status"] == "successful"
    assert content["expected_time"] == pytest.approx(1.75, rel=1e-12)
    assert content["throughput"] == pytest.approx(2 / 1.75, rel=1e-12)
    assert content["bounds"][0] <= content["expected_time"] <= content["bounds"][1]


@pytest.mark.parametrize("num_tokens", [0, -1, 1.5, True, "9", 10**7])
def test_a_number_of_tokens_that_is_none_is_refused(num_tokens):
    with pytest.raises(ValueError, match=r"num_tokens: must be a whole number in 1\.\.1000000, got"):
        solve_horizon(StoppingProblem(IID(0.5), Affine(0.25, 1.0), max_candidates=2), num_tokens)


def test_other_bad_input_is_refused():
    problem = StoppingProblem(IID(0.5), Affine(0.25, 1.0), max_candidates=2)
    with pytest.raises(ValueError, match="num_tokens: at most 131072 for a problem of this size"):
        solve_horizon(StoppingProblem(IID(0.5), Affine(0.25, 1.0), max_candidates=1024), 131073)
    with pytest.raises(ValueError, match="max_knots: must be > 0"):
        solve_horizon(problem, 3, max_knots=0)
    with pytest.raises(ValueError, match="tol: must be > 0"):
        solve_horizon(problem, 3, tol=0)
    with pytest.raises(ValueError, match="continuous"):
        solve_horizon(dataclasses.replace(problem, acceptance=BetaMixture(0.7, 3.0)), 3)


# --- The laws above are seen to fail

MUTANTS = {
    "tokens beyond the end count": ("-np.arange(len(threshold) + 1.0)[:, None]", "np.zeros((len(threshold) + 1, 1))"),
    "tokens to go are off by one": ("before[:, :-1]], axis=1), (h", "before[:, 1:]], axis=1), (h"),
    "rules give both sides": ("both.upper[1]]", "both.lower[1]]"),
    "interpolation gives both sides": ("both.lower[0]", "both.upper[0]"),
    "a rejection leads nowhere": ("_replace(rejection=anew[0]", "_replace(rejection=0 * anew[0]"),
    "the start is forgotten": ("h @ arrays.initial", "h[:, :, 0]"),
}


@pytest.mark.parametrize(("right", "wrong"), MUTANTS.values(), ids=MUTANTS)
def test_a_broken_recursion_is_caught(right, wrong, monkeypatch):
    source = inspect.getsource(mdp.horizon)
    assert source.count(right) == 1
    broken = ModuleType("broken")
    monkeypatch.setitem(sys.modules, "broken", broken)
    exec(compile(source.replace(right, wrong), "broken", "exec"), broken.__dict__)
    problem = random_problem(1, 3, 6, "renewal")
    expected = walk(problem.lower(), 8)
    for module in (mdp.horizon, broken):
        monkeypatch.setattr(module, "FIRST_KNOTS", 12)  # with knots on every kink both sides would be the same
    check_enclosed(problem, solve_horizon(problem, 8, max_knots=1), expected)
    with pytest.raises((AssertionError, TypeError, ValueError)):
        check_enclosed(problem, broken.solve_horizon(problem, 8, max_knots=1), expected)
