"""The solver: right to rounding against the enumeration oracle, inside its own bounds, with thresholds that mean it."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from strategies import (
    SHAPES,
    affine_costs,
    position_problems,
    probabilities,
    problems,
    scales,
    tame_probabilities,
)

from mdp.acceptance import IID, MarkovModulated, Position
from mdp.chain import recurrent_classes, stationary_law
from mdp.cost import Affine, Table
from mdp.evaluate import evaluate, round_law
from mdp.problem import Persistent, StoppingProblem, start_graph
from mdp.reference import advantage, solve_by_enumeration
from mdp.solve import SolveStatus, solve

CLOSE = 1e-9
"""Relative agreement with the oracle and with exact evaluation."""

ROUNDING = 1e-13
"""What the oracle's own floating point may be off by when bounds are held against it."""

OFFSETS = 10.0 ** -np.arange(1, 8)
"""How far from a threshold, on both sides, its verdict is checked."""

TOKENS = 1e-6
"""A threshold is right wherever CONTINUE and STOP differ by more tokens than this."""


def persistent(transition, accept_prob, initial, rejection, bonus, cost, depth):
    return StoppingProblem(MarkovModulated(transition, accept_prob, initial), cost, depth, Persistent(rejection, bonus))


# Problems that broke the solver once. Round times that stand still: STOP and CONTINUE tie at survival 0, not above it.
FLAT = persistent(
    [[0.999, 0.001], [1.0, 0.0]], [0.0, 1.0], [0.0, 1.0], [[0.0, 1.0], [0.5, 0.5]], [[1.0, 0.0], [0.4, 0.6]],
    Table(0.25, [2.0, 1.75, 1.5]), 2,
)  # fmt: skip
# Draft steps that cost nearly nothing: thresholds in the millionths, several kinks apart by a few of them.
CHEAP = StoppingProblem(MarkovModulated([[1.0, 0.0], [0.5, 0.5]], [1.0 - 1e-12, 0.5], [0.5, 0.5]), Affine(1e-6, 1.0), 6)
# One hundred thousand rounds between visits to the other regime.
RARE = persistent(
    [[0.5, 0.5], [0.5, 0.5]], [1.0, 1e-9], [1.0, 0.0], [[1.0 - 1e-9, 1e-9], [1e-9, 1.0 - 1e-9]],
    [[1.0 - 1e-9, 1e-9], [1e-9, 1.0 - 1e-9]], Affine(0.2, 1.0), 3,
)  # fmt: skip
# All candidates are accepted and the bonus turns in a circle: the three starts take turns for ever.
CIRCLE = persistent(
    np.eye(3), [1.0, 1.0, 1.0], [1.0, 0.0, 0.0], np.eye(3), np.roll(np.eye(3), 1, axis=1), Table(0.1, [1, 1, 1.5, 2]), 3
)
# A probability too small to be divided by.
NEVER = persistent(
    [[1.0, 0.0], [1.0, 0.0]], [0.0, 0.0], [1.0, 0.0], [[1.0, 0.0], [1.0, 0.0]], [[1.0, 2e-313], [1.0, 0.0]],
    Affine(0.001, 1.0), 3,
)  # fmt: skip


def oracle(problem):
    return solve_by_enumeration(*problem.lower())


def check_optimum(solution, reference):
    """The value is the oracle's, and the bounds hold it tightly."""
    lower, upper = solution.bounds
    assert solution.status is SolveStatus.successful
    assert solution.throughput == pytest.approx(reference.throughput, rel=CLOSE)
    assert lower <= solution.throughput <= upper
    assert lower <= reference.throughput * (1 + ROUNDING)
    assert upper >= reference.throughput * (1 - ROUNDING)
    assert upper - lower <= 1e-6 * lower


def check_policy_earns_it(problem, solution):
    """The table, evaluated exactly, earns what the solver says: in each class of starts it can end up in."""
    finite, policy = problem.lower(), solution.policy
    law = round_law(finite, policy)
    if not finite.persistent:
        assert evaluate(problem, policy).throughput == pytest.approx(solution.throughput, rel=CLOSE)
        return
    classes = recurrent_classes(law.next_start, finite.initial)
    for members in classes:
        weights = stationary_law(law.next_start, members)
        assert (weights @ law.emitted) / (weights @ law.time) == pytest.approx(solution.throughput, rel=CLOSE)
    if len(classes) == 1:
        assert evaluate(problem, policy).throughput == pytest.approx(solution.throughput, rel=CLOSE)


def can_be_met(finite):
    """[K, Z]: whether k candidates, all of which may yet be accepted, can end in z in a round that can happen.

    Only there does what follows have a value: a persistent round elsewhere would lead to starts that no run meets,
    and whose bias means nothing. Where rounds renew there is no bias, and every (k, z) counts.
    """
    depth, size = finite.accept_prob.shape
    if not finite.persistent:
        return np.ones((depth, size), dtype=bool)
    met = [start_graph(finite)[1]]
    for accept_prob in finite.accept_prob[:-1]:
        met.append((met[-1] @ (finite.transition > 0)) & (accept_prob > 0))
    return np.array(met)


def check_thresholds(problem, solution, reference, offsets=OFFSETS):
    """CONTINUE iff survival >= threshold, close to the threshold on both sides and far from it."""
    finite = problem.lower()
    arrays = finite._asdict()
    for k, z in np.argwhere(can_be_met(finite)):
        threshold = solution.survival_threshold[k, z]
        assert threshold >= 0 and (threshold <= 1 or threshold == np.inf)
        near = min(threshold, 1.0)
        survivals = np.concatenate([near - offsets, near + offsets, [near, 1e-9, 0.3, 1.0]])
        for survival in survivals[(survivals > 0) & (survivals <= 1)]:
            gain = advantage(arrays, reference, k, z, survival)
            if abs(gain) > TOKENS:
                assert (gain > 0) == (survival >= threshold), (k, z, survival, threshold, gain)


# --- Against the oracle


@given(problems())
@example(FLAT)
@example(CHEAP)
@example(RARE)
@example(NEVER)
@example(CIRCLE)
def test_the_value_is_the_enumerated_optimum_inside_its_bounds(problem):
    solution = solve(problem)
    check_optimum(solution, oracle(problem))
    check_policy_earns_it(problem, solution)
    assert solution.speedup == pytest.approx(solution.throughput * problem.lower().verify_time[0])


@given(problems())
@example(FLAT)
@example(CHEAP)
@example(CIRCLE)
def test_a_threshold_is_where_continuing_starts_to_pay(problem):
    check_thresholds(problem, solve(problem), oracle(problem), offsets=OFFSETS[::2])


@given(position_problems())
def test_where_survival_is_known_beforehand_the_best_fixed_length_is_optimal(problem):
    finite = problem.lower()
    emitted = 1.0 + np.append(0.0, np.cumsum(np.cumprod(finite.accept_prob[:, 0])))
    check_optimum(solve(problem), oracle(problem))
    assert solve(problem).throughput == pytest.approx((emitted / finite.round_time).max(), rel=CLOSE)


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


# --- The certificate when it is not reached


def random_problem(seed, size, depth, coupling):
    rng = np.random.default_rng(seed)
    rows = lambda: rng.dirichlet(np.full(size, 0.5), size)  # noqa: E731
    chain = MarkovModulated(rows(), rng.random(size), rng.dirichlet(np.ones(size)))
    cost = Table(0.05, 1.0 + 0.5 * (np.arange(depth + 1) >= 4))
    return StoppingProblem(chain, cost, depth, Persistent(rows(), rows()) if coupling == "persistent" else None)


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


# --- Compilation


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


def solve_some(seeds, size, depth, coupling):
    knots = {solve(random_problem(seed, size, depth, coupling)).num_knots for seed in seeds}
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


def test_float64_is_switched_on_for_the_solver_alone():
    assert not jax.config.jax_enable_x64
    solution = solve(CIRCLE)
    assert not jax.config.jax_enable_x64
    assert solution.survival_threshold.dtype == solution.bias.dtype == np.float64
    assert jax.numpy.ones(1).dtype == np.float32


# --- The laws above are seen to fail


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

    settings(max_examples=100, database=None, derandomize=True)(look)()
    expected = {f"Z, K = {z}, {k}" for z, k in SHAPES}
    expected |= {"persistent", "renewal", "a = 0", "a = 1", "sparse", "dip", "step", "twins", "small", "large"}
    assert expected - seen == set()
