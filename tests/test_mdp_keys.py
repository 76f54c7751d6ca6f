"""What the schema says of a key is what the key's class does: ranges are tried at and beyond their ends."""

import json

import numpy as np
import pytest

from mdp.problem import loads, schema

HALVES = [[0.5, 0.5], [0.5, 0.5]]
REGIMES = {"transition": HALVES, "accept_prob": [0.5, 0.5], "initial": [0.5, 0.5]}
GOOD = {
    "acceptance": {
        "iid": {"accept_prob": 0.5},
        "position": {"accept_prob": [0.5, 0.5]},
        "beta_mixture": {"mean": 0.5, "concentration": 2.0},
        "markov_modulated": REGIMES,
        "observed": {**REGIMES, "observation": HALVES},
        "logit_ar": {"logit_mean": 0.0, "logit_deviation": 1.0, "correlation": 0.5},
        "token_pair": {"draft": HALVES, "target": HALVES, "prompt_token": 0},
    },
    "coupling": {"renewal": {}, "persistent": {"rejection": HALVES, "bonus": HALVES}},
    "cost": {
        "affine": {"draft_time": 1.0, "verify_time": 1.0, "verify_slope": 0.0},
        "table": {"draft_time": 1.0, "verify_time": [1.0, 1.0, 1.0]},
        "roofline": {
            "draft_weight_bytes": 1.0, "draft_kv_bytes": 1.0, "draft_flops": 1.0, "target_weight_bytes": 1.0,
            "target_kv_bytes": 1.0, "target_flops": 1.0, "memory_bandwidth": 1.0, "peak_flops": 1.0, "batch_size": 1,
            "context_length": 0, "draft_overhead": 1.0, "target_overhead": 1.0,
        },
        "overlapped": {"draft_time": 1.0, "verify_time": 1.0, "verify_slope": 0.0, "overlap": 0.5},
    },
}  # fmt: skip
KNOWN = schema()["keys"]
KEYS = [(part, kind, key) for part in KNOWN for kind in KNOWN[part] for key in KNOWN[part][kind]]


def problem(part, kind, key=None, value=None):
    """A problem file with that kind in its place, and the value in the key's first number."""
    content = {"acceptance": {"kind": "markov_modulated", **REGIMES}, "coupling": {"kind": "renewal"},
               "cost": {"kind": "affine", **GOOD["cost"]["affine"]}, "max_candidates": 2}  # fmt: skip
    content[part] = {"kind": kind, **json.loads(json.dumps(GOOD[part][kind]))}
    if kind == "token_pair":
        del content["coupling"]
    if key is not None:
        held = content[part][key]
        if not isinstance(held, list):
            content[part][key] = value
        elif KNOWN[part][kind][key]["rows"] and isinstance(held[0], list):
            held[0] = [value, 1 - value]
        elif KNOWN[part][kind][key]["rows"]:
            held[:] = [value, 1 - value]
        else:
            held[0] = value
    return json.dumps(content)


def test_every_kind_has_an_example_with_all_of_its_keys():
    assert {part: {kind: set(keys) for kind, keys in kinds.items()} for part, kinds in KNOWN.items()} == {
        part: {kind: set(keys) for kind, keys in kinds.items()} for part, kinds in GOOD.items()
    }
    for part, kinds in GOOD.items():
        for kind in kinds:
            loads(problem(part, kind))


@pytest.mark.parametrize(("part", "kind", "key"), KEYS)
def test_a_range_is_what_is_taken(part, kind, key):
    holds = KNOWN[part][kind][key]
    whole = holds["shape"] == "whole number"
    low, high = holds["low"], holds["high"]
    beyond = (low - 1, high + 1) if whole else (np.nextafter(low, -np.inf), np.nextafter(high, np.inf))
    for value in beyond:
        with pytest.raises(ValueError, match=rf"^{part}\.{key}"):
            loads(problem(part, kind, key, value))
    if kind == "token_pair" and whole:
        high = 1  # the file's own vocabulary is smaller than the largest
    for value in (low, high):
        try:
            loads(problem(part, kind, key, value))
        except ValueError as error:  # one number may be fine where the file as a whole is not
            assert not str(error).startswith(f"{part}.{key}"), value


@pytest.mark.parametrize(("part", "kind", "key"), KEYS)
def test_a_key_may_be_left_out_if_it_has_a_default_and_not_else(part, kind, key):
    holds, content = KNOWN[part][kind][key], json.loads(problem(part, kind))
    del content[part][key]
    if holds["required"]:
        with pytest.raises(ValueError, match=rf"^{part}\.{key}: missing"):
            loads(json.dumps(content))
    else:
        assert getattr(getattr(loads(json.dumps(content)), part), key) == holds["default"]


@pytest.mark.parametrize(("part", "kind", "key"), [k for k in KEYS if KNOWN[k[0]][k[1]][k[2]]["shape"].startswith("[")])
def test_a_list_has_the_axes_that_are_named(part, kind, key):
    holds, content = KNOWN[part][kind][key], json.loads(problem(part, kind))
    sizes = {"K": 2, "K+1": 3, "Z": 2, "O": 2, "n": 2}
    assert np.shape(content[part][key]) == tuple(sizes[axis] for axis in holds["shape"].strip("[]").split(", "))
    content[part][key] = content[part][key][0]  # one axis too few
    with pytest.raises(ValueError, match=rf"^{part}\.{key}"):
        loads(json.dumps(content))


def test_the_longest_axes_are_named():
    most = schema()["most"]
    for axis, kind, shape in (("Z of observed", "observed", "accept_prob"), ("n", "token_pair", "draft")):
        size = most[axis] + 1
        content = json.loads(problem("acceptance", kind))
        content["acceptance"][shape] = [0.5] * size if kind == "observed" else np.eye(size).tolist()
        if kind == "observed":
            content["acceptance"] |= {"transition": np.eye(size).tolist(), "initial": np.eye(size)[0].tolist()}
        with pytest.raises(ValueError, match=f"at most {most[axis]}"):
            loads(json.dumps(content))
