"""What less and more information would earn: exact where it can be counted, and in order everywhere."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import position_problems, problems
from test_mdp_many import mixed

import mdp.relaxations
from mdp.acceptance import IID, Position
from mdp.cost import Affine, Table
from mdp.evaluate import evaluate
from mdp.problem import StoppingProblem
from mdp.relaxations import best_fixed_length, rejection_seen
from mdp.solve import solve


def test_the_best_fixed_length_is_the_best_that_evaluate_finds():
    many = mixed(37, persistent=False, seed=1)  # more than one group, the last one not full
    found = best_fixed_length(many)
    for index, problem in enumerate(many):
        rates = [evaluate(problem, f"fixed:{length}").throughput for length in range(problem.max_candidates + 1)]
        assert found.throughput[index] == pytest.approx(max(rates), rel=1e-12)
        assert rates[found.length[index]] == pytest.approx(max(rates), rel=1e-12)


def rejection_seen_by_hand(problem):
    """Every rule that maps (candidates, regime) to go on or stop, told of a rejection at once: depth 2, two regimes."""
    finite = problem.lower()
    law, accept, times = finite.transition, finite.accept_prob, finite.round_time
    best = 0.0
    for rule in np.ndindex(2, 2, 2, 2):
        goes_on = np.reshape(rule, (2, 2))
        emitted = time = 0.0
        for first, chance in enumerate(finite.initial):
            emitted, time = emitted + chance, time + chance * times[0]
            if not goes_on[0, first]:
                continue
            time += chance * (times[1] - times[0])
            for second in range(2):
                alive = chance * law[first, second] * accept[0, second]
                emitted += alive
                if goes_on[1, second]:
                    time += alive * (times[2] - times[1])
                    emitted += alive * law[second] @ accept[1]
        best = max(best, emitted / time)
    return best


def test_seeing_rejections_is_worth_what_the_best_of_all_rules_earns():
    many = mixed(20, persistent=False, seed=2, size=2, depth=2)
    found = rejection_seen(many)
    for index, problem in enumerate(many):
        assert found.throughput[index] == pytest.approx(rejection_seen_by_hand(problem), rel=1e-12)
        assert found.throughput[index] <= found.bound[index] <= found.throughput[index] * (1 + 1e-9)


@given(st.lists(problems(coupling="renewal", shapes=((3, 6),)), min_size=1, max_size=3))
def test_less_information_never_earns_more(members):
    """Nothing seen <= regime seen <= rejections seen too; dips in the times included."""
    low, high = best_fixed_length(members).throughput, rejection_seen(members).bound
    for index, problem in enumerate(members):
        lower, upper = solve(problem).bounds
        assert low[index] <= upper * (1 + 1e-12)
        assert high[index] >= lower * (1 - 1e-12)


@given(position_problems())
def test_acceptance_known_by_position_leaves_nothing_to_adapt_to(problem):
    """F5: a fixed length is optimal; acceptances differ by depth here."""
    lower, upper = solve(problem).bounds
    assert lower * (1 - 1e-12) <= best_fixed_length([problem]).throughput[0] <= upper * (1 + 1e-12)
    assert rejection_seen([problem]).bound[0] >= lower * (1 - 1e-12)


def test_where_nothing_is_to_be_seen_only_rejections_matter():
    """iid: a fixed length is optimal; with free drafts, seeing rejections is worth nothing either."""
    costly = StoppingProblem(IID(0.8), Affine(0.2, 1.0), 12)
    free = StoppingProblem(Position([0.9, 0.8, 0.7]), Affine(1e-12, 1.0), 3)
    assert best_fixed_length([costly]).throughput[0] == pytest.approx(solve(costly).throughput, rel=1e-12)
    assert best_fixed_length([free]).throughput[0] == pytest.approx(rejection_seen([free]).throughput[0], rel=1e-9)


def test_a_dip_in_the_times_is_used_even_by_who_sees_a_rejection():
    """T(1) = 1.3 > T(2) = 1.0: whoever has drafted one drafts another, rejected or not."""
    dip = StoppingProblem(IID(0.5), Table(0.1, [1.0, 1.2, 0.8]), 2)
    assert solve(dip).throughput == pytest.approx(1.75)
    assert rejection_seen([dip]).bound[0] == pytest.approx(1.75, rel=1e-9)


def test_one_compilation_serves_every_batch_of_a_shape():
    rejection_seen(mixed(3, persistent=False, seed=5), tol=1e-8)
    before = mdp.relaxations._grouped._cache_size()
    rejection_seen(mixed(31, persistent=False, seed=6), tol=1e-10)
    assert mdp.relaxations._grouped._cache_size() == before


def test_bad_batches_are_refused():
    with pytest.raises(ValueError, match="there are none"):
        best_fixed_length([])
    with pytest.raises(ValueError, match="must renew"):
        rejection_seen(mixed(2, persistent=True))
    with pytest.raises(ValueError, match="tol"):
        rejection_seen(mixed(2, persistent=False), tol=0.0)
