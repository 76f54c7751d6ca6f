"""The ladder of information: in order, right at its ends, and its prices are what they say."""

import itertools
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import distributions, stochastic_matrices, tame_probabilities

from mdp.acceptance import MarkovModulated
from mdp.calibrate import two_regimes
from mdp.cost import Table
from mdp.evaluate import evaluate
from mdp.information import World, _clairvoyant, _coin, _readings, channel, value_of_information
from mdp.problem import StoppingProblem
from mdp.solve import solve

WORLD = World(two_regimes(0.82, 0.6, 0.8), 0.5, 0.3, 1.0, max_candidates=6)


def in_order(rungs):
    """No rung can be proven below the one before it."""
    return all(after.bounds[1] >= before.bounds[0] * (1 - 1e-9) for before, after in itertools.pairwise(rungs))


@pytest.fixture(scope="module")
def rungs():
    return value_of_information(WORLD, (0.5, 0.7, 0.9, 1.0))


def test_the_ladder_is_monotone_and_can_fail(rungs):
    assert in_order(rungs) and all(rung.closed for rung in rungs)
    assert not in_order(rungs[::-1])  # the check would notice


def test_steps_that_matter_are_strict(rungs):
    gain = {(rung.name, rung.accuracy): rung.gain for rung in rungs}
    for name in ("position", "history", "token_accept_prob", "clairvoyant"):
        assert gain[name, None] > 1e-3
    assert gain["head", 0.9] > 1e-3
    # a reading that is noise is worth nothing, one without error is the regime
    assert gain["head", 0.5] == pytest.approx(0.0, abs=1e-9)
    assert gain["regime", None] == pytest.approx(0.0, abs=1e-6)


@settings(max_examples=6)
@given(st.data())
def test_random_worlds_are_monotone(data):
    accept = data.draw(st.lists(tame_probabilities(), min_size=2, max_size=2))
    chain = MarkovModulated(data.draw(stochastic_matrices(2)), accept, data.draw(distributions(2)))
    world = World(chain, data.draw(st.floats(0, 1)), data.draw(st.floats(0.02, 1.2)), 1.0, max_candidates=4)
    values = [
        _coin(world.regimes().lower()),
        max(evaluate(world.regimes(), f"fixed:{k}").throughput for k in range(5)),
        *(_readings(law, world.regimes().lower()) for law in (np.ones((2, 1)), channel(2, 0.7), channel(2, 0.9))),
        solve(world.regimes()).bounds[1],
        solve(world.tokens()).bounds[1],
        _clairvoyant(world.regimes().lower()),
    ]
    assert (np.diff(values) >= -1e-6 * values[-1]).all()


def test_a_reading_without_error_is_the_regime():
    lower, upper = solve(WORLD.regimes()).bounds
    assert lower * (1 - 1e-12) <= _readings(np.eye(2), WORLD.regimes().lower()) <= upper * (1 + 1e-12)


def test_readings_against_every_rule():
    # three candidates and two readings: a rule says go or stop at each of 2 starts x (1 + 2 + 4) nodes
    world = World(MarkovModulated([[0.8, 0.2], [0.4, 0.6]], [0.9, 0.3], [0.6, 0.4]), 0.0, 0.25, 1.0, 3)
    law, problem = channel(2, 0.8), world.regimes().lower()
    best = 0.0
    nodes = [(), *((a,) for a in range(2)), *itertools.product(range(2), repeat=2)]
    per_start = [
        [totals(problem, law, start, dict(zip(nodes, go, strict=True)))
         for go in itertools.product([False, True], repeat=len(nodes))]
        for start in range(2)
    ]  # fmt: skip
    for first, second in itertools.product(*per_start):
        emitted, time = problem.initial @ np.array([first, second])
        best = max(best, emitted / time)
    assert _readings(law, problem) == pytest.approx(best, rel=1e-12)


def totals(problem, law, start, go):
    """Tokens and time of a round from one start, all regimes and readings summed."""

    def play(seen, regime, alive):
        if len(seen) == 3 or not go[seen]:
            return np.array([0.0, problem.verify_time[len(seen)]])
        out = np.array([0.0, problem.draft_time])
        for after, reading in itertools.product(range(2), repeat=2):
            chance = problem.transition[regime, after] * law[after, reading]
            survived = alive * problem.accept_prob[0, after]
            out = out + chance * (np.array([survived, 0.0]) + play((*seen, reading), after, survived))
        return out

    return play((), start, 1.0) + np.array([1.0, 0.0])  # the correction or bonus


def test_clairvoyance_is_the_oracle_where_drafting_is_cheap():
    problem = WORLD.regimes()
    assert _clairvoyant(problem.lower()) == pytest.approx(evaluate(problem, "oracle").throughput, rel=1e-12)
    dear = WORLD.regimes(draft_time=1.3)  # rho t_d > 1: it knows better than to draft
    assert evaluate(dear, "oracle").throughput < 0.99 and _clairvoyant(dear.lower()) == 1.0


def test_clairvoyance_against_every_choice():
    # one candidate alone is dear to verify, three are cheap: it must not draft all that would be accepted
    problem = StoppingProblem(WORLD.chain, Table(0.3, [1.0, 3.0, 1.5, 1.2]), 3).lower()
    alive = [1.0]
    for k in range(1, 4):
        law = evaluate(problem, f"fixed:{k}").tally.num_emitted
        alive.append(law - 1.0 - sum(alive[1:]))
    exactly = np.append(-np.diff(alive), alive[-1])  # P(just so many would be accepted)
    ratios = {}
    for choice in itertools.product(*(range(most + 1) for most in range(4))):
        lengths = np.array(choice)
        ratios[choice] = (exactly @ (1.0 + lengths)) / (exactly @ problem.round_time[lengths])
    best = max(ratios, key=lambda choice: ratios[choice])
    assert best != (0, 1, 2, 3)
    assert _clairvoyant(problem) == pytest.approx(ratios[best], rel=1e-12)


def test_splitting_tokens_keeps_every_regimes_mean():
    problem, fine = WORLD.regimes().lower(), WORLD.tokens().lower()
    coarse = fine.next_accept_prob[0].reshape(2, 2)
    np.testing.assert_allclose(coarse, np.repeat(problem.next_accept_prob[0][:, None], 2, axis=1), rtol=1e-12)
    for k in range(4):
        whole, split = (evaluate(part, f"fixed:{k}").throughput for part in (WORLD.regimes(), WORLD.tokens()))
        assert whole == pytest.approx(split, rel=1e-12)


def test_extra_time_spends_the_gain(rungs):
    for before, rung in itertools.pairwise(rungs):
        if rung.name in ("history", "regime", "token_accept_prob") and rung.extra_time:
            slower = WORLD._replace(draft_time=WORLD.draft_time + rung.extra_time)
            value = {
                "history": partial(_readings, np.ones((2, 1)), slower.regimes().lower()),
                "regime": lambda slower=slower: solve(slower.regimes()).throughput,
                "token_accept_prob": lambda slower=slower: solve(slower.tokens()).throughput,
            }[rung.name]()
            assert value == pytest.approx(before.throughput, rel=1e-6)


def test_what_is_refused():
    with pytest.raises(ValueError, match="accuracies: must increase"):
        value_of_information(WORLD, (0.9, 0.7))
    with pytest.raises(ValueError, match="accuracies: must increase"):
        value_of_information(WORLD, (0.2,))
    with pytest.raises(ValueError, match="too many to enumerate"):
        value_of_information(WORLD._replace(max_candidates=30))
    with pytest.raises(ValueError, match="token_dispersion"):
        value_of_information(WORLD._replace(token_dispersion=2.0))
    assert isinstance(WORLD.tokens(), StoppingProblem)
