"""Thresholds without a grid: the optimum where the form of the policy is known, and nothing claimed where it is not."""

import inspect
import math
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from optimum import (
    CLOSE,
    OFFSETS,
    check_optimum,
    check_policy_earns_it,
    check_thresholds,
    oracle,
    persistent,
    random_problem,
)
from strategies import affine_costs, distributions, position_problems, probabilities, problems, stochastic_matrices

import mdp.direct
from mdp.acceptance import IID, MarkovModulated
from mdp.cost import Affine, Table
from mdp.direct import is_monotone, solve_directly
from mdp.policy import ThresholdTable
from mdp.problem import StoppingProblem
from mdp.reference import solve_by_enumeration
from mdp.solve import solve


@st.composite
def monotone_problems(draw, size=3, depth=5):
    """Renewal rounds in which the next candidate hardly tells regimes apart, made monotone by mixing if need be."""
    rows, even = draw(stochastic_matrices(size)), draw(distributions(size))
    accept = draw(st.lists(probabilities(), min_size=size, max_size=size))
    start, cost = draw(distributions(size)), draw(affine_costs())
    for share in (0.0, 0.5, 0.9, 1.0):  # with equal rows the next acceptance is one number, and that is monotone
        chain = MarkovModulated(share * np.tile(even, (size, 1)) + (1 - share) * rows, accept, start)
        problem = StoppingProblem(chain, cost, depth)
        if is_monotone(problem.lower()):
            return problem
    raise AssertionError("equal rows are monotone")


@given(monotone_problems())
def test_monotone_problems_are_solved_by_looking_one_step_ahead(problem):
    solution = solve(problem)
    assert solution.method == ("one_step_lookahead" if len(set(problem.acceptance.accept_prob)) > 1 else "fixed_length")
    reference = oracle(problem)
    check_optimum(solution, reference)
    check_policy_earns_it(problem, solution)
    check_thresholds(problem, solution, reference, offsets=OFFSETS[::2])
    lower, upper = solution.bounds
    assert upper - lower <= 1e-10 * lower  # rounding and ties, no grid


@given(monotone_problems())
def test_both_methods_agree(problem):
    ours, theirs = solve(problem), solve(problem, method="policy_iteration")
    assert theirs.method == "policy_iteration"
    assert ours.throughput == pytest.approx(theirs.throughput, rel=CLOSE)
    assert max(ours.bounds[0], theirs.bounds[0]) <= min(ours.bounds[1], theirs.bounds[1])


@given(problems())
def test_what_is_solved_directly_is_the_optimum(problem):
    solution = solve_directly(problem.lower())
    assume(solution is not None)
    reference = oracle(problem)
    check_optimum(solution, reference)
    check_policy_earns_it(problem, solution)
    check_thresholds(problem, solution, reference, offsets=OFFSETS[::3])


@given(position_problems())
def test_where_survival_is_known_beforehand_no_grid_is_needed(problem):
    solution, reference = solve(problem), oracle(problem)
    assert solution.method == "fixed_length" and solution.num_knots == 0
    check_optimum(solution, reference)
    check_thresholds(problem, solution, reference, offsets=OFFSETS[::3])


def test_acceptances_by_place_may_be_monotone_where_those_of_one_place_are_not():
    # a' a-bar' <= a-bar compares the candidate after the next with the next one: it must have faded by then.
    chain = MarkovModulated([[0.9, 0.1], [0.3, 0.7]], [0.95, 0.4], [0.8, 0.2])
    finite = StoppingProblem(chain, Affine(0.1, 1.0), 4).lower()
    shares = np.array([1.0, 0.66, 0.6, 0.5])[:, None]
    fading, rising = (finite._replace(accept_prob=finite.accept_prob * part) for part in (shares, shares[::-1]))
    assert is_monotone(fading) and not is_monotone(rising) and not is_monotone(finite)
    assert solve(fading).method == "one_step_lookahead" and solve(rising).method == "policy_iteration"
    for problem in (fading, rising):
        check_optimum(solve(problem), solve_by_enumeration(*problem))


def test_what_a_candidate_reveals_can_pay_for_it():
    # From the second regime a candidate rarely survives, but then the first regime is worth a long round.
    chain = MarkovModulated([[1.0, 0.0], [0.3, 0.7]], [1.0, 0.02], [0.0, 1.0])
    problem = StoppingProblem(chain, Affine(0.35, 1.0), 12)
    assert not is_monotone(problem.lower())
    solution = solve(problem)
    assert solution.method == "policy_iteration"
    ahead = np.minimum(solution.throughput * 0.35 / problem.lower().next_accept_prob, np.inf)
    assert solution.survival_threshold[0, 1] < ahead[0, 1] * 0.9


def test_a_saving_later_is_not_monotone():
    """The fourth candidate makes the target call cheaper: the third is drafted for its sake."""
    dip = StoppingProblem(MarkovModulated([[0.5, 0.5], [0.4, 0.6]], [0.7, 0.5], [0.5, 0.5]),
                          Table(0.1, [1.0, 1.3, 1.6, 2.0, 0.6]), 4)  # fmt: skip
    assert not is_monotone(dip.lower())
    check_optimum(solve(dip), oracle(dip))


def test_persistent_rounds_are_monotone_only_without_regimes():
    assert not is_monotone(random_problem(0, 3, 6, "persistent").lower())
    rows = [[0.2, 0.8], [0.6, 0.4]]
    same = persistent(rows, [0.7, 0.7], [1.0, 0.0], rows, rows, Affine(0.2, 1.0), 6)
    solution = solve(same)
    assert solution.method == "fixed_length" and solution.bias.tolist() == [0.0, 0.0]
    check_optimum(solution, oracle(same))


def test_long_rounds_take_no_grid():
    alpha, depth, draft_time = 0.999, 1024, 0.01
    solution = solve(StoppingProblem(IID(alpha), Affine(draft_time, 1.0), depth))
    best = max(math.fsum(alpha**i for i in range(k + 1)) / (1 + k * draft_time) for k in range(0, depth + 1, 1))
    assert solution.throughput == pytest.approx(best, rel=CLOSE)
    assert solution.method == "fixed_length"


def test_a_tree_too_large_is_left_to_the_grid():
    rng = np.random.default_rng(0)
    chain = MarkovModulated(np.tile(rng.dirichlet(np.ones(8)), (8, 1)), rng.random(8), np.full(8, 0.125))
    problem = StoppingProblem(chain, Affine(0.05, 1.0), 12)
    assert is_monotone(problem.lower())
    assert solve(problem).method == "policy_iteration"


def test_bounds_closer_than_rounding_are_left_to_the_grid():
    problem = StoppingProblem(IID(0.8), Affine(0.2, 1.0), 6)
    assert solve(problem, tol=1e-10).method == "fixed_length"
    assert solve_directly(problem.lower(), tol=1e-15) is None


def test_it_needs_no_jax(tmp_path):
    problem = tmp_path / "problem.json"
    problem.write_text('{"acceptance": {"kind": "iid", "accept_prob": 0.8}, "max_candidates": 8, '
                       '"cost": {"kind": "affine", "draft_time": 0.2, "verify_time": 1.0}}')  # fmt: skip
    code = f"import sys; from specstop.cli import main; main(['solve', {str(problem)!r}]); print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False" and "fixed_length" in done.stdout


# --- The condition is seen to matter

MUTANTS = {
    "what comes after is forgotten": ("problem.accept_prob[k] * ahead[k + 1]", "0.0 * ahead[k + 1]"),
    "acceptance is forgotten": ("problem.accept_prob[k] * ahead[k + 1] * added[k]", "0.5 * ahead[k + 1] * added[k]"),
    "times are forgotten": ("added[k + 1] <= 0 or ", ""),
    "impossible steps count alone": ("possible = problem.transition > 0", "possible = problem.transition == 0"),
    "the target turns round": ("behind > (ahead", "behind < (ahead"),
    "persistent rounds count too": ("    if problem.persistent:\n        return False\n", ""),
}


@pytest.mark.parametrize(("right", "wrong"), MUTANTS.values(), ids=MUTANTS)
def test_a_broken_condition_is_caught(right, wrong):
    source = inspect.getsource(mdp.direct)
    assert source.count(right) == 1
    broken = ModuleType("broken")
    exec(compile(source.replace(right, wrong), "broken", "exec"), broken.__dict__)
    finites = [random_problem(seed, 2, 4, "persistent" if seed % 3 == 0 else "renewal").lower() for seed in range(60)]
    # Nothing is ever accepted, but a longer call is cheaper: two candidates pay for one.
    finites.append(StoppingProblem(MarkovModulated([[0, 1], [0, 1]], [0.9, 0.0], [0.5, 0.5]),
                                   Table(0.1, [1.0, 1.2, 0.5]), 2).lower())  # fmt: skip
    right_answers = [is_monotone(finite) for finite in finites]
    assert 5 < sum(right_answers) < 55
    assert [broken.is_monotone(finite) for finite in finites] != right_answers


class _Earns:
    """A rule and what it is said to earn."""

    def __init__(self, policy, throughput):
        self.policy, self.throughput = policy, throughput


def test_looking_ahead_off_its_condition_loses():
    """Else the condition would be for nothing: a rule at the optimum's own rate that earns less."""
    chain = MarkovModulated([[1.0, 0.0], [0.3, 0.7]], [1.0, 0.02], [0.0, 1.0])
    problem = StoppingProblem(chain, Affine(0.35, 1.0), 12)
    best = solve(problem).throughput
    table = mdp.direct._one_step_lookahead(problem.lower(), best)
    with pytest.raises(AssertionError):
        check_policy_earns_it(problem, _Earns(ThresholdTable(table), best))
