"""Small trace folders, and what the tests of traces do to them."""

import json

import chains
import numpy as np
import pytest

from mdp.trace import load

PAIR = chains.random_pair(1, size=4, end=3)


def recorded(seed=0, num_requests=6, limit=12, depth=4, pair=PAIR):
    return chains.record(pair, seed, num_requests, limit, depth, measured={"draft_time": 0.2, "verify_time": [1.0]})


def arrays_of(trace):
    rollout = {f"rollout_{key}": value for key, value in trace.rollout_features.items()}
    names = ("offsets", "limit", "ends", "accepted", "drafts_end", "rollout_offsets", "rollout_drafts_end")
    return {name: getattr(trace, name) for name in names} | dict(trace.features) | dict(trace.optional) | rollout


def assert_same(ours, theirs):
    ours, theirs = arrays_of(ours), arrays_of(theirs)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)
        assert (array is None) or array.dtype.kind == theirs[name].dtype.kind


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder, message):
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
