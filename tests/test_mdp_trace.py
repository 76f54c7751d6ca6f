"""Trace folders: what is written comes back, what is damaged names itself, what is half-written is no trace."""

import dataclasses
import hashlib
import json
from pathlib import Path

import chains
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import mdp.trace
from mdp.trace import FEATURES, SCHEMA_VERSION, Trace, load, save, write_manifest, write_shard

PAIR = chains.random_pair(1, size=4, end=3)


def recorded(seed=0, num_requests=6, limit=12, depth=4, pair=PAIR):
    return chains.record(pair, seed, num_requests, limit, depth, measured={"draft_time": 0.2, "verify_time": [1.0]})


@pytest.fixture
def folder(tmp_path):
    save(recorded(), tmp_path / "trace")
    return tmp_path / "trace"


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


# --- Round trips


@given(seed=st.integers(0, 99), limit=st.integers(1, 9), depth=st.integers(1, 5), ends=st.booleans())
def test_what_is_saved_comes_back(tmp_path_factory, seed, limit, depth, ends):
    pair = chains.random_pair(seed, size=3, end=2 if ends else None)
    trace = recorded(seed, 3, limit, depth, pair)
    folder = tmp_path_factory.mktemp("trace")
    save(trace, folder)
    again = load(folder)
    assert_same(again, trace)
    assert again.request_ids == trace.request_ids
    assert again.max_candidates == depth
    assert again.manifest["measured"] == trace.manifest["measured"]
    assert again.manifest["schema_version"] == SCHEMA_VERSION


def test_optional_arrays_come_back(tmp_path):
    trace = recorded()
    total, steps = trace.num_positions, int(trace.rollout_offsets[-1])
    optional = {"token": np.arange(total), "hidden": np.ones((total, 3), np.float16),
                "rollout_draft_token": np.arange(steps)}  # fmt: skip
    save(dataclasses.replace(trace, optional=optional), tmp_path)
    assert_same(load(tmp_path), dataclasses.replace(trace, optional=optional))


def test_a_trace_without_rollouts_comes_back(tmp_path):
    bare = dataclasses.replace(recorded(), rollout_offsets=None, rollout_drafts_end=None, rollout_features={})
    save(bare, tmp_path)
    assert_same(load(tmp_path), bare)


def test_rollouts_that_no_target_scored_come_back(tmp_path):
    trace = recorded()
    draft_side = {key: value for key, value in trace.rollout_features.items() if not key.endswith("accept_prob")}
    save(dataclasses.replace(trace, rollout_features=draft_side), tmp_path)
    assert set(load(tmp_path).rollout_features) == set(FEATURES) - {"token_accept_prob", "step_accept_prob"}


def test_shards_are_joined_in_order(tmp_path):
    parts = [recorded(seed, num_requests) for seed, num_requests in ((0, 2), (1, 1), (2, 3))]
    entries = [write_shard(part, tmp_path, index) for index, part in enumerate(parts)]
    assert [entry["num_requests"] for entry in entries] == [2, 1, 3]
    ids = [f"{index}-{name}" for index, part in enumerate(parts) for name in part.request_ids]
    write_manifest({"max_candidates": 4, "request_ids": ids, "shards": entries}, tmp_path)
    whole = load(tmp_path)
    assert whole.num_requests == 6 and whole.request_ids == ids
    start = 0
    for part in parts:
        end = start + part.num_requests
        first, last = whole.offsets[start], whole.offsets[end]
        np.testing.assert_array_equal(whole.offsets[start : end + 1] - first, part.offsets)
        np.testing.assert_array_equal(whole.accepted[first:last], part.accepted)
        steps = whole.rollout_offsets[first : last + 1]
        np.testing.assert_array_equal(steps - steps[0], part.rollout_offsets)
        np.testing.assert_array_equal(
            whole.rollout_features["entropy"][steps[0] : steps[-1]], part.rollout_features["entropy"]
        )
        start = end


# --- Damage


@given(st.data())
def test_any_flipped_byte_of_a_shard_is_noticed(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("trace")
    save(recorded(num_requests=2), folder)
    shard = folder / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    shard.write_bytes(content)
    refused(folder, r"shard-00000\.safetensors: shard is damaged")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_shard_names_itself(folder, keep):
    shard = folder / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    refused(folder, r"shard-00000\.safetensors: shard is damaged")


def test_bytes_that_are_no_safetensors_name_their_shard_even_if_the_hash_fits(folder):
    content = b"no safetensors at all"
    (folder / "shard-00000.safetensors").write_bytes(content)
    entry = {"file": "shard-00000.safetensors", "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(folder, shards=[entry])
    refused(folder, r"shard-00000\.safetensors: shard is damaged")


def test_a_missing_shard_is_named(folder):
    (folder / "shard-00000.safetensors").unlink()
    refused(folder, r"shard-00000\.safetensors: shard is missing")


def test_a_folder_without_a_manifest_is_no_trace(folder, tmp_path):
    (folder / "manifest.json").unlink()
    refused(folder, "not a trace")
    refused(tmp_path / "nowhere", "not a trace")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "{}", '{"schema_version": 1}', '{"schema_version": 1, "shards": [{}]}',
             '{"schema_version": 1, "shards": 3}', "[" * 100_000]
)  # fmt: skip
def test_a_manifest_that_is_none_is_refused(folder, text):
    (folder / "manifest.json").write_text(text)
    refused(folder, "not a trace manifest")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_schema_version_is_refused(folder, version):
    edit_manifest(folder, schema_version=version)
    refused(folder, "schema_version must be 1, got")


CHANGES = {
    "no shards": ({"shards": []}, "has no shards"),
    "no candidates": ({"max_candidates": 0}, "max_candidates must be in 1..1024"),
    "a flag for a number": ({"max_candidates": True}, "max_candidates must be in 1..1024"),
    "one candidate more": ({"max_candidates": 5}, "a rollout has the wrong number of steps"),
    "one candidate less": ({"max_candidates": 3}, "a rollout has the wrong number of steps"),
    "a request too few": ({"request_ids": ["a"] * 5}, "request_ids must have one string a request"),
    "ids that are none": ({"request_ids": 3}, "request_ids must have one string a request"),
}


@pytest.mark.parametrize(("changes", "message"), CHANGES.values(), ids=CHANGES)
def test_a_manifest_that_does_not_fit_is_refused(folder, changes, message):
    edit_manifest(folder, **changes)
    refused(folder, message)


@pytest.mark.parametrize("lacking", ["max_candidates", "request_ids"])
def test_a_manifest_that_lacks_a_key_is_refused(folder, lacking):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest[lacking]
    path.write_text(json.dumps(manifest))
    refused(folder, lacking)


OUTSIDE = ["absolute", "../outside.safetensors", "sub/inside.safetensors", "..", ".", "", "manifest.json",
           "link.safetensors", "two\nlines.safetensors", "x" * 999 + ".safetensors", "nul\0.safetensors", 3,
           None]  # fmt: skip


@pytest.mark.parametrize("where", OUTSIDE, ids=[repr(where)[:30] for where in OUTSIDE])
def test_a_manifest_cannot_point_out_of_its_folder(folder, tmp_path, where):
    content = (folder / "shard-00000.safetensors").read_bytes()
    outside = tmp_path / "outside.safetensors"
    (folder / "sub").mkdir()
    for path in (outside, folder / "sub" / "inside.safetensors"):
        path.write_bytes(content)
    (folder / "link.safetensors").symlink_to(outside)
    where = str(outside) if where == "absolute" else where
    edit_manifest(folder, shards=[{"file": where, "sha256": hashlib.sha256(content).hexdigest()}])
    refused(folder, "must be a .safetensors file in the trace's own folder|is missing")


# --- Contents that contradict each other


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


# --- Writing


class PowerCut(BaseException):
    """What a killed process sees: not an Exception."""


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_write_that_fails_leaves_no_manifest_and_no_scraps(tmp_path, monkeypatch, call, nth):
    calls = []

    def failing(original):
        def act(*arguments):
            calls.append(arguments)
            if len(calls) == nth:
                raise PowerCut
            return original(*arguments)

        return act

    target = Path if call == "replace" else mdp.trace.os
    monkeypatch.setattr(target, call, failing(getattr(target, call)))
    with pytest.raises(PowerCut):
        save(recorded(), tmp_path)
    assert files(tmp_path) == ["shard-00000.safetensors"] * (nth - 1)
    refused(tmp_path, "not a trace")


def test_an_old_trace_stays_whole_when_its_rewriting_fails_at_the_shard(folder, monkeypatch):
    before = arrays_of(load(folder))

    def fail(*_):
        raise PowerCut

    monkeypatch.setattr(mdp.trace.os, "fsync", fail)
    with pytest.raises(PowerCut):
        save(recorded(seed=5), folder)
    monkeypatch.undo()
    after = arrays_of(load(folder))
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


def test_a_manifest_with_numbers_json_has_not_is_refused(tmp_path):
    with pytest.raises(ValueError):
        write_manifest({"draft_time": float("nan")}, tmp_path)
    assert files(tmp_path) == []


def test_a_trace_is_not_equal_by_accident():
    # Arrays inside a dataclass make == ambiguous; identity it is.
    assert recorded() != recorded()
    assert isinstance(recorded(), Trace)
