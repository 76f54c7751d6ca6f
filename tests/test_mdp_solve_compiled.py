"""Compiled programs: one per problem shape, the same numbers uncompiled or in a batch, float64 for them alone.

How many programs a batch needs is in `test_mdp_many.py`.
"""

import jax
import numpy as np
import pytest
from optimum import CIRCLE, random_problem

from mdp.horizon import solve_horizon
from mdp.many import solve_many
from mdp.solve import solve


@pytest.fixture
def compilations():
    """A list that grows by one with each program XLA compiles."""
    events = []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def solve_some(seeds, size, depth, coupling, **options):
    options = {"method": "policy_iteration", **options}
    knots = {solve(random_problem(seed, size, depth, coupling), **options).num_knots for seed in seeds}
    assert len(knots) == 1  # more knots are another shape


@pytest.mark.parametrize("coupling", ["renewal", "persistent"])
def test_new_numbers_compile_nothing(coupling, compilations):
    solve_some(range(6), 4, 4, coupling)
    first = len(compilations)
    assert 0 < first <= 2  # else this test sees nothing; one program improves, one only looks closer
    solve_some(range(6, 18), 4, 4, coupling)
    assert len(compilations) == first


def test_shapes_next_to_each_other_share_a_program(compilations):
    solve_some(range(6), 6, 6, "renewal")
    first = len(compilations)
    solve_some(range(6), 5, 5, "renewal")
    assert len(compilations) == first


@pytest.mark.parametrize("options", [{"method": "value_iteration"}, {"precision": "float32", "max_knots": 1}], ids=str)
def test_other_ways_to_solve_have_one_program_too(options, compilations):
    solve_some(range(12), 2, 4, "persistent", **options)
    assert 0 < len(compilations) <= 2


def test_one_program_serves_every_number_of_tokens(compilations):
    solve_horizon(random_problem(0, 2, 4, "renewal"), 40, tol=1e-3)
    first = len(compilations)
    solve_horizon(random_problem(1, 2, 4, "renewal"), 300, tol=1e-3)
    assert 0 < first == len(compilations)


@pytest.mark.parametrize(("coupling", "method"), [("renewal", "value_iteration"), ("persistent", "policy_iteration")])
def test_compiled_equals_uncompiled(coupling, method):
    problem = random_problem(3, 2, 2, coupling)
    options = {"method": method, "tol": 1e-3, "max_knots": 1, "max_sweeps": 3}
    compiled = solve(problem, **options)
    with jax.disable_jit():
        eager = solve(problem, **options)
    assert compiled.num_sweeps == eager.num_sweeps
    assert compiled.throughput == pytest.approx(eager.throughput, rel=1e-12)
    assert compiled.bounds == pytest.approx(eager.bounds, rel=1e-12)
    np.testing.assert_allclose(compiled.survival_threshold, eager.survival_threshold, rtol=1e-12)
    np.testing.assert_allclose(compiled.bias, eager.bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize("coupling", ["renewal", "persistent"])
def test_a_batch_of_unequal_members_is_a_loop(coupling):
    # Unequal in how far they have to go, too: a member that is done must not be moved by one that is not.
    members = [random_problem(seed, 3, 6, coupling) for seed in range(5)]
    batch = solve_many(members)
    for index, problem in enumerate(members):
        alone = solve_many([problem])
        assert batch.bounds[index].tolist() == alone.bounds[0].tolist()
        assert batch.survival_threshold[index].tolist() == alone.survival_threshold[0].tolist()
        lower, upper = solve(problem).bounds
        assert lower <= batch.bounds[index, 1] and batch.bounds[index, 0] <= upper


def test_float64_is_switched_on_for_the_solver_alone():
    assert not jax.config.jax_enable_x64
    solution = solve(CIRCLE)
    assert not jax.config.jax_enable_x64
    assert solution.survival_threshold.dtype == solution.bias.dtype == np.float64
    assert jax.numpy.ones(1).dtype == np.float32
