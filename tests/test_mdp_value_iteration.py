"""Value iteration, and single precision: other ways to the same answer, each inside the same kind of proof."""

import inspect
from types import ModuleType

import jax
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from optimum import (
    CIRCLE,
    FLAT,
    NEVER,
    OFFSETS,
    RARE,
    ROUNDING,
    check_thresholds,
    oracle,
    random_problem,
)
from strategies import problems

import mdp.value_iteration
from mdp.acceptance import BetaMixture
from mdp.certificate import certificate
from mdp.cost import Affine
from mdp.evaluate import evaluate
from mdp.knots import even_and_kinks, place
from mdp.price import lump
from mdp.problem import StoppingProblem
from mdp.solve import SolveStatus, solve

RIGHT = 1e-6  # both close their bounds to this


def encloses(solution, throughput):
    lower, upper = solution.bounds
    assert lower <= solution.throughput <= upper
    assert lower <= throughput * (1 + ROUNDING) and throughput * (1 - ROUNDING) <= upper


@given(problems(shapes=((3, 6),)))
@example(FLAT)
@example(CIRCLE)
def test_value_iteration_encloses_the_optimum(problem):
    solution, reference = solve(problem, method="value_iteration", max_sweeps=300, max_knots=512), oracle(problem)
    assert solution.method == "value_iteration"
    encloses(solution, reference.throughput)
    if solution.status is SolveStatus.successful:
        assert solution.throughput == pytest.approx(reference.throughput, rel=RIGHT)
        check_thresholds(problem, solution, reference, offsets=OFFSETS[::3])


@pytest.mark.parametrize("coupling", ["renewal", "persistent"])
@pytest.mark.parametrize("seed", range(4))
def test_it_agrees_with_policy_iteration_and_takes_more_steps(coupling, seed):
    problem = random_problem(seed, 3, 6, coupling)
    ours, theirs = (solve(problem, method=f"{name}_iteration") for name in ("value", "policy"))
    assert ours.status is theirs.status is SolveStatus.successful
    assert max(ours.bounds[0], theirs.bounds[0]) <= min(ours.bounds[1], theirs.bounds[1])
    assert ours.throughput == pytest.approx(theirs.throughput, rel=RIGHT)
    assert ours.num_sweeps > 2 * theirs.num_sweeps
    np.testing.assert_allclose(
        np.minimum(ours.survival_threshold, 1), np.minimum(theirs.survival_threshold, 1), atol=1e-5
    )
    assert evaluate(problem, ours.policy).throughput == pytest.approx(theirs.throughput, rel=RIGHT)


def test_starts_that_take_turns_do_not_keep_it_from_ending():
    # Undamped, the three values would go round for ever.
    solution = solve(CIRCLE, method="value_iteration")
    assert solution.status is SolveStatus.successful
    encloses(solution, oracle(CIRCLE).throughput)


def test_where_it_cannot_end_it_says_so():
    # A hundred thousand rounds between visits to the other regime: each step forgets one part in so many.
    solution = solve(RARE, method="value_iteration", max_sweeps=50, max_knots=1)
    encloses(solution, oracle(RARE).throughput)
    assert solution.status is SolveStatus.max_steps_reached or solution.bounds[1] <= solution.bounds[0] * (1 + RIGHT)
    hurried = solve(random_problem(0, 3, 6, "persistent"), method="value_iteration", max_sweeps=2, max_knots=1)
    assert hurried.status is SolveStatus.max_steps_reached
    encloses(hurried, oracle(random_problem(0, 3, 6, "persistent")).throughput)


def rates(module, problem, most):
    """The rate after 1..most steps from plain decoding's."""
    arrays, _ = lump(problem.lower())
    grid = place(arrays.accept_prob, even_and_kinks(arrays.accept_prob, arrays.into, None, 512))
    start = 1.0 / arrays.verify_time[0], np.zeros(len(arrays.initial))
    with jax.enable_x64(True):
        return np.array([module.iterate_values(arrays, grid, *start, n).rate for n in range(1, most + 1)])


def check_climb(climb, best):
    assert (np.diff(climb) >= -1e-12).all() and climb[-1] > climb[0]
    assert climb[-1] == pytest.approx(best, rel=1e-3)  # up to the knots' own error


@pytest.mark.parametrize("coupling", ["renewal", "persistent"])
def test_the_rate_climbs_to_the_optimum_and_does_not_pass_it(coupling):
    problem = random_problem(2, 3, 6, coupling)
    check_climb(rates(mdp.value_iteration, problem, 60), solve(problem).throughput)


MUTANTS = {
    "steps are too long": ("/ longest", "/ (0.3 * shortest)"),
    "steps go the wrong way": ("done.rate + jnp.where(low > 0", "done.rate - jnp.where(low > 0"),
    "values keep still": ("+ 0.5 * (gain", "+ 0.0 * (gain"),
}


@pytest.mark.parametrize(("right", "wrong"), MUTANTS.values(), ids=MUTANTS)
def test_a_broken_step_is_caught(right, wrong):
    source = inspect.getsource(mdp.value_iteration)
    assert source.count(right) == 1
    broken = ModuleType("broken")
    exec(compile(source.replace(right, wrong), "broken", "exec"), broken.__dict__)
    problem = random_problem(2, 3, 6, "persistent")
    with pytest.raises(AssertionError):
        check_climb(rates(broken, problem, 60), solve(problem).throughput)


# --- Single precision


@given(problems(shapes=((3, 6),)))
@example(FLAT)
@example(NEVER)
@example(RARE)
def test_single_precision_encloses_what_double_precision_proves(problem):
    preview = solve(problem, precision="float32", max_knots=1)
    proven = solve(problem)
    encloses(preview, proven.throughput)
    assert preview.bounds[0] <= proven.bounds[1] and proven.bounds[0] <= preview.bounds[1]


@given(st.integers(0, 10**6), st.sampled_from(["renewal", "persistent"]))
def test_on_ordinary_problems_the_preview_is_close(seed, coupling):
    problem = random_problem(seed, 3, 6, coupling)
    preview, proven = solve(problem, precision="float32", tol=1e-2), solve(problem)
    assert preview.status is SolveStatus.successful
    assert preview.throughput == pytest.approx(proven.throughput, rel=1e-4)
    encloses(preview, proven.throughput)
    assert solve(problem, precision="float32").status is SolveStatus.max_steps_reached


def test_bounds_that_forget_the_rounding_are_caught():
    """With double precision's allowance the previews of some problems would exclude their optimum."""
    missed = 0
    for seed in range(20):
        problem = random_problem(seed, 3, 6, "renewal")
        preview, exact = solve(problem, precision="float32", max_knots=1), solve(problem).throughput
        width = preview.bounds[1] - preview.bounds[0]
        round_time = problem.lower().round_time
        allowance = np.diff(certificate(exact, 0.0, 0.0, round_time, 0.0, 3, float(np.finfo(np.float32).eps)))[0]
        narrow = width - allowance + 1e-12
        missed += not (preview.throughput - narrow / 2 <= exact <= preview.throughput + narrow / 2)
    assert missed > 0


def test_single_precision_and_value_iteration_are_for_finite_problems():
    problem = StoppingProblem(BetaMixture(0.7, 3.0), Affine(0.2, 1.0), 3)
    with pytest.raises(ValueError, match="method: beta_mixture is continuous"):
        solve(problem, method="value_iteration")
    with pytest.raises(ValueError, match="precision: beta_mixture is continuous"):
        solve(problem, precision="float32")
