"""Logits that remember: both chains against adaptive integration, limits, and draws from the true law."""

import itertools
import json
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import integrate, interpolate, optimize, special

from mdp.acceptance import IID, LogitAR
from mdp.cost import Affine, Table
from mdp.evaluate import evaluate
from mdp.policy import Policy, ThresholdTable
from mdp.problem import Persistent, StoppingProblem, loads
from mdp.solve import solve
from simulate.rounds import simulate

COST = Affine(draft_time=0.1, verify_time=1.0)
DIPS = Table(0.15, [1.0, 0.95, 1.3, 0.9])
TIGHT = {"epsabs": 1e-10, "epsrel": 1e-10, "limit": 200}


def mean_under(function, centre, spread, kinks=()):
    """E[function(x)], x ~ N(centre, spread^2), by adaptive integration between the kinks."""
    ends = [centre - 9 * spread, *sorted(x for x in kinks if abs(x - centre) < 9 * spread), centre + 9 * spread]

    def weighted(x):
        return function(x) * np.exp(-0.5 * ((x - centre) / spread) ** 2) / (spread * np.sqrt(2 * np.pi))

    return sum(
        integrate.quad(weighted, low, high, points=[centre] if low < centre < high else None, **TIGHT)[0]
        for low, high in itertools.pairwise(ends)
    )


def round_value(process, cost, depth, rate):
    """T_rho: what the best round of at most 3 candidates is worth, less its time; falls in rho.

    S_1 = a(x_1) is known from x_1, so three candidates need functions of one logit only.
    """
    m, deviation, correlation = process.logit_mean, process.logit_deviation, process.correlation
    spread, times = deviation * np.sqrt(1 - correlation**2), cost.verify_times(depth)
    grid = m + deviation * np.linspace(-10, 10, 161)

    def tabulate(function):
        return interpolate.CubicSpline(grid, [function(x) for x in grid])

    def follow(x):
        return m + correlation * (x - m)

    def crossings(function):
        """Where a smooth function changes sign on the grid."""
        values = function(grid)
        where = np.flatnonzero(values[:-1] * values[1:] < 0)
        return [optimize.brentq(function, grid[i], grid[i + 1], xtol=1e-13) for i in where]

    next_accept = tabulate(lambda x: mean_under(special.expit, follow(x), spread))

    def continued(k):
        """Worth of CONTINUE at depth k = 0 or 1 as a function of x_k, at the survival S_0 = 1 or S_1 = a(x_1)."""
        survival = special.expit if k else np.ones_like
        if k == depth - 1:
            return lambda x: survival(x) * next_accept(x) - rate * (cost.draft_time + times[depth])
        if k == 0:
            later, stop = continued(1), -rate * times[1]
            bends = crossings(lambda x: later(x) - stop)
            return tabulate(
                lambda x: (
                    mean_under(lambda y: special.expit(y) + max(stop, later(y)), follow(x), spread, bends)
                    - rate * cost.draft_time
                )
            )
        stop, last = -rate * times[2], rate * (cost.draft_time + times[3])

        def two_left(x):
            now = special.expit(x)
            bends = crossings(lambda y: now * special.expit(y) * next_accept(y) - last - stop)
            worth = mean_under(
                lambda y: now * special.expit(y) + max(stop, now * special.expit(y) * next_accept(y) - last),
                follow(x), spread, bends,
            )  # fmt: skip
            return worth - rate * cost.draft_time

        return tabulate(two_left)

    first, stop = continued(0), -rate * times[0]
    bends = crossings(lambda x: first(x) - stop)
    return 1.0 + mean_under(lambda x: max(stop, first(x)), m, deviation, bends)


PROCESSES = [LogitAR(1.5, 1.0, 0.8), LogitAR(0.5, 2.0, 0.3), LogitAR(2.0, 0.5, 0.95), LogitAR(1.0, 1.0, 0.0)]


@pytest.mark.parametrize("process", PROCESSES, ids=str)
@pytest.mark.parametrize(("cost", "depth"), [(COST, 1), (COST, 2), (COST, 3), (DIPS, 3)])
def test_the_bounds_enclose_adaptive_integration(process, cost, depth):
    solution = solve(StoppingProblem(process, cost, depth), tol=1e-4)
    lower, upper = solution.bounds
    assert solution.status.name == "successful" and upper - lower <= 1e-4 * lower
    assert round_value(process, cost, depth, lower) >= -1e-8
    assert round_value(process, cost, depth, upper) <= 1e-8


def test_the_oracle_of_this_file_tells_rates_apart():
    lower, upper = solve(StoppingProblem(PROCESSES[0], COST, 3), tol=1e-4).bounds
    assert round_value(PROCESSES[0], COST, 3, upper) < 0 < round_value(PROCESSES[0], COST, 3, lower)
    assert round_value(PROCESSES[0], COST, 3, lower * 0.9998) > 1e-4


@given(
    mean=st.floats(-4, 4), deviation=st.floats(0.05, 6), correlation=st.floats(0, 0.99), size=st.integers(2, 40),
    slopes=st.lists(st.tuples(st.floats(-6, 6), st.floats(0, 1)), min_size=1, max_size=5),
)  # fmt: skip
def test_every_row_encloses_its_law(mean, deviation, correlation, size, slopes):
    """In the mean of products of 1/(1 + e^w v^p), for every row and the start."""
    process = LogitAR(mean, deviation, correlation)
    low, high = process.bracket(2, size)
    nodes = process.nodes(size)

    def worth(logit):
        return np.prod([special.expit(p * logit - w) for w, p in slopes], axis=0)

    noise = np.linspace(-10, 10, 4001)
    weight = np.exp(-(noise**2) / 2) / np.exp(-(noise**2) / 2).sum()
    centres = np.append(mean + correlation * (nodes - mean), mean)
    spreads = np.append(np.full(size, process.innovation), deviation)
    exact = worth(centres[:, None] + spreads[:, None] * noise) @ weight
    ends = [np.append(worth(nodes), end) for end in (worth(-1e9), worth(1e9))]
    for chain, end, sign in zip((low, high), ends, (1, -1), strict=True):
        rows = np.vstack([chain.transition[:size], chain.initial])
        assert (rows >= -1e-15).all() and np.allclose(rows.sum(axis=1), 1.0, atol=1e-13)
        assert (sign * (rows @ end - exact) <= 1e-12).all()


@given(
    mean=st.floats(-4, 4), deviation=st.floats(0.05, 3), correlation=st.floats(0, 0.99), size=st.integers(2, 60)
)  # fmt: skip
@example(mean=1.0, deviation=1.0, correlation=0.5, size=60)
def test_every_put_is_enclosed(mean, deviation, correlation, size):
    """E[(t - v)^+] at nodes, between them and beyond: what all convex decreasing functions are made of."""
    process = LogitAR(mean, deviation, correlation)
    nodes = process.nodes(size)
    centres = np.append(mean + correlation * (nodes - mean), mean)[:, None]
    spreads = np.append(np.full(size, process.innovation), deviation)[:, None]
    odds = np.exp(-nodes)
    shares = np.linspace(0, 1, 8)
    strikes = np.unique(np.r_[(np.outer(odds[1:], shares) + np.outer(odds[:-1], 1 - shares)).ravel(),
                              odds[-1] * shares, odds[0] * (1 + shares)])  # fmt: skip
    # Black's formula: v is lognormal.
    with np.errstate(divide="ignore"):
        above = (np.log(strikes) + centres) / spreads
    exact = strikes * special.ndtr(above) - np.exp(-centres + spreads**2 / 2) * special.ndtr(above - spreads)
    for chain, end, sign in zip(process.bracket(2, size), (np.inf, 0.0), (1, -1), strict=True):
        rows = np.vstack([chain.transition[:size], chain.initial])
        found = rows @ np.maximum(strikes - np.append(odds, end)[:, None], 0.0)
        assert (sign * (found - exact) <= 1e-11 * (strikes + odds[-1])).all()


def test_nodes_twice_as_dense_make_a_gap_four_times_smaller():
    problem = StoppingProblem(LogitAR(1.5, 1.0, 0.6), COST, 4)
    rates = np.array(
        [[solve(side, max_knots=512).throughput for side in problem.bracket(size)] for size in (15, 31, 63)]
    )
    assert (np.diff(rates[:, 0]) > 0).all() and (np.diff(rates[:, 1]) < 0).all()
    width = rates[:, 1] - rates[:, 0]
    assert (width[1:] < width[:-1] / 3).all()


def test_without_memory_the_logit_seen_does_not_matter():
    solution = solve(StoppingProblem(LogitAR(1.0, 1.0, 0.0), COST, 5), tol=1e-4)
    table = solution.survival_threshold
    assert (table == table[:, :1]).all() and ((table > 0) & (table < 1)).any()


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.99])
def test_no_deviation_is_iid(correlation):
    iid = solve(StoppingProblem(IID(float(special.expit(1.2))), COST, 6))
    lower, upper = solve(StoppingProblem(LogitAR(1.2, 1e-4, correlation), COST, 6), tol=1e-5).bounds
    assert upper - lower <= 1e-5 * upper
    assert lower * (1 - 1e-6) <= iid.throughput <= upper * (1 + 1e-5)


def test_perfect_memory_is_one_acceptance_for_the_round():
    """a_i = a(x_0) for all i: the best length for each x_0 at the rate at which the mean round is worth nothing."""
    depth, mean, deviation = 4, 1.0, 1.5
    lengths = np.arange(depth + 1)

    def worth(logit, rate):
        return max((special.expit(logit) ** np.arange(k + 1)).sum() - rate * (1.0 + 0.1 * k) for k in lengths)

    def total(rate):
        return integrate.quad(
            lambda z: worth(mean + deviation * z, rate) * np.exp(-z * z / 2) / np.sqrt(2 * np.pi), -9, 9, limit=400
        )[0]

    exact = optimize.brentq(total, 1.0, 3.0, xtol=1e-9)
    solution = solve(StoppingProblem(LogitAR(mean, deviation, 0.999999), COST, depth), tol=1e-2)
    lower, upper = solution.bounds
    assert lower * (1 - 1e-3) <= exact <= upper * (1 + 1e-3)


def test_what_does_not_close_says_so_and_still_encloses(monkeypatch):
    monkeypatch.setattr("mdp.enclosed.NODES", (127, 255))
    problem = StoppingProblem(LogitAR(1.5, 1.0, 0.8), COST, 3)
    rough, fine = solve(problem, tol=1e-12, max_knots=128), solve(problem, tol=1e-4)
    assert rough.status.name == "max_steps_reached" and rough.status.value
    assert rough.bounds[0] <= fine.bounds[1] and fine.bounds[0] <= rough.bounds[1]


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_what_is_not_seen_is_integrated(process):
    """E[S_2] from x_1 and the mean of a(x_2) given it."""
    spread = process.innovation

    def both(x):
        centre = process.logit_mean + process.correlation * (x - process.logit_mean)
        return special.expit(x) * mean_under(special.expit, centre, spread)

    one = mean_under(special.expit, process.logit_mean, process.logit_deviation)
    two = mean_under(both, process.logit_mean, process.logit_deviation)
    problem = StoppingProblem(process, COST, 3)
    np.testing.assert_allclose(np.cumprod(problem.unseen().accept_prob[:2, 0]), [one, two], rtol=1e-9)
    assert evaluate(problem, "fixed:2").throughput == pytest.approx((1 + one + two) / 1.2, rel=1e-9)
    exact = (1 - one) / 1.0 + (one - two) * 1.1
    oracle = evaluate(StoppingProblem(process, COST, 2), "oracle")
    assert float(oracle.tally.time) == pytest.approx(exact + two * 1.2, rel=1e-9)


def test_samples_have_the_law():
    process = LogitAR(1.5, 0.8, 0.7)
    rng = np.random.default_rng(0)
    drawn = process.sample(rng.random((6, 40_000)), rng.random(40_000))
    logits = np.vstack([drawn.state, special.logit(drawn.accept_prob[-1:])])
    np.testing.assert_allclose(special.expit(logits[1:]), drawn.accept_prob)
    np.testing.assert_allclose(logits.mean(axis=1), 1.5, atol=5 * 0.8 / 200)
    np.testing.assert_allclose(logits.std(axis=1), 0.8, atol=5 * 0.8 / 280)
    for lag in (1, 3):
        found = np.mean((logits[lag:] - 1.5) * (logits[:-lag] - 1.5)) / 0.64
        assert found == pytest.approx(0.7**lag, abs=0.02)
    empty = process.sample(np.zeros((2, 1)), np.zeros(1))
    assert np.isfinite(empty.state).all()  # a coin of exactly 0


@pytest.mark.parametrize("process", [*PROCESSES, LogitAR(0.0, 20.0, 0.5)], ids=str)
def test_the_next_acceptance_is_a_mean(process):
    states = process.logit_mean + process.logit_deviation * np.array([-4.0, -1.0, 0.0, 0.3, 2.5])
    centres = process.logit_mean + process.correlation * (states - process.logit_mean)
    exact = [mean_under(special.expit, centre, process.innovation, kinks=[0.0]) for centre in centres]
    np.testing.assert_allclose(process.expected_next(states), exact, atol=1e-8)


def test_columns_are_about_the_nodes():
    process = LogitAR(1.0, 0.5, 0.3)
    nodes = process.nodes(31)
    assert (np.diff(nodes) > 0).all()
    np.testing.assert_array_equal(process.regimes(nodes, 31), np.arange(31))
    np.testing.assert_array_equal(process.regimes(np.array([-99.0, 99.0]), 31), [0, 30])
    assert (process.regimes(nodes, 1) == 0).all()


@pytest.mark.parametrize("process", [LogitAR(1.5, 1.0, 0.8), LogitAR(0.5, 2.0, 0.3)], ids=str)
def test_the_rule_found_earns_what_the_solver_says(process):
    problem = StoppingProblem(process, COST, 8)
    solution = solve(problem, tol=1e-4)
    result = simulate(problem, [solution.policy, "lookahead:0.6", "fixed:4"], rounds=100_000, key=1)
    earned = result.policies[0].throughput
    assert solution.bounds[0] - 5 * earned.se <= earned.value <= solution.bounds[1] + 5 * earned.se
    assert abs(result.policies[2].throughput.value - evaluate(problem, "fixed:4").throughput) <= (
        5 * result.policies[2].throughput.se
    )
    others = [policy.throughput for policy in result.policies[1:]]
    assert all(other.value <= solution.bounds[1] + 5 * other.se for other in others)


def test_lookahead_sees_the_mean_given_the_logit():
    """At k = 0 the rule drafts iff E[a | x_0] >= 0.8."""
    process = LogitAR(1.5, 1.0, 0.8)
    edge = optimize.brentq(lambda x: process.expected_next(np.array([x]))[0] - 0.8, -5, 9)
    drafts = special.ndtr(1.5 - edge)
    kept = mean_under(lambda x: float(process.expected_next(np.array([x]))[0]) * (x >= edge), 1.5, 1.0, [edge])
    exact = (1 + kept) / (1 + 0.1 * drafts)
    found = simulate(StoppingProblem(process, COST, 1), ["lookahead:0.2"], rounds=40_000, key=3).policies[0].throughput
    assert abs(found.value - exact) <= 5 * found.se


@dataclass(frozen=True)
class OwnRegime(Policy):
    needs = ("regime",)


def test_rules_that_look_are_told_what_there_is():
    problem = StoppingProblem(PROCESSES[0], COST, 2)
    with pytest.raises(ValueError, match="needs regime, but logit_ar has a continuum of them"):
        simulate(problem, [OwnRegime()], rounds=10, key=0)
    for policy in ("rejection:0.4", "lookahead:0.4", ThresholdTable(np.zeros((2, 5)))):
        with pytest.raises(ValueError, match="simulate it instead"):
            evaluate(problem, policy)
    with pytest.raises(ValueError, match="logit_ar is continuous"):
        problem.lower()


DATA = {"acceptance": {"kind": "logit_ar", "logit_mean": 1.5, "logit_deviation": 1, "correlation": 0.8},
        "max_candidates": 3, "cost": {"kind": "affine", "draft_time": 0.2, "verify_time": 1.0}}  # fmt: skip


def test_it_comes_back_from_its_own_dict():
    problem = loads(json.dumps(DATA))
    assert problem.acceptance == LogitAR(1.5, 1.0, 0.8)
    assert loads(json.dumps(problem.to_dict())).to_dict() == problem.to_dict()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        *[({"logit_mean": bad}, "acceptance.logit_mean: must be a number in -50..50") for bad in (99, True, "1", None)],
        *[({"logit_deviation": bad}, "acceptance.logit_deviation: must be a number in 0.0001..20")
          for bad in (0, -1, 21, True, [5])],
        *[({"correlation": bad}, "acceptance.correlation: must be a number in 0..0.999999")
          for bad in (-0.1, 1, 10**400, False)],
        ({"persistence": 0.5}, "acceptance.persistence: unknown key"),
    ],
)  # fmt: skip
def test_bad_laws_are_refused_in_one_line_that_names_the_field(parts, message):
    with pytest.raises(ValueError) as error:
        loads(json.dumps(DATA | {"acceptance": DATA["acceptance"] | parts}))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_rounds_renew():
    with pytest.raises(ValueError, match="persistent needs markov_modulated, not logit_ar"):
        StoppingProblem(PROCESSES[0], COST, 3, Persistent([[1.0]], [[1.0]]))
