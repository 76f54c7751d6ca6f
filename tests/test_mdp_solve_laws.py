"""Laws that every optimum keeps: F1's inequalities, closed forms, scaling, monotone costs, where a run starts."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from optimum import CLOSE, OFFSETS, TOKENS, can_be_met, check_optimum, check_thresholds, oracle, persistent
from strategies import affine_costs, position_problems, probabilities, problems, scales, tame_probabilities

from mdp.acceptance import IID, MarkovModulated, Position
from mdp.cost import Affine, Table
from mdp.problem import Persistent, StoppingProblem, start_graph
from mdp.reference import advantage, solve_by_enumeration
from mdp.solve import solve

# --- Inequalities of F1


@given(problems(costs=affine_costs()))
def test_with_convex_times_a_longer_round_asks_for_more_survival(problem):
    solution = solve(problem)
    finite, reference = problem.lower(), oracle(problem)
    for k, z in np.argwhere(can_be_met(finite)[:-1] & can_be_met(finite)[1:]):
        now, later = solution.survival_threshold[k : k + 2, z]
        if now > later + CLOSE:  # then a tie: between the two thresholds nothing is to be gained at k or at k + 1
            between = (min(now, 1.0) + later) / 2
            assert all(abs(advantage(finite._asdict(), reference, depth, z, between)) <= TOKENS for depth in (k, k + 1))


@given(problems("renewal"))
def test_a_threshold_is_at_most_that_of_looking_one_step_ahead(problem):
    solution, finite = solve(problem), problem.lower()
    price = solution.throughput * np.diff(finite.round_time)
    pays_at_most = np.minimum(solution.survival_threshold, 1.0) * finite.next_accept_prob
    assert (pays_at_most <= np.maximum(price, 0.0)[:, None] + CLOSE).all()


@given(tame_probabilities(), tame_probabilities(), affine_costs())
def test_with_one_mean_and_affine_times_all_thresholds_are_one_number(mean, share, cost):
    # F2: rows differ, the next candidate's acceptance does not.
    transition = [[1.0 - mean, 0.0, mean], [0.0, 1.0, 0.0], [share * (1 - mean), 1.0 - share, share * mean]]
    problem = StoppingProblem(MarkovModulated(transition, [0.0, mean, 1.0], [0.2, 0.3, 0.5]), cost, 6)
    solution = solve(problem)
    threshold = solution.throughput * (cost.draft_time + cost.verify_slope) / mean
    assume(abs(threshold - 1.0) > CLOSE)
    expected = threshold if threshold < 1 else np.inf
    np.testing.assert_allclose(solution.survival_threshold, np.full((6, 3), expected), rtol=1e-8)


# --- Special cases


@given(position_problems())
def test_where_survival_is_known_beforehand_the_best_fixed_length_is_optimal(problem):
    finite = problem.lower()
    emitted = 1.0 + np.append(0.0, np.cumsum(np.cumprod(finite.accept_prob[:, 0])))
    check_optimum(solve(problem), oracle(problem))
    assert solve(problem).throughput == pytest.approx((emitted / finite.round_time).max(), rel=CLOSE)


@given(probabilities(), affine_costs())
@example(0.0, Affine(0.2, 1.0))
@example(1.0, Affine(0.2, 1.0))
def test_one_regime_is_the_closed_form_however_it_is_written(alpha, cost):
    depth = 6
    tokens = [depth_ + 1.0 if alpha == 1 else math.fsum(alpha**i for i in range(depth_ + 1)) for depth_ in range(7)]
    best = max(e / (k * cost.draft_time + cost.verify_time + k * cost.verify_slope) for k, e in enumerate(tokens))
    one = np.ones((1, 1))
    chain = MarkovModulated(one, [alpha], [1.0])
    same = [
        StoppingProblem(IID(alpha), cost, depth),
        StoppingProblem(Position([alpha] * depth), cost, depth),
        StoppingProblem(chain, cost, depth),
        StoppingProblem(chain, cost, depth, Persistent(one, one)),
        StoppingProblem(MarkovModulated([[0.3, 0.7], [1.0, 0.0]], [alpha, alpha], [0.5, 0.5]), cost, depth),
    ]
    for problem in same:
        assert solve(problem).throughput == pytest.approx(best, rel=CLOSE)


@given(problems("renewal", costs=affine_costs()))
def test_starts_that_forget_how_the_round_ended_renew(problem):
    """Zero persistence: whatever happened, the next start is drawn from `initial`."""
    afresh = np.tile(problem.acceptance.initial, (problem.acceptance.num_regimes, 1))
    joined = StoppingProblem(problem.acceptance, problem.cost, problem.max_candidates, Persistent(afresh, afresh))
    renewal, persistent_ = (solve(each, method="policy_iteration") for each in (problem, joined))
    assert persistent_.throughput == pytest.approx(renewal.throughput, rel=CLOSE)
    # The bias behind a round is the same wherever it ended, so it decides nothing.
    check_thresholds(problem, persistent_, oracle(problem), offsets=OFFSETS[::3])


@given(problems("renewal", shapes=((2, 3), (3, 6))))
def test_one_candidate_is_worth_it_or_not_in_each_regime(problem):
    """K = 1 in closed form: the rate at which the best of both, regime by regime, is worth nothing on average."""
    first, second = (float(time) for time in problem.cost.verify_time[:2])
    draft_time, chain = problem.cost.draft_time, problem.acceptance
    short = StoppingProblem(chain, Table(draft_time, [first, second]), 1)
    ahead = chain.transition @ chain.accept_prob
    best = max(
        (chain.initial @ (1 + drafts * ahead)) / (chain.initial @ (first + drafts * (draft_time + second - first)))
        for drafts in itertools.product((0, 1), repeat=len(ahead))
        for drafts in [np.array(drafts)]
    )
    assert solve(short).method in ("fixed_length", "one_step_lookahead")
    for method in ("auto", "policy_iteration"):
        assert solve(short, method=method).throughput == pytest.approx(best, rel=CLOSE)


def test_the_paper_pairs_have_their_published_thresholds():
    # theory.md, F4: (alpha, target time / draft time) and the optimal threshold on 1 - S.
    for alpha, ratio, expected in ((0.82, 4.58, 0.503), (0.857, 4.48, 0.480), (0.867, 4.55, 0.478)):
        solution = solve(StoppingProblem(IID(alpha), Affine(1.0, ratio), max_candidates=24))
        np.testing.assert_allclose(1.0 - solution.survival_threshold[:-1], expected, atol=5e-4)


# --- Scaling and monotone laws


@given(problems(), scales())
def test_in_another_unit_of_time_the_policy_is_the_same(problem, unit):
    times = problem.cost.draft_time * unit, [float(time * unit) for time in problem.cost.verify_time]
    scaled = StoppingProblem(problem.acceptance, Table(*times), problem.max_candidates, problem.coupling)
    ours, theirs = solve(problem), solve(scaled)
    assert theirs.throughput * unit == pytest.approx(ours.throughput, rel=CLOSE)
    assert theirs.speedup == pytest.approx(ours.speedup, rel=CLOSE)
    check_thresholds(problem, theirs, oracle(problem), offsets=OFFSETS[1::4])


@given(problems(), st.floats(1.0, 10.0))
def test_slower_drafts_never_help(problem, factor):
    slower = Table(problem.cost.draft_time * factor, problem.cost.verify_time)
    dearer = StoppingProblem(problem.acceptance, slower, problem.max_candidates, problem.coupling)
    assert solve(dearer).throughput <= solve(problem).throughput * (1 + CLOSE)


@given(problems("renewal"), st.integers(0, 6), st.floats(1.0, 10.0))
def test_a_slower_target_call_of_any_length_never_helps(problem, k, factor):
    times = problem.cost.verify_time.copy()
    times[min(k, problem.max_candidates)] *= factor
    dearer = StoppingProblem(problem.acceptance, Table(problem.cost.draft_time, times), problem.max_candidates)
    assert solve(dearer).throughput <= solve(problem).throughput * (1 + CLOSE)


@given(problems())
def test_a_longer_limit_never_hurts(problem):
    depth = problem.max_candidates - 1
    shorter = Table(problem.cost.draft_time, problem.cost.verify_time[: depth + 1])
    try:
        less = StoppingProblem(problem.acceptance, shorter, depth, problem.coupling)
    except ValueError:
        assume(False)  # the last candidate is what makes the starts communicate
    assert solve(less).throughput <= solve(problem).throughput * (1 + CLOSE)


# --- Persistent rounds


@given(problems("persistent"))
def test_where_a_persistent_run_starts_does_not_matter(problem):
    expected, chain = solve(problem).throughput, problem.acceptance
    for start in np.flatnonzero(start_graph(problem.lower())[1]):
        moved = MarkovModulated(chain.transition, chain.accept_prob, np.eye(chain.num_regimes)[start])
        other = StoppingProblem(moved, problem.cost, problem.max_candidates, problem.coupling)
        assert solve(other).throughput == pytest.approx(expected, rel=CLOSE)


def test_starts_that_meet_only_after_several_rounds_communicate():
    # Every round leads on by one, whatever is done: after three rounds all starts were met.
    onwards = np.roll(np.eye(3), 1, axis=1)
    problem = persistent(
        np.eye(3), [0.9, 0.5, 0.1], [1.0, 0.0, 0.0], onwards, onwards, Affine(0.2, 1.0), depth=3
    )  # fmt: skip
    solution = solve(problem)
    check_optimum(solution, oracle(problem))
    tokens = np.array([[sum(a**i for i in range(k + 1)) for k in range(4)] for a in (0.9, 0.5, 0.1)])
    times = 1.0 + 0.2 * np.arange(4)
    lengths = np.array(np.meshgrid(*[range(4)] * 3)).reshape(3, -1)
    best = max(sum(tokens[z, k[z]] for z in range(3)) / sum(times[k[z]] for z in range(3)) for k in lengths.T)
    assert solution.throughput == pytest.approx(best, rel=CLOSE)


def test_two_worlds_that_never_meet_are_refused_by_problem_and_oracle():
    stay = np.eye(2)
    arrays = (stay, np.tile([0.9, 0.2], (3, 1)), np.array([0.5, 0.5]), 0.2, np.ones(4), stay, stay)
    with pytest.raises(ValueError, match="not communicating"):
        persistent(stay, [0.9, 0.2], [0.5, 0.5], stay, stay, Affine(0.2, 1.0), depth=3)
    with pytest.raises(ValueError, match="multichain"):
        solve_by_enumeration(*arrays)
