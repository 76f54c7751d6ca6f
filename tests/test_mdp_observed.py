"""Hidden regimes: bounds against an enumeration of all histories, reductions, value of information, rules, files."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import affine_costs, observed_problems

import mdp.observed as observed
from mdp import belief, envelope
from mdp.acceptance import Observed
from mdp.cost import Affine
from mdp.entrants import fit_depth
from mdp.evaluate import evaluate
from mdp.observed import solve_hidden
from mdp.policy import BeliefRule, Observation
from mdp.problem import StoppingProblem
from mdp.solve import SolveStatus, solve

TINY = 1e-12


def channel(size, symbols, seed=0, sharpness=0.5):
    return np.random.default_rng(seed).dirichlet(np.full(symbols, sharpness), size)


def problem_of(observation, max_candidates=6, draft_time=0.1, seed=0):
    """Sticky regimes, from good to bad, seen through a channel."""
    size = len(observation)
    rng = np.random.default_rng(seed)
    transition = 0.8 * np.eye(size) + 0.2 * rng.dirichlet(np.ones(size), size)
    process = Observed(transition, np.linspace(0.95, 0.3, size), np.full(size, 1.0 / size), observation)
    return StoppingProblem(process, Affine(draft_time, 1.0), max_candidates)


# The oracle: every history of symbols, one at a time, with the joint law of (regime, nothing rejected yet?). Nothing is
# merged or normalised, and nothing is shared with the solver.


def histories(problem, decide):
    """A function of the rate: tokens and time of a round where `decide(k, alive, dead, stop, go)` rules.

    It picks one of two triples (worth, tokens, time), unnormalised; `go()` computes the second.
    """
    process, times = problem.acceptance, problem.cost.verify_times(problem.max_candidates)
    size, symbols = process.observation.shape

    def rest(k, alive, dead, rate):
        mass = sum(alive) + sum(dead)
        stop = (-rate * times[k] * mass, 0.0, times[k] * mass)
        if k == problem.max_candidates:
            return stop

        def go():
            worth, tokens, time = -rate * problem.cost.draft_time * mass, 0.0, problem.cost.draft_time * mass
            for symbol in range(symbols):
                now, gone = [0.0] * size, [0.0] * size
                for z in range(size):
                    for y in range(size):
                        move = process.transition[z, y] * process.observation[y, symbol]
                        now[y] += alive[z] * move * process.accept_prob[y]
                        gone[y] += (dead[z] + alive[z] * (1 - process.accept_prob[y])) * move
                if sum(now) + sum(gone) > 0:
                    below = rest(k + 1, now, gone, rate)
                    worth, tokens, time = (
                        worth + below[0] + sum(now), tokens + below[1] + sum(now), time + below[2]
                    )  # fmt: skip
            return worth, tokens, time

        return decide(k, alive, dead, stop, go)

    def price(rate):
        _, tokens, time = rest(0, list(process.initial), [0.0] * size, rate)
        return 1.0 + tokens, time

    return price


def enumerated(problem):
    """The best throughput: Dinkelbach over all rules of histories, until the rate stands still."""

    def best(k, alive, dead, stop, go):
        on = go()
        return on if on[0] >= stop[0] else stop

    price, rate = histories(problem, best), 0.0
    for _ in range(100):
        tokens, time = price(rate)
        if abs(tokens / time - rate) <= 1e-15 * rate:
            return rate
        rate = tokens / time
    raise AssertionError("the enumeration did not converge")


def played(problem, stops):
    """Throughput of a rule `stops(k, survival, next_accept_prob)` by the same enumeration."""
    process = problem.acceptance

    def decide(k, alive, dead, stop, go):
        good, mass = sum(alive), sum(alive) + sum(dead)
        coming = sum(
            alive[z] * process.transition[z, y] * process.accept_prob[y]
            for z in range(len(alive))
            for y in range(len(alive))
        )
        return stop if stops(k, good / mass, coming / good if good > 0 else 0.0) else go()

    tokens, time = histories(problem, decide)(0.0)
    return tokens / time


# The optimum


@given(observed_problems())
def test_bounds_enclose_the_enumeration_and_the_rule_earns_it(problem):
    solution, exact = solve(problem), enumerated(problem)
    lower, upper = solution.bounds
    assert lower * (1 - TINY) <= exact <= upper * (1 + TINY)
    assert upper - lower <= 1e-8 * lower
    assert solution.status is SolveStatus.successful
    assert lower <= solution.throughput <= upper
    found = evaluate(problem, solution.policy)
    assert found.throughput == pytest.approx(exact, rel=1e-9)
    assert lower * (1 - TINY) <= found.throughput <= upper * (1 + TINY)


@given(observed_problems(), st.integers(1, 3))
def test_bounds_enclose_the_enumeration_where_few_points_are_opened(problem, limit):
    found = solve_hidden(problem.unseen(), problem.acceptance.observation, tol=1e-9, limit=limit)
    exact = enumerated(problem)
    assert found.bounds[0] * (1 - TINY) <= exact <= found.bounds[1] * (1 + TINY)
    assert found.tally[0] / found.tally[1] <= exact * (1 + TINY)  # the rule behind the lower bound is a real one
    assert evaluate(problem, found.rule).throughput <= exact * (1 + TINY)


def test_that_check_can_fail(monkeypatch):
    """An envelope that is too low by a tenth is caught by the same enumeration."""
    problem = problem_of(channel(2, 2))
    run = partial(solve_hidden, problem.unseen(), problem.acceptance.observation, tol=1e-9, limit=2)
    exact = enumerated(problem)
    assert run().bounds[1] >= exact
    true = observed.relaxed
    monkeypatch.setattr(observed, "relaxed", lambda *given: true(*given) - 0.1)
    assert run().bounds[1] < exact


def test_a_limit_is_a_status_and_a_wider_one_closes_the_bounds():
    problem = problem_of(channel(3, 3, seed=1), max_candidates=12, draft_time=0.05)
    rough, fine = solve(problem, max_knots=8), solve(problem)
    assert rough.status is SolveStatus.max_steps_reached and "max_knots" in rough.status.value
    assert fine.status is SolveStatus.successful
    assert rough.bounds[0] <= fine.bounds[0] * (1 + TINY) and fine.bounds[1] <= rough.bounds[1] * (1 + TINY)
    assert rough.bounds[0] <= evaluate(problem, rough.policy).throughput <= fine.bounds[1]
    assert solve(problem, max_knots=8, tol=0.5).status is SolveStatus.successful


def test_long_rounds_close_to_a_thousandth_in_a_second_or_so():
    problem = problem_of(channel(4, 4, seed=2), max_candidates=12)
    solution = solve(problem, tol=1e-3)
    assert solution.status is SolveStatus.successful
    assert evaluate(problem, solution.policy).throughput >= solution.bounds[0] * (1 - TINY)


@given(observed_problems(), st.integers(-6, 6))
def test_units_of_time_do_not_matter(problem, power):
    unit = 10.0**power
    cost = replace(problem.cost, draft_time=problem.cost.draft_time * unit,
                   verify_time=[float(time) * unit for time in problem.cost.verify_time])  # fmt: skip
    one, other = solve(problem), solve(replace(problem, cost=cost))
    assert other.throughput * unit == pytest.approx(one.throughput, rel=1e-9)
    assert other.speedup == pytest.approx(one.speedup, rel=1e-9)


# What holds at any point


@given(observed_problems(costs=affine_costs()), st.integers(0, 2**32 - 1))
def test_the_envelope_is_above_the_exact_worth_and_blind_rules_below(problem, seed):
    finite, rng = problem.unseen(), np.random.default_rng(seed)
    size, rate, k = finite.num_regimes, 1.5, problem.max_candidates - 3
    regimes = rng.dirichlet(np.ones(size), 6)
    points = np.concatenate([regimes * rng.uniform(size=(6, size)), regimes], axis=1)

    def best(depth, point):  # G by recursion over points
        if depth == problem.max_candidates:
            return 0.0
        grown = belief.branch(finite, problem.acceptance.observation, depth, point[None])
        onward = sum(c * best(depth + 1, x) for c, x in zip(grown.chance[0], grown.point[0], strict=True) if c > 0)
        return max(0.0, grown.gain[0] - rate * finite.step_time[depth] + onward)

    exact = np.array([best(k, point) for point in points])
    visible, bare = envelope.seen(finite, rate), envelope.blind(finite, k)
    over = np.maximum(envelope.relaxed(finite, visible, k, points), 0.0)
    below = points[:, :size] @ bare.emitted.T - rate * bare.time
    assert (over >= exact - 1e-12).all() and (below.max(axis=1) <= exact + 1e-12).all()
    near = np.tile(points[None, 1:], (6, 1, 1))
    hull = envelope.hull(finite, visible, k, points, near, np.tile(exact[1:], (6, 1)))
    assert (hull >= exact - 1e-12).all()
    assert hull[1:] == pytest.approx(exact[1:], abs=1e-9)  # at a known point nothing is lost


def test_histories_that_agree_are_one_point():
    mute = problem_of(np.full((3, 4), 0.25))
    layers, short = observed._grow(mute.unseen(), mute.acceptance.observation, 1.0, 100, 0.0)
    assert [len(layer.points) for layer in layers] == [1] * 7 and not short


def test_a_mixed_up_key_merges_nothing(monkeypatch):
    points = np.arange(8.0).reshape(4, 2) / 8
    monkeypatch.setattr(belief, "cells", lambda points, bits: np.zeros(len(points)))
    first, group = belief.merge(points)
    assert first.tolist() == group.tolist() == [0, 1, 2, 3]


# Reductions and the value of information (theory, F5 and F8)


@given(observed_problems(costs=affine_costs()))
def test_more_information_is_worth_no_less(problem):
    process = problem.acceptance
    shown = solve(replace(problem, acceptance=process.visible))
    some = solve(problem)
    fixed = max(evaluate(problem, f"fixed:{k}").throughput for k in range(problem.max_candidates + 1))
    assert shown.bounds[1] >= some.bounds[0] and some.bounds[1] >= fixed * (1 - TINY)
    garbled = process.observation @ np.full((process.num_symbols, 2), 0.5)
    worse = solve(replace(problem, acceptance=replace(process, observation=garbled)))
    assert some.bounds[1] >= worse.bounds[0]


@given(observed_problems(costs=affine_costs()))
def test_a_channel_that_tells_all_is_the_visible_problem_and_a_mute_one_a_fixed_length(problem):
    process = problem.acceptance
    telling = solve(replace(problem, acceptance=replace(process, observation=np.eye(len(process.accept_prob)))))
    # The start regime is not shown, so the visible problem must not gain from it: start where only one can be.
    shown = solve(replace(problem, acceptance=process.visible))
    assert telling.bounds[0] <= shown.bounds[1]
    sure = np.zeros(len(process.accept_prob))
    sure[0] = 1.0
    at_one = replace(process, initial=sure)
    telling = solve(replace(problem, acceptance=replace(at_one, observation=np.eye(len(sure)))))
    shown = solve(replace(problem, acceptance=at_one.visible))
    assert telling.throughput == pytest.approx(shown.throughput, rel=2e-6)
    mute = solve(replace(problem, acceptance=replace(process, observation=np.ones((len(sure), 1)))))
    fixed = max(evaluate(problem, f"fixed:{k}").throughput for k in range(problem.max_candidates + 1))
    assert mute.throughput == pytest.approx(fixed, rel=1e-8)


def test_a_product_of_calibrated_heads_is_not_survival():
    """Two regimes hardly told apart: what each head reports is right, their product is not."""
    process = Observed([[0.95, 0.05], [0.05, 0.95]], [0.95, 0.3], [0.5, 0.5], [[0.6, 0.4], [0.4, 0.6]])
    finite = StoppingProblem(process, Affine(0.1, 1.0), 4).unseen()
    points, head_product = np.tile(process.initial, 2)[None], np.ones(1)
    for k in range(4):
        grown = belief.branch(finite, process.observation, k, points)
        head = grown.point[:, :, 2:] @ process.accept_prob  # calibrated: P(this candidate is good | symbols)
        head_product = (head_product[:, None] * head).ravel()
        points = grown.point.reshape(-1, 4)
    gap = belief.survival(points) - head_product
    assert np.abs(gap).max() > 0.05
    points, head_product = np.tile(process.initial, 2)[None], np.ones(1)
    for k in range(4):  # where the regime is told, they agree
        grown = belief.branch(finite, np.eye(2), k, points)
        head_product = (head_product[:, None] * (grown.point[:, :, 2:] @ process.accept_prob)).ravel()
        points = grown.point.reshape(-1, 4)
    assert belief.survival(points) == pytest.approx(head_product)


def test_survival_may_rise():
    process = Observed(np.eye(2), [1.0, 0.0], [0.5, 0.5], [[0.9, 0.1], [0.1, 0.9]])
    finite = StoppingProblem(process, Affine(0.1, 1.0), 2).unseen()
    first = belief.branch(finite, process.observation, 0, np.tile(process.initial, 2)[None]).point[0, :1]
    second = belief.branch(finite, process.observation, 1, first).point[0, :1]
    assert belief.survival(first) == pytest.approx(0.9) and belief.survival(second) == pytest.approx(81 / 82)


# Rules


@given(observed_problems(), st.integers(0, 100))
def test_evaluation_agrees_with_the_enumeration(problem, percent):
    level = percent / 100 + 1e-4  # no ties: rounding decides those
    rejection = played(problem, lambda k, survival, likely: 1 - survival > level)
    assert evaluate(problem, f"rejection:{min(level, 1.0)}").throughput == pytest.approx(rejection, rel=1e-9)
    lookahead = played(problem, lambda k, survival, likely: 1 - survival * likely > level)
    assert evaluate(problem, f"lookahead:{min(level, 1.0)}").throughput == pytest.approx(lookahead, rel=1e-9)
    length = percent % (problem.max_candidates + 1)
    fixed = played(problem, lambda k, survival, likely: k >= length)
    assert evaluate(problem, f"fixed:{length}").throughput == pytest.approx(fixed, rel=1e-9)


def test_what_was_solved_is_what_is_evaluated():
    problem = problem_of(channel(3, 3, seed=1), max_candidates=8)
    solution = solve(problem)
    found = evaluate(problem, "optimal", solution=solution)
    for name in ("block_efficiency", "verification_rate", "discard_rate", "mean_candidates"):
        assert getattr(found.tally, name) == pytest.approx(getattr(solution, name), rel=1e-9)
    assert found.gap == pytest.approx((0.0, 0.0), abs=1e-8)
    assert max(evaluate(problem, f"fixed:{k}").throughput for k in range(9)) < solution.bounds[0]
    assert evaluate(problem, "oracle").throughput > solution.bounds[1]


def test_the_rule_is_the_same_on_numbers_arrays_and_jax():
    import jax
    import jax.numpy as jnp

    problem = problem_of(channel(3, 3, seed=1))
    rule, rng = solve(problem).policy, np.random.default_rng(0)
    symbols = rng.integers(0, 3, (5, 40))
    answers = []
    state = rule.init()
    for k in range(6):
        seen = np.full(40, -1) if k == 0 else symbols[k - 1]
        state, stops = rule.stop(state, Observation(k, symbol=seen))
        answers.append(np.broadcast_to(stops, 40))
    assert 0 < np.mean(answers) < 1
    with jax.enable_x64(True):
        leaves = {name: jnp.asarray(value) for name, value in vars(rule).items()}
        traced = jax.jit(lambda state, k, symbol: BeliefRule(**leaves).stop(state, Observation(k, symbol=symbol)))
        for lane in range(0, 40, 8):
            one, other = rule.init(), (leaves["initial"], leaves["initial"])
            for k in range(6):
                symbol = -1 if k == 0 else int(symbols[k - 1, lane])
                one, stops = rule.stop(one, Observation(k, symbol=symbol))
                other, traced_stops = traced(other, k, symbol)
                assert bool(stops) == bool(traced_stops) == bool(answers[k][lane])
                np.testing.assert_allclose(one, np.asarray(other), atol=1e-14)
    assert rule.end_round(one, None)[0] is rule.initial


def test_a_symbol_that_cannot_be_stops():
    rule = solve(problem_of(np.array([[1.0, 0.0], [1.0, 0.0]]))).policy
    state, stops = rule.stop(rule.init(), Observation(0, symbol=-1))
    assert not stops
    _, stops = rule.stop(state, Observation(1, symbol=1))
    assert stops


def test_rules_that_do_not_fit_are_refused():
    problem = problem_of(channel(2, 3))
    rule = solve(problem).policy
    longer = replace(problem, max_candidates=8)
    assert evaluate(longer, rule).throughput == pytest.approx(evaluate(problem, rule).throughput)
    assert fit_depth("rule", rule, 8, 1).emitted.shape[0] == 8
    with pytest.raises(ValueError, match="made for rounds of 6"):
        evaluate(replace(problem, max_candidates=4), rule)
    with pytest.raises(ValueError, match="made for 3 symbols, here are 2"):
        evaluate(problem_of(channel(2, 2)), rule)
    with pytest.raises(ValueError, match="needs symbol"):
        evaluate(replace(problem, acceptance=problem.acceptance.visible), rule)
    table = solve(replace(problem, acceptance=problem.acceptance.visible)).policy
    with pytest.raises(ValueError, match="one column here"):
        evaluate(problem, table)


def test_too_many_histories_are_refused(monkeypatch):
    import mdp.histories

    monkeypatch.setattr(mdp.histories, "MAX_NUMBERS", 100)
    problem = problem_of(channel(2, 3))
    with pytest.raises(ValueError, match=r"too many histories for exact evaluation .* simulate it instead"):
        evaluate(problem, "rejection:1")
    evaluate(problem, "fixed:6")


# Files and the command line
