"""Hidden regimes in the simulator: the law of what is drawn, and what a rule gets to see of it."""

from dataclasses import dataclass

import numpy as np
import pytest

from mdp.acceptance import Observed
from mdp.cost import Affine
from mdp.evaluate import evaluate
from mdp.policy import Policy
from mdp.problem import StoppingProblem
from mdp.solve import solve
from simulate.rounds import simulate

PROCESS = Observed(
    transition=[[0.8, 0.2, 0.0], [0.1, 0.7, 0.2], [0.3, 0.3, 0.4]],
    accept_prob=[0.95, 0.6, 0.2],
    initial=[0.5, 0.0, 0.5],
    observation=[[0.7, 0.0, 0.3], [0.2, 0.5, 0.3], [0.0, 0.6, 0.4]],
)
PROBLEM = StoppingProblem(PROCESS, Affine(0.15, 1.0), max_candidates=6)


def drawn(size=200_000, depth=3, seed=0):
    rng = np.random.default_rng(seed)
    return PROCESS.sample(rng.uniform(size=(depth, size)), rng.uniform(size=size))


def test_paths_have_the_law_of_the_process():
    """Regime (told by its acceptance) of candidates 1 and 2, and the symbol of candidate 1."""
    rounds = drawn()
    found = np.zeros((3, 3, 3))
    regime = [np.searchsorted(-PROCESS.accept_prob, -rounds.accept_prob[k]) for k in range(2)]
    np.add.at(found, (regime[0], rounds.symbol[1], regime[1]), 1.0 / len(regime[0]))
    first = PROCESS.initial @ PROCESS.transition
    exact = first[:, None, None] * PROCESS.observation[:, :, None] * PROCESS.transition[:, None, :]
    assert np.abs(found - exact).max() < 5 * np.sqrt(0.25 / 200_000)
    assert (found[exact == 0] == 0).all()


def test_what_is_shown_is_the_posterior():
    """Among rounds with the same symbols, `survival` is the mean product of acceptances, `state` that of the next."""
    rounds = drawn()
    assert (rounds.symbol[0] == -1).all() and (rounds.survival[0] == 1.0).all()
    for first in range(3):
        for second in range(3):
            same = (rounds.symbol[1] == first) & (rounds.symbol[2] == second)
            assert same.sum() > 1000
            survival, likely = rounds.survival[2][same], rounds.state[2][same]
            assert np.ptp(survival) < 1e-12 and np.ptp(likely) < 1e-12
            alive = rounds.accept_prob[0][same] * rounds.accept_prob[1][same]
            error = 5 * 0.5 / np.sqrt(same.sum())
            assert abs(alive.mean() - survival[0]) < error
            assert abs((alive * rounds.accept_prob[2][same]).mean() / alive.mean() - likely[0]) < error / alive.mean()


def test_the_posterior_tells_the_difference():
    """The check above would not pass the naive product of what each candidate's symbol says."""
    rounds = drawn()
    same = (rounds.symbol[1] == 2) & (rounds.symbol[2] == 2)
    alive = rounds.accept_prob[0][same] * rounds.accept_prob[1][same]
    naive = rounds.accept_prob[0][same].mean() * rounds.accept_prob[1][same].mean()
    assert abs(alive.mean() - naive) > 5 * 0.5 / np.sqrt(same.sum())


@dataclass(frozen=True)
class LastSymbol(Policy):
    """Stop after a symbol, or at a length."""

    symbol: int
    most: int
    needs = ("symbol",)

    def stop(self, state, observation):
        return state, (observation.symbol == self.symbol) | (observation.num_candidates >= self.most)


def test_simulated_throughput_agrees_with_the_exact_value():
    solution = solve(PROBLEM)
    rules = [solution.policy, "fixed:3", "oracle", "rejection:0.4", "lookahead:0.5", LastSymbol(1, 4), LastSymbol(7, 2)]
    results = simulate(PROBLEM, rules, rounds=60_000, key=0).policies
    for rule, result in zip(rules, results, strict=True):
        exact = evaluate(PROBLEM, rule)
        assert abs(result.throughput.value - exact.throughput) < 5 * result.throughput.se, result.policy
    assert evaluate(PROBLEM, LastSymbol(7, 2)).throughput == pytest.approx(evaluate(PROBLEM, "fixed:2").throughput)


@dataclass(frozen=True)
class Reads(Policy):
    """A rule that would like to see what is hidden."""

    threshold: float

    def stop(self, state, observation):
        return state, observation.num_candidates >= self.threshold


@pytest.mark.parametrize("field", ["regime", "token_accept_prob"])
def test_what_is_hidden_is_not_shown(field):
    rule = type("Wants", (Reads,), {"needs": (field,)})(2.0)
    with pytest.raises(ValueError, match=f"needs {field}, which a problem does not show"):
        simulate(PROBLEM, [rule], rounds=10, key=0)
    with pytest.raises(ValueError, match=f"needs {field}, which a problem with hidden regimes does not show"):
        evaluate(PROBLEM, rule)
    simulate(StoppingProblem(PROCESS.visible, PROBLEM.cost, 6), [rule], rounds=10, key=0)


def test_rules_for_other_symbols_are_refused():
    rule = solve(PROBLEM).policy
    two = Observed(PROCESS.transition, PROCESS.accept_prob, PROCESS.initial, np.full((3, 2), 0.5))
    with pytest.raises(ValueError, match="made for 3 symbols, here are 2"):
        simulate(StoppingProblem(two, PROBLEM.cost, 6), [rule], rounds=10, key=0)
    visible = StoppingProblem(PROCESS.visible, PROBLEM.cost, 6)
    with pytest.raises(ValueError, match="needs symbol, which a problem does not show"):
        simulate(visible, [rule], rounds=10, key=0)
