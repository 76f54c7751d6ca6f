"""A family of rules in one pass: each as if evaluated alone, whatever the order, repetition or size of the tree."""

import inspect
import sys
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optimum import random_problem
from strategies import problems

import mdp.evaluate
import mdp.frontier
from mdp.acceptance import IID, BetaMixture
from mdp.cost import Affine
from mdp.evaluate import evaluate
from mdp.frontier import FAMILIES, frontier
from mdp.problem import StoppingProblem

FIGURES = ("throughput", "speedup", "block_efficiency", "verification_rate", "discard_rate", "mean_candidates")
CLOSE = 1e-11

thresholds = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]) | st.floats(0.0, 1.0), min_size=1, max_size=8)


def mixing(problem):
    """Persistent rounds may be followed by any start, so that every rule has one long run."""
    finite = problem.lower()
    if not finite.persistent:
        return finite
    even = 0.5 / finite.num_regimes
    return finite._replace(bonus=0.5 * finite.bonus + even, rejection=0.5 * finite.rejection + even)


def check(finite, family, values, found):
    rule = FAMILIES[family][0]
    np.testing.assert_array_equal(found.threshold, values)
    for index, value in enumerate(values):
        alone = evaluate(finite, rule(value))
        for name in FIGURES:
            expected = getattr(alone, name, None)
            expected = getattr(alone.tally, name) if expected is None else expected
            assert getattr(found, name)[index] == pytest.approx(float(expected), rel=CLOSE, abs=CLOSE), (name, value)


@given(problems(), st.sampled_from(["rejection", "lookahead"]), thresholds)
def test_each_threshold_earns_what_it_earns_alone(problem, family, values):
    finite = mixing(problem)
    check(finite, family, values, frontier(finite, family, values))


@given(problems(), st.lists(st.integers(0, 3), min_size=1, max_size=5))
def test_each_length_earns_what_it_earns_alone(problem, values):
    finite = mixing(problem)
    check(finite, "fixed", values, frontier(finite, "fixed", values))


@pytest.mark.parametrize("family", ["rejection", "lookahead"])
@pytest.mark.parametrize("coupling", ["renewal", "persistent"])
def test_a_threshold_on_the_edge_is_the_same_rule_as_alone(family, coupling):
    # Survivals that are met exactly, from both sides of the tolerance for ties.
    finite = random_problem(3, 3, 5, coupling).lower()
    accept = finite.accept_prob[0]
    edges = np.unique(1.0 - np.concatenate([accept, np.outer(accept, accept).ravel(), [1.0]]))
    values = np.clip(np.concatenate([edges, edges - 1e-13, edges - 1e-11, edges + 1e-11]), 0.0, 1.0)
    check(finite, family, values, frontier(finite, family, values))


def test_patient_rules_draft_more_and_call_less():
    found = frontier(random_problem(4, 3, 8, "renewal"), "rejection", np.linspace(0, 1, 101))
    assert (np.diff(found.mean_candidates) >= -1e-12).all() and (np.diff(found.verification_rate) <= 1e-12).all()
    assert (np.diff(found.discard_rate) >= -1e-12).all()
    np.testing.assert_allclose(found.block_efficiency * found.verification_rate, 1.0)
    np.testing.assert_allclose(found.tally.imbalance, 0.0, atol=1e-12)


@pytest.mark.parametrize("coupling", ["renewal", "persistent"])
def test_a_tree_that_does_not_fit_is_walked_in_parts(coupling, monkeypatch):
    finite, values = random_problem(5, 3, 7, coupling).lower(), np.linspace(0, 0.9, 16)[::-1]
    finite = finite._replace(accept_prob=0.8 + 0.15 * finite.accept_prob)
    whole = frontier(finite, "lookahead", values)
    calls, real, room = [], mdp.frontier.round_laws, 30
    while True:  # just enough for the most patient rule alone
        monkeypatch.setattr(mdp.evaluate, "MAX_STATES", room)
        try:
            frontier(finite, "lookahead", [values.max()])
            break
        except mdp.evaluate.TreeTooLarge:
            room += 10
    monkeypatch.setattr(mdp.frontier, "round_laws", lambda *args: calls.append(args[2]) or real(*args))
    parts = frontier(finite, "lookahead", values)
    assert len(calls) > 1 and min(calls) < 16
    for name in FIGURES:
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=CLOSE)
    monkeypatch.setattr(mdp.evaluate, "MAX_STATES", 30)
    with pytest.raises(ValueError, match="too large for exact evaluation"):
        frontier(finite, "lookahead", values)


def test_continuous_acceptances_have_fixed_lengths_only():
    problem = StoppingProblem(BetaMixture(0.8, 3.0), Affine(0.2, 1.0), 6)
    found = frontier(problem, "fixed", [0, 3, 6])
    assert found.throughput[1] == pytest.approx(evaluate(problem, "fixed:3").throughput, rel=CLOSE)
    with pytest.raises(ValueError, match="rejection on beta_mixture has no frontier in one pass"):
        frontier(problem, "rejection", [0.5])


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("optimal", [0.5], "family: must be one of fixed, lookahead, rejection, got 'optimal'"),
        ("rejection", [], "thresholds: must be a list of numbers"),
        ("rejection", 0.5, "thresholds: must be a list of numbers"),
        ("rejection", [0.5, 1.5], r"thresholds: must lie in 0..1 for rejection, got 1.5"),
        ("rejection", [float("nan")], "thresholds: must lie in 0..1 for rejection, got nan"),
        ("rejection", [True], "thresholds: must be a list of numbers"),
        ("fixed", [0.5], "thresholds: must be a list of whole numbers"),
        ("fixed", [5], "thresholds: must lie in 0..4 for fixed, got 5"),
    ],
)
def test_bad_families_and_thresholds_are_refused(family, values, message):
    with pytest.raises(ValueError, match=message):
        frontier(StoppingProblem(IID(0.5), Affine(0.2, 1.0), 4), family, values)


MUTANTS = {
    "a tie stops": ("margin = TIE if reads else 0.0", "margin = -1e-9"),
    "the order is lost": ("[back] for part", "[::-1][back] for part"),
    "lookahead does not look": ("seen.survival * seen.next_accept_prob", "seen.survival"),
    "lengths are off by one": ("seen.num_candidates + 1", "seen.num_candidates"),
}


@pytest.mark.parametrize(("right", "wrong"), MUTANTS.values(), ids=MUTANTS)
def test_a_broken_frontier_is_caught(right, wrong, monkeypatch):
    source = inspect.getsource(mdp.frontier)
    assert source.count(right) == 1
    broken = ModuleType("broken")
    monkeypatch.setitem(sys.modules, "broken", broken)
    exec(compile(source.replace(right, wrong), "broken", "exec"), broken.__dict__)
    finite = random_problem(3, 3, 5, "renewal").lower()
    with pytest.raises(AssertionError):
        for family, values in (("lookahead", [0.2, 0.6, 0.4]), ("fixed", [2, 0, 4]),
                               ("rejection", [0.0, float(1.0 - finite.accept_prob[0, 0])])):  # fmt: skip
            check(finite, family, values, broken.frontier(finite, family, values))
