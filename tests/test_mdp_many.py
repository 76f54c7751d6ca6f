"""Batches: each member as if solved alone, one compilation, statuses that are true."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import problems

import mdp.many
from mdp.acceptance import IID, MarkovModulated
from mdp.cost import Affine, Table
from mdp.evaluate import evaluate
from mdp.many import derivatives, solve_many
from mdp.policy import ThresholdTable
from mdp.problem import FiniteProblem, Persistent, StoppingProblem
from mdp.solve import SolveStatus, solve


def mixed(count, persistent, seed=0, size=3, depth=6):
    """Problems of one shape that have nothing else in common."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        laws = [rng.dirichlet(np.full(size, 0.7), size=size) for _ in range(3)]
        chain = MarkovModulated(laws[0], rng.uniform(0.05, 0.99, size), rng.dirichlet(np.ones(size)))
        cost = Affine(float(rng.uniform(0.02, 0.8)), float(rng.uniform(0.5, 2.0)), float(rng.uniform(0, 0.1)))
        found.append(StoppingProblem(chain, cost, depth, Persistent(laws[1], laws[2]) if persistent else None))
    return found


@pytest.mark.parametrize("persistent", [False, True], ids=["renewal", "persistent"])
def test_members_are_solved_as_if_alone(persistent):
    many = mixed(37, persistent)  # more than one call, the last one not full
    batch = solve_many(many)
    for index, problem in enumerate(many):
        alone = solve(problem)
        (low, high), (lower, upper) = batch.bounds[index], alone.bounds
        assert low <= batch.throughput[index] <= high
        assert max(low, lower) <= min(high, upper)  # both enclose the optimum
        assert batch.throughput[index] == pytest.approx(alone.throughput, rel=2e-6)
        assert batch.status[index] is SolveStatus.successful
        assert high - low <= 1e-6 * low


@given(st.lists(problems(coupling="renewal", shapes=((3, 6),)), min_size=1, max_size=4))
def test_trouble_in_a_batch_is_proven_or_said(members):
    check(members)


@given(st.lists(problems(coupling="persistent", shapes=((3, 6),)), min_size=1, max_size=4))
def test_trouble_in_a_persistent_batch_is_proven_or_said(members):
    check(members)


def check(members):
    batch = solve_many(members)
    for index, problem in enumerate(members):
        (low, high), (lower, upper) = batch.bounds[index], solve(problem).bounds
        assert low <= batch.throughput[index] <= high
        assert max(low, lower) <= min(high, upper) * (1 + 1e-14)
        if batch.status[index] is SolveStatus.successful:
            assert high - low <= 1e-6 * low


def test_thresholds_earn_the_throughput():
    many = mixed(8, persistent=False, seed=3)
    batch = solve_many(many)
    for index, problem in enumerate(many):
        table = ThresholdTable(batch.survival_threshold[index])
        assert evaluate(problem, table).throughput >= batch.bounds[index, 0] * (1 - 1e-6)


def test_thresholds_are_those_of_solve():
    many = mixed(8, persistent=False, seed=4)
    batch = solve_many(many)
    for index, problem in enumerate(many):
        alone = solve(problem).survival_threshold
        np.testing.assert_array_equal(np.isinf(alone), np.isinf(batch.survival_threshold[index]))
        finite = np.isfinite(alone)
        np.testing.assert_allclose(batch.survival_threshold[index][finite], alone[finite], atol=2e-5)
    assert (batch.threshold_slack <= 1e-6).all()


def test_one_compilation_serves_every_batch_of_a_shape():
    solve_many(mixed(3, persistent=False, seed=5))
    before = mdp.many._solve_chunk._cache_size()
    solve_many(mixed(40, persistent=False, seed=6))
    solve_many(mixed(1, persistent=False, seed=7))
    assert mdp.many._solve_chunk._cache_size() <= before + 1  # + 1: the finer call, if it is needed here first
    assert not jax.config.jax_enable_x64


def test_a_dip_in_the_times_is_left_to_solve():
    """Where a longer round takes less time, CONTINUE is right at survival 0 and the lattice proves nothing."""
    dip = StoppingProblem(IID(0.8), Table(0.1, [1.0, 1.1, 0.7, 1.3]), 3)
    plain = StoppingProblem(IID(0.8), Affine(0.1, 1.0), 3)
    batch = solve_many([plain, dip])
    assert batch.num_refined == (1, 1)
    alone = solve(dip)
    assert batch.bounds[1] == pytest.approx(alone.bounds, abs=0)
    assert batch.status == [SolveStatus.successful] * 2


def test_a_status_that_is_not_success_reaches_the_user(monkeypatch):
    """With `solve` out of steps, the member it could not close must say so, and no other."""
    monkeypatch.setattr(mdp.many, "solve", lambda problem, tol: solve(problem, tol=1e-300, max_knots=1))
    dip = StoppingProblem(IID(0.8), Table(0.1, [1.0, 1.1, 0.7, 1.3]), 3)
    batch = solve_many([dip, StoppingProblem(IID(0.8), Affine(0.1, 1.0), 3)])
    assert batch.status == [SolveStatus.max_steps_reached, SolveStatus.successful]


def test_stacked_arrays_are_a_batch():
    many = mixed(4, persistent=True, seed=8)
    parts = zip(*(problem.lower() for problem in many), strict=True)
    stacked = FiniteProblem(*(np.stack(part) for part in parts))
    np.testing.assert_array_equal(solve_many(stacked).bounds, solve_many(many).bounds)


def test_bad_batches_are_refused():
    with pytest.raises(ValueError, match="there are none"):
        solve_many([])
    with pytest.raises(ValueError, match="one shape"):
        solve_many(mixed(1, False) + mixed(1, True))
    with pytest.raises(ValueError, match="tol"):
        solve_many(mixed(1, False), tol=0.0)


@pytest.mark.parametrize("persistent", [False, True], ids=["renewal", "persistent"])
def test_derivatives_are_the_slopes_of_throughput(persistent):
    """rho* is a maximum of E[emitted] / E[time], each convex in either time: its slope is between the differences."""

    def moved(problem, draft_time=0.0, verify_time=0.0):
        finite = problem.lower()
        return finite._replace(draft_time=finite.draft_time + draft_time, verify_time=finite.verify_time + verify_time)

    many, step = mixed(6, persistent, seed=9), 1e-3
    slopes = dict(zip(("draft_time", "verify_time"), derivatives(solve_many(many)), strict=True))
    smooth = 0
    for index, problem in enumerate(many):
        for name, slope in slopes.items():
            down, here, up = (solve(moved(problem, **{name: by}), tol=1e-9).throughput for by in (-step, 0.0, step))
            behind, ahead = (here - down) / step, (up - here) / step
            assert behind - 1e-3 <= slope[index] <= ahead + 1e-3
            if ahead - behind <= 0.01 * abs(ahead):  # no tie within a step
                smooth += 1
                assert slope[index] == pytest.approx((ahead + behind) / 2, rel=0.01)
    assert smooth >= 6
