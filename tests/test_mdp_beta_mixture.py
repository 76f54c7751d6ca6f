"""Continuous acceptances: brackets against adaptive integration, limits, and draws from the true law."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
from scipy import integrate, optimize, special

from mdp.acceptance import IID, BetaMixture
from mdp.cost import Affine, Table
from mdp.evaluate import evaluate
from mdp.independent import Knots, _lowered, price
from mdp.policy import Policy, ThresholdTable
from mdp.policy_iteration import THRESHOLD_TOLERANCE
from mdp.problem import Persistent, StoppingProblem, loads
from mdp.rounded import enclose
from mdp.solve import solve
from simulate.rounds import simulate

COST = Affine(draft_time=0.15, verify_time=1.0)
DIPS = Table(0.15, [1.0, 0.95, 1.3, 0.9])


def going_on(process, cost, depth, rate, k, survival):
    """What one more candidate is worth at (k, survival), by adaptive integration within adaptive integration."""
    times = cost.verify_times(depth)
    sure = survival * process.mean - rate * (cost.draft_time + times[min(k + 1, depth)])
    if k == depth - 1:
        return sure

    def gain(next_survival):
        return going_on(process, cost, depth, rate, k + 1, next_survival) + rate * times[k + 1]

    if gain(survival) <= 0:
        return sure
    # Integrate from the kink on, where one starts to go on; the poles of the law at 0 and 1 are the weight.
    kink = optimize.brentq(gain, 0.0, survival, xtol=1e-14) / survival if gain(0.0) < 0 else 0.0
    first, second = process.shapes
    left = 0.0 if kink > 0 else first - 1
    extra, _ = integrate.quad(
        lambda a: gain(survival * a) * a ** (first - 1 - left), kink, 1.0, weight="alg", wvar=(left, second - 1),
        epsabs=1e-10, epsrel=1e-10,
    )  # fmt: skip
    return sure + extra / special.beta(first, second)


def best(process, cost, depth):
    """The rate at which the best round is worth nothing."""
    plain = cost.verify_times(depth)[0]
    return optimize.brentq(
        lambda rate: 1.0 + max(-rate * plain, going_on(process, cost, depth, rate, 0, 1.0)),
        0.5 / plain, (depth + 1.0) / cost.round_times(depth).min(), xtol=1e-9, rtol=1e-10,
    )  # fmt: skip


PROCESSES = [BetaMixture(0.7, 3.0), BetaMixture(0.8, 0.5), BetaMixture(0.5, 40.0)]


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_the_bounds_enclose_adaptive_integration(process):
    exact, solution = best(process, COST, 2), solve(StoppingProblem(process, COST, 2))
    assert solution.status.name == "successful"
    assert solution.bounds[0] * (1 - 1e-8) <= exact <= solution.bounds[1] * (1 + 1e-8)
    assert solution.bounds[1] - solution.bounds[0] <= 1e-6 * exact


def test_three_candidates_and_their_thresholds():
    process = BetaMixture(0.7, 3.0)
    exact, solution = best(process, DIPS, 3), solve(StoppingProblem(process, DIPS, 3))
    assert solution.bounds[0] * (1 - 1e-8) <= exact <= solution.bounds[1] * (1 + 1e-8)
    assert solution.survival_threshold.shape == (3, 1)
    for k, threshold in enumerate(solution.survival_threshold[:, 0]):
        stop = -exact * DIPS.verify_time[k]
        if 0 < threshold <= 1:
            assert abs(going_on(process, DIPS, 3, exact, k, threshold) - stop) <= THRESHOLD_TOLERANCE
        else:  # always, or never
            side = going_on(process, DIPS, 3, exact, k, 1e-12 if threshold == 0 else 1.0) - stop
            assert side >= -THRESHOLD_TOLERANCE if threshold == 0 else side <= THRESHOLD_TOLERANCE


@pytest.mark.parametrize("count", [5, 40, 300])
@pytest.mark.parametrize("process", [*PROCESSES, BetaMixture(0.99, 1e-3), BetaMixture(0.3, 1e6)], ids=str)
def test_both_sides_enclose_a_mean(process, count):
    """E[max{F(S a), stop}] for a convex F that is linear between knots: exact at the knots but for the crossing."""
    knots = Knots(process, count, 0.05)
    values = 2.0 * knots.ends**2 + knots.ends
    for stop in (-1.0, 0.3, 1.7, 9.0):
        (low, slope), (high, _) = (knots.expect(values, stop, above=side) for side in (False, True))
        exact = [knots.expect_at(at, values, stop) for at in knots.survival]
        assert (low[:-1] <= exact + 1e-12 * np.abs(exact)).all() and (high[:-1] >= exact - 1e-12 * np.abs(exact)).all()
        tangents = low[:-1] + slope[:-1] * (knots.survival[:, None] - knots.survival)
        assert (tangents <= np.array(exact)[:, None] + 1e-9).all()
    grid = np.linspace(0, 1, 2_000_001)[1:-1]
    if min(process.shapes) > 0.8 and process.concentration < 100:  # no pole, no spike: the law on a fine grid
        law = grid ** (process.shapes[0] - 1) * (1 - grid) ** (process.shapes[1] - 1)
        mean = law @ np.maximum(np.interp(0.7 * grid, knots.ends[::-1], values[::-1]), 0.3) / law.sum()
        assert knots.expect_at(0.7, values, 0.3) == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("count", [4, 30])
def test_lowered_chords_stay_below_and_convex(count):
    knots = Knots(PROCESSES[0], count, 0.05)
    for power in (1.0, 1.5, 4.0):
        lowered = _lowered(knots, knots.ends**power, power * knots.ends ** (power - 1))
        at = np.linspace(0, 1, 5001)
        below = np.interp(at, knots.ends[::-1], lowered[::-1])
        assert (below <= at**power + 1e-15).all() and (np.diff(knots.slopes(lowered)) <= 1e-12).all()
        assert below[-1] >= 1 - 1e-15 if power == 1 else below[-1] >= 1 - power * knots.length[0]


def test_denser_knots_tighten_both_sides():
    process, times = BetaMixture(0.7, 3.0), COST.verify_times(6)
    found = [price(Knots(process, count, 0.2), 1.8, 0.15, times) for count in (64, 128, 256, 512)]
    low, high = np.array([(side.lower, side.upper) for side in found]).T
    assert (np.diff(low) > 0).all() and (np.diff(high) < 0).all()
    width = high - low
    assert (width[1:] < width[:-1] / 3).all()  # about 4: the square of the knots' distance


def test_long_rounds_close_too():
    solution = solve(StoppingProblem(BetaMixture(0.9, 20.0), Affine(draft_time=0.05, verify_time=1.0), 64))
    assert solution.status.name == "successful"
    assert (np.diff(solution.survival_threshold[:, 0]) >= -1e-5).all()  # theory, F1: non-decreasing in k


def test_infinite_concentration_is_iid():
    iid = solve(StoppingProblem(IID(0.7), COST, 6))
    ours = solve(StoppingProblem(BetaMixture(0.7, 1e9), COST, 6))
    assert ours.throughput == pytest.approx(iid.throughput, rel=1e-5)


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_a_mean_at_the_end_is_iid(mean):
    ours, iid = (solve(StoppingProblem(p, COST, 6)) for p in (BetaMixture(mean, 2.0), IID(mean)))
    assert ours.throughput == pytest.approx(iid.throughput, rel=1e-12)
    np.testing.assert_allclose(ours.survival_threshold, iid.survival_threshold)


def test_no_concentration_is_a_coin_seen():
    """a is 0 or 1: draft until the first candidate that will be rejected."""
    mean, depth = 0.7, 3
    rates = [
        sum(mean**i for i in range(n + 1)) / (1.0 + 0.15 * sum(mean**i for i in range(n))) for n in range(depth + 1)
    ]
    ours = solve(StoppingProblem(BetaMixture(mean, 1e-6), COST, depth))
    assert ours.throughput == pytest.approx(max(rates), rel=1e-5)


def test_seeing_pays():
    problem = StoppingProblem(BetaMixture(0.8, 2.0), COST, 3)
    fixed = [evaluate(problem, f"fixed:{k}").throughput for k in range(4)]
    assert solve(problem).throughput > 1.01 * max(fixed)


@dataclass(frozen=True)
class OwnRule(Policy):
    needs = ("survival",)

    def stop(self, state, observation):
        return state, observation.survival < 0.3


def test_fixed_and_oracle_are_exact_and_rules_of_ones_own_are_refused():
    problem, iid = (StoppingProblem(p, COST, 5) for p in (BetaMixture(0.8, 2.0), IID(0.8)))
    for policy in ("fixed:0", "fixed:3", "oracle"):
        found = evaluate(problem, policy)
        assert found.throughput == evaluate(iid, policy).throughput and found.throughput_bounds is None
    with pytest.raises(ValueError, match="only thresholds in survival can be enclosed; simulate it"):
        evaluate(problem, OwnRule())
    with pytest.raises(ValueError, match="beta_mixture is continuous"):
        problem.lower()


def by_integration(process, cost, threshold):
    """Emitted and time per round of "two candidates at least if S_1 >= h_1, three if also S_2 >= h_2"."""
    first, second = process.shapes
    beta = special.beta(first, second)

    def over_first(weight, reached):
        """E[weight(a) reached(a); a >= h_1], the law's pole at 1 as a weight."""
        return integrate.quad(
            lambda a: weight(a) * reached(a) * a ** (first - 1), threshold[1], 1.0, weight="alg", wvar=(0, second - 1),
            epsabs=1e-12, epsrel=1e-12,
        )[0] / beta  # fmt: skip

    three, four = (
        over_first(weight, lambda a, shape=shape: special.betaincc(shape, second, min(1.0, threshold[2] / a)))
        for weight, shape in ((lambda a: 1.0, first), (lambda a: process.mean * a, first + 1))
    )
    two = special.betaincc(first, second, threshold[1])
    drafted = [1.0, two, three]
    weights = [1.0, process.mean * special.betaincc(first + 1, second, threshold[1]), four]
    times = cost.round_times(3)
    return 1 + process.mean * sum(weights), times[0] + np.diff(times) @ drafted


@pytest.mark.parametrize("cost", [COST, DIPS], ids=["even", "dips"])
@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_a_threshold_is_enclosed_between_its_roundings(process, cost):
    threshold = np.array([0.5, 0.7, 0.35])
    emitted, time = by_integration(process, cost, threshold)
    widths = []
    for cells in (2**10, 2**13):
        found = enclose(process, threshold, cost.round_times(3), cells)
        assert found.emitted[0] <= emitted <= found.emitted[1] and found.time[0] <= time <= found.time[1]
        widths.append(np.diff(found.emitted)[0])
    assert 6 < widths[0] / widths[1] < 10
    result = evaluate(StoppingProblem(process, cost, 3), ThresholdTable(threshold[:, None]))
    assert result.throughput_bounds[0] <= result.throughput <= result.throughput_bounds[1]
    assert result.throughput == pytest.approx(emitted / time, rel=1e-5)
    assert result.to_dict()["throughput_bounds"] == list(result.throughput_bounds)


def test_the_optimum_is_worth_its_bounds_and_no_rule_more():
    problem = StoppingProblem(BetaMixture(0.8, 2.0), COST, 6)
    solution = solve(problem)
    best_rule = evaluate(problem, "optimal", solution=solution)
    assert best_rule.throughput_bounds[0] <= solution.bounds[1] and solution.bounds[0] <= best_rule.throughput_bounds[1]
    lookahead, rejection = (evaluate(problem, p, solution=solution) for p in ("lookahead:0.6", "rejection:0.5"))
    assert lookahead.throughput == pytest.approx(rejection.throughput, rel=1e-9)  # 1 - 0.6 = 0.8 (1 - 0.5)
    assert rejection.throughput_bounds[0] <= solution.bounds[1] and rejection.gap[0] > 1e-4


def test_extreme_thresholds_are_fixed_lengths():
    problem = StoppingProblem(BetaMixture(0.8, 20.0), COST, 4)
    for policy, length in (("rejection:1", 4), ("rejection:0", 1), (ThresholdTable(np.full((1, 1), np.inf)), 0)):
        exact = evaluate(problem, f"fixed:{length}").throughput
        assert evaluate(problem, policy).throughput == pytest.approx(exact, rel=1e-5)


def test_what_is_too_wide_is_refused_with_its_width(monkeypatch):
    monkeypatch.setattr("mdp.evaluate.WIDEST", 1e-9)
    with pytest.raises(ValueError, match=r"relative width \d\.\de-\d\d; simulate it instead"):
        evaluate(StoppingProblem(BetaMixture(0.8, 2.0), COST, 4), "rejection:0.4")


@pytest.mark.parametrize("policy", ["rejection:0.4", "lookahead:0.4"])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_sure_acceptances_have_an_exact_value(mean, policy):
    ours, iid = (StoppingProblem(p, COST, 4) for p in (BetaMixture(mean, 2.0), IID(mean)))
    assert evaluate(ours, policy).throughput == evaluate(iid, policy).throughput


@pytest.mark.parametrize("process", [BetaMixture(0.7, 3.0), BetaMixture(0.8, 0.3)], ids=str)
def test_the_simulator_draws_from_the_law(process):
    problem = StoppingProblem(process, COST, 3)
    # Two candidates if the first has a >= 1/2: S_1 = a is Beta, the rest is arithmetic.
    first, second = process.shapes
    more = special.betaincc(first, second, 0.5)
    kept = process.mean * special.betaincc(first + 1, second, 0.5)
    exact = (1 + process.mean + process.mean * kept) / (1 + 0.15 * (1 + more))
    rule = ThresholdTable(np.array([[0.0], [0.5], [2.0]]))
    result = simulate(problem, [rule, "fixed:2", "oracle"], rounds=40_000, key=0)
    for policy, value in zip(
        result.policies, [exact, *(evaluate(problem, p).throughput for p in ("fixed:2", "oracle"))], strict=True
    ):
        assert abs(policy.throughput.value - value) <= 5 * policy.throughput.se


def test_the_rule_found_earns_what_the_solver_says():
    problem = StoppingProblem(BetaMixture(0.8, 2.0), COST, 3)
    solution = solve(problem)
    result = simulate(problem, [solution.policy], rounds=100_000, key=1).policies[0]
    assert abs(result.throughput.value - solution.throughput) <= 5 * result.throughput.se


def test_it_comes_back_from_its_own_dict():
    data = {"acceptance": {"kind": "beta_mixture", "mean": 0.8, "concentration": 5}, "max_candidates": 3,
            "cost": {"kind": "affine", "draft_time": 0.2, "verify_time": 1.0}}  # fmt: skip
    problem = loads(json.dumps(data))
    assert problem.acceptance == BetaMixture(0.8, 5.0)
    assert loads(json.dumps(problem.to_dict())).to_dict() == problem.to_dict()
    assert problem.acceptance.num_regimes == 1


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        *[({"mean": bad}, "acceptance.mean: must") for bad in (-0.1, 1.1, True, "0.5", [0.5], None)],
        *[({"concentration": bad}, "acceptance.concentration: must be a number in 1e-06..1e+09")
          for bad in (0, -1, True, "5", [5], None, 1e300, 10**400)],
        ({"alpha": 1}, "acceptance.alpha: unknown key"),
    ],
)  # fmt: skip
def test_bad_laws_are_refused_in_one_line_that_names_the_field(parts, message):
    data = {"acceptance": {"kind": "beta_mixture", "mean": 0.8, "concentration": 5, **parts}, "max_candidates": 3,
            "cost": {"kind": "affine", "draft_time": 0.2, "verify_time": 1.0}}  # fmt: skip
    with pytest.raises(ValueError) as error:
        loads(json.dumps(data))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_rounds_renew():
    with pytest.raises(ValueError, match="persistent needs markov_modulated, not beta_mixture"):
        StoppingProblem(BetaMixture(0.8, 5.0), COST, 3, Persistent([[1.0]], [[1.0]]))
