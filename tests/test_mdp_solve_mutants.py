"""The laws of test_mdp_solve.py are seen to fail: on solvers of another problem, on wrong tables, on wrong bounds."""

import dataclasses

import numpy as np
import pytest
from optimum import check_optimum, check_thresholds, oracle, random_problem

from mdp.solve import solve


def late(verify_time):
    """V(k) off by one."""
    return np.append(verify_time[:1], verify_time[:-1])


MUTANTS = {
    "V(k) is off by one": lambda p: p._replace(verify_time=late(p.verify_time)),
    "the first draft step is free": lambda p: p._replace(verify_time=p.verify_time - p.draft_time * (np.arange(7) > 0)),
    "regimes move along columns": lambda p: p._replace(transition=p.transition.T / p.transition.T.sum(1)[:, None]),
    "the bonus start is that of a rejection": lambda p: p._replace(bonus=p.rejection),
    "the bias is dropped": lambda p: p._replace(rejection=None, bonus=None),
    "the last candidate cannot be drafted": lambda p: p._replace(
        accept_prob=p.accept_prob[:-1], verify_time=p.verify_time[:-1]
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_a_solver_of_the_wrong_problem_is_caught(mutant):
    problem = random_problem(5, 3, 6, "persistent")
    reference = oracle(problem)
    check_optimum(solve(problem), reference)
    with pytest.raises(AssertionError):
        check_optimum(solve(mutant(problem.lower())), reference)


TABLE_MUTANTS = {
    "rows are off by one": lambda table: np.roll(table, 1, axis=0),
    "columns are swapped": lambda table: table[:, ::-1],
    "survival is forgotten": lambda table: np.where(table <= 1, 0.0, np.inf),
    "thresholds are rounded to a grid": lambda table: np.round(table, 3),
}


@pytest.mark.parametrize("mutant", TABLE_MUTANTS.values(), ids=TABLE_MUTANTS)
@pytest.mark.parametrize("coupling", ["renewal", "persistent"])
def test_a_wrong_table_is_caught(mutant, coupling):
    problem = random_problem(5, 3, 6, coupling)
    solution, reference = solve(problem), oracle(problem)
    check_thresholds(problem, solution, reference)
    wrong = dataclasses.replace(solution, survival_threshold=mutant(solution.survival_threshold))
    with pytest.raises(AssertionError):
        check_thresholds(problem, wrong, reference)


def test_bounds_that_miss_the_optimum_are_caught():
    problem = random_problem(5, 3, 6, "renewal")
    solution, reference = solve(problem), oracle(problem)
    lower, upper = solution.bounds
    for bounds in ((lower * (1 + 1e-10), upper), (lower, upper * (1 - 1e-10)), (lower * (1 - 1e-5), upper)):
        with pytest.raises(AssertionError):
            check_optimum(dataclasses.replace(solution, bounds=bounds), reference)
