"""The simulator: closed forms, exact evaluation, shared coins, long runs, compilation."""

import json
from dataclasses import dataclass
from typing import ClassVar

import chains
import jax.random as jr
import numpy as np
import pytest

from mdp.acceptance import IID, MarkovModulated, Position
from mdp.cost import Affine, Table
from mdp.evaluate import evaluate
from mdp.policy import Policy, ThresholdTable
from mdp.problem import Persistent, StoppingProblem
from simulate import rounds as module
from simulate import walk
from simulate.rounds import simulate

COST = Affine(draft_time=0.2, verify_time=1.0, verify_slope=0.02)


def renewal(max_candidates=6):
    process = MarkovModulated([[0.9, 0.1, 0.0], [0.2, 0.5, 0.3], [0.0, 0.3, 0.7]], [0.95, 0.6, 0.3], [0.5, 0.3, 0.2])
    return StoppingProblem(process, COST, max_candidates)


def persistent(mix=0.3, max_candidates=4, initial=(1.0, 0.0)):
    """Two regimes that a round leaves with probability `mix`, and nothing else does."""
    process = MarkovModulated(np.eye(2), [0.95, 0.4], list(initial))
    stay = [[1 - mix, mix], [mix, 1 - mix]]
    return StoppingProblem(process, COST, max_candidates, Persistent(stay, stay))


def agrees(problem, result, policies=None):
    for p, policy in enumerate(result.policies):
        exact = evaluate(problem, policies[p] if policies else policy.policy).throughput
        value, se = policy.throughput
        assert abs(value - exact) <= 5 * se + 1e-12, policy.policy


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_iid_closed_form(alpha):
    problem = StoppingProblem(IID(alpha), COST, 5)
    result = simulate(problem, [f"fixed:{k}" for k in range(6)], rounds=20_000, key=0)
    for k, policy in enumerate(result.policies):
        emitted = sum(alpha**i for i in range(k + 1))
        exact = emitted / (0.2 * k + 1.0 + 0.02 * k)
        assert abs(policy.throughput.value - exact) <= 5 * policy.throughput.se + 1e-12
        assert policy.total.num_target_calls == 20_000
        assert policy.total.num_drafted == 20_000 * k


def test_all_rules_against_exact_evaluation():
    problem = renewal()
    policies = ["fixed:3", "rejection:0.4", "lookahead:0.5", "oracle", ThresholdTable(np.full((4, 3), [0.2, 0.4, 0.9]))]
    agrees(problem, simulate(problem, policies, rounds=40_000, key=1), policies)


def test_position_dependent_acceptance_and_measured_times():
    problem = StoppingProblem(Position([0.9, 0.2, 0.8]), Table(0.1, [1.0, 0.9, 1.4, 1.2]), 3)
    agrees(problem, simulate(problem, ["fixed:3", "lookahead:0.3", "oracle"], rounds=20_000, key=2))


def test_optimal_is_solved_first():
    result = simulate(renewal(), ["optimal", "fixed:0", "fixed:2"], rounds=20_000, key=3)
    assert result.policies[0].throughput.value > result.policies[2].throughput.value
    assert result.differences[0].throughput_difference.value < 0


@pytest.mark.parametrize("mix", [0.3, 1.0, 1e-3, 1e-6])
def test_persistent_long_run_whatever_the_mixing(mix):
    """1.0 alternates regimes for ever; 1e-6 never leaves the first one within a replica."""
    problem = persistent(mix)
    agrees(problem, simulate(problem, ["fixed:2", "rejection:0.3", "oracle"], rounds=30_000, key=4))


@pytest.mark.parametrize("mix", [0.3, 0.01])
def test_persistent_long_run_from_a_pilot(mix, monkeypatch):
    monkeypatch.setattr(module, "MAX_EXACT_STATES", 0)
    problem = persistent(mix)
    agrees(problem, simulate(problem, ["fixed:2", "rejection:0.3"], rounds=30_000, key=5))


def two_cycles():
    """Regimes swap with each candidate, all of which are accepted. The table drafts two from regime 0, none from 1."""
    swap, stay = np.array([[0.0, 1.0], [1.0, 0.0]]), np.eye(2)
    problem = StoppingProblem(MarkovModulated(swap, [1.0, 1.0], [0.5, 0.5]), COST, 2, Persistent(stay, stay))
    return problem, ThresholdTable(np.array([[0.0, np.inf], [0.0, 0.0]]))


def test_recurrent_classes_that_earn_differently_are_refused():
    problem, table = two_cycles()
    with pytest.raises(ValueError, match="policy 'table': its start regimes fall into 2 recurrent classes"):
        simulate(problem, [table], rounds=100, key=0)
    with pytest.raises(ValueError, match="2 recurrent classes with throughputs from 1 to "):
        evaluate(problem, table)


def test_recurrent_classes_that_earn_the_same_are_fine():
    problem, _ = two_cycles()  # plain decoding never leaves its regime, and earns 1 / V(0) in each
    assert evaluate(problem, "fixed:0").throughput == pytest.approx(1 / COST.verify_time)
    assert simulate(problem, ["fixed:0"], rounds=100, key=0).policies[0].throughput.value == 1 / COST.verify_time


def test_clairvoyance_is_shown_only_to_those_who_declare_it():
    @dataclass(frozen=True)
    class Peeking(Policy):
        def stop(self, state, observation):
            assert observation.next_accepted is None
            return state, observation.num_candidates >= 1

    simulate(persistent(), [Peeking()], rounds=10, key=0)


@pytest.mark.parametrize("number", [1, 257, 1000])
def test_exactly_as_many_rounds_as_asked(number):
    result = simulate(persistent(), ["fixed:2", "rejection:0.5"], rounds=number, key=0)
    assert result.rounds == number
    for policy in result.policies:
        assert policy.total.num_target_calls == number
        assert policy.num_clusters == min(number, 256)
    json.dumps(result.to_dict(), allow_nan=False)


def test_same_key_same_result_and_other_key_another():
    one, two, other = (simulate(renewal(), ["rejection:0.5", "fixed:2"], rounds=10_000, key=k).to_dict()
                       for k in (7, 7, 8))  # fmt: skip
    assert one == two
    assert one["policies"] != other["policies"]
    assert (one["seed"], simulate(renewal(), ["fixed:2"], rounds=10_000, key=jr.key(7)).seed) == (7, None)
    assert simulate(renewal(), ["fixed:2"], rounds=10_000, key=jr.key(7)).policies[0].total == (
        simulate(renewal(), ["fixed:2"], rounds=10_000, key=7).policies[0].total
    )


@pytest.mark.parametrize("problem", [renewal(), persistent()])
def test_what_one_policy_earns_does_not_depend_on_the_others(problem):
    alone = simulate(problem, ["rejection:0.5"], rounds=10_000, key=1).policies[0]
    among = simulate(problem, ["fixed:4", "rejection:0.5", "oracle"], rounds=10_000, key=1).policies[1]
    assert alone.total == among.total


@pytest.mark.parametrize("problem", [renewal(), persistent()])
def test_common_coins_make_differences_sharper(problem):
    result = simulate(problem, ["fixed:3", "fixed:4", "rejection:0.6"], rounds=20_000, key=2)
    base = result.policies[0].throughput.se
    for policy, difference in zip(result.policies[1:], result.differences, strict=True):
        assert difference.throughput_difference.se < 0.8 * np.hypot(base, policy.throughput.se)
    same = simulate(problem, ["fixed:3", ThresholdTable(np.zeros((3, 1)))], rounds=10_000, key=2)
    assert same.differences[0].throughput_difference == (0.0, 0.0)


@pytest.mark.parametrize("problem", [renewal(), persistent(0.05)])
def test_standard_errors_are_honest(problem):
    exact = evaluate(problem, "rejection:0.5").throughput
    scores = [
        (x.value - exact) / x.se
        for x in (simulate(problem, ["rejection:0.5"], rounds=4000, key=k).policies[0].throughput for k in range(60))
    ]
    assert abs(np.mean(scores)) < 5 / np.sqrt(60)
    assert 0.6 < np.std(scores) < 1.5


# --- rules of one's own ---


@dataclass(frozen=True)
class Smoothed(Policy):
    """Draft one as soon as a mean that starts as the whole number 0 has risen to a quarter."""

    def init(self):
        return 0

    def stop(self, state, observation):
        return state, (observation.num_candidates > 0) & (state > 0.2)

    def end_round(self, state, outcome):
        return 0.5 * state + 0.25 * (outcome.num_drafted > 0)


@dataclass(frozen=True)
class Counting(Policy):
    """A rule that counts how often it is traced, not run."""

    threshold: float
    needs = ("survival",)
    traced: ClassVar[int] = 0

    def init(self):
        return 0.0  # a state, so that rounds are stepped through

    def __post_init__(self):
        if not 0 <= self.threshold <= 1:
            raise ValueError("threshold")

    def stop(self, state, observation):
        type(self).traced += 1
        return state, observation.survival < self.threshold


@dataclass(frozen=True)
class Entropic(Policy):
    needs = ("entropy",)

    def stop(self, state, observation):
        return state, observation.entropy > 1


@dataclass(frozen=True)
class Named(Policy):
    mode: str

    def stop(self, state, observation):
        return state, True


def test_rule_with_a_state_iid():
    """Always-accepted candidates: the length grows by one a round up to the most there can be."""
    result = simulate(StoppingProblem(IID(1.0), COST, 5), [chains.OneMore(1)], rounds=10_000, key=0)
    assert result.policies[0].total.num_drafted == 50_000  # the burn-in has passed lengths 1..4
    result = simulate(StoppingProblem(IID(0.0), COST, 5), [chains.OneMore(3)], rounds=10_000, key=0)
    assert result.policies[0].total.num_drafted == 10_000


def test_state_may_turn_from_whole_to_real():
    result = simulate(StoppingProblem(IID(1.0), COST, 5), [Smoothed()], rounds=10_000, key=0)
    assert result.policies[0].total.num_drafted == 10_000


def test_rule_with_a_state_is_a_chain_over_its_state():
    """Renewal iid: the next length depends on this one alone, so the long run is a small linear system."""
    alpha, depth = 0.6, 5
    chain = np.zeros((depth + 1, depth + 1))
    for length in range(1, depth + 1):
        for accepted in range(length + 1):
            prob = alpha**accepted * (1.0 if accepted == length else 1 - alpha)
            chain[length, min(accepted + 1, depth)] += prob
    law = np.linalg.matrix_power(chain, 200)[1]
    emitted = law @ [sum(alpha**i for i in range(k + 1)) for k in range(depth + 1)]
    time = law @ (0.2 * np.arange(depth + 1) + COST.verify_times(depth))
    result = simulate(StoppingProblem(IID(alpha), COST, depth), [chains.OneMore(1)], rounds=60_000, key=1).policies[0]
    assert abs(result.throughput.value - emitted / time) <= 5 * result.throughput.se


def test_one_compilation_per_class_and_shape():
    Counting.traced = 0
    simulate(renewal(), [Counting(0.2)], rounds=10_000, key=0)
    once = Counting.traced
    assert once > 0
    simulate(renewal(), [Counting(0.3), Counting(0.9)], rounds=10_000, key=1)
    harder = MarkovModulated(np.full((3, 3), 1 / 3), [0.1, 0.2, 0.3], [1.0, 0.0, 0.0])
    simulate(StoppingProblem(harder, Affine(0.5, 2.0), 6), [Counting(0.5)], rounds=10_000, key=2)
    assert Counting.traced == once
    simulate(renewal(5), [Counting(0.2)], rounds=10_000, key=0)
    assert Counting.traced > once


def test_walks_compile_once_for_many_rules():
    simulate(renewal(), ["rejection:0.2"], rounds=10_000, key=0)
    once = walk._walk._cache_size()
    simulate(renewal(), ["rejection:0.3", "fixed:2", "lookahead:0.5"], rounds=10_000, key=1)
    assert walk._walk._cache_size() == once


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("rejection:0.4,signal=entropy", "signal= applies to traces"),
        (Entropic(), r"policy 'Entropic\(\)' needs entropy, which a problem does not show"),
        (Named("fast"), r"field mode must be a number"),
        ("fixed:7", r"policy 'fixed:7': length must be in 0..6 here"),
        (ThresholdTable(np.zeros((7, 3))), "its table has 7 rows"),
        (ThresholdTable(np.zeros((6, 2))), "its table must have 1 or 3 columns here"),
        ("nonsense", "unknown rule"),
    ],
)
def test_refusals(policy, message):
    with pytest.raises(ValueError, match=message) as caught:
        simulate(renewal(), ["fixed:1", policy], rounds=10, key=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("rounds", "key"), [(0, 0), (1.5, 0), (True, 0), (10, -1), (10, 2**63)])
def test_bad_numbers(rounds, key):
    with pytest.raises(ValueError, match=r"rounds: must be a whole number|seed: must be a whole number"):
        simulate(renewal(), ["fixed:1"], rounds=rounds, key=key)


def test_no_policies():
    with pytest.raises(ValueError, match="at least one is needed"):
        simulate(renewal(), [], rounds=10, key=0)


def test_long_rounds_and_one_candidate():
    agrees(renewal(1), simulate(renewal(1), ["fixed:1", "rejection:0.1"], rounds=20_000, key=0))
    problem = StoppingProblem(IID(0.99), COST, 300)
    agrees(problem, simulate(problem, ["fixed:300", "rejection:0.9"], rounds=500, key=0))
