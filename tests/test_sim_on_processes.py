"""Predictions of fitted processes: their intervals against the delta method, and what no process can express."""

import numpy as np
import pytest

from mdp.acceptance import MarkovModulated
from mdp.cost import Affine, Table
from mdp.evaluate import evaluate
from mdp.likelihood import full_rounds
from mdp.policy import parse
from simulate.estimate import ratio
from simulate.on_processes import Processes, predict, signal_of, with_ends
from simulate.replay import replay
from tests.test_mdp_likelihood import sample

COST, DEPTH = Affine(0.2, 1.0), 4
MIXED = MarkovModulated([[0.7, 0.3], [0.3, 0.7]], [0.9, 0.6], [0.5, 0.5])


@pytest.fixture(scope="module")
def trace():
    return sample(MIXED, True, texts=80, length=20, depth=DEPTH)


@pytest.fixture(scope="module")
def fits(trace):
    return Processes.fit(trace, np.arange(80), ("draft_prob",), 2, groups=20)


def value(fits, text, name, cost=COST):
    spec = parse(text)
    return predict(fits, name, spec, spec.policy, cost, DEPTH)


def test_the_jackknife_is_the_delta_method(trace, fits):
    """fixed:1 earns (1 + a) / 1.2, so its error is that of the mean acceptance over 1.2."""
    runs = full_rounds(trace, np.arange(80))
    kept, tested = (np.bincount(runs.row, weights=w, minlength=80) for w in (runs.length, runs.num_tested))
    found, exact = value(fits, "fixed:1", "iid"), ratio(kept, tested)
    assert found.values["throughput"] == pytest.approx((1 + exact.value) / 1.2, rel=1e-3)
    assert found.ses["throughput"] == pytest.approx(exact.se / 1.2, rel=0.5)  # 19 degrees of freedom
    low, high = found.to_dict(0.95)["interval"]
    assert low < found.values["throughput"] < high and found.num_groups == 20


def test_rules_are_evaluated_on_the_process_that_shows_what_they_read(trace, fits):
    chain = fits.whole["signal_chain:draft_prob"]
    problem = chain.problem(COST, DEPTH)
    for text in ("rejection:0.3,signal=draft_prob", "lookahead:0.4,signal=draft_prob", "hf_confidence:threshold=0.8"):
        found = value(fits, text, chain.name)
        assert found.values["throughput"] == evaluate(problem, text.split(",signal")[0]).throughput
    # one regime shows .6 and the other .9: stopping below .8 is stopping in the worse one
    looks, not_at_all = (value(fits, text, chain.name) for text in ("hf_confidence:threshold=0.8", "fixed:4"))
    assert looks.values["discard_rate"] < not_at_all.values["discard_rate"]


@pytest.mark.slow
def test_prediction_and_replay_agree_where_the_process_is_right(trace, fits):
    found = replay(trace, ["hf_confidence:threshold=0.8"], cost=COST).policies[0]
    spec = parse("hf_confidence:threshold=0.8")
    name = "signal_chain:draft_prob"
    ended = with_ends(fits, name, [(spec, spec.policy)], COST, trace, np.arange(80), rounds=20_000)[0]
    off = ended["throughput"] - found.throughput.value
    assert abs(off) < 4 * np.hypot(found.throughput.se, ended["se"])
    endless = value(fits, "hf_confidence:threshold=0.8", name).values["throughput"]
    assert ended["end_prob"] == 0 and ended["throughput"] < endless


@pytest.mark.parametrize(
    ("text", "signal"),
    [("fixed:2", None), ("rejection:0.4,signal=entropy", "entropy"), ("rejection:0.4", "token_accept_prob"),
     ("svip", "entropy"), ("kangaroo", "top_prob")],
)  # fmt: skip
def test_the_signal_that_a_rule_reads(text, signal):
    spec = parse(text)
    assert signal_of(spec, spec.policy) == signal


@pytest.mark.parametrize(("text", "why"), [("adaedl", "remembers"), ("oracle", "next_accepted"), ("disco", "together")])
def test_what_no_process_expresses(text, why):
    spec = parse(text)
    with pytest.raises(ValueError, match=why):
        signal_of(spec, spec.policy)


def test_a_process_that_was_not_fitted_is_named(fits):
    with pytest.raises(ValueError, match="no process signal_chain:head was fitted"):
        value(fits, "fixed:2", "signal_chain:head")


def test_a_process_that_persists_refuses_times_that_fall(fits):
    falling = Table(0.1, np.array([1.0, 1.0, 0.2, 0.2, 0.2]))
    with pytest.raises(ValueError, match="non-decreasing"):
        value(fits, "fixed:2", "markov_modulated", falling)
    assert value(fits, "fixed:2", "iid", falling).values["throughput"] > 1
