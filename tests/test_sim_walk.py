"""Walked rounds: automata and lanes against exact evaluation, for every kind of rule without memory."""

from dataclasses import dataclass

import jax
import jax.random as jr
import numpy as np
import pytest

import simulate.automaton as automata
from mdp.acceptance import IID, MarkovModulated, Position, TokenPair
from mdp.cost import Affine, Table
from mdp.evaluate import evaluate, long_run, round_law
from mdp.policy import Policy, ThresholdTable, parse
from mdp.problem import Persistent, StoppingProblem
from simulate.automaton import alias_rows, automaton
from simulate.coins import lane_keys
from simulate.estimate import ratio
from simulate.rounds import simulate
from simulate.walk import one_regime, walk

LANES, QUOTA = 2048, 128
RULES = ("fixed:0", "fixed:3", "rejection:0.3", "lookahead:0.5", "oracle", "table")


@dataclass(frozen=True)
class PeekAndStop(Policy):
    """A clairvoyant that stops where the next candidate would be accepted: nonsense, but a rule."""

    needs = ("next_accepted", "regime")

    def stop(self, state, observation):
        return state, (observation.next_accepted != 0) | (observation.regime == 0)


def random_problem(rng, size, depth, persistent, steps):
    rows = [rng.dirichlet(np.full(size, 0.5), size) for _ in range(3)]
    chain = MarkovModulated(rows[0], rng.uniform(0.2, 1.0, size), rng.dirichlet(np.ones(size)))
    cost = Table(0.2, list(1.0 + np.cumsum(rng.uniform(-0.1, 0.3, depth + 1)))) if steps else Affine(0.2, 1.0, 0.05)
    return StoppingProblem(chain, cost, depth, Persistent(rows[1], rows[2]) if persistent else None)


def rule_named(name, rng, finite):
    if name == "table":
        return ThresholdTable(np.sort(rng.uniform(0, 1.2, (finite.max_candidates, finite.num_regimes)), axis=0))
    return parse(name).policy


def scores(problem, rule, counts, quota):
    """Sample means minus exact ones in standard errors: drafted, accepted, time."""
    exact = evaluate(problem, rule).tally
    expected = (exact.num_drafted, exact.num_emitted - 1.0, exact.time)
    out = []
    for sample, mean in zip(counts, expected, strict=True):
        error = np.sum(sample) / np.sum(quota) - mean
        se = np.std(sample / quota, ddof=1) / len(sample) ** 0.5
        out.append(0.0 if abs(error) < 1e-9 else error / max(se, 1e-12))
    return np.array(out)


def played(problem, rule, quota, seed=0, burn_in=0):
    finite = problem.lower()
    start = long_run(round_law(finite, rule), finite.initial, "rule") if finite.persistent else finite.initial
    with jax.enable_x64(True):
        return walk(
            finite,
            automaton(finite, rule, start, problem.acceptance.features()),
            lane_keys(jr.key(seed), len(quota)),
            quota,
            burn_in,
        )


@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_walk_agrees_with_exact_values(size, persistent, steps):
    rng = np.random.default_rng([size, persistent, steps])
    problem = random_problem(rng, size, 6, persistent, steps)
    quota = np.full(LANES, QUOTA) - (np.arange(LANES) % 3)
    for name in RULES:
        rule = rule_named(name, rng, problem.lower())
        assert np.abs(scores(problem, rule, played(problem, rule, quota), quota)).max() < 5, name


def test_walk_on_token_pairs_and_by_position():
    rng = np.random.default_rng(5)
    pair = TokenPair(rng.dirichlet(np.ones(3), 3), rng.dirichlet(np.ones(3), 3))
    quota = np.full(LANES, QUOTA)
    for problem in (
        StoppingProblem(pair, Affine(0.2, 1.0), 5),
        StoppingProblem(Position([0.9, 0.5, 0.8, 0.3]), Affine(0.2, 1.0), 4),
    ):
        for name in ("fixed:3", "rejection:0.5", "oracle"):
            rule = parse(name).policy
            assert np.abs(scores(problem, rule, played(problem, rule, quota, seed=1), quota)).max() < 5, name


def test_a_clairvoyant_rule_of_ones_own():
    """By hand: from regime 1 it drafts rejected candidates only, until it lands in regime 0."""
    chain = MarkovModulated([[0.5, 0.5], [0.5, 0.5]], [0.25, 0.5], [0.0, 1.0])
    problem = StoppingProblem(chain, Affine(0.2, 1.0), 3)
    quota = np.full(LANES, QUOTA)
    counts = played(problem, PeekAndStop(), quota)
    assert counts.accepted.sum() == 0
    # the first candidate is drafted iff it is rejected: .5 .75 + .5 .5; behind a rejection nothing is acceptable,
    # so that it goes on while it is in regime 1, up to three candidates
    first_in_1, first = 0.5 * 0.5, 0.5 * 0.75 + 0.5 * 0.5
    expected = first + first_in_1 + first_in_1 * 0.5
    sample = counts.drafted / quota
    assert abs(sample.mean() - expected) < 5 * sample.std(ddof=1) / LANES**0.5


@pytest.mark.parametrize("problem", [
    StoppingProblem(IID(0.8), Affine(0.2, 1.0), 8),
    StoppingProblem(Position([1.0, 0.5, 0.0, 0.7]), Table(0.2, [1.0, 1.4, 1.2, 1.5, 2.0]), 4),
])  # fmt: skip
def test_one_regime_agrees_with_exact_values(problem):
    names = ("fixed:0", "fixed:4", "rejection:0.5", "lookahead:0.6", "oracle")
    rules = [parse(name).policy for name in names]
    quota = np.full(LANES, QUOTA) - (np.arange(LANES) % 2)
    with jax.enable_x64(True):
        counts = one_regime(problem.lower(), rules, lane_keys(jr.key(0), LANES), quota, {})
    for name, rule, count in zip(names, rules, counts, strict=True):
        assert np.abs(scores(problem, rule, count, quota)).max() < 5, name


def test_lanes_keep_their_rounds_whatever_the_others_do():
    """Quotas, not steps, end a lane: other lanes' quotas change nothing, and more rounds go on where fewer stopped."""
    rng = np.random.default_rng(3)
    problem, rule = random_problem(rng, 3, 5, True, True), parse("rejection:0.6").policy
    short, long = played(problem, rule, np.full(16, 20)), played(problem, rule, np.append(np.full(15, 20), 500))
    for few, many in zip(short, long, strict=True):
        np.testing.assert_array_equal(few[:15], many[:15])


@pytest.mark.parametrize("persistent", [False, True])
def test_calls_of_bounded_size_go_on_where_the_last_ended(monkeypatch, persistent):
    rng = np.random.default_rng(4)
    problem, rule = random_problem(rng, 3, 5, persistent, True), parse("rejection:0.6").policy
    whole = played(problem, rule, np.full(16, 100), burn_in=7)
    monkeypatch.setattr("simulate.walk.BATCH", 9)
    parts = played(problem, rule, np.full(16, 100), burn_in=7)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-13)


def test_burn_in_has_addresses_of_its_own():
    """A rule that is burnt in meets the coins of one that is not, so their difference profits."""
    problem = random_problem(np.random.default_rng(8), 3, 5, True, False)
    rule, quota = parse("fixed:3").policy, np.full(512, 64)
    cold, burnt = (played(problem, rule, quota, burn_in=rounds).accepted / quota for rounds in (0, 50))
    assert np.corrcoef(cold, burnt)[0, 1] > 0.5
    other = played(problem, rule, quota, seed=1).accepted / quota
    assert abs(np.corrcoef(cold, other)[0, 1]) < 0.2


def test_a_lane_that_plays_fixed_steps_would_be_biased():
    """Why quotas: rounds that are over after so many steps are the short ones."""
    problem, rule = StoppingProblem(IID(0.8), Affine(0.2, 1.0), 8), parse("oracle").policy
    counts = played(problem, rule, np.full(LANES, QUOTA))
    exact = evaluate(problem, rule).tally.num_drafted
    assert abs(counts.drafted.sum() / (LANES * QUOTA) - exact) < 0.02
    rng = np.random.default_rng(0)
    length = np.minimum(rng.geometric(0.2, (4000, 64)) - 1, 8)
    done = np.cumsum(length + 1, axis=1) <= 12  # rounds over within twelve steps
    assert length[done].mean() < exact - 0.2


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_alias_rows_hold_the_law(size):
    rng = np.random.default_rng(size)
    law = rng.dirichlet(np.full(size, 0.3), 9)
    law[0], law[1] = np.eye(size)[-1], 1.0 / size
    rows = alias_rows(3.0 * law)
    share = (rows >> np.uint64(automata.ALIAS_BITS)) / 2.0 ** (64 - automata.ALIAS_BITS)
    other = (rows & np.uint64(2**automata.ALIAS_BITS - 1)).astype(int)
    found = share / size
    for row in range(len(law)):
        np.add.at(found[row], other[row], (1.0 - share[row]) / size)
    np.testing.assert_allclose(found, law, atol=1e-13)


def test_too_many_nodes_are_declined(monkeypatch):
    problem = random_problem(np.random.default_rng(1), 3, 6, False, False).lower()
    rule = parse("rejection:1").policy
    assert automaton(problem, rule, problem.initial, {}) is not None
    monkeypatch.setattr(automata, "MAX_ENTRIES", 100)
    assert automaton(problem, rule, problem.initial, {}) is None


def test_a_hundred_problems_and_five_rules_agree_with_their_exact_values():
    """Four rates within 5 standard errors, the token balance exact; differences gain by pairing."""
    rng, names = np.random.default_rng(2026), ("fixed:2", "rejection:0.4", "lookahead:0.5", "oracle", "table")
    paired_gain = []
    for index in range(100):
        problem = random_problem(rng, 3, 5, bool(index % 2), bool(index % 4 > 1))
        rules = [rule_named(name, rng, problem.lower()) for name in names]
        result = simulate(problem, rules, rounds=8192, key=index)
        for rule, found in zip(rules, result.policies, strict=True):
            exact, clusters = evaluate(problem, rule).tally, found.clusters
            drafted, emitted, time = (
                np.asarray(part) for part in (clusters.num_drafted, clusters.num_emitted, clusters.time)
            )
            assert (drafted + clusters.num_target_calls == emitted + clusters.num_discarded + clusters.num_cut).all()
            for top, bottom, value in (
                (emitted, time, exact.throughput),
                (emitted, clusters.num_target_calls, exact.block_efficiency),
                (clusters.num_target_calls, emitted, exact.verification_rate),
                (clusters.num_discarded, emitted, exact.discard_rate),
            ):
                sample = ratio(np.asarray(top, dtype=float), np.asarray(bottom, dtype=float))
                assert abs(sample.value - value) <= 5 * sample.se + 1e-9, (index, rule)
        first, *others = result.policies
        for other, difference in zip(others, result.differences, strict=True):
            errors = first.throughput.se, other.throughput.se
            if min(errors) > 0:  # a rule that never drafts has nothing to share
                paired_gain.append(difference.throughput_difference.se / np.hypot(*errors))
    # where two rules hardly ever draft alike, pairing gains nothing, and an estimate of 1 may lie above it
    assert np.mean(paired_gain) < 0.7 and np.mean(np.array(paired_gain) < 1.0) > 0.8, np.mean(np.array(paired_gain) < 1)
