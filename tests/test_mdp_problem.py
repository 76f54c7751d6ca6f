"""The problem file: what is read comes back, what is wrong is refused in one line that names the field."""

import copy
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdp.acceptance import IID, MarkovModulated, Position
from mdp.cost import Affine, Table
from mdp.problem import (
    MAX_FILE_BYTES,
    Persistent,
    StoppingProblem,
    cost_from_dict,
    load,
    loads,
    parse_json,
    schema,
    start_graph,
)

CHAIN = {"kind": "markov_modulated", "transition": [[0.9, 0.1], [0.3, 0.7]], "accept_prob": [0.95, 0.4],
         "initial": [0.8, 0.2]}  # fmt: skip
PERSISTENT = {"kind": "persistent", "rejection": [[0.5, 0.5], [0.2, 0.8]], "bonus": [[0.9, 0.1], [0.4, 0.6]]}
AFFINE = {"kind": "affine", "draft_time": 0.2, "verify_time": 1.0}
GOOD = {"acceptance": CHAIN, "coupling": {"kind": "renewal"}, "cost": AFFINE, "max_candidates": 3}

KINDS = {
    "iid": {"acceptance": {"kind": "iid", "accept_prob": 0.8}},
    "iid, whole numbers": {"acceptance": {"kind": "iid", "accept_prob": 1}, "cost": {**AFFINE, "verify_time": 1}},
    "position": {"acceptance": {"kind": "position", "accept_prob": [0.9, 0.8, 0.7]}},
    "markov_modulated": {},
    "persistent": {"coupling": PERSISTENT},
    "no coupling": {"coupling": None},
    "coupling without kind": {"coupling": {}},
    "slope": {"cost": {**AFFINE, "verify_slope": 0.1}},
    "table": {"cost": {"kind": "table", "draft_time": 0.1, "verify_time": [1.0, 1.0, 1.5, 1.5]}},
    "table with a dip": {"cost": {"kind": "table", "draft_time": 0.1, "verify_time": [1.0, 0.5, 1.5, 1.2]}},
}


def changed(**parts):
    """The good problem with some parts replaced; None leaves a part out."""
    out = copy.deepcopy(GOOD) | parts
    return {key: value for key, value in out.items() if value is not None}


def with_value(path, value):
    """The good problem with one value, deep inside, replaced."""
    out = copy.deepcopy(GOOD)
    inner = out
    *keys, last = path.split(".")
    for key in keys:
        inner = inner[key]
    inner[last] = value
    return out


@pytest.mark.parametrize("parts", KINDS.values(), ids=KINDS)
def test_a_good_problem_comes_back_from_its_own_dict(parts):
    problem = loads(json.dumps(changed(**parts)))
    again = loads(json.dumps(problem.to_dict()))
    assert again.to_dict() == problem.to_dict()
    for ours, theirs in zip(again.lower(), problem.lower(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_lowered_arrays_are_those_of_the_file():
    finite = loads(json.dumps(changed(coupling=PERSISTENT))).lower()
    np.testing.assert_allclose(finite.transition, CHAIN["transition"])
    np.testing.assert_allclose(finite.accept_prob, [CHAIN["accept_prob"]] * 3)
    np.testing.assert_allclose(finite.verify_time, [1.0] * 4)
    np.testing.assert_allclose(finite.round_time, [1.0, 1.2, 1.4, 1.6])
    np.testing.assert_allclose(finite.rejection, PERSISTENT["rejection"])
    np.testing.assert_allclose(finite.next_accept_prob[0], [0.9 * 0.95 + 0.1 * 0.4, 0.3 * 0.95 + 0.7 * 0.4])
    assert finite.persistent and finite.num_regimes == 2 and finite.max_candidates == 3


def test_python_objects_and_file_give_the_same_problem():
    ours = StoppingProblem(
        MarkovModulated(np.array(CHAIN["transition"]), [0.95, 0.4], (0.8, 0.2)), Affine(0.2, 1.0), max_candidates=3,
        coupling=Persistent(PERSISTENT["rejection"], PERSISTENT["bonus"]),
    )  # fmt: skip
    assert ours.to_dict() == loads(json.dumps(changed(coupling=PERSISTENT))).to_dict()
    assert Position([0.9, 0.8, 0.7]).lower(3).accept_prob.shape == (3, 1)
    assert Table(0.1, [1, 2]).verify_times(1).tolist() == [1.0, 2.0]
    assert IID(0.5).num_regimes == 1


def test_rows_are_normalised_within_the_tolerance():
    problem = loads(json.dumps(with_value("acceptance.transition", [[0.9, 0.1 + 5e-9], [0.3, 0.7]])))
    np.testing.assert_allclose(problem.lower().transition.sum(axis=1), 1.0, rtol=0, atol=1e-15)


BAD = [
    # Keys: unknown ones at every level, missing ones.
    (changed(cots=1), "cots: unknown key"),
    (with_value("acceptance.probs", [1]), "acceptance.probs: unknown key"),
    (with_value("coupling.bonus", [[1]]), "coupling.bonus: unknown key"),
    (with_value("cost.slope", 1), "cost.slope: unknown key"),
    (changed(coupling={**PERSISTENT, "start": 0}), "coupling.start: unknown key"),
    (changed(acceptance=None), "acceptance: missing"),
    (changed(cost=None), "cost: missing"),
    (changed(max_candidates=None), "max_candidates: missing"),
    (changed(acceptance={"kind": "iid"}), "acceptance.accept_prob: missing"),
    (changed(cost={"kind": "affine", "verify_time": 1}), "cost.draft_time: missing"),
    (changed(coupling={"kind": "persistent", "bonus": [[1]]}), "coupling.rejection: missing"),
    # Kinds.
    (with_value("acceptance.kind", "beta_mixture"), "acceptance.transition: unknown key"),
    (with_value("acceptance.kind", "coin"), "acceptance.kind: must be one of"),
    (with_value("acceptance.kind", ["iid"]), "acceptance.kind: must be one of"),
    (with_value("acceptance.kind", True), "acceptance.kind: must be one of"),
    (with_value("coupling.kind", "sticky"), "coupling.kind: must be one of"),
    (with_value("cost.kind", None), "cost.kind: must be one of"),
    (changed(acceptance={"accept_prob": 0.5}), "acceptance.kind: must be one of"),
    (changed(acceptance=[CHAIN]), "acceptance: must be an object"),
    (changed(cost=0.2), "cost: must be an object"),
    (changed(coupling="renewal"), "coupling: must be an object"),
    ([GOOD], "the problem must be an object"),
    (7, "the problem must be an object"),
    # The number of candidates.
    *[(with_value("max_candidates", bad), "max_candidates: must be a whole number in 1..1024")
      for bad in (0, -1, 1025, True, 3.0, "3", [3], {}, 10**30)],
    # Times.
    *[(with_value("cost.draft_time", bad), "cost.draft_time: must be a finite number > 0")
      for bad in (0, -0.1, True, "0.2", [0.2], None, 10**400)],
    *[(with_value("cost.verify_time", bad), "cost.verify_time: must be a finite number > 0")
      for bad in (0, -1, False, "1", None)],
    *[(with_value("cost.verify_slope", bad), "cost.verify_slope: must be a finite number >= 0")
      for bad in (-1e-9, True, "0")],
    *[(changed(cost={"kind": "table", "draft_time": 0.1, "verify_time": bad}), "cost.verify_time: must")
      for bad in ([1, 1, 1], [1] * 5, [], 1.0, "1111", [1, 1, 0, 1], [1, 1, True, 1], [1, 1, [1], 1], None)],
    # Probabilities.
    *[(changed(acceptance={"kind": "iid", "accept_prob": bad}), "acceptance.accept_prob: must")
      for bad in (-0.1, 1.1, True, "0.5", [0.5], None, {}, 10**400)],
    *[(changed(acceptance={"kind": "position", "accept_prob": bad}), "acceptance.accept_prob: must")
      for bad in ([0.5] * 2, [0.5] * 4, [], 0.5, [0.5, 0.5, 1.5], [0.5, True, 0.5], [0.5, "0.5", 0.5], [[0.5] * 3])],
    *[(with_value("acceptance.accept_prob", bad), "acceptance.accept_prob: must")
      for bad in ([0.95, 1.4], [True, 0.4], 0.5, [[0.95, 0.4]], [], ["a", 0.1])],
    *[(with_value("acceptance.transition", bad), "acceptance.transition:")
      for bad in ([[0.9, 0.2], [0.3, 0.7]], [[1.0]], [[0.9, 0.1]], [0.9, 0.1], [[0.9, 0.1], [1.0]], [],
                  [[1.1, -0.1], [0.3, 0.7]], [[0.9, 0.1], [True, False]], [[0.9, 0.1 + 3e-8], [0.3, 0.7]], None)],
    *[(with_value("acceptance.initial", bad), "acceptance.initial:")
      for bad in ([0.8, 0.3], [1.0], [0.5, 0.3, 0.2], 1.0, [1.5, -0.5], [True, False], "10")],
    (with_value("acceptance.transition", [[0.9, 0.1], [0.3, 0.6]]), "row 1 must sum to 1"),
    # Coupling.
    (changed(acceptance={"kind": "iid", "accept_prob": 0.5}, coupling={"kind": "persistent", "rejection": [[1]],
             "bonus": [[1]]}), "coupling.kind: persistent needs markov_modulated"),
    (changed(coupling={**PERSISTENT, "bonus": [[1.0]]}), "coupling.bonus: must be 2 x 2"),
    (changed(coupling={"kind": "persistent", "rejection": [[1]], "bonus": [[1]]}), "coupling.rejection: must be 2 x 2"),
    (changed(coupling={**PERSISTENT, "rejection": [[0.5, 0.6], [0.2, 0.8]]}), "coupling.rejection: row 0"),
    (changed(coupling={**PERSISTENT, "rejection": 1}), "coupling.rejection: must be"),
    (changed(coupling=PERSISTENT, cost={"kind": "table", "draft_time": 0.1, "verify_time": [1, 0.8, 1, 1]}),
     "non-decreasing, it falls from k = 0 to 1"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "message"), BAD)
def test_a_bad_problem_is_refused_in_one_line_that_names_the_field(data, message):
    with pytest.raises(ValueError) as error:
        loads(json.dumps(data))
    assert message in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


TEXTS = {
    "": "not JSON",
    "{": "not JSON",
    "[1,]": "not JSON",
    "{'a': 1}": "not JSON",
    '{"a": NaN}': "NaN is not a number in JSON",
    '{"a": [Infinity]}': "Infinity is not a number in JSON",
    '{"a": -Infinity}': "-Infinity is not a number in JSON",
    '{"max_candidates": 3, "max_candidates": 4}': "max_candidates: key given twice",
    '{"cost": {"draft_time": 1, "draft_time": 1}}': "draft_time: key given twice",
    "[" * 100_000 + "]" * 100_000: "nested too deep",
    '{"a":' * 100_000 + "1" + "}" * 100_000: "nested too deep",
    '{"a": ' + "9" * 5000 + "}": "",
}


@pytest.mark.parametrize(("text", "message"), TEXTS.items(), ids=[text[:20] for text in TEXTS])
def test_text_that_is_no_strict_json_is_refused(text, message):
    with pytest.raises(ValueError, match="^" + message) as error:
        loads(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", ["1e400", "-1e400"])
def test_a_number_too_large_for_a_float_is_refused(number):
    text = json.dumps(GOOD).replace('"verify_time": 1.0', f'"verify_time": {number}')
    with pytest.raises(ValueError, match=r"cost\.verify_time: must be a finite number"):
        loads(text)


def test_a_coupling_whose_starts_do_not_communicate_is_refused():
    stuck = {"kind": "persistent", "rejection": [[1, 0], [0, 1]], "bonus": [[1, 0], [0, 1]]}
    chain = {**CHAIN, "transition": [[1, 0], [0, 1]]}
    with pytest.raises(ValueError, match="not communicating"):
        loads(json.dumps(changed(acceptance=chain, coupling=stuck)))


def test_only_the_starts_that_can_be_reached_must_communicate():
    stuck = {"kind": "persistent", "rejection": [[1, 0], [0, 1]], "bonus": [[1, 0], [0, 1]]}
    chain = {**CHAIN, "transition": [[1, 0], [0, 1]], "initial": [1, 0]}
    problem = loads(json.dumps(changed(acceptance=chain, coupling=stuck)))
    _, reachable = start_graph(problem.lower())
    assert reachable.tolist() == [True, False]


def test_a_problem_that_only_an_action_connects_is_communicating():
    # Stopping at once keeps the regime; only a draft step leads from 0 to 1 and back.
    keep = [[1, 0], [0, 1]]
    chain = {**CHAIN, "transition": [[0, 1], [1, 0]], "initial": [1, 0]}
    loads(json.dumps(changed(acceptance=chain, coupling={"kind": "persistent", "rejection": keep, "bonus": keep})))


def test_decreasing_round_times_are_fine_where_rounds_renew():
    falling = {"kind": "table", "draft_time": 0.1, "verify_time": [1, 0.8, 0.6, 0.4]}
    assert (np.diff(loads(json.dumps(changed(cost=falling))).lower().round_time) < 0).all()
    with pytest.raises(ValueError, match="non-decreasing"):
        loads(json.dumps(changed(cost=falling, coupling=PERSISTENT)))


def test_a_round_time_that_stands_still_is_not_decreasing():
    flat = {"kind": "table", "draft_time": 0.1, "verify_time": [1, 0.9, 0.8, 0.7]}
    loads(json.dumps(changed(cost=flat, coupling=PERSISTENT)))


def test_a_file_is_named_in_what_is_said_of_it(tmp_path):
    path = tmp_path / "bad.json"
    for content, message in ((b"{", "not JSON"), (b"\xff\xfe{}", "not UTF-8"), (b" " * (MAX_FILE_BYTES + 1), "larger")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"bad.json: .*{message}"):
            load(path)
    with pytest.raises(ValueError, match="No such file"):
        load(tmp_path / "none.json")
    with pytest.raises(ValueError, match="Is a directory"):
        load(tmp_path)


def test_a_file_is_read(tmp_path):
    path = tmp_path / "good.json"
    path.write_text(json.dumps(GOOD))
    assert load(path).to_dict() == loads(json.dumps(GOOD)).to_dict()


def test_the_schema_lists_every_key_of_every_kind():
    known = schema()
    assert known["acceptance"]["markov_modulated"] == ["transition", "accept_prob", "initial"]
    assert known["coupling"] == {"renewal": [], "persistent": ["rejection", "bonus"]}
    assert known["cost"]["affine"] == ["draft_time", "verify_time", "verify_slope"]
    assert known["max_candidates"] == [1, 1024]


def test_a_cost_alone_is_read():
    assert cost_from_dict(AFFINE) == Affine(0.2, 1.0)
    with pytest.raises(ValueError, match=r"cost\.kind"):
        cost_from_dict({"draft_time": 1})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
paths = st.sampled_from(
    [f"acceptance.{k}" for k in CHAIN] + [f"cost.{k}" for k in AFFINE] + ["acceptance", "coupling", "cost",
     "max_candidates"]
)  # fmt: skip


@given(path=paths, value=json_values)
def test_any_value_anywhere_is_read_or_refused_in_one_line(path, value):
    try:
        problem = loads(json.dumps(with_value(path, value)))
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert np.isfinite(problem.lower().round_time).all()


@given(st.text(max_size=40))
def test_any_text_is_parsed_or_refused_in_one_line(text):
    try:
        parse_json(text)
    except ValueError as error:
        assert "\n" not in str(error)
