"""Traces whose contents contradict each other are refused, when read and when written."""

import dataclasses
import hashlib

import chains
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from trace_folders import arrays_of, edit_manifest, recorded, refused

from mdp.trace import FEATURES, load, save


@pytest.fixture
def folder(tmp_path):
    save(recorded(), tmp_path / "trace")
    return tmp_path / "trace"


def rewrite(folder, **changes):
    """The shard with some arrays replaced (None: left out), hash and manifest in order."""
    path = folder / "shard-00000.safetensors"
    arrays = load_file(path) | changes
    save_file({key: array for key, array in arrays.items() if array is not None}, path)
    entry = {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    edit_manifest(folder, shards=[entry])


@pytest.mark.parametrize("name", sorted(arrays_of(recorded())))
def test_an_array_of_the_wrong_size_is_refused(folder, name):
    array = load_file(folder / "shard-00000.safetensors")[name]
    rewrite(folder, **{name: array[:-1]})
    refused(folder, "must have|wrong number of steps|longer than its limit|before its limit|end-of-text")


@pytest.mark.parametrize("name", sorted(set(arrays_of(recorded())) - {"rollout_offsets"}))
def test_a_missing_array_is_refused(folder, name):
    rewrite(folder, **{name: None})
    if name in ("rollout_token_accept_prob", "rollout_step_accept_prob"):
        assert name.removeprefix("rollout_") not in load(folder).rollout_features  # rollouts not scored: allowed
    else:
        refused(folder, f"lacks {name}|{name} is missing|{name} must")


@pytest.mark.parametrize("name", sorted(arrays_of(recorded())))
@pytest.mark.parametrize("wrong", [np.float64(0.5), np.zeros((2, 2)), np.zeros(0)], ids=["number", "matrix", "empty"])
def test_an_array_of_the_wrong_kind_is_refused(folder, name, wrong):
    rewrite(folder, **{name: np.asarray(wrong)})
    refused(folder, "must|do not fit together|lacks|end-of-text|number of steps")


@pytest.mark.parametrize("name", sorted(FEATURES))
@pytest.mark.parametrize("value", [-0.1, np.nan])
def test_a_feature_out_of_range_is_refused(folder, name, value):
    for key in (name, f"rollout_{name}"):
        array = load_file(folder / "shard-00000.safetensors")[key].copy()
        good, array[0] = array.copy(), value
        rewrite(folder, **{key: array})
        refused(folder, f"{key} must lie in")
        rewrite(folder, **{key: good})


def changed(trace, **parts):
    return dataclasses.replace(trace, **parts)


def flipped(array, index):
    out = array.copy()
    out[index] = ~out[index]
    return out


def one_request(depth=3, limit=6, ends=False):
    """A path of six positions, all rejected: rollouts of 2, 2, 2, 1, 0, 0 steps (depth 3)."""
    step = {"token_accept_prob": 0.5, "step_accept_prob": 0.5, "draft_prob": 0.5, "top_prob": 0.5, "entropy": 1.0,
            "end": False}  # fmt: skip
    lengths = [max(0, min(depth - 1, limit - 2 - j)) for j in range(limit)]
    positions = [{"accepted": False, "token": 0, **step, "rollout": [step] * n} for n in lengths]
    return chains.assemble([positions], [limit], depth, [ends])


def test_rollouts_have_the_lengths_of_the_layout():
    assert np.diff(one_request().rollout_offsets).tolist() == [2, 2, 2, 1, 0, 0]
    assert np.diff(one_request(depth=1).rollout_offsets).tolist() == [0] * 6


@pytest.mark.parametrize("position", range(6))
@pytest.mark.parametrize("change", [-1, 1])
def test_a_rollout_that_is_too_short_or_too_long_is_refused(position, change):
    trace = one_request()
    steps = np.diff(trace.rollout_offsets)
    steps[position] += change
    if steps[position] < 0:
        return
    count = steps.sum()
    longer = {key: np.full(count, 0.5) for key in FEATURES}
    wrong = changed(trace, rollout_offsets=np.append(0, np.cumsum(steps)), rollout_features=longer,
                    rollout_drafts_end=np.zeros(count, dtype=bool))  # fmt: skip
    with pytest.raises(ValueError, match="a rollout has the wrong number of steps"):
        wrong.validate()


def test_a_rollout_may_end_early_behind_an_end_of_text():
    trace = one_request()
    steps = np.array([1, 2, 2, 1, 0, 0])
    ends = np.zeros(6, dtype=bool)
    early = changed(trace, rollout_offsets=np.append(0, np.cumsum(steps)), rollout_drafts_end=flipped(ends, 0),
                    rollout_features={key: np.full(6, 0.5) for key in FEATURES})  # fmt: skip
    early.validate()
    with pytest.raises(ValueError, match="wrong number of steps"):
        changed(early, rollout_drafts_end=ends).validate()


def test_an_accepted_position_has_no_rollout():
    trace = one_request()
    with pytest.raises(ValueError, match="wrong number of steps"):
        changed(trace, accepted=flipped(trace.accepted, 0)).validate()


WRONG = {
    "path longer than its limit": (lambda t: changed(t, limit=t.limit - 1), "longer than its limit"),
    "path that just stops": (lambda t: changed(t, limit=t.limit + 1), "before its limit without an end-of-text"),
    "end accepted in the middle": (
        lambda t: changed(t, accepted=flipped(t.accepted, 1), drafts_end=flipped(t.drafts_end, 1)), "not the end of"),
    "end accepted, not marked": (
        lambda t: changed(t, accepted=flipped(t.accepted, -1), ends=~t.ends), "not marked in drafts_end"),
    "accepted against all odds": (
        lambda t: changed(t, accepted=flipped(t.accepted, -1),
                          features=dict(t.features) | {"token_accept_prob": np.zeros(6)}), "token_accept_prob is 0"),
    "offsets that fall": (lambda t: changed(t, offsets=np.array([0, 3, 2])), "offsets must start at 0 and increase"),
    "offsets that start late": (lambda t: changed(t, offsets=np.array([1, 6])), "offsets must start at 0"),
    "no request": (lambda t: changed(t, offsets=np.array([0])), "offsets must start at 0"),
    "rollout fields, no rollouts": (
        lambda t: changed(t, rollout_offsets=None, rollout_drafts_end=None,
                          optional={"rollout_draft_token": np.zeros(9)}), "but no rollouts"),
}  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG)
def test_contents_that_contradict_each_other_are_refused(wrong, message, tmp_path):
    trace = one_request()
    trace.validate()
    with pytest.raises(ValueError, match=message):
        wrong(trace).validate()
    with pytest.raises(ValueError, match=message):
        save(wrong(trace), tmp_path)
    assert list(tmp_path.iterdir()) == []
