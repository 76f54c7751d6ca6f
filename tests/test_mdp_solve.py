"""The solver: right to rounding against the enumeration oracle, inside its own bounds, with thresholds that mean it."""

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from optimum import (
    CHEAP,
    CIRCLE,
    CLOSE,
    FLAT,
    NEVER,
    OFFSETS,
    RARE,
    check_optimum,
    check_policy_earns_it,
    check_thresholds,
    oracle,
    random_problem,
)
from strategies import SHAPES, problems

from mdp.acceptance import IID
from mdp.cost import Affine
from mdp.evaluate import evaluate
from mdp.problem import StoppingProblem
from mdp.solve import SolveStatus, solve

# --- Against the oracle


@given(problems())
@example(FLAT)
@example(CHEAP)
@example(RARE)
@example(NEVER)
@example(CIRCLE)
def test_the_value_is_the_enumerated_optimum_inside_its_bounds(problem):
    solution = solve(problem, method="policy_iteration")
    assert solution.method == "policy_iteration"
    check_optimum(solution, oracle(problem))
    check_policy_earns_it(problem, solution)
    assert solution.speedup == pytest.approx(solution.throughput * problem.lower().verify_time[0])


@given(problems())
@example(FLAT)
@example(CHEAP)
@example(CIRCLE)
def test_a_threshold_is_where_continuing_starts_to_pay(problem):
    check_thresholds(problem, solve(problem, method="policy_iteration"), oracle(problem), offsets=OFFSETS[::2])


# --- The certificate when it is not reached


@pytest.mark.parametrize("coupling", ["renewal", "persistent"])
@pytest.mark.parametrize("seed", range(3))
def test_bounds_hold_when_sweeps_run_out(seed, coupling):
    problem = random_problem(seed, 3, 6, coupling)
    hurried, reference = solve(problem, max_sweeps=1, max_knots=1), oracle(problem)
    lower, upper = hurried.bounds
    assert hurried.status is SolveStatus.max_steps_reached
    assert "max_knots" in hurried.status.value
    assert 0 <= lower <= reference.throughput <= upper < np.inf
    assert lower <= hurried.throughput <= upper
    assert upper - lower > 1e-6 * lower


@pytest.mark.parametrize("coupling", ["renewal", "persistent"])
def test_bounds_hold_when_they_are_asked_to_be_closer_than_rounding(coupling):
    problem = random_problem(0, 3, 6, coupling)
    solution, reference = solve(problem, tol=1e-15, max_knots=1), oracle(problem)
    assert solution.status is SolveStatus.max_steps_reached
    assert solution.bounds[0] <= reference.throughput <= solution.bounds[1]
    check_thresholds(problem, solution, reference)


@pytest.mark.parametrize("argument", ["tol", "max_knots", "max_sweeps"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_limits_that_make_no_sense_are_refused(argument, value):
    with pytest.raises(ValueError, match=f"{argument}: must be > 0"):
        solve(CIRCLE, **{argument: value})


@pytest.mark.parametrize("argument", ["method", "precision"])
def test_a_way_to_solve_that_does_not_exist_is_refused(argument):
    with pytest.raises(ValueError, match=f"{argument}: must be one of .*, got 'best'"):
        solve(CIRCLE, **{argument: "best"})


# --- What a solution is


@given(problems())
def test_a_solution_is_consistent_with_itself(problem):
    solution = solve(problem)
    depth = problem.max_candidates
    assert solution.survival_threshold.shape == (depth, problem.acceptance.num_regimes)
    assert solution.block_efficiency * solution.verification_rate == pytest.approx(1.0)
    assert 1 - CLOSE <= solution.block_efficiency <= depth + 1 + CLOSE
    assert 0 <= solution.mean_candidates <= depth + CLOSE
    discarded = solution.mean_candidates + 1 - solution.block_efficiency
    assert solution.discard_rate * solution.block_efficiency == pytest.approx(discarded, abs=CLOSE)


@pytest.mark.parametrize("coupling", ["renewal", "persistent"])
def test_rates_are_those_of_the_policy(coupling):
    problem = random_problem(2, 3, 6, coupling)  # no ties: under a tie rates may differ where throughput does not
    solution = solve(problem)
    tally = evaluate(problem, solution.policy).tally
    for name in ("block_efficiency", "verification_rate", "discard_rate", "mean_candidates"):
        assert getattr(solution, name) == pytest.approx(float(getattr(tally, name)), rel=CLOSE)


def test_the_json_of_a_solution_has_no_infinity():
    solution = solve(StoppingProblem(IID(0.1), Affine(draft_time=0.5, verify_time=1.0), max_candidates=2))
    line = json.dumps(solution.to_dict(), allow_nan=False)
    content = json.loads(line)
    assert content["survival_threshold"] == [[None], [None]]
    assert content["status"] == "successful"
    assert content["bounds"][0] <= content["throughput"] <= content["bounds"][1]
    assert "\n" not in line


# --- The problems tried


def test_the_strategies_reach_what_they_promise():
    # Else the laws above would be about tame problems only.
    seen = set()

    @given(problems())
    def look(problem):
        finite = problem.lower()
        seen.add(f"Z, K = {finite.num_regimes}, {finite.max_candidates}")
        seen.add("persistent" if finite.persistent else "renewal")
        seen.update(name for name, met in {
            "a = 0": (finite.accept_prob == 0).any(), "a = 1": (finite.accept_prob == 1).any(),
            "sparse": (finite.transition == 0).any(), "dip": (np.diff(finite.verify_time) < 0).any(),
            "twins": finite.num_regimes > 1 and (finite.transition[0] == finite.transition[1]).all(),
            "step": (np.diff(finite.verify_time) > 0).any(), "small": finite.verify_time[0] < 1e-3,
            "large": finite.verify_time[0] > 1e3,
        }.items() if met)  # fmt: skip

    settings(max_examples=300, database=None, derandomize=True)(look)()
    expected = {f"Z, K = {z}, {k}" for z, k in SHAPES}
    expected |= {"persistent", "renewal", "a = 0", "a = 1", "sparse", "dip", "step", "twins", "small", "large"}
    assert expected - seen == set()
