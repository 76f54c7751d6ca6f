"""Trace folders: what is written comes back, and a write that fails leaves no trace."""

import dataclasses
from pathlib import Path

import chains
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_folders import arrays_of, assert_same, recorded, refused

import mdp.trace
from mdp.trace import FEATURES, SCHEMA_VERSION, Trace, load, save, write_manifest, write_shard


@pytest.fixture
def folder(tmp_path):
    save(recorded(), tmp_path / "trace")
    return tmp_path / "trace"


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
