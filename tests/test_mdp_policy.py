"""Policy strings and rules: what is read, what is refused, and one verdict whatever holds the numbers."""

import json
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdp.acceptance import IID
from mdp.cost import Affine
from mdp.entrants import catalogue, needs
from mdp.evaluate import evaluate
from mdp.policy import (
    MAX_TABLE_BYTES,
    SIGNALS,
    TIE,
    FixedLength,
    LookaheadThreshold,
    Observation,
    Oracle,
    Policy,
    RejectionThreshold,
    ThresholdTable,
    load_table,
    parse,
)
from mdp.problem import StoppingProblem
from mdp.solve import solve
from simulate.rounds import simulate

GOOD = {
    "fixed:0": FixedLength(0),
    "fixed:12": FixedLength(12),
    "fixed:1024": FixedLength(1024),
    "rejection:0.4": RejectionThreshold(0.4),
    "rejection:0": RejectionThreshold(0.0),
    "rejection:1": RejectionThreshold(1.0),
    "rejection:5e-1": RejectionThreshold(0.5),
    "lookahead:0.5": LookaheadThreshold(0.5),
    "optimal": None,
    "oracle": Oracle(),
}


@pytest.mark.parametrize(("text", "policy"), GOOD.items(), ids=GOOD)
def test_a_good_string_is_its_rule(text, policy):
    spec = parse(text)
    assert (spec.text, spec.policy, spec.signal) == (text, policy, None)
    assert spec.solves == (text == "optimal")


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("rule", ["rejection:0.5", "lookahead:0.5", "optimal"])
def test_a_signal_stands_beside_the_rule(rule, signal):
    comma = "," if ":" in rule else ":"
    spec = parse(f"{rule}{comma}signal={signal}")
    assert spec.signal == signal
    assert spec.policy == parse(rule).policy


BAD = {
    "": "unknown rule ''",
    "coin": "unknown rule 'coin'; choose from fixed, rejection, lookahead, optimal, oracle",
    "Fixed:3": "unknown rule 'Fixed'",
    " fixed:3": "unknown rule ' fixed'",
    "fixed": "expected fixed:K",
    "fixed:": "expected fixed:K",
    "fixed:1,2": "expected fixed:K",
    "fixed:-1": "length must be a whole number in 0..1024, got '-1'",
    "fixed:1025": "length must be a whole number in 0..1024, got '1025'",
    "fixed:2.0": "length must be a whole number in 0..1024, got '2.0'",
    "fixed:x": "length must be a whole number in 0..1024, got 'x'",
    "fixed:nan": "length must be a whole number in 0..1024, got 'nan'",
    "fixed:" + "9" * 5000: "length must be a whole number",
    "fixed:3,signal=entropy": "signal=entropy: not taken by this rule",
    "fixed:3,length=4": "unknown parameter 'length'",
    "rejection": "expected rejection:h",
    "rejection:0.5,0.6": "expected rejection:h",
    "rejection:-0.1": "threshold must be a number in [0, 1], got '-0.1'",
    "rejection:1.1": "threshold must be a number in [0, 1], got '1.1'",
    "rejection:nan": "threshold must be a number in [0, 1], got 'nan'",
    "rejection:inf": "threshold must be a number in [0, 1], got 'inf'",
    "rejection:0,5": "expected rejection:h",
    "rejection:0.5,signal=luck": "signal=luck: one of token_accept_prob, draft_prob, top_prob, entropy, head",
    "rejection:0.5,signal=": "signal=: one of",
    "rejection:0.5,signal=head,signal=head": "signal is given twice",
    "rejection:0.5,sigal=head": "unknown parameter 'sigal'",
    "lookahead:": "expected lookahead:h",
    "optimal:a,b": "expected optimal or optimal:FILE",
    "optimal:/no/such/file.json": "no such solution file: '/no/such/file.json'",
    "optimal:/no/such\nfile": r"no such solution file: '/no/such\nfile'",
    "optimal:/" + "a" * 5000: "no such solution file: '/aaa",
    "oracle:3": "expected oracle",
    "oracle:signal=head": "signal=head: not taken by this rule",
}


@pytest.mark.parametrize(("text", "message"), BAD.items(), ids=[text[:30] for text in BAD])
def test_a_bad_string_is_refused_in_one_line_that_names_it(text, message):
    with pytest.raises(ValueError) as error:
        parse(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    if not text.startswith("optimal:/"):
        assert repr(text) in str(error.value)


@given(st.text(max_size=30) | st.builds("{}:{}".format, st.sampled_from(["fixed", "rejection", "optimal"]), st.text()))
def test_any_text_is_read_or_refused_in_one_line(text):
    try:
        assert parse(text).text == text
    except ValueError as error:
        assert "\n" not in str(error)


# --- Rules


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.7])
def test_a_tie_continues(threshold):
    # 1 - (1 - h) is not h in floating point, and is meant to be.
    tied = Observation(1, survival=1.0 - threshold, next_accept_prob=1.0, regime=0)
    for rule in (RejectionThreshold(threshold), LookaheadThreshold(threshold),
                 ThresholdTable(np.full((2, 1), 1.0 - threshold))):  # fmt: skip
        assert not rule.stop((), tied)[1]
        assert not rule.stop((), tied._replace(survival=1.0 - threshold - TIE / 2))[1]
        assert rule.stop((), tied._replace(survival=1.0 - threshold - 1e-9))[1]
        assert not rule.stop((), tied._replace(survival=1.0 - threshold + 1e-9))[1]


def test_what_each_rule_looks_at():
    seen = Observation(2, survival=0.5, next_accept_prob=0.5, regime=1, next_accepted=1)
    table = ThresholdTable(np.array([[0.0, 0.0], [0.0, 0.0], [0.4, 0.6]]))
    verdicts = {
        FixedLength(2): True, FixedLength(3): False,
        RejectionThreshold(0.4): True, RejectionThreshold(0.6): False,
        LookaheadThreshold(0.7): True, LookaheadThreshold(0.8): False,
        table: True, Oracle(): False,
    }  # fmt: skip
    for rule, stops in verdicts.items():
        assert bool(rule.stop(rule.init(), seen)[1]) == stops
    assert not table.stop((), seen._replace(regime=0))[1]
    assert Oracle().stop((), seen._replace(next_accepted=0))[1]


def test_where_continuing_never_pays_full_survival_stops():
    assert ThresholdTable(np.array([[np.inf]])).stop((), Observation(0, survival=1.0))[1]


def test_one_column_does_not_read_the_regime():
    table = ThresholdTable(np.array([[0.2], [0.5]]))
    assert table.stop((), Observation(1, survival=0.4, regime=None))[1]
    assert table.stop((), Observation(1, survival=0.4, regime=7))[1]


probability = st.floats(0.0, 1.0, width=32)
rules = st.one_of(
    st.builds(FixedLength, st.integers(0, 3)),
    st.builds(RejectionThreshold, probability),
    st.builds(LookaheadThreshold, probability),
    st.just(Oracle()),
    st.lists(probability | st.just(np.inf), min_size=6, max_size=6).map(
        lambda cells: ThresholdTable(np.array(cells).reshape(3, 2))
    ),
)
observations = st.tuples(st.integers(0, 2), probability, probability, st.integers(0, 1), st.integers(0, 1)).map(
    lambda seen: Observation(*seen[:4], next_accepted=seen[4])
)


@given(rules, st.lists(observations, min_size=3, max_size=3))
def test_one_verdict_on_floats_arrays_and_traced_arrays(rule, seen):
    expected = [bool(rule.stop((), one)[1]) for one in seen]
    columns = [None if column[0] is None else np.array(column) for column in zip(*seen, strict=True)]
    assert np.asarray(rule.stop((), Observation(*columns))[1]).tolist() == expected
    with jax.enable_x64(True):
        if isinstance(rule, ThresholdTable):  # a traced index needs a jax table
            rule = ThresholdTable(jnp.asarray(rule.survival_threshold))
        traced = Observation(*(None if column is None else jnp.asarray(column) for column in columns))
        assert np.asarray(rule.stop((), traced)[1]).tolist() == expected


def test_a_rule_runs_inside_a_compiled_function():
    table = ThresholdTable(jnp.array([[0.5, 0.9], [0.5, 0.9]]))
    stop = jax.jit(lambda k, s, z: table.stop((), Observation(k, survival=s, regime=z))[1])
    assert [bool(stop(k, 0.7, z)) for k in (0, 1) for z in (0, 1)] == [False, True, False, True]


# --- Saved solutions


def test_a_saved_solution_is_the_rule_it_was(tmp_path):
    solution = solve(StoppingProblem(IID(0.6), Affine(0.4, 1.0), 3))
    path = tmp_path / "solution.json"
    path.write_text(json.dumps(solution.to_dict(), allow_nan=False) + "\n")
    np.testing.assert_array_equal(load_table(path).survival_threshold, solution.survival_threshold)
    spec = parse(f"optimal:{path}")
    np.testing.assert_array_equal(spec.policy.survival_threshold, solution.survival_threshold)
    assert not spec.solves


BAD_FILES = {
    "not JSON": "{",
    "empty": "",
    "no table": '{"throughput": 1}',
    "a list": "[1, 2]",
    "a word for a number": '{"survival_threshold": [["high"]]}',
    "rows of unequal length": '{"survival_threshold": [[0.1, 0.2], [0.3]]}',
    "no rows": '{"survival_threshold": []}',
    "one dimension": '{"survival_threshold": [0.1, 0.2]}',
    "negative": '{"survival_threshold": [[-0.1]]}',
    "NaN": '{"survival_threshold": [[NaN]]}',
    "nested too deep": "[" * 100_000 + "]" * 100_000,
    "a number that is no number": '{"survival_threshold": 3}',
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_no_solution_is_refused_by_name(content, tmp_path):
    path = tmp_path / "solution.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"solution\.json: (not a saved solution|survival_threshold must be)") as error:
        load_table(path)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_text_or_too_large_is_refused(tmp_path):
    path = tmp_path / "solution.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not a saved solution"):
        load_table(path)
    with path.open("wb") as file:
        file.truncate(MAX_TABLE_BYTES + 1)
    with pytest.raises(ValueError, match="larger than"):
        load_table(path)
    with pytest.raises(ValueError, match="no such solution file"):
        load_table(tmp_path)


def test_a_rule_that_forgets_to_say_what_it_reads_is_told_so():
    @dataclass(frozen=True)
    class Forgetful(Policy):
        threshold: float

        def stop(self, state, observation):
            return state, 1.0 - observation.survival > self.threshold

    with pytest.raises(ValueError, match=r"Forgetful\(threshold=0.5\)': stop\(\) reads survival, which is not among"):
        needs(Forgetful(0.5))
    problem = StoppingProblem(IID(0.8), Affine(draft_time=0.2, verify_time=1.0), max_candidates=4)
    for world in (
        lambda: evaluate(problem, Forgetful(0.5)),
        lambda: simulate(problem, [Forgetful(0.5)], rounds=9, key=0),
    ):
        with pytest.raises(ValueError, match="reads survival"):
            world()

    @dataclass(frozen=True)
    class Cautious(Forgetful):
        def stop(self, state, observation):  # may read what is there, and does without
            sure = 1.0 if observation.survival is None else observation.survival
            return state, 1.0 - sure > self.threshold

    assert needs(Cautious(0.5)) == frozenset()
    for spec in catalogue(4):
        assert spec.policy is None or needs(spec.policy) <= set(spec.policy.needs)
